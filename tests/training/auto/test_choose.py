"""What `auto` chooses: the batch size, the learning rate, and when to stop."""

import json
import re
import shutil

import pytest
import torch
from rich.console import Console

from runs import interrupt_at, tiny_recipe
from tokenfusion import InputError, Recipe
from tokenfusion.checkpoint import load_tensors
from tokenfusion.options import AUTO_OPTIONS
from tokenfusion.recipe import dump_recipe, load_recipe
from tokenfusion.report import write_report
from tokenfusion.training import Interrupted, resume, start
from tokenfusion.training.auto import timing
from tokenfusion.training.auto.batch_size import choose_batch_size, largest_that_fits
from tokenfusion.training.auto.rate import LrRange
from tokenfusion.training.auto.timing import measuring_process
from tokenfusion.training.recovery import OutOfMemory
from tokenfusion.training.schedule import LATEST_DECAY, MAX_EPOCHS, decide_end, epochs_ahead, learning_rate
from tokenfusion.training.state import Progress

QUIET = Console(quiet=True)


def ignore(_text):
    pass


def test_auto_is_a_word_in_toml_and_on_the_command_line(tmp_path, command, monkeypatch):
    recipe = Recipe(batch_size="auto", lr="auto", epochs="auto", accumulate=3)
    text = dump_recipe(recipe)
    for line in ('batch_size = "auto"', 'lr = "auto"', 'epochs = "auto"', 'precision = "auto"'):
        assert line in text.splitlines()
    (tmp_path / "recipe.toml").write_text(text)
    assert Recipe(**load_recipe(tmp_path / "recipe.toml")) == recipe
    assert recipe.autos == ("epochs", "batch_size", "lr")
    with pytest.raises(InputError, match="weight_decay='auto' is of type str"):
        Recipe(weight_decay="auto")
    begun = []
    monkeypatch.setattr("tokenfusion.training.start", lambda recipe, *_: begun.append(recipe))
    words = ("--batch-size", "auto", "--lr", "auto", "--epochs", "auto", "--img-size", "9", "--model", "vit_micro")
    assert command("train", "digits", *words, "--out", tmp_path / "run")[0] == 0
    assert [(recipe.batch_size, recipe.lr, recipe.epochs) for recipe in begun] == [("auto", "auto", "auto")]


def test_help_says_which_numbers_may_be_auto_and_of_no_other_verb(command):
    shown = dict(re.findall(r"(--[\w-]+) ((?:INT|FLOAT)\S*)", command("train", "--help")[1]))
    assert {name for name, kind in shown.items() if kind in ("INT|auto", "FLOAT|auto")} == AUTO_OPTIONS
    assert (shown["--epochs"], shown["--lr"], shown["--accumulate"]) == ("INT|auto", "FLOAT|auto", "INT")
    assert "|auto" not in command("profile", "--help")[1]
    assert command("profile", "vit_micro", "--batch-size", "auto")[0] != 0


def test_the_batch_doubles_while_memory_suffices_and_a_size_that_would_take_too_much_is_not_tried():
    tried, said = [], []

    def measure(size):
        tried.append(size)
        return 100.0 + 3 * size

    # 128 would take 292 + 2 * (292 - 196) = 484; 256 would take 484 + 2 * (484 - 292) = 868
    chosen, reason = largest_that_fits(measure, [8, 16, 32, 64, 128, 256], 500.0, said.append)
    assert (chosen, tried) == (128, [8, 16, 32, 64, 128])
    assert reason == "256 would take about 868 of 500 MB"
    assert said[-1] == "batch_size=auto: 128 takes 484 of 500 MB"
    assert largest_that_fits(measure, [8, 16], 500.0, ignore) == (16, "32 would leave an epoch fewer than 20 steps")


def test_a_batch_that_did_not_fit_gives_the_one_before():
    def measure(size):
        if size > 16:
            raise OutOfMemory("17 GB were asked for")
        return 1.0

    assert largest_that_fits(measure, [8, 16, 32], 500.0, ignore) == (16, "32 does not fit (17 GB were asked for)")
    assert largest_that_fits(lambda size: size**2, [8, 16], 200.0, ignore) == (8, "16 takes 256 of 200 MB")
    assert largest_that_fits(float, [8, 16], 7.0, ignore)[0] == 0


