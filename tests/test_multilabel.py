"""Metrics of images with any number of classes, against cases worked out by hand and against scikit-learn."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from tokenfusion.errors import InputError
from tokenfusion.metrics import wilson_interval
from tokenfusion.multilabel import (
    average_precision,
    average_precisions,
    bootstrap_map,
    cross_fitted,
    evaluate_multilabel,
    sigmoid_scores,
    tune_thresholds,
)


def noisy(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that lean towards the truth; the later a class, the rarer."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, k, generator=generator) < 1 / torch.arange(2, k + 2)
    return torch.randn(n, k, generator=generator) + labels.float(), labels


def test_average_precision_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    labels = np.array([True, False, True, False])
    once = np.ones((1, 4), dtype=np.int64)
    # found at rank 1 of 1 and rank 2 of 3
    assert average_precision(scores, labels, once)[0] == pytest.approx((1 / 1 + 2 / 3) / 2)
    # of equal scores none comes first: one step of two positives in four
    assert average_precision(np.zeros(4), labels, once)[0] == pytest.approx(2 / 4)
    # without the third image; with the second one thrice
    others = np.array([[1, 1, 0, 1], [1, 3, 1, 1], [0, 1, 0, 1]])
    found = average_precision(scores, labels, others)
    assert found[:2] == pytest.approx([1, (1 + 2 / 5) / 2])
    assert math.isnan(found[2])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(1, 3)), min_size=1, max_size=30))
def test_average_precision_is_scikit_learns_of_any_sample(rows: list[tuple[int, bool, int]]) -> None:
    scores, labels, counts = (np.array(column) for column in zip(*rows, strict=True))
    if labels.any():
        expected = oracle.average_precision_score(labels, scores, sample_weight=counts)
        assert average_precision(scores.astype(float), labels, counts[None])[0] == pytest.approx(expected)


def test_agrees_with_scikit_learn() -> None:
    logits, labels = noisy(n=211, k=5)
    predictions = sigmoid_scores(logits) >= 0.6
    found = evaluate_multilabel(logits, labels, predictions, list("abcde"), [0.6] * 5)
    assert found["map"] == pytest.approx(oracle.average_precision_score(labels, logits.double(), average="macro"))
    assert found["f1_macro"] == pytest.approx(oracle.f1_score(labels, predictions, average="macro"))
    assert found["f1_micro"] == pytest.approx(oracle.f1_score(labels, predictions, average="micro"))
    assert found["exact_match"] == pytest.approx(oracle.accuracy_score(labels, predictions))
    precision, recall, f1, n = oracle.precision_recall_fscore_support(labels, predictions)
    for k, name in enumerate("abcde"):
        row = found["per_class"][name]
        assert [row["precision"], row["recall"], row["f1"], row["n"]] == pytest.approx(
            [precision[k], recall[k], f1[k], n[k]]
        )
    assert found["loss"] == pytest.approx(
        np.mean([oracle.log_loss(labels[:, k], logits[:, k].double().sigmoid()) for k in range(5)])
    )


def test_by_hand() -> None:
    # two classes; scores 3/4 and 1/4 are logits of ln 3 and -ln 3
    sure = math.log(3)
    logits = torch.tensor([[sure, sure], [sure, -sure], [-sure, -sure]])
    labels = torch.tensor([[True, False], [True, False], [False, False]])
    found = evaluate_multilabel(logits, labels, sigmoid_scores(logits) >= 0.5, ["cat", "dog"], [0.5, 0.5], skipped=2)
    assert found["n"] == 3
    assert found["skipped"] == 2
    assert found["map"] == 1.0  # of the cat alone, as there is no dog
    assert found["f1_macro"] == 1.0
    assert found["f1_micro"] == pytest.approx(2 * 2 / (2 + 3))
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(-(5 * math.log(3 / 4) + math.log(1 / 4)) / 6)
    assert found["per_class"]["dog"] == {
        "ap": None, "f1": 0.0, "precision": 0.0, "recall": None, "threshold": 0.5, "n": 0,
    }  # fmt: skip
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_threshold_is_midway_where_f1_is_largest() -> None:
    scores = np.array([[0.9, 0.2, 0.3], [0.8, 0.4, 0.3], [0.5, 0.6, 0.3], [0.1, 0.9, 0.3]])
    labels = np.array([[True, True, False], [True, True, False], [False, True, False], [False, True, False]])
    # between 0.5 and 0.8; below all scores, midway to 0; and there is nothing to be learned of a class without images
    assert tune_thresholds(scores, labels) == pytest.approx([0.65, 0.1, 0.5])
    # F1 at 0.9: 2/3; at 0.8: 1/2; at 0.7: 4/5; at 0.6: 2/3
    one = tune_thresholds(np.array([[0.9], [0.8], [0.7], [0.6]]), np.array([[True], [False], [True], [False]]))
    assert one == pytest.approx([(0.7 + 0.6) / 2])


def test_cross_fitting_judges_by_the_other_half() -> None:
    scores = np.array([[0.9], [0.6], [0.4], [0.2]])
    labels = np.array([[True], [False], [True], [False]])
    # thresholds: 0.75 of the first two, 0.3 of the last two
    fold = np.array([0, 0, 1, 1])
    assert cross_fitted(scores, labels, fold)[:, 0].tolist() == [True, True, False, False]


def test_noise_gains_nothing_by_cross_fitting() -> None:
    # of scores that know nothing of the labels, thresholds tuned on the same images make something after all
    random = np.random.default_rng(0)
    scores, labels = random.random((40, 50)), random.random((40, 50)) < 0.1
    fold = np.arange(40) % 2
    honest = oracle.f1_score(labels, cross_fitted(scores, labels, fold), average="macro", zero_division=0)
    flattering = oracle.f1_score(labels, scores >= tune_thresholds(scores, labels), average="macro", zero_division=0)
    always = oracle.f1_score(labels, np.ones_like(labels), average="macro", zero_division=0)
    assert flattering > always + 0.05
    assert honest < always


def test_the_interval_holds_the_map_and_narrows_with_the_root_of_the_images() -> None:
    widths = []
    for n in (100, 1600):
        logits, labels = noisy(n, k=4)
        low, high = bootstrap_map(logits.numpy(), labels.numpy())
        assert low < np.nanmean(average_precisions(logits.numpy(), labels.numpy())) < high
        assert (low, high) == tuple(bootstrap_map(logits.numpy(), labels.numpy()))
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)
    assert bootstrap_map(np.zeros((3, 2)), np.zeros((3, 2), dtype=bool)) is None


def test_a_perfect_ranking_of_few_images_is_no_certainty() -> None:
    labels = np.array([[True, False], [False, True]] * 6)
    assert bootstrap_map(labels.astype(float), labels) == list(wilson_interval(12, 12))


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match=r"1 of 2 images are not finite.*lower --lr"):
        sigmoid_scores(torch.tensor([[0.0], [math.nan]]))
