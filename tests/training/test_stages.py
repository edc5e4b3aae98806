"""Training in stages: a linear classifier on what two frozen parents see, and what fuses started from it."""

import errno
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from runs import interrupt_at, results, small_recipe
from tokenfusion import Classifier, InputError, features
from tokenfusion.data.decoded import read_images
from tokenfusion.data.open import open_dataset
from tokenfusion.evaluate import collect_logits, evaluate
from tokenfusion.features import keep_features, on_features
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.training import Interrupted, resume, start

QUIET = Console(quiet=True)
CNN, VIT = "wide(resnet_micro,0.1)", "wide(vit_micro,0.1)"
MODEL = f"fuse({CNN},{VIT},probe)"


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A CNN and a transformer that each saw the digits once."""
    folder = tmp_path_factory.mktemp("parents")
    for name, model in (("cnn", CNN), ("vit", VIT)):
        start(
            small_recipe(model=model, precision="fp32", ema=0.0, drop_path=0.0, epochs=1, val_fraction=0.85),
            folder / name,
            QUIET,
        )
    return str(folder / "cnn"), str(folder / "vit")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def recipe_of(parents, **changes):
    values = {
        "model": MODEL,
        "tune": "fusion",
        "precision": "fp32",
        "ema": 0.0,
        "drop_path": 0.0,
        "optimizer": "adamw",
        "val_fraction": 0.85,
        "batch_size": 32,
    }
    return small_recipe(**values | {"warm_start_from": parents, "mixup": 0.4} | changes)


@pytest.fixture
def digits():
    return read_images(open_dataset("digits"), range(150), max_pixels=64, cache_bytes=2**20)[0]


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier.create(MODEL, tuple("0123456789"), img_size=(8, 8), precision="fp32")


def test_a_run_tuned_in_stages_is_a_run_like_any_other(parents, tmp_path):
    run = tmp_path / "fusion"
    start(recipe_of(parents), run, QUIET)
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluate(run)["top1"] == pytest.approx(record["val_top1"], abs=0.004)  # kept in half precision
    known = json.loads((run / "probe.json").read_text())["held_out"]
    assert known["mixture"] >= max(known["cnn"], known["vit"]) - 0.05
    model = Classifier.load(run).model
    assert isinstance(model, ProbeFusion)
    assert model.gate.weight.abs().sum() > 0


def test_with_its_gate_closed_it_is_the_linear_classifier(parents, tmp_path):
    run = tmp_path / "probe"
    start(recipe_of(parents, tune="probe"), run, QUIET)
    record = json.loads((run / "metrics.jsonl").read_text())
    known = json.loads((run / "probe.json").read_text())["held_out"]
    assert record["epoch"] == 0
    assert record["val_top1"] == pytest.approx(known["mixture"], abs=1e-3)
    model = Classifier.load(run).model
    assert not model.gate.weight.any()
    assert not model.votes.weight.any()
    images = torch.randn(3, 3, 8, 8)
    with torch.inference_mode():
        line = model.head(model.standardize(model.means(model.observe(images))))
        torch.testing.assert_close(model(images), line, rtol=0, atol=0)


def test_the_parents_stay_as_they_are(parents, tmp_path):
    run = tmp_path / "fusion"
    start(recipe_of(parents), run, QUIET)
    fused, alone = Classifier.load(run).model, Classifier.load(parents[0]).model
    for name, tensor in alone.state_dict().items():
        if (part := fused.cnn.state_dict().get(name)) is not None:
            assert torch.equal(tensor, part)


def test_a_run_resumed_equals_a_run_uninterrupted(parents, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(recipe_of(parents), whole, QUIET)
    with pytest.raises(Interrupted):
        start(recipe_of(parents), parts, QUIET, listener=interrupt_at(7))
    resume(parts, QUIET)
    (a, records, steps), (b, other_records, other_steps) = results(whole), results(parts)
    assert (records, steps) == (other_records, other_steps)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_was_kept_is_not_computed_again_and_decides_as_images_do(classifier, digits, monkeypatch):
    rows = keep_features(classifier, digits)
    expected, _ = collect_logits(classifier, digits)
    found, labels = collect_logits(on_features(classifier), rows.as_images())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert torch.equal(labels, digits.labels)
    monkeypatch.setattr(features, "append_rows", None)
    assert np.array_equal(keep_features(classifier, digits).rows.rows, rows.rows.rows)


def test_rows_of_other_weights_or_pixels_are_never_used(classifier, digits, cache):
    keep_features(classifier, digits)
    with torch.no_grad():
        next(classifier.model.vit.parameters()).add_(1.0)
    keep_features(classifier, digits)
    other, _ = read_images(open_dataset("digits"), range(1, 151), max_pixels=64, cache_bytes=2**20)
    keep_features(classifier, other)
    assert len(list(cache.glob("*.f16"))) == 3


def test_rows_of_more_images_serve_for_some_in_any_order(classifier, digits, cache):
    whole, chosen = keep_features(classifier, digits), np.array([140, 3, 77])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "append_rows", None)
        some = keep_features(classifier, digits.subset(chosen))
    assert some.rows.path == whole.rows.path
    assert torch.equal(next(some.batches()), next(whole.subset(chosen).batches()))
    assert torch.equal(some.as_images()[0], whole.as_images()[140])
    assert len(list(cache.glob("*.f16"))) == 1
    expected = next(some.batches())
    with whole.rows.path.open("r+b") as file:
        file.write(b"\xff" * 10)  # of an image that is not among them, but the file is no longer whole
    again = keep_features(classifier, digits.subset(chosen))
    assert again.rows.path != whole.rows.path
    torch.testing.assert_close(next(again.batches()), expected, rtol=0, atol=0.01)


def test_a_full_disk_ends_clean_and_is_gone_on_with(classifier, digits, cache, monkeypatch):
    noted, write = [], features.write_json

    def full(path, value):
        if len(value) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, value)
        noted.append(path)

    monkeypatch.setattr(features, "write_json", full)
    with pytest.raises(InputError, match=r"No space left on device; .* gone on with: make room"):
        keep_features(classifier, digits)
    monkeypatch.setattr(features, "write_json", write)
    seen = []
    rows = keep_features(classifier, digits, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(128, 150), (150, 150)]  # the first block was safe
    again = keep_features(classifier, digits, folder=cache.parent / "elsewhere")
    assert np.array_equal(rows.rows.rows, again.rows.rows)


def test_a_damaged_block_is_computed_again(classifier, digits):
    rows = keep_features(classifier, digits).rows
    expected = rows.rows.copy()
    with rows.path.open("r+b") as file:
        file.seek(2 * 70 * expected.shape[1])
        file.write(b"\xff" * 10)
    assert np.array_equal(keep_features(classifier, digits).rows.rows, expected)


def test_rows_beyond_the_limit_are_refused_and_old_ones_make_room(classifier, digits, cache, monkeypatch):
    size = 2 * len(digits) * classifier.model.row_length
    monkeypatch.setenv("TOKENFUSION_CACHE_GB", str(1.5 * size / 2**30))
    first = keep_features(classifier, digits).rows.path
    other, _ = read_images(open_dataset("digits"), range(1, 151), max_pixels=64, cache_bytes=2**20)
    second = keep_features(classifier, other).rows.path
    assert list(cache.glob("*.f16")) == [second] != [first]
    assert {path.stem for path in cache.iterdir() if path.suffix != ".lock"} == {second.stem}
    monkeypatch.setenv("TOKENFUSION_CACHE_GB", str(0.5 * size / 2**30))
    with pytest.raises(InputError, match=r"more than the .* GiB of the cache; allow more by TOKENFUSION_CACHE_GB"):
        keep_features(
            classifier, digits.__class__(digits.dataset.subset(range(149)), 64, checksums=digits.checksums[:149])
        )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": f"fuse({CNN},{VIT},late)"}, "give --model fuse.CNN,VIT,probe"),
        ({"warm_start_from": ()}, "parents would be random"),
        ({"lr": "auto"}, "give numbers"),
        ({"every": 1}, "give 0"),
    ],
)
def test_what_cannot_be_tuned_is_refused(parents, tmp_path, changes, reason):
    with pytest.raises(InputError, match=reason):
        start(replace(recipe_of(parents), **changes), tmp_path / "run", QUIET)


def test_the_command_has_a_preset_of_its_own_for_kept_tokens(parents, tmp_path):
    from tokenfusion.cli import app

    run = tmp_path / "run"
    parts = ["--tune", "probe", "--img-size", "8", "--val-fraction", "0.85"]
    app(["train", "digits", "--model", MODEL, "--warm-start-from", *parents, *parts, "--out", str(run)])
    recipe = (run / "recipe.toml").read_text()
    assert 'tune = "probe"' in recipe
    assert 'optimizer = "adamw"' in recipe
    assert "head_lr = 0.1" in recipe