def test_the_batch_is_measured_for_real_and_leaves_an_epoch_20_steps():
    recipe, said = tiny_recipe(batch_size="auto", accumulate=3), []
    chosen = choose_batch_size(recipe, 10, 300, said.append, memory_mb=1e9)
    assert chosen.batch_size == 12  # from 6 = 3 parts of 2, and 24 * 20 > 300
    assert "12 is chosen; 24 would leave an epoch fewer than 20 steps" in said[-1]
    with pytest.raises(InputError, match=r"6 takes .* of 1 MB; give a smaller --model or --img-size"):
        choose_batch_size(recipe, 10, 300, ignore, memory_mb=1.0)


def ask_for_too_much(*_):
    return bytearray(2**62)


def test_a_larger_batch_takes_more_memory_and_python_s_own_error_means_that_one_does_not_fit(monkeypatch):
    with measuring_process(tiny_recipe(img_size=(32, 32)), 10, steps=2) as measure:
        small, large = (measure(size) for size in (4, 256))
        monkeypatch.setattr(timing, "random_steps", ask_for_too_much)
        with pytest.raises(OutOfMemory, match="MemoryError"):
            measure(512)
    floats = 256 * 3 * 32 * 32 * 4 / 2**20  # the images alone
    assert large.peak_memory_mb - small.peak_memory_mb > floats
    assert 0 < small.grown_mb < small.peak_memory_mb


