"""What the papers' pages tell of published figures, from `tokenfusion.models.published`, and of a detector."""

from results_page import load, table

from tokenfusion.formatting import counted
from tokenfusion.models.published import COLLAPSE, PUBLISHED


def collapse() -> str:
    """DeepViT beside a ViT of the same depth, as its paper prints them: accuracy, and blocks that attend alike."""
    rows = []
    for name, found in COLLAPSE.items():
        depth, top1 = name.removeprefix("deepvit_"), PUBLISHED[name]["top1"]["paper"]
        rows.append([depth, found["vit_top1"], found["vit_similar"], top1, found["similar"]])
    heading = ["blocks", "ViT, top-1 %", "similar blocks", "DeepViT, top-1 %", "similar blocks"]
    return table(heading, rows)


def detector() -> str:
    """What `examples/detector.py` reached with CMT-S as the backbone of a detector."""
    found = load("detector")
    before, after = found["before"], found["after"]
    rows = [
        [what, *(f"{when[key]:.1%}" for when in (before, after))]
        for what, key in (
            ("average precision at an IoU of 0.5, mean of ten classes", "ap50"),
            ("digits that one of ten boxes covers by an IoU of 0.5", "recall50"),
            ("mean IoU of a digit with the best of ten boxes", "iou"),
        )
    ]
    return (
        f"`{found['command']}`: {found['steps']} steps of {found['batch_size']} images of {found['side']} px, from "
        f"random weights, in {found['processor_minutes']:.1f} minutes of a processor on {found['hardware']}, by "
        f"{counted(found['threads'], 'thread')}. The loss: {found['loss_first']:.2f} in the first tenth of the steps, "
        f"{found['loss_last']:.2f} in the last. Of "
        f"{found['held_out']} held-out images:\n\n{table(['one run', 'before', 'after'], rows)}"
    )
