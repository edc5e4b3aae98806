"""Attention collapse watched while a model trains: what is logged, and that training does not notice."""

import json

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runs import small_recipe
from tokenfusion import InputError, create_model
from tokenfusion.analyze.collapse import watch_collapse
from tokenfusion.report.plots import plot_curves
from tokenfusion.training import resume, start

NAMES = {
    f"collapse/{name}"
    for name in (
        "neighbour_similarity",
        "similar_blocks",
        "head_similarity",
        "entropy",
        "token_similarity",
        "effective_rank",
    )
}


def epochs_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def watched(run):
    return [{name: value for name, value in epoch.items() if name in NAMES} for epoch in epochs_of(run)]


def train(run, measure=watch_collapse, **changes):
    start(small_recipe(model="wide(with(vit_micro,depth=3),0.5)", **changes), run, Console(quiet=True), measure)
    return run


@pytest.fixture(scope="module")
def with_watch(tmp_path_factory):
    return train(tmp_path_factory.mktemp("watched") / "run", epochs=4, every=2)


def test_uniform_attention_has_collapsed_altogether():
    model = create_model("vit_micro", num_classes=7)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: 2 * 96].zero_()  # queries and keys
            block.attn.qkv.bias[: 2 * 96].zero_()
    found = watch_collapse(model, torch.randn(3, 3, 32, 24))
    assert found.keys() == NAMES
    for name in ("neighbour_similarity", "similar_blocks", "head_similarity", "entropy"):
        assert found[f"collapse/{name}"] == pytest.approx(1, abs=1e-5)
    assert found["collapse/token_similarity"] < 0.99


def test_it_leaves_the_model_as_it_was():
    model = create_model("deepvit_micro").train()
    model.blocks[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    first = torch.get_rng_state()
    watch_collapse(model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), first)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_watched_run_is_bit_equal_to_one_that_is_not(with_watch, tmp_path):
    alone = train(tmp_path / "run", epochs=4)
    assert (alone / "model.safetensors").read_bytes() == (with_watch / "model.safetensors").read_bytes()
    assert [epoch["train_loss"] for epoch in epochs_of(alone)] == [
        epoch["train_loss"] for epoch in epochs_of(with_watch)
    ]
    assert watched(alone) == 4 * [{}]


def test_every_second_epoch_is_logged(with_watch):
    rows = watched(with_watch)
    assert [row.keys() for row in rows] == [set(), NAMES, set(), NAMES]
    assert rows[1] != rows[3]
    events = EventAccumulator(str(with_watch / "events")).Reload()
    logged = events.Scalars("collapse/neighbour_similarity")
    steps = [epoch["step"] for epoch in epochs_of(with_watch)]
    assert [event.step for event in logged] == [steps[1], steps[3]]
    assert logged[1].value == pytest.approx(rows[3]["collapse/neighbour_similarity"])


def test_a_run_that_is_resumed_goes_on_watching(with_watch, tmp_path):
    calls = []

    def dies_in_the_fourth_epoch(model, images):
        calls.append(len(images))
        if len(calls) == 3:  # the first is the check before training
            raise KeyboardInterrupt
        return watch_collapse(model, images)

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(run, dies_in_the_fourth_epoch, epochs=4, every=2)
    assert calls[1:] == [32, 32]
    assert len(epochs_of(run)) == 3
    resume(run, Console(quiet=True), watch_collapse)
    assert watched(run) == watched(with_watch)
    assert (run / "model.safetensors").read_bytes() == (with_watch / "model.safetensors").read_bytes()


def test_a_model_without_attention_is_refused_before_anything_is_trained(tmp_path, command):
    run = tmp_path / "run"
    status, _, errors = command(
        "train", "digits", "--model", "resnet_micro", "--img-size", 8, "--every", 1, "--out", run
    )
    assert status == 2
    assert "every=1 does not go with resnet_micro" in errors
    assert "has no attention that can be seen" in errors
    assert "leave out --every" in errors
    assert not run.exists()


def test_without_a_measurement_there_is_nothing_to_watch(tmp_path):
    with pytest.raises(InputError, match="every=1 has nothing to measure"):
        train(tmp_path / "run", measure=None, every=1)


def test_compare_refuses_it(tmp_path, command):
    status, _, errors = command("compare", "digits", "--models", "vit_micro", "--every", 2, "--out", tmp_path / "out")
    assert status == 2
    assert "every=2 looks at attention" in errors
    assert "analyze collapse" in errors


def test_the_report_draws_it(with_watch):
    figures = plot_curves(epochs_of(with_watch))
    assert len(figures) == 5
    assert "neighbouring blocks" in figures[3]
    assert "Effective rank" in figures[4]
    plain = [{key: value for key, value in epoch.items() if key not in NAMES} for epoch in epochs_of(with_watch)]
    assert len(plot_curves(plain)) == 3