def test_the_rate_chosen_is_a_tenth_of_that_of_the_lowest_loss():
    tested = LrRange(rates=[1e-3, 1e-2, 0.1234, 1.0], losses=[3, 1, 2, 9], smoothed=[3.0, 2.0, 1.9, 4.0])
    assert tested.chosen == 0.012


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A run whose rate was chosen."""
    run = tmp_path_factory.mktemp("chosen") / "run"
    start(tiny_recipe(lr="auto", epochs=1), run, QUIET)
    return run


def test_the_run_holds_the_number_and_how_it_was_chosen(chosen):
    text = (chosen / "recipe.toml").read_text()
    assert text.startswith("# Chosen by measuring: lr.\n")
    tested = json.loads((chosen / "lr_range.json").read_text())
    assert load_recipe(chosen / "recipe.toml")["lr"] == tested["chosen"]
    assert tested["rates"][0] == 1e-5
    steps = [later / earlier for earlier, later in zip(tested["rates"], tested["rates"][1:], strict=False)]
    assert steps == pytest.approx([10 ** (5 / 99)] * len(steps))
    mean = 0.1 * tested["losses"][0] * 0.9 + 0.1 * tested["losses"][1]
    assert tested["smoothed"][:2] == pytest.approx([tested["losses"][0], mean / (1 - 0.9**2)])
    assert 1e-4 < tested["chosen"] <= 0.02  # 0.004 is what the tests train at; rounding differs among CPUs


def test_the_range_test_is_drawn_in_the_report(chosen):
    page = write_report(chosen).read_text()
    assert "Loss in the range test" in page
    assert "a tenth of the rate at which the smoothed loss is lowest" in page


def test_the_range_test_changes_nothing_but_the_rate_and_is_the_same_again(chosen, tmp_path):
    """Trained at the number itself, and chosen anew, the same bits come out."""
    rate = load_recipe(chosen / "recipe.toml")["lr"]
    start(tiny_recipe(lr=rate, epochs=1), tmp_path / "given", QUIET)
    expected, _ = load_tensors(chosen / "model.safetensors")
    tensors, _ = load_tensors(tmp_path / "given" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_a_run_that_was_killed_while_choosing_chooses_again_and_one_killed_later_does_not(chosen, tmp_path):
    run = shutil.copytree(chosen, tmp_path / "run")
    tested = (run / "lr_range.json").read_bytes()
    for name in ("model.json", "model.safetensors", "metrics.jsonl", "lr_range.json"):
        (run / name).unlink()
    shutil.rmtree(run / "state")
    (run / "recipe.toml").write_text(dump_recipe(tiny_recipe(lr="auto", epochs=1)))
    resume(run, QUIET)
    assert (run / "lr_range.json").read_bytes() == tested
    (run / "model.safetensors").unlink()
    (run / "lr_range.json").unlink()
    resume(run, QUIET)
    assert not (run / "lr_range.json").exists()
    assert (run / "model.safetensors").exists()


def test_an_open_end_warms_up_stays_and_falls_to_0():
    recipe = tiny_recipe(lr=1.0, epochs="auto", warmup_epochs=2.0)
    rates = [learning_rate(recipe, step, 4) for step in range(30)]
    assert rates == pytest.approx([(step + 1) / 9 for step in range(8)] + [1.0] * 22)
    # begun after 10 epochs, the decay takes 2 of 4 steps each: 1 - sqrt(done / 8)
    falling = [learning_rate(recipe, step, 4, decay_epoch=10) for step in range(40, 48)]
    assert falling == pytest.approx([1 - (done / 8) ** 0.5 for done in range(8)])


def ended(recipe, accuracies):
    """Epochs done when each thing was decided, for such held-out accuracies."""
    progress = Progress()
    for accuracy in accuracies:
        progress.epoch += 1
        if accuracy > progress.best_score:
            progress.best_score, progress.best_epoch = accuracy, progress.epoch
        decide_end(recipe, progress)
        if progress.finished:
            break
    return progress.decay_epoch, progress.epoch, progress.finished


def test_an_open_end_decays_when_patience_ends():
    recipe = tiny_recipe(epochs="auto", warmup_epochs=1.0, patience=3)
    # the best after 4, so that 7 decides; 0.2 * 7 rounds up to 2 epochs of decay, a better accuracy in them or not
    assert ended(recipe, [0.1, 0.2, 0.2, 0.5, 0.4, 0.5, 0.3, 0.9, 0.95, 1.0]) == (7, 9, True)
    assert ended(recipe, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == (0, 6, False)
    assert ended(tiny_recipe(epochs="auto", warmup_epochs=4.0, patience=3), [0.0] * 9) == (7, 9, True)
    assert ended(tiny_recipe(epochs="auto", warmup_epochs=0.0), [0.0] * 99) == (11, 14, True)  # waits for 10


def test_an_open_end_has_a_ceiling():
    recipe = tiny_recipe(epochs="auto")
    assert ended(recipe, [epoch / 1000 for epoch in range(400)]) == (LATEST_DECAY, MAX_EPOCHS, True)
    assert epochs_ahead(recipe, Progress(epoch=100)) == 200
    assert epochs_ahead(recipe, Progress(epoch=11, decay_epoch=10)) == 1
    assert epochs_ahead(tiny_recipe(epochs=7), Progress(epoch=3)) == 4


# Never better than at first.
OPEN = tiny_recipe(epochs="auto", lr=1e-12, warmup_epochs=0.0, patience=2, img_size=(4, 4))


@pytest.fixture(scope="module")
def open_ended(tmp_path_factory):
    run = tmp_path_factory.mktemp("open") / "run"
    start(OPEN, run, QUIET)
    return run


def records_of(run):
    times = {"seconds", "images_per_s", "peak_memory_mb"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in times} for line in lines]


def test_a_run_with_an_open_end_ends_and_says_so(open_ended):
    assert [record["epoch"] for record in records_of(open_ended)] == [1, 2, 3, 4]  # 3 decides, 1 more of decay
    _, progress = load_tensors(open_ended / "state" / "last.safetensors")
    assert (progress["decay_epoch"], progress["finished"]) == (3, True)
    assert load_recipe(open_ended / "recipe.toml")["epochs"] == "auto"
    assert ">4<" in write_report(open_ended).read_text()  # and not "4 of -1"


def test_a_run_stopped_in_its_final_decay_resumes_exactly(open_ended, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        start(OPEN, run, QUIET, listener=interrupt_at(3 * 11 + 4))
    _, progress = load_tensors(run / "state" / "last.safetensors")
    assert (progress["decay_epoch"], progress["step"]) == (3, 37)
    resume(run, QUIET)
    assert records_of(run) == records_of(open_ended)
    tensors, _ = load_tensors(run / "model.safetensors")
    expected, _ = load_tensors(open_ended / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
