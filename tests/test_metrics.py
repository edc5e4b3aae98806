"""Metrics against cases worked out by hand, and against scikit-learn, SciPy and torchmetrics."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as oracle
from torchmetrics.functional.classification import multiclass_calibration_error

from tokenfusion.errors import InputError
from tokenfusion.metrics import (
    TEMPERATURE_BOUNDS,
    bootstrap_ece,
    evaluate_logits,
    fit_temperature,
    reliability,
    share_interval,
    wilson_interval,
)
from tokenfusion.multilabel import evaluate_multilabel

KEYS = [
    *("n", "groups", "top1", "top5", "top1_ci95", "loss", "ece", "ece_ci95", "ece_raw", "risk_coverage"),
    *("temperature", "per_class", "confusion", "skipped"),
]


def noisy(n: int, k: int, seed: int = 0, scale: float = 1.5) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Logits that lean towards the truth, without ties."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=generator)
    logits = torch.randn(n, k, generator=generator) * scale
    logits[torch.arange(n), labels] += 1.0
    return logits, labels, [f"class {i}" for i in range(k)]


def test_by_hand() -> None:
    # two classes at odds 3:1 and 1:1; the last row is a tie, which goes to the first class, as argmax does
    ln3 = math.log(3)
    logits = torch.tensor([[ln3, 0], [ln3, 0], [0, ln3], [0.0, 0]])
    found = evaluate_logits(logits, torch.tensor([0, 1, 1, 1]), ["cat", "dog"], skipped=3)
    assert list(found) == KEYS
    assert found["n"] == 4
    assert found["skipped"] == 3
    assert found["top1"] == 0.5
    assert found["top5"] == 1.0
    assert found["confusion"] == [[1, 0], [2, 1]]
    assert found["per_class"] == {
        "cat": {"precision": 1 / 3, "recall": 1.0, "f1": 0.5, "n": 1},
        "dog": {"precision": 1.0, "recall": 1 / 3, "f1": 0.5, "n": 3},
    }
    # -(ln 3/4 + ln 1/4 + ln 3/4 + ln 1/2) / 4
    assert found["loss"] == pytest.approx(-math.log(9 / 128) / 4)
    # three images at confidence 0.75, two of them right; one at 0.5, wrong
    assert found["ece"] == pytest.approx((3 * abs(2 / 3 - 0.75) + 1 * abs(0 - 0.5)) / 4)
    assert found["ece_raw"] == found["ece"]
    # two of the three surest are right, and the mistake is taken to come first: wrong are 1/1, 1/2, 1/3, then 2/4
    assert found["risk_coverage"]["coverage"] == [0.25, 0.5, 0.75, 1.0]
    assert found["risk_coverage"]["risk"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2], abs=1e-6)
    assert found["risk_coverage"]["area"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    # a temperature T turns 3:1 into 3^(1/T):1; two right and one wrong are likeliest at 2:1
    assert found["temperature"] == pytest.approx(ln3 / math.log(2), rel=1e-3)


def test_agrees_with_the_oracles() -> None:
    logits, labels, classes = noisy(n=503, k=7)
    found = evaluate_logits(logits, labels, classes)
    prediction, probability = logits.argmax(1), logits.double().softmax(1)
    precision, recall, f1, n = oracle.precision_recall_fscore_support(labels, prediction)
    assert found["top1"] == pytest.approx(oracle.accuracy_score(labels, prediction))
    assert found["top5"] == pytest.approx(oracle.top_k_accuracy_score(labels, logits, k=5))
    assert found["loss"] == pytest.approx(oracle.log_loss(labels, probability), rel=1e-6)
    assert found["confusion"] == oracle.confusion_matrix(labels, prediction).tolist()
    assert found["ece"] == pytest.approx(
        multiclass_calibration_error(probability, labels, 7, n_bins=15).item(), rel=1e-5
    )
    for i, name in enumerate(classes):
        assert found["per_class"][name] == pytest.approx(
            {"precision": precision[i], "recall": recall[i], "f1": f1[i], "n": n[i]}
        )


def test_what_is_undefined_is_null() -> None:
    # nobody is a unicorn, nor taken for one; the only emu is taken for a dodo, which nobody is
    classes = ["cat", "dodo", "emu", "unicorn"]
    logits = torch.eye(4)[[0, 1]] * 5
    found = evaluate_logits(logits, torch.tensor([0, 2]), classes)
    assert found["per_class"]["unicorn"] == {"precision": None, "recall": None, "f1": None, "n": 0}
    assert found["per_class"]["dodo"] == {"precision": 0.0, "recall": None, "f1": 0.0, "n": 0}
    assert found["per_class"]["emu"] == {"precision": None, "recall": 0.0, "f1": 0.0, "n": 1}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@settings(deadline=None)
@given(
    st.integers(2, 9).flatmap(
        lambda k: st.lists(
            st.tuples(
                st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=k, max_size=k), st.integers(0, k - 1)
            ),
            min_size=1,
            max_size=6,
        )
    )
)
def test_any_finite_logits_give_plain_json(rows: list[tuple[list[float], int]]) -> None:
    logits, labels = torch.tensor([row for row, _ in rows]), torch.tensor([label for _, label in rows])
    found = evaluate_logits(logits, labels, [str(i) for i in range(logits.shape[1])])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert 0 <= found["top1_ci95"][0] <= found["top1"] <= found["top1_ci95"][1] <= 1
    assert found["top1"] <= found["top5"] <= 1
    assert 0 <= found["ece"] <= 1
    assert TEMPERATURE_BOUNDS[0] <= found["temperature"] <= TEMPERATURE_BOUNDS[1]
    assert sum(map(sum, found["confusion"])) == len(rows)
    assert found["top1"] == pytest.approx(np.trace(found["confusion"]) / len(rows))


def test_ties_rank_in_the_order_of_the_classes() -> None:
    # a collapsed model: all 11 logits equal, one image of each class
    found = evaluate_logits(torch.zeros(11, 11), torch.arange(11), [str(i) for i in range(11)])
    assert found["top1"] == pytest.approx(1 / 11)
    assert found["top5"] == pytest.approx(5 / 11)
    assert found["temperature"] == 1.0  # no temperature changes anything


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.7])
def test_temperature_is_recovered(true_temperature: float) -> None:
    # labels drawn from softmax(z): z is calibrated, so that z * T needs the temperature T
    generator = torch.Generator().manual_seed(1)
    calibrated = torch.randn(20_000, 5, generator=generator) * 2
    labels = torch.multinomial(calibrated.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(calibrated * true_temperature, labels) == pytest.approx(true_temperature, rel=0.03)


def test_temperature_stays_in_bounds_when_everything_is_right_or_wrong() -> None:
    low, high = TEMPERATURE_BOUNDS
    labels = torch.arange(6)
    assert low <= fit_temperature(torch.eye(6), labels) <= low * 1.01
    assert low <= fit_temperature(torch.eye(6) * 1e4, labels) <= high
    assert high * 0.99 <= fit_temperature(torch.eye(6).roll(1, 0) * 1e4, labels) <= high


def test_half_precision_and_saturated_logits() -> None:
    logits, labels, classes = noisy(n=97, k=3)
    half = evaluate_logits(logits.bfloat16(), labels, classes)
    assert half == evaluate_logits(logits.bfloat16().float(), labels, classes)
    # confidences of exactly 1, three in four right, are one bin
    sure = torch.eye(2)[[0, 0, 1, 1]] * 1e5
    assert evaluate_logits(sure, torch.tensor([0, 0, 1, 0]), ["a", "b"])["ece"] == pytest.approx(0.25)


def test_reliability_by_hand() -> None:
    bins = reliability([0.05, 0.5, 0.59, 0.95, 1.0, 1.0000001], [True, False, True, True, True, False], bins=10)
    assert bins.count.tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    assert bins.accuracy[[0, 5, 9]] == pytest.approx([1, 1 / 2, 2 / 3])
    assert bins.confidence[[0, 5, 9]] == pytest.approx([0.05, 0.545, 2.95 / 3])
    assert bins.ece == pytest.approx((0.95 + 2 * 0.045 + 0.95) / 6)
    assert reliability([], []).ece == 0


@settings(deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy(case: tuple[int, int]) -> None:
    interval = binomtest(*case).proportion_ci(0.95, method="wilson")
    assert wilson_interval(*case) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_wilson_ends() -> None:
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(0, 7)[0] == 0
    assert wilson_interval(7, 7)[1] == 1
    # 10 of 10: n / (n + z**2)
    assert wilson_interval(10, 10)[0] == pytest.approx(10 / (10 + 1.959964**2))
    with pytest.raises(ValueError, match="successes=8 is not between 0 and n=7"):
        wilson_interval(8, 7)


def test_the_interval_of_the_calibration_error_holds_the_error():
    random = np.random.default_rng(3)
    confidence = random.uniform(0.9, 1, 200)  # calibrated, by chance so well that images drawn anew are always less so
    correct = random.random(200) < confidence
    error = reliability(confidence, correct).ece
    low, high = bootstrap_ece(confidence, correct)
    assert low <= error <= high


def test_the_interval_of_a_calibration_error_has_a_width_where_all_are_right_or_all_wrong() -> None:
    # 12 of 12 right at a confidence of 1: the accuracy may be Wilson's 12 / (12 + z**2), and the gap as large
    low, high = bootstrap_ece([1.0] * 12, [True] * 12)
    assert (low, high) == (0.0, pytest.approx(1 - 12 / (12 + 1.959964**2)))
    low, high = bootstrap_ece([0.9] * 12, [False] * 12)
    assert (low, high) == (pytest.approx(0.9 - 1.959964**2 / (12 + 1.959964**2)), pytest.approx(0.9))
    low, high = bootstrap_ece([0.9] * 12, [True] * 12)  # within what the accuracy may be
    assert (low, high) == (0.0, pytest.approx(0.9 - 12 / (12 + 1.959964**2)))


def test_refusals_say_what_and_what_to_do() -> None:
    logits, labels, classes = noisy(n=5, k=3)
    with pytest.raises(InputError, match=r"0 images to evaluate \(4 skipped\).*readable images"):
        evaluate_logits(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), classes, skipped=4)
    logits[2, 1], logits[4, 0] = math.nan, math.inf
    with pytest.raises(InputError, match=r"2 of 5 images are not finite.*lower --lr"):
        evaluate_logits(logits, labels, classes)
    with pytest.raises(ValueError, match="do not fit"):
        evaluate_logits(logits, labels, ["cat", "dog"])
    with pytest.raises(ValueError, match="2 different class names"):
        evaluate_logits(logits, labels, ["cat", "dog", "cat"])


def test_images_of_one_group_widen_an_interval():
    random = np.random.default_rng(0)
    right = random.random(40) < 0.7  # one a group, and ten times the same
    groups = np.repeat(np.arange(40), 10)
    alone, together = share_interval(right), share_interval(np.repeat(right, 10), groups)
    as_if_alone = share_interval(np.repeat(right, 10))
    assert together == pytest.approx(alone, abs=0.04)
    assert together[1] - together[0] > 2 * (as_if_alone[1] - as_if_alone[0])
    each = share_interval(right, np.arange(40))  # groups of one are images
    assert each == pytest.approx(alone, abs=0.04)


def test_an_interval_of_groups_that_are_all_right_is_that_of_so_many_groups():
    assert share_interval(np.ones(50, bool), np.arange(50) // 10) == wilson_interval(5, 5)
    assert share_interval(np.zeros(50, bool), np.arange(50) // 10) == wilson_interval(0, 5)


@pytest.mark.parametrize("multi_label", [False, True])
def test_every_interval_of_an_evaluation_is_of_whole_groups(multi_label):
    random = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(30, 3, generator=random), torch.randint(0, 3, (30,), generator=random)
    if multi_label:
        labels = torch.nn.functional.one_hot(labels, 3).bool()

    def judge(repeats, groups):
        some, truth = logits.repeat_interleave(repeats, 0), labels.repeat_interleave(repeats, 0)
        if not multi_label:
            return evaluate_logits(some, truth, "abc", groups=groups)
        return evaluate_multilabel(some, truth, (some > 0).numpy(), "abc", [0.5] * 3, groups=groups)

    once, alike = judge(1, None), judge(8, np.repeat(np.arange(30), 8))
    assert (once["groups"], alike["groups"]) == (None, 30)
    names = ("map_ci95", "exact_match_ci95") if multi_label else ("top1_ci95", "ece_ci95")
    for name in names:
        (low, high), (as_one_low, as_one_high) = judge(8, None)[name], alike[name]
        assert as_one_high - as_one_low > 1.5 * (high - low), name
