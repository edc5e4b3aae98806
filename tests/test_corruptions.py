"""Images made worse, by known numbers; what `evaluate --corruptions` finds and draws."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from runs import tiny_recipe
from tokenfusion import InputError, train
from tokenfusion.classifier import Classifier
from tokenfusion.corruptions import CORRUPTIONS, LEVELS, corrupted, measure_corruptions
from tokenfusion.evaluate import evaluate
from tokenfusion.report import write_figures, write_report

SIZES = [(3, 32, 32), (1, 32, 32), (3, 17, 40), (3, 5, 9), (1, 1, 1)]


def pictures(number: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (number, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def worse(images: torch.Tensor, name: str, severity: float, seed: int = 0) -> torch.Tensor:
    return corrupted(images, name, severity, range(seed, seed + len(images)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_keep_their_shape_and_the_same_seed_gives_the_same(name, size):
    images = pictures(2, *size)
    before = images.clone()
    for severity in CORRUPTIONS[name].severities:
        found = worse(images, name, severity)
        assert (found.shape, found.dtype) == (images.shape, torch.uint8)
        assert torch.equal(found, worse(images, name, severity))
        assert torch.equal(found[1], worse(images[1:], name, severity, seed=1)[0])  # whatever stands beside it
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_stronger_levels_are_farther_from_the_image(name):
    smooth = torch.linspace(0, 255, 64).round().to(torch.uint8).expand(8, 3, 64, 64)
    far = [
        float((worse(smooth, name, s).float() - smooth.float()).square().mean()) for s in CORRUPTIONS[name].severities
    ]
    assert far[0] > 0
    if name != "shuffled patches":  # pieces keep their pixels, and smaller ones may land as near
        assert far == sorted(far)


def test_noise_has_the_deviation_that_is_said():
    gray = torch.full((1, 3, 200, 200), 128, dtype=torch.uint8)
    for std in CORRUPTIONS["noise"].severities[:2]:  # of the strongest the ends are cut off
        assert worse(gray, "noise", std).float().std() / 255 == pytest.approx(std, rel=0.01)


def test_contrast_shrinks_differences_by_the_factor():
    image = torch.tensor([100, 140], dtype=torch.uint8).repeat(8).expand(1, 1, 16, 16)
    assert worse(image, "contrast", 0.5).unique().tolist() == [110, 130]


@pytest.mark.parametrize("share", CORRUPTIONS["occlusion"].severities)
def test_occlusion_hides_the_share_of_the_area_in_the_mean_colour(share):
    image = torch.cat([torch.zeros(1, 1, 40, 20), torch.full((1, 1, 40, 20), 200)], 3).to(torch.uint8)
    hidden = worse(image, "occlusion", share) == 100
    assert hidden.float().mean() == pytest.approx(share, abs=0.02)


def test_shuffled_pieces_are_all_there_in_another_order():
    images = torch.arange(16).repeat_interleave(3).reshape(1, 1, 4, 12).to(torch.uint8)  # 4×4 pieces of 1×3
    found = worse(images, "shuffled patches", 4)
    assert not torch.equal(found, images)
    assert sorted(piece[0] for piece in found.reshape(16, 3).tolist()) == list(range(16))
    assert all(len(set(piece)) == 1 for piece in found.reshape(16, 3).tolist())


def test_what_is_lost_is_paired_over_images():
    """A model that reads the first pixel's brightness: contrast leaves it right, noise does not."""
    images = torch.cat([torch.full((50, 1, 8, 8), 118), torch.full((50, 1, 8, 8), 138)]).to(torch.uint8)
    labels = torch.arange(100) // 50
    model = lambda batch: torch.stack([128 - batch[:, 0, 0, 0].float(), batch[:, 0, 0, 0].float() - 128], 1)  # noqa: E731
    batches = [(images[start : start + 30], labels[start : start + 30]) for start in range(0, 100, 30)]
    told = []
    found = measure_corruptions(model, batches, progress=told.append)
    assert (found["images"], found["top1"], told) == (100, 1.0, [30, 60, 90, 100])
    faded, noisy = (found["corruptions"][name]["levels"] for name in ("contrast", "noise"))
    assert [level["top1"] for level in faded] == [1.0, 1.0, 1.0]
    assert [level["level"] for level in noisy] == list(LEVELS)
    assert noisy[0]["top1"] > noisy[2]["top1"]
    for level in noisy:
        low, high = level["lost"]["ci95"]
        assert low <= level["lost"]["mean"] <= high
        assert math.isclose(level["lost"]["mean"], 1 - level["top1"])
    everything = [level["top1"] for kind in found["corruptions"].values() for level in kind["levels"]]
    assert found["top1_mean"] == pytest.approx(np.mean(everything))
    other = measure_corruptions(model, [(images, labels)])
    assert other == found  # however images are batched


def test_of_groups_intervals_are_of_whole_groups():
    images, labels = pictures(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)
    groups = np.arange(20) // 10
    model = lambda batch: torch.stack([batch.float().mean((1, 2, 3)) - 128, torch.zeros(len(batch))], 1)  # noqa: E731
    level = measure_corruptions(model, [(images, labels)], groups)["corruptions"]["noise"]["levels"][0]
    alone = measure_corruptions(model, [(images, labels)])["corruptions"]["noise"]["levels"][0]
    assert level["lost"]["ci95"] is None
    assert level["ci95"] != alone["ci95"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("corrupted") / "run"
    train(tiny_recipe(epochs=1), run)
    return run


def test_evaluate_judges_writes_and_draws_it(run, command):
    status, output, _ = command("evaluate", run, "--corruptions")
    assert status == 0
    heading, noise = (line.split() for line in output.splitlines()[:2])
    assert heading == [*("images", "made", "worse"), *LEVELS, *("lost", "when", "strong,", "points")]
    assert noise[0] == "noise"
    assert "corruptions.svg" in output
    evaluation = json.loads((run / "evaluation.json").read_text())
    found = evaluation["corruptions"]
    assert (found["images"], found["top1"]) == (evaluation["n"], evaluation["top1"])
    assert [*found["corruptions"]] == [*CORRUPTIONS]
    assert all(name in (run / "corruptions.svg").read_text() for name in CORRUPTIONS)
    page = write_report(run).read_text()
    assert "Worse images" in page
    assert "lost when strong" in page


def test_without_it_the_evaluation_and_the_page_say_nothing_of_it(run):
    assert "corruptions" not in evaluate(run)
    assert write_figures(run) == ["risk_coverage.svg"]
    assert not (run / "corruptions.svg").exists()
    assert "Worse images" not in write_report(run).read_text()


def test_a_model_of_any_number_of_classes_is_refused_before_anything_is_judged(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    classifier = Classifier.create("wide(vit_micro,0.1)", ("a", "b"), img_size=(8, 8), multi_label=True)
    classifier.save(run)
    (run / "recipe.toml").write_text('data = "digits"\n')
    with pytest.raises(InputError, match=r"any number of classes"):
        evaluate(run, corruptions=True)


def test_the_page_states_the_severities():
    page = (Path(__file__).parents[1] / "docs" / "inside.md").read_text()
    for name, kind in CORRUPTIONS.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert ", ".join(f"{severity:g}" for severity in kind.severities) in line
