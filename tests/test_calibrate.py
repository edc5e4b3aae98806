"""Scores to trust: temperatures are judged on other images than chose them, and abstaining keeps its word."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

from tokenfusion import Classifier
from tokenfusion.calibrate import choose_temperature, cross_fitted_temperatures, halves
from tokenfusion.data.decoded import read_images
from tokenfusion.data.open import open_dataset
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.evaluate import calibrated
from tokenfusion.metrics import bootstrap_ece, evaluate_logits, reliability
from tokenfusion_runtime.abstain import DELTA, SurestErrors, images_needed, tail, why_silent, why_unsure


def calibrated_logits(n, k=10, seed=0):
    """Logits whose softmax says how often each class is true, and labels drawn by it."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, k, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_multiplied_in_is_found(factor):
    logits, labels = calibrated_logits(2000)
    assert choose_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.06)


def test_of_any_number_of_classes_it_is_found_too():
    logits = 3 * torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < logits.sigmoid()
    assert choose_temperature(2.5 * logits, labels) == pytest.approx(2.5, rel=0.06)


def test_a_few_images_that_are_all_right_do_not_make_every_score_1():
    logits = 2.0 * torch.eye(4)
    assert 0.4 < choose_temperature(logits, torch.arange(4)) < 1
    assert choose_temperature(logits[:0], torch.arange(0)) == 1.0


def test_each_half_is_judged_by_the_temperature_of_the_other():
    logits, labels = calibrated_logits(400)
    found, fold = cross_fitted_temperatures(logits, labels), halves(labels)
    assert 150 < fold.sum() < 250
    for own in (0, 1):
        assert (found[fold == own] == choose_temperature(logits[fold != own], labels[fold != own])).all()
    labels[fold == 0] = (labels[fold == 0] + 1) % 10  # what is true of its own half changes nothing for it
    assert (halves(labels).shape, cross_fitted_temperatures(logits[:1], labels[:1])) == (fold.shape, torch.ones(1))


def test_calibrated_scores_have_the_error_of_the_temperature_and_raw_ones_of_none():
    logits, labels = calibrated_logits(3000)
    found = evaluate_logits(4 * logits, labels, [str(i) for i in range(10)], temperatures=torch.full((3000,), 4.0))
    assert found["ece"] < 0.03 < 0.1 < found["ece_raw"]
    low, high = found["ece_ci95"]
    assert 0 <= low <= found["ece"] <= high < 0.05


def test_the_interval_of_the_calibration_error_covers_it():
    """Scores of 0.8 of which 60 % are right: the error is 0.2."""
    random, covered = np.random.default_rng(0), 0
    for _ in range(40):
        right = random.random(200) < 0.6
        assert reliability(np.full(200, 0.8), right).ece == pytest.approx(abs(right.mean() - 0.8))
        low, high = bootstrap_ece(np.full(200, 0.8), right, resamples=100)
        covered += low <= 0.2 <= high
    assert covered >= 34


@pytest.mark.parametrize(("errors", "answers", "risk"), [(0, 150, 0.02), (3, 400, 0.02), (30, 800, 0.05)])
def test_the_tail_is_the_binomial_one(errors, answers, risk):
    assert tail(errors, answers, risk) == pytest.approx(binom.cdf(errors, answers, risk), rel=1e-9)


def test_without_images_enough_for_a_bound_nothing_is_answered():
    assert SurestErrors(148, (), ()).cut(0.02) == math.inf
    assert SurestErrors(149, (), ()).cut(0.02) == -1.0  # 0.98^149 < 0.05: everything is answered
    assert SurestErrors(149, (80,), (0.9,)).cut(0.02) == math.inf
    assert SurestErrors(400, (200,), (0.7,)).cut(0.02) == 0.7  # one error among 200 is one too many, up to 236
    assert SurestErrors(400, (240,), (0.7,)).cut(0.02) == -1.0


