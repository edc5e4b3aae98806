"""What the loop does besides resuming: accumulate, stop early, average weights, refuse what is not finite."""

import itertools
import json

import pytest
import torch
from rich.console import Console

from runs import small_recipe, tiny_recipe
from tokenfusion import Classifier, InputError
from tokenfusion.checkpoint import load_tensors
from tokenfusion.data.augment import Augment
from tokenfusion.data.decoded import read_images
from tokenfusion.data.loader import TrainLoader
from tokenfusion.data.open import open_dataset
from tokenfusion.training import build, loop, start
from tokenfusion.training.distributed.world import Requests
from tokenfusion.training.log import Log
from tokenfusion.training.loop import fit
from tokenfusion.training.objective import BatchMixing, CrossEntropy
from tokenfusion.training.optimizer import make_optimizer
from tokenfusion.training.setup import Run, Setup
from tokenfusion.training.state import TrainState
from tokenfusion.training.step import train_step

QUIET = Console(quiet=True)
CROSSVIT, PROBE = "fuse(resnet_micro,crossvit_micro,layerwise)", "fuse(resnet_micro,vit_micro,probe)"


def setup_of(recipe, folder):
    source = open_dataset("digits")
    images, _ = read_images(source, range(64), max_pixels=64, cache_bytes=2**20)
    torch.manual_seed(0)
    classifier = Classifier.create(recipe.model, source.classes, img_size=recipe.img_size, precision="fp32")
    loader = TrainLoader(images, Augment((8, 8), 3, 1.0, 0.0, False), batch_size=32, seed=0, workers=0)
    state = TrainState(classifier.model, make_optimizer(classifier.model, recipe), recipe.ema, keep_best=False)
    run = Run(folder, QUIET)
    return Setup(recipe, run, classifier, loader, BatchMixing(recipe, 10), CrossEntropy(0.1), images), state


def step(setup, state):
    return train_step(setup, state, next(setup.batches.epoch(0)), Requests())


def freeze_batch_norm(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda _mode=True, module=module: module  # stays in evaluation
            module.training = False


def test_accumulated_parts_make_the_gradient_of_the_whole_batch(tmp_path):
    results = []
    for accumulate in (1, 4):
        recipe = small_recipe(batch_size=32, accumulate=accumulate, drop_path=0.0, precision="fp32")
        setup, state = setup_of(recipe, tmp_path)
        freeze_batch_norm(state.model)  # its statistics are those of a part
        gradients = {}
        state.optimizer.register_step_pre_hook(
            lambda *_, into=gradients, model=state.model: into.update(
                {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
            )
        )
        results.append((*step(setup, state), gradients))
    (loss, correct, whole), (loss_in_parts, correct_in_parts, parts) = results
    assert loss_in_parts == pytest.approx(loss, rel=1e-5)
    assert correct_in_parts == correct
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-3, atol=1e-6, msg=key)


def test_a_gradient_is_clipped_to_its_norm(tmp_path):
    recipe = small_recipe(batch_size=32, clip_grad=1e-3)
    setup, state = setup_of(recipe, tmp_path)
    norms = []
    state.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
        )
    )
    step(setup, state)
    assert norms[0].item() == pytest.approx(1e-3, rel=1e-3)


def test_each_group_learns_at_its_share_of_the_rate(tmp_path):
    rates = {"lr": 0.02, "backbone_lr": 0.25, "head_lr": 3.0}
    recipe = small_recipe(batch_size=32, warmup_epochs=0.0, optimizer="adamw", **rates)
    setup, state = setup_of(recipe, tmp_path)
    parameters = dict(state.model.named_parameters())
    before = {key: value.detach().clone() for key, value in parameters.items()}
    step(setup, state)
    assert {group["lr"] for group in state.optimizer.param_groups} == {0.02, 0.005, 0.06}
    # the first step of AdamW is as long as the rate wherever there is a gradient
    for name, rate in (("vit.norm.bias", 0.005), ("pixel_source.pixels.norm.bias", 0.02), ("vit.head.bias", 0.06)):
        longest = (parameters[name] - before[name]).abs().max().item()
        assert longest == pytest.approx(rate, rel=1e-3), name


def test_frozen_parents_stay_as_they_are_and_so_do_their_averages(tmp_path):
    recipe = tiny_recipe(freeze="both", ema=0.9, epochs=1)
    start(recipe, tmp_path / "run", QUIET)
    trained = Classifier.load(tmp_path / "run").model
    untrained = build(recipe, open_dataset("digits").classes).model
    before = untrained.state_dict()
    changed = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if untrained.part_of(name) in ("fusion", "head")}


