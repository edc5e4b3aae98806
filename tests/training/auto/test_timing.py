"""What a step is timed on, and a model of which none can be taken."""

import shutil

import pytest
import torch

from runs import small_recipe
from serving import serving, write_shards
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError
from tokenfusion.training.auto import timing
from tokenfusion.training.muon import Muon


def test_of_many_shards_only_those_of_the_first_batches_are_fetched(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("TOKENFUSION_CACHE", str(cache))
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    sizes = {f"train-{i}.tar": 16 for i in range(4)} | {"val-0.tar": 6}
    with serving(write_shards(tmp_path / "shards", sizes)) as server:
        recipe = small_recipe(data=f"{server.url}/{{train-{{0..3}},val-0}}.tar", batch_size=4)
        assert len(open_dataset(recipe.data)) == 70
        for path in cache.iterdir():  # what the shards hold stays known, they themselves do not
            if path.name != "indexes":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        server.sent.clear()
        assert timing.own_steps(recipe, threads=1) > 0
        assert {path for path in server.sent if path.endswith(".tar")} == {"/train-0.tar"}


def run_short(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def in_forward(classifier):
    classifier.model.register_forward_hook(run_short)


def not_finite(classifier):
    classifier.model.register_forward_hook(lambda _model, _inputs, output: output * float("nan"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            in_forward,
            r"memory ran out \(CUDA out of memory\) while steps of tokenfusion_early_micro were .* --batch-size, or",
        ),
        (not_finite, r"the loss is nan while steps of tokenfusion_early_micro were timed; give a lower --lr, or"),
    ],
)
def test_a_model_whose_steps_cannot_be_taken_is_refused_by_name(fault, said, monkeypatch):
    build = timing.build

    def build_faulty(*arguments):
        classifier = build(*arguments)
        fault(classifier)
        return classifier

    monkeypatch.setattr(timing, "build", build_faulty)
    with pytest.raises(InputError, match=said):
        timing.own_steps(small_recipe(), threads=1)


def test_memory_that_runs_out_while_weights_move_names_no_run_to_go_on_with(monkeypatch):
    monkeypatch.setattr(Muon, "step", run_short)
    with pytest.raises(InputError, match=r"memory ran out .* were timed; .*leave it out$") as refused:
        timing.own_steps(small_recipe(), threads=1)
    assert "--resume" not in str(refused.value)
