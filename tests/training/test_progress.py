"""What a person sees of training."""

import io
from dataclasses import replace

from rich.console import Console

from tokenfusion.training.progress import Display, Update

RECORD = {
    "epoch": 3, "step": 30, "lr": 0.1, "train_loss": 1.25, "train_top1": 0.5, "val_loss": 0.75, "val_top1": 0.625,
    "seconds": 10.0, "images_per_s": 1234.4, "peak_memory_mb": 1.0,
}  # fmt: skip


def shown(terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=140, color_system=None)
    update = Update(step=25, steps=50, epoch=3, epochs=5, loss=1.25, score=0.5, images_per_s=1234.4)
    with Display(console) as display:
        display(update)
        display.bar.refresh()
        display(replace(update, record=RECORD, seconds_left=65.0))
    return output.getvalue()


def test_a_terminal_gets_a_bar_with_epoch_speed_loss_accuracy_and_time_left():
    output = shown(terminal=True)
    for part in ("epoch 3/5", "25/50", "1,234 images/s", "loss 1.250", "accuracy 50.0%", "left"):
        assert part in output


def test_a_file_gets_a_plain_line_an_epoch_and_no_bar():
    (line,) = shown(terminal=False).splitlines()
    assert line == (
        "epoch 3/5  train loss 1.250 accuracy 50.00%  held-out loss 0.750 accuracy 62.50%  1,234 images/s  1:05 left"
    )
