"""Whoever reads a run's images again understands them as training did."""

import shutil

import numpy as np
from PIL import Image

from runs import TINY


def test_a_list_of_other_columns_elsewhere_is_judged_drawn_and_explained_as_it_was_trained(command, tmp_path):
    images, lists, run = tmp_path / "images", tmp_path / "lists", tmp_path / "run"
    images.mkdir()
    lists.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(images / f"{number}.png")
    rows = "".join(f"{number}.png,{'ab'[number % 2]},{number}\n" for number in range(len(pixels)))
    (lists / "x.csv").write_text("where,what,note\n" + rows)
    reading = ("--root", images, "--path-column", "where", "--label-column", "what")
    command("train", lists / "x.csv", *reading, "--model", TINY, "--img-size", 8, "--epochs", 1, "--out", run)
    status, _, errors = command("evaluate", run)
    assert (status, errors) == (0, "")
    status, output, errors = command("report", run)
    assert status == 0, errors
    assert "moved" not in output + errors
    status, _, errors = command("explain", run)
    assert status == 0, errors
    shutil.copytree(lists, tmp_path / "new")  # another list of the same columns, beside its images
    shutil.copytree(images, tmp_path / "new", dirs_exist_ok=True)
    status, output, errors = command("evaluate", run, tmp_path / "new" / "x.csv")
    assert status == 0, errors
