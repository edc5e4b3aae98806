"""Intervals, tests and the front, against numbers worked out by hand."""

import math
from statistics import variance

import pytest

from tokenfusion.compare.statistics import crossed_t, holm, mcnemar, paired_t, pareto_front, variance_of_mean
from tokenfusion.metrics import t_interval


def test_the_interval_of_three_seeds():
    # mean 0.8, standard deviation 0.1, t of two degrees of freedom 4.302653
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert t_interval([0.7, 0.8, 0.9]) == pytest.approx((0.8 - half, 0.8 + half), abs=1e-6)
    assert t_interval([0.7]) is None


def test_a_paired_difference():
    # differences 0.01, 0.02, 0.03: mean 0.02, standard deviation 0.01, t = 2 sqrt(3) with two degrees of freedom,
    # whose two-sided p is 1 - t / sqrt(t^2 + 2) = 1 - sqrt(12 / 14)
    result = paired_t([0.51, 0.72, 0.93], [0.50, 0.70, 0.90])
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert result["difference_mean"] == pytest.approx(0.02)
    assert result["ci95"] == pytest.approx([0.02 - half, 0.02 + half], abs=1e-6)
    assert result["p"] == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-6)


def test_differences_without_spread():
    assert paired_t([0.5, 0.75], [0.5, 0.75])["p"] == 1
    for values, reference, difference in (([0.75, 1.0], [0.5, 0.75], 0.25), ([0.7, 0.8], [0.6, 0.7], 0.1)):
        result = paired_t(values, reference)  # two seeds of equal difference are no certainty
        assert result["difference_mean"] == pytest.approx(difference)
        assert (result["ci95"], result["p"]) == (None, None)
        assert result["method"] == "none, the same difference with all of 2 seeds"


def test_mcnemar_is_a_sign_test_of_the_images_that_one_alone_gets_right():
    # 5 images to one side, 1 to the other, 4 that both get: p = 2 (C(6,0) + C(6,1)) / 2^6
    ours, theirs = [True] * 5 + [False] + [True] * 4, [False] * 5 + [True] + [True] * 4
    result = mcnemar(ours, theirs)
    assert result["difference_mean"] == pytest.approx(0.4)
    assert result["p"] == pytest.approx(14 / 64)
    assert mcnemar(theirs, ours)["p"] == pytest.approx(14 / 64)
    assert mcnemar(ours, ours)["p"] == 1


def test_seeds_of_two_models_are_not_paired_and_images_are_random_too():
    # two seeds of either, 0.02 apart: each mean has the variance 0.0002 / 2, so that Welch's degrees of freedom are 2
    values, reference = [0.51, 0.53], [0.50, 0.48]
    seeds = crossed_t(values, reference)
    error = math.sqrt(2 * 0.0002 / 2)
    assert seeds["difference_mean"] == pytest.approx(0.03)
    assert seeds["ci95"] == pytest.approx([0.03 - 4.302653 * error, 0.03 + 4.302653 * error], abs=1e-6)
    assert seeds["method"] == "t over 2 and 2 seeds (Welch), images as given: their predictions were not kept"
    per_image = [0.5, -0.5, 0.12, 0.0] * 25  # of 100 images: mean 0.03
    both = crossed_t(values, reference, per_image)
    assert both["difference_mean"] == seeds["difference_mean"]
    wide = [end["ci95"][1] - end["ci95"][0] for end in (both, seeds)]
    assert wide[0] > 3.92 * math.sqrt(0.0002 + 0.1286 / 100)  # with infinitely many degrees of freedom
    # more images narrow it to what seeds leave
    many = crossed_t(values, reference, per_image * 10_000)
    assert many["ci95"] == pytest.approx(seeds["ci95"], abs=1e-3)
    assert both["p"] > seeds["p"]


def test_models_that_are_alike_to_the_last_image_do_not_differ():
    assert crossed_t([0.5, 0.5], [0.5, 0.5], [0.0, 0.0])["p"] == 1
    assert crossed_t([0.6, 0.6], [0.5, 0.5])["p"] is None


def test_holms_correction():
    # sorted: 0.01 times 3, 0.02 times 2, 0.03 times 1 but no less than the one before
    assert [p and round(p, 9) for p in holm([0.03, None, 0.01, 0.02])] == [0.04, None, 0.03, 0.04]
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_equals_are_all_on_the_pareto_front():
    points = {"a": (1.0, 0.7), "b": (1.0, 0.7), "c": (2.0, 0.7)}
    assert pareto_front(points) == ["a", "b"]


def test_the_pareto_front_leaves_out_what_is_beaten():
    points = {"dear": (9.0, 0.9), "worse": (5.0, 0.7), "cheap": (1.0, 0.7), "middle": (4.0, 0.8), "as dear": (9.0, 0.8)}
    assert pareto_front(points) == ["cheap", "middle", "dear"]
    assert pareto_front({}) == []


def test_images_of_one_group_are_one_draw():
    values, reference, alike = [0.5, 0.52], [0.48, 0.47], [0.5, -0.5, 0.12, 0.0] * 5
    once = crossed_t(values, reference, alike)
    ten_times = [value for value in alike for _ in range(10)]
    groups = [number for number in range(len(alike)) for _ in range(10)]
    assert crossed_t(values, reference, ten_times, groups)["ci95"] == pytest.approx(once["ci95"])
    assert crossed_t(values, reference, ten_times)["p"] < once["p"]
    assert "in 20 whole groups" in crossed_t(values, reference, ten_times, groups)["method"]
    assert variance_of_mean([1.0, 2.0, 4.0], range(3)) == (pytest.approx(variance([1.0, 2.0, 4.0]) / 3), 3)
