"""Save some held-out digits of a run as PNG files, to try `tokenfusion predict` on.

Usage: python examples/save_digits.py RUN FOLDER
"""

import csv
import sys
from pathlib import Path

from torchvision.io import write_png

from tokenfusion.data.open import open_dataset


def main(run: Path, folder: Path, number: int = 8) -> None:
    source = open_dataset("digits")
    with (run / "split.csv").open(newline="") as file:
        held_out = [row["path"] for row in csv.DictReader(file) if row["split"] == "val"]
    folder.mkdir(parents=True, exist_ok=True)
    for name in held_out[:number]:
        index = source.names.index(name)
        digit = source.classes[source.labels[index]]
        write_png(source.decode(index, max_pixels=64).contiguous(), str(folder / f"a {digit} ({index}).png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