@pytest.mark.parametrize(("option", "value"), [("freeze", "cnn"), ("branch_dropout", 0.2), ("side_loss", 0.5)])
def test_only_what_is_fused_has_sides_to_freeze_drop_or_ask(option, value):
    with pytest.raises(InputError) as refused:
        build(small_recipe(model="vit_micro", **{option: value}), ("a", "b"))
    asked, remedy = f"{option}={value} needs a CNN and", f"leave out --{option.replace('_', '-')}"
    assert str(refused.value).startswith(asked)
    assert f"vit_micro is no such model; {remedy}" in str(refused.value)


@pytest.mark.parametrize(
    ("option", "recipe", "said"),
    [
        ("branch_dropout", {"model": CROSSVIT}, "a CrossViT has two; take another .*, or leave out --branch-dropout"),
        ("branch_dropout", {"model": PROBE, "tune": "probe"}, "give --tune fusion"),
        ("side_loss", {"model": CROSSVIT}, "side_loss=0.2 asks the pixels alone, beside which a CrossViT's head reads"),
        ("side_loss", {"model": PROBE, "tune": "probe"}, r"that of fuse\(CNN,VIT,probe\) is fitted on both at once"),
        ("side_loss", {"model": PROBE, "tune": "fusion"}, "take another strategy, or leave out --side-loss"),
    ],
)
def test_sides_are_dropped_or_asked_whole_or_not_at_all(option, recipe, said):
    with pytest.raises(InputError, match=said):
        build(small_recipe(**{option: 0.2, "img_size": 32} | recipe), ("a", "b"))


def test_a_recipe_drops_sides_while_training():
    assert build(small_recipe(branch_dropout=0.2), ("a", "b")).model.branch_dropout == 0.2


def test_the_average_is_the_weighted_sum_of_the_weights(tmp_path):
    setup, state = setup_of(small_recipe(batch_size=32, ema=0.9), tmp_path)
    step(setup, state)
    state.progress.step = 1_000_000  # past the warm-up of the decay
    before = state.average.module.get_classifier().weight.clone()
    state.update_average()
    expected = 0.9 * before + 0.1 * state.model.get_classifier().weight
    torch.testing.assert_close(state.average.module.get_classifier().weight, expected)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"(loss|norm) is (nan|inf) at step \d+ \(epoch \d+, batch \d+: .*lower --lr"):
        start(tiny_recipe(epochs=9, lr=100.0, clip_grad=0.0, warmup_epochs=3.0, save_minutes=9.0), run, QUIET)


@pytest.fixture
def broken(tmp_path):
    """A run whose weights are not finite any more; the checkpoint of when they were is the same after the test."""
    setup, state = setup_of(small_recipe(batch_size=32), tmp_path)
    setup.run.checkpoint.parent.mkdir()
    state.save(setup.run.checkpoint)
    before = setup.run.checkpoint.read_bytes()
    state.model.get_classifier().bias.data[0] = torch.nan
    yield setup, state
    assert setup.run.checkpoint.read_bytes() == before


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(broken, tmp_path):
    setup, state = broken
    with pytest.raises(InputError, match=r"the loss is nan at step 1 .*the last good checkpoint is kept as"):
        fit(setup, state, lambda _: None, Log(tmp_path, []))


def test_weights_that_are_not_finite_never_replace_a_checkpoint(broken):
    setup, state = broken
    with pytest.raises(InputError, match=r"bias is not finite after step 0; the last good .* lower --lr"):
        state.save(setup.run.checkpoint)


def first_loss(run, **changes):
    """The loss of a run of one step."""
    start(tiny_recipe(epochs=1, batch_size=1024, **changes), run, QUIET)
    return json.loads((run / "metrics.jsonl").read_text())["train_loss"]


@pytest.fixture(scope="module")
def plain_loss(tmp_path_factory):
    return first_loss(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"label_smoothing": 0.3},
        {"balance": "loss"},
        {"balance": "sampling"},
        {"trivial_augment": True},
        {"rand_augment": 9.0},
        {"color_jitter": 0.4},
        {"random_erasing": 1.0},
        {"repeats": 3},
        {"mixup": 0.4},
        {"cutmix": 1.0},
        {"drop_path": 0.5},
        {"crop_scale": 0.9},
        {"hflip": 1.0},
    ],
    ids=lambda change: next(iter(change), "none"),
)
def test_fields_of_the_recipe_act_and_nothing_else_does(change, tmp_path, plain_loss):
    assert (first_loss(tmp_path / "run", **change) != plain_loss) is bool(change)