def test_it_is_said_why_nothing_is_answered():
    few, wrong = SurestErrors(12, (), ()), SurestErrors(149, (80,), (0.9,))
    assert (
        why_silent(0.02, [few]) == "12 held-out images cannot promise 0.02: 149 are needed, or --abstain 0.221 or more"
    )
    assert few.cut(0.221) == -1.0
    assert few.cut(0.220) == math.inf
    too_many = "too many of the surest answers on the 149 held-out images are wrong to promise 0.02; "
    assert why_silent(0.02, [wrong]).startswith(f"{too_many}give --abstain 0.")
    hopeless = SurestErrors(149, tuple(range(1, 150)), (1.0,) * 149)
    assert why_silent(0.02, [hopeless]) == f"{too_many}train on more images, or on better ones"
    assert why_silent(0.02, [SurestErrors(149, (), ()), wrong]) == why_silent(0.02, []) == ""


def test_of_equal_scores_the_wrong_come_first():
    assert SurestErrors.among([0.5, 0.9, 0.5], [True, True, False]) == SurestErrors(3, (2,), (0.5,))


class Saying(torch.nn.Module):
    """Gives the next of some logits, whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.left = logits

    def forward(self, images):
        said, self.left = self.left.split([len(images), len(self.left) - len(images)])
        return said


def test_scores_that_round_to_1_are_equal_scores():
    """A thousand images of which three in four are right by logits of 1.1, and 601 by logits that float32 cannot tell
    from certainty, of which the last is wrong: it is not to be answered, however slightly less sure it is."""
    images, _ = read_images(open_dataset("digits"), range(1601), max_pixels=64, cache_bytes=2**20)
    gaps = torch.cat([torch.full((1000,), 1.1), torch.full((601,), 60.0)])
    gaps[-1], wrong = 25.0, torch.arange(1601) % 4 == 0
    wrong[1000:1600], wrong[1600] = False, True
    true, false = images.labels, (images.labels + 1) % 10
    logits = torch.full((1601, 10), -100.0)
    logits[range(1601), torch.where(wrong, true, false)] = 0.0
    logits[range(1601), torch.where(wrong, false, true)] = gaps
    preprocess = Preprocess((8, 8), 3, (0.5,) * 3, (0.5,) * 3)
    names = tuple(map(str, range(10)))
    found = calibrated(Classifier("saying", Saying(logits), names, preprocess, torch.device("cpu"), "fp32"), images)
    scores, answers = found.scores(logits).numpy(), found.answers(abstain=0.005)
    assert scores[1600].max() == scores[1000].max() == 1.0
    assert answers.prediction("", scores[1600]).abstains


def test_the_share_of_wrong_answers_is_kept():
    """Of many draws of held-out images, the true share of wrong answers exceeds the limit in fewer than DELTA."""
    random, exceeded, answered = np.random.default_rng(0), 0, []
    for _ in range(300):
        scores = random.random(600)  # right with that very chance to the power 1/8: surer answers are better
        errors = SurestErrors.among(scores.tolist(), (random.random(600) < scores ** (1 / 8)).tolist())
        cut = min(max(errors.cut(0.06), 0.0), 1.0)
        answered.append(1 - cut)
        share = 1 - (8 / 9) * (1 - cut ** (9 / 8)) / (1 - cut) if cut < 1 else 0.0  # of the wrong above the cut
        exceeded += share > 0.06
    assert exceeded / 300 <= DELTA
    assert np.mean(answered) > 0.1


def test_a_run_ends_calibrated_and_predict_shows_it(command, run, digit):
    written = json.loads((run / "model.json").read_text())
    assert written["temperature"] != 1.0
    assert written["surest_errors"][0]["images"] == 359
    classifier = Classifier.load(run)
    calibrated, raw = (one.predict(digit)[0] for one in (classifier, classifier.uncalibrated()))
    assert calibrated.label == raw.label
    _, output, _ = command("predict", run, digit, "--format", "json")
    assert json.loads(output)["score"] == pytest.approx(calibrated.score, rel=1e-5)
    _, output, _ = command("predict", run, digit, "--format", "json", "--raw")
    assert json.loads(output)["score"] == pytest.approx(raw.score, rel=1e-5)
    pixels = classifier.preprocess.resize(torch.zeros(3, 8, 8, dtype=torch.uint8))[None]
    logits = classifier.logits(pixels)
    torch.testing.assert_close(classifier.scores(logits), (logits / written["temperature"]).softmax(1))


def test_where_the_model_is_too_unsure_the_label_is_null(command, run, digit):
    description = json.loads((run / "model.json").read_text())
    for score, label in ((0.0, True), (1.0, False)):
        errors = [{"images": 400, "ranks": [200], "scores": [score]}]
        (run / "model.json").write_text(json.dumps(description | {"surest_errors": errors}))
        status, output, _ = command("predict", run, digit, "--abstain", 0.02, "--format", "json")
        said = json.loads(output)
        assert status == 0
        assert (said["label"] is not None) == label
        assert said["score"] == said["topk"][0]["score"]
    assert ",,0." in command("predict", run, digit, "--abstain", 0.02, "--format", "csv")[1]
    _, output, errors = command("predict", run, digit, "--abstain", 0.02)
    assert "unsure" in output
    assert errors == (
        "unsure of 1: only scores above 1.000000 are right often enough to promise 0.02; a larger --abstain, or more "
        "held-out images in training, answer more\n"
    )


def test_help_and_page_say_how_many_held_out_images_a_share_needs(command):
    needed = {share: images_needed(share) for share in (0.02, 0.05, 0.1)}
    assert needed == {0.02: 149, 0.05: 59, 0.1: 29}
    helped = re.sub(r"[│\s]+", " ", command("predict", "--help")[1])
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    for share, images in needed.items():
        assert re.search(rf"\b{images}( held-out images)? for {share:g}\b", helped), share
        assert f"{images} at {100 * share:g} %" in " ".join(page.split())


def test_where_nothing_is_answered_there_is_one_reason():
    sure = [SurestErrors(400, (200,), (0.9,))]
    assert why_unsure(3, 0.02, sure).startswith("unsure of 3: only scores above 0.900000 ")
    assert why_unsure(0, 0.02, sure) == ""
    assert why_unsure(3, 0.02, [SurestErrors(12, (), ())]) == ""  # `why_silent` has said it


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--abstain", 2), "abstain=2.0 is no share of wrong answers"),
        (("--abstain", 0.02, "--raw"), "leave out --raw"),
    ],
)
def test_what_abstain_cannot_keep_is_refused(command, run, digit, words, said):
    status, _, errors = command("predict", run, digit, *words)
    assert status == 2
    assert said in errors


def test_a_run_of_an_older_version_has_raw_scores_and_says_that_it_cannot_abstain(command, run, digit):
    description = json.loads((run / "model.json").read_text())
    for key in ("temperature", "surest_errors"):
        del description[key]
    (run / "model.json").write_text(json.dumps(description | {"format": 2}))
    assert command("predict", run, digit)[0] == 0
    status, _, errors = command("predict", run, digit, "--abstain", 0.02)
    assert status == 2
    assert "train again" in errors


def test_a_class_of_a_multi_label_model_is_answered_alike():
    from tokenfusion_runtime.prediction import Answers

    answers = Answers(("cat", "dog", "emu"), thresholds=(0.5, 0.5, 0.5), cuts=(0.8, 0.8, 0.8))
    found = answers.prediction("a.png", np.array([0.95, 0.7, 0.02]))
    assert found.labels == (("cat", 0.95),)
    assert found.unsure == ("dog",)  # 0.7 is 0.4 of the way from its threshold to 1
    assert found.to_dict()["unsure"] == ["dog"]
