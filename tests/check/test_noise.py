"""How likely a label is wrong: the model of labels by hand, and what it finds of flips that were planted."""

import numpy as np
import pytest

from tokenfusion.check.labels import judge_labels
from tokenfusion.check.noise import find_wrong_labels


def planted(images, share, classes=4, seed=0):
    """Logits of the true classes as they are, and labels of which a share is another class; which ones."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(size=(images, classes)) * 4
    powers = np.exp(logits)
    true = (powers.cumsum(1) / powers.sum(1, keepdims=True) < chance.random((images, 1))).sum(1)
    wrong = np.zeros(images, dtype=bool)
    wrong[chance.choice(images, int(share * images), replace=False)] = True
    labels = np.where(wrong, (true + chance.integers(1, classes, images)) % classes, true)
    return logits, labels, wrong


def test_the_probability_is_bayes_rule():
    logits, labels, _ = planted(500, 0.1)
    found = find_wrong_labels([logits], labels)
    own = found.scores[np.arange(500), labels]
    others = found.share / 3 * (1 - own)
    assert found.wrong == pytest.approx(others / (others + (1 - found.share) * own))
    assert found.scores.sum(1) == pytest.approx(np.ones(500))
    assert (np.diff(found.wrong[np.argsort(own)]) <= 1e-12).all()  # the unlikelier a label, the likelier is it wrong


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_share_and_scale_are_found(share):
    logits, labels, wrong = planted(20_000, share)
    found = find_wrong_labels([logits / 3], labels)  # too flat by a factor that no wrong label hides
    assert found.share == pytest.approx(share, abs=0.01)
    expected = np.exp(logits - logits.max(1, keepdims=True))
    assert found.scores == pytest.approx(expected / expected.sum(1, keepdims=True), abs=0.05)
    assert found.wrong.mean() == pytest.approx(share, abs=0.01)
    likely = found.wrong >= 0.5
    assert wrong[likely].sum() == pytest.approx(found.wrong[likely].sum(), rel=0.1, abs=3)  # as precise as it says


@pytest.mark.parametrize("odd", [0.0, 0.05])
def test_what_is_told_is_no_less_than_what_is_wrong(odd):
    """Odd pictures, of whose class a sure classifier knows nothing, are taken for wrong labels."""
    logits, labels, wrong = planted(20_000, 0.05)
    chance = np.random.default_rng(1)
    strange = chance.random(len(labels)) < odd
    labels = np.where(strange & ~wrong, chance.integers(0, 4, len(labels)), labels)
    found = find_wrong_labels([logits], labels)
    likely = found.wrong >= 0.5
    told, true = found.wrong[likely].mean(), wrong[likely].mean()
    assert told == pytest.approx(true, abs=0.05) if not odd else told > true + 0.1
    assert found.share > 0.05 - 0.01


def test_a_classifier_that_guesses_is_given_no_weight():
    logits, labels, _ = planted(5_000, 0.05)
    guesses = np.random.default_rng(1).normal(size=logits.shape)
    alone, beside = find_wrong_labels([logits], labels), find_wrong_labels([logits, guesses], labels)
    assert beside.wrong == pytest.approx(alone.wrong, abs=0.05)


def test_flipped_labels_come_first_and_the_precision_is_told_at_each_rank():
    chance = np.random.default_rng(0)
    true = np.arange(600) % 3
    features = np.eye(3)[true] * 3 + chance.normal(size=(600, 3))
    labels = true.copy()
    labels[:30] = (true[:30] + 1) % 3
    judgement = judge_labels([features], labels, np.arange(1000, 1600), None, 1.0)
    disputes = judgement.disputes
    hits = [dispute.image < 1030 for dispute in disputes]
    assert 20 <= sum(hits) <= len(hits) <= 1.2 * sum(hits)
    assert all(d.suggestion == true[d.image - 1000] for d, hit in zip(disputes, hits, strict=True) if hit)
    assert all(dispute.wrong >= 0.5 or dispute.precision >= 0.75 for dispute in disputes)
    assert [d.wrong for d in disputes] == sorted((d.wrong for d in disputes), reverse=True)
    means = [np.mean([d.wrong for d in disputes[: rank + 1]]) for rank in range(len(disputes))]
    assert [d.precision for d in disputes] == pytest.approx(means)
    assert judgement.share == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize(("strength", "further"), [(1.0, False), (3.0, True), (5.0, False)])
def test_what_is_likelier_right_is_disputed_only_while_three_quarters_of_all_are_wrong(strength, further):
    """By a weak classifier too few of the disputes are wrong, and a strong one leaves no label in doubt."""
    true = np.arange(3000) % 3
    features = np.eye(3)[true] * strength + np.random.default_rng(0).normal(size=(3000, 3))
    labels = np.where(np.arange(3000) < 150, (true + 1) % 3, true)
    disputes = judge_labels([features], labels, np.arange(3000), None, 1.0).disputes
    likely, rest = ([d for d in disputes if (d.wrong >= 0.5) == first] for first in (True, False))
    assert disputes == likely + rest
    assert len(likely) > 0
    assert all(d.wrong >= 0.25 and d.precision >= 0.75 for d in rest)
    assert (sum(d.image < 150 for d in rest) > 3) == further
    if further:
        assert np.mean([d.image < 150 for d in disputes]) == pytest.approx(rest[-1].precision, abs=0.07)


def test_a_class_that_a_fold_has_not_met_is_no_answer_there():
    labels = np.repeat([0, 1, 2], 20)
    features = np.eye(3)[labels] + np.random.default_rng(0).normal(size=(60, 3)) * 0.1
    groups = np.arange(60)
    groups[40:] = [40] * 16 + [41, 42, 43, 44]  # nearly all of a class in one fold
    judgement = judge_labels([features], labels, np.arange(60), groups, 1.0)
    assert judgement.judged == 60
    assert judgement.accuracy >= 0.6
