"""Train a small classifier on the built-in digits from Python, and classify with it.

Usage: python examples/train.py OUT
"""

import sys
from pathlib import Path

import tokenfusion
from tokenfusion.training import Update


def show(update: Update) -> None:
    """Print a line after every epoch; `update.record` is None after a step."""
    if update.record:
        print(f"epoch {update.epoch} of {update.epochs}: accuracy {update.record['val_top1']:.1%}")


def main(out: Path, epochs: int = 5) -> None:
    recipe = tokenfusion.Recipe("digits", model="vit_micro", img_size=(8, 8), epochs=epochs, hflip=0.0, crop_scale=0.6)
    classifier = tokenfusion.train(recipe, out, progress=show)
    print(f"{out} knows {', '.join(classifier.classes)}; load it again by tokenfusion.Classifier.load({str(out)!r})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
