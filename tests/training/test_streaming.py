"""Training over shards behind URLs."""

import os
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from children import begin
from killing import Death, die_by
from runs import interrupt_at, tiny_recipe
from serving import Server, add, picture, png, serving, write_shards
from tokenfusion.checkpoint import load_tensors
from tokenfusion.data import remote
from tokenfusion.errors import InputError
from tokenfusion.evaluate import evaluate
from tokenfusion.recipe import Recipe
from tokenfusion.training import Interrupted, resume, start

QUIET = Console(quiet=True)
BAD = "train-4.tar/0905.png"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Six shards, of which one holds an image that cannot be read, and a cache that does not hold them all."""
    folder = write_shards(tmp_path / "shards", {f"train-{n}.tar": 12 + n for n in range(4)} | {"val-0.tar": 9})
    with tarfile.open(folder / "train-4.tar", "w") as tar:
        for number in range(900, 911):
            add(tar, f"{number:04d}.png", b"no image" if number == 905 else png(picture(number)))
            add(tar, f"{number:04d}.cls", str(number % 3).encode())
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))
    with serving(folder) as server:
        yield server


def recipe_for(server: Server, **changes: object) -> Recipe:
    return tiny_recipe(
        data=server.url + "/{train-{0..4},val-0}.tar", batch_size=8, save_minutes=99.0, max_skipped=0.02, **changes
    )


def test_a_run_that_stops_in_the_middle_of_an_epoch_ends_the_same(server: Server, tmp_path: Path) -> None:
    start(recipe_for(server), tmp_path / "whole", QUIET)
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        start(recipe_for(server, workers=2), run, QUIET, listener=interrupt_at(11))  # of 8 steps an epoch
    assert load_tensors(run / "state" / "last.safetensors")[1]["step_in_epoch"] == 3
    server.sent.clear()
    server.failures.update(dict.fromkeys((f"/train-{n}.tar" for n in range(5)), 1))
    resume(run, QUIET)
    expected, _ = load_tensors(tmp_path / "whole" / "model.safetensors")
    tensors, _ = load_tensors(run / "model.safetensors")
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    skipped = (run / "skipped.csv").read_text()
    assert skipped == (tmp_path / "whole" / "skipped.csv").read_text()
    assert [line.split(",")[:3] for line in skipped.splitlines()] == [["path", "label", "split"], [BAD, "2", "train"]]
    result = evaluate(run)
    assert (result["split"], result["n"]) == ("val", 9)


def stream(recipe: Recipe, run: Path, cache: Path, death: Death | None) -> None:
    os.environ["TOKENFUSION_CACHE"] = str(cache)
    if death:
        die_by(death)
    if (run / "recipe.toml").exists():
        resume(run, QUIET)
    else:
        start(recipe, run, QUIET)


def test_a_run_over_shards_that_is_killed_in_the_middle_of_epochs_ends_the_same(server: Server, tmp_path: Path) -> None:
    start(recipe_for(server), tmp_path / "whole", QUIET)
    recipe, run = replace(recipe_for(server, workers=1), save_minutes=0.0), tmp_path / "run"
    steps = []
    for death in (("half written", 7), ("time", 0.8), ("renamed", 5), ("not flushed", 3), None):
        process = begin(stream, recipe, run, tmp_path / "cache", death)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if death else 0)
        steps.append(load_tensors(run / "state" / "last.safetensors")[1]["step"])
    assert steps == sorted(steps)
    assert any(step % 8 > 0 for step in steps)  # of 8 steps an epoch
    expected, _ = load_tensors(tmp_path / "whole" / "model.safetensors")
    tensors, _ = load_tensors(run / "model.safetensors")
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_too_many_unreadable_images_end_the_run(server: Server, tmp_path: Path) -> None:
    said = rf"1 of 65 training images .* max_skipped=0 allows .*{BAD}: not an image"
    with pytest.raises(InputError, match=said):
        start(tiny_recipe(data=server.url, batch_size=8, epochs=3, max_skipped=0.0), tmp_path / "run", QUIET)
    assert BAD in (tmp_path / "run/skipped.csv").read_text()
    with pytest.raises(InputError, match=said):  # as nothing was mended
        resume(tmp_path / "run", QUIET)


def test_a_shard_that_vanishes_or_changes_ends_the_run_which_goes_on_once_it_is_back(
    server: Server, tmp_path: Path
) -> None:
    run, shard = tmp_path / "run", tmp_path / "shards/train-1.tar"
    with pytest.raises(Interrupted):
        start(recipe_for(server), run, QUIET, listener=interrupt_at(9))
    content = shard.read_bytes()
    shard.rename(tmp_path / "away.tar")
    with pytest.raises(InputError, match=r"train-1.tar: there is no such file; put it back"):
        resume(run, QUIET)
    shard.write_bytes(content + bytes(512))
    with pytest.raises(InputError, match=r"pixels of the training images are not those that the run began with"):
        resume(run, QUIET)
    shard.write_bytes(content)
    resume(run, QUIET)
    assert (run / "model.safetensors").exists()