def test_one_value_per_channel_is_refused_with_the_remedy(tmp_path):
    recipe = small_recipe(model="resnet_micro", batch_size=1, img_size=(4, 4), drop_path=0.0)
    with pytest.raises(InputError, match=r"BatchNorm sees a single value per channel .* larger --batch-size"):
        start(recipe, tmp_path / "run", QUIET)


def test_without_a_checkpoint_none_is_promised(tmp_path):
    recipe = tiny_recipe(epochs=9, lr=100.0, clip_grad=0.0, warmup_epochs=0.0, optimizer="adamw")
    with pytest.raises(InputError, match=r"there is no checkpoint yet"):
        start(recipe, tmp_path / "run", QUIET)


def test_the_time_that_a_save_takes_is_not_counted_as_training(tmp_path, monkeypatch):
    setup, state = setup_of(tiny_recipe(batch_size=32, epochs=1, save_minutes=0.0), tmp_path)
    ticks, save = itertools.count(), state.save
    monkeypatch.setattr(loop, "perf_counter", lambda: next(ticks))
    seconds = []

    def slow_save(path):
        seconds.append(state.progress.seconds)
        save(path)
        for _ in range(1000):
            next(ticks)

    state.save = slow_save
    setup.run.checkpoint.parent.mkdir()
    fit(setup, state, lambda _: None, None)
    assert len(seconds) == 3  # after each step and after the epoch
    assert state.progress.records[0]["seconds"] < 1000


def test_an_open_end_is_at_most_300_epochs_away_until_it_is_decided(tmp_path):
    setup, state = setup_of(tiny_recipe(batch_size=32, epochs="auto"), tmp_path)
    state.progress.epoch = 11
    assert (loop.update(setup, state).epochs, loop.update(setup, state).steps) == (300, 600)
    state.progress.decay_epoch = 10
    assert (loop.update(setup, state).epochs, loop.update(setup, state).steps) == (12, 24)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimiser_keeps_tensors_alone(optimizer, tmp_path):
    """A checkpoint holds tensors."""
    setup, state = setup_of(tiny_recipe(batch_size=32, optimizer=optimizer), tmp_path)
    step(setup, state)
    kept = [value for moments in state.optimizer.state.values() for value in moments.values()]
    assert kept
    assert all(isinstance(value, torch.Tensor) for value in kept)


def test_patience_stops_early_and_ships_the_best_epoch(tmp_path):
    run = tmp_path / "run"
    start(tiny_recipe(epochs=50, patience=2, lr=0.02, warmup_epochs=0.0, ema=0.0, batch_size=512), run, QUIET)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [record["val_top1"] for record in records]
    best = accuracies.index(max(accuracies))
    assert len(records) == best + 3 < 50
    shipped, _ = load_tensors(run / "model.safetensors")
    state, progress = load_tensors(run / "state" / "last.safetensors")
    assert progress["best_epoch"] == best + 1
    for name, tensor in shipped.items():
        assert torch.equal(tensor, state[f"best.{name}"])
    assert not torch.equal(shipped["vit.head.weight"], state["model.vit.head.weight"])


def test_training_learns_and_logs(learned):
    records = [json.loads(line) for line in (learned / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert [record["step"] for record in records] == [11, 22, 33, 44]
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert records[-1]["val_top1"] > 0.8
    assert all(record["images_per_s"] > 0 and record["peak_memory_mb"] > 0 for record in records)


def test_tensorboard_reads_the_events(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "events")).Reload()
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    logged = [(event.step, event.value) for event in events.Scalars("val_top1")]
    assert [step for step, _ in logged] == [11, 22, 33, 44]
    assert [value for _, value in logged] == pytest.approx([record["val_top1"] for record in records])


def test_gradient_checkpointing_trains_to_the_same_weights(tmp_path):
    for name, on in (("with", True), ("without", False)):
        start(tiny_recipe(epochs=1, grad_checkpointing=on), tmp_path / name, QUIET)
    with_, _ = load_tensors(tmp_path / "with" / "model.safetensors")
    without, _ = load_tensors(tmp_path / "without" / "model.safetensors")
    for name, tensor in without.items():
        assert torch.equal(with_[name], tensor), name
