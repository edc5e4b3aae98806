"""The report, read back as a browser's parser reads it, from run folders made of real files."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenfusion.errors import InputError
from tokenfusion.metrics import wilson_interval
from tokenfusion.recipe import Recipe, dump_recipe
from tokenfusion.report import write_figures, write_report
from tokenfusion.report.confusion import draw_heatmap, shortened
from tokenfusion.report.page import prose
from tokenfusion.report.run import MAX_MISTAKES

SCRIPT = "<script>alert(1)</script>"
CLASSES = ["cat", SCRIPT, "$x^{ & two\nlines", "unicorn"]
# rows truth: 8 cats, 5 scripts, 3 of two lines, and no unicorn, for which one cat is taken
CONFUSION = [[6, 1, 0, 1], [2, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]]
PER_CLASS = [(6 / 8, 6 / 8, 6 / 8, 8), (3 / 4, 3 / 5, 2 / 3, 5), (1.0, 1.0, 1.0, 3), (0.0, None, 0.0, 0)]


def epoch(number: int, **changes: Any) -> dict[str, Any]:
    line = {"epoch": number, "step": 36 * number, "lr": 0.001 / number, "train_loss": 2.0 / number, "train_top1": 0.5}
    line |= {
        "val_loss": 1.9 / number,
        "val_top1": 0.6125,
        "seconds": 50.0,
        "images_per_s": 1234.5,
        "peak_memory_mb": 612,
    }
    return line | changes


def predictions() -> list[tuple[str, str, str, float]]:
    """A row for each count of the confusion matrix, each with another score."""
    pairs = [(t, p) for t, row in enumerate(CONFUSION) for p, count in enumerate(row) for _ in range(count)]
    return [(f"im {i}.png", CLASSES[t], CLASSES[p], (i * 7 % 16 + 1) / 20) for i, (t, p) in enumerate(pairs)]


def write_csv(path: Path, header: str, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([header.split(","), *rows])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my run"
    folder.mkdir()
    recipe = Recipe(
        data="photos & <b>more</b>", model="tokenfusion_early_micro", epochs=3, img_size=(40, 24), lr=0.00173
    )
    (folder / "recipe.toml").write_text(dump_recipe(recipe))
    versions = {"tokenfusion": "0.1.0", "torch": "2.14.1", "timm": "1.0.31", "python": "3.11.2"}
    model = {"format": 1, "name": "tokenfusion_early_micro", "classes": CLASSES, "preprocess": {}}
    model |= {"precision": "auto", "max_pixels": 100}
    model |= {"parameters": 1234567, "macs": 38_400_000, "versions": versions, "hardware": "AMD EPYC, 2 cores"}
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(epoch(i)) + "\n" for i in (1, 2)))
    keys = ("precision", "recall", "f1", "n")
    evaluation = {"data": "photos", "split": "test", "n": 16, "top1": 12 / 16, "top5": 1.0, "top1_ci95": [0.505, 0.898]}
    evaluation |= {"loss": 0.5432, "ece": 0.0321, "temperature": 1.47, "confusion": CONFUSION, "skipped": 2}
    evaluation["per_class"] = {
        name: dict(zip(keys, row, strict=True)) for name, row in zip(CLASSES, PER_CLASS, strict=True)
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    write_csv(folder / "predictions.csv", "path,label,prediction,score", predictions())
    skipped = [("a\nb.jpg", SCRIPT, "test", "0 bytes"), ("c.png", "cat", "train", "truncated at 120 of 4,096 bytes")]
    for name, image in zip(("skipped-1.csv", "skipped.csv"), skipped, strict=True):  # two processes trained
        write_csv(folder / name, "path,label,split,reason", [image])
    return folder


class Page(HTMLParser):
    """A page's tags, and each section's text and table."""

    def __init__(self, run: Path, thumbnails: Callable[[list[str]], dict[str, bytes]] | None = None) -> None:
        super().__init__()
        self.section = "header"
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {"header": ""}
        self.table: dict[str, list[list[str]]] = {}
        self.figures: list[str] = []
        self.open: list[str] = []
        self.source = write_report(run, thumbnails).read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
            self.text[self.section] = ""
        elif tag == "tr":
            self.table.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.table[self.section][-1].append("")
        elif tag == "figure":
            self.figures.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text[self.section] += data
        if {"td", "th"} & set(self.open):
            self.table[self.section][-1][-1] += data
        if "figure" in self.open:
            self.figures[-1] += data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def png(names: list[str]) -> dict[str, bytes]:
    """A picture of its own for each name."""
    pictures = {}
    for i, name in enumerate(names):
        buffer = io.BytesIO()
        Image.fromarray(np.full((5, 9, 3), i, dtype=np.uint8)).save(buffer, "PNG")
        pictures[name] = buffer.getvalue()
    return pictures


def test_the_file_needs_nothing_but_itself(run: Path) -> None:
    page = Page(run, png)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "base", "a")]
    assert all(address.startswith("data:image/png;base64,") for address in page.attributes("src"))
    assert all(address.startswith("#") for address in page.attributes("href") + page.attributes("xlink:href"))
    assert "://" not in page.source
    assert "@import" not in page.source
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_ids_are_unique_and_references_lead_somewhere(run: Path) -> None:
    page = Page(run)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    used = [a.removeprefix("#") for a in page.attributes("xlink:href")]
    used += [a.removeprefix("url(#").removesuffix(")") for a in page.attributes("clip-path")]
    assert used
    assert set(used) <= set(ids)


def test_headline(run: Path) -> None:
    text = Page(run).text["header"]
    assert "tokenfusion_early_micro was trained for 2 epochs on photos & <b>more</b>, and judged on 16 images" in text
    assert "It named 12 of them correctly: 75.00%." in text
    assert "between 50.5% and 89.8% (95% interval)" in text
    assert f"It finds “{SCRIPT}” least often, 3 of 5 times." in text
    assert f"Its commonest mistake is to take “{SCRIPT}” for “cat”: 2 times." in text
    # the mean of 1/20 ... 16/20 is 0.425, below the accuracy of 0.75
    assert "off by 3.2 percentage points on average, on the whole too low" in text
    assert "2 images could not be read and are not counted." in text
    assert "4 wrong, 2 skipped" in text


def test_every_class_with_its_numbers(run: Path) -> None:
    head, *rows = Page(run).table["classes"]
    assert head == ["Class", "Images", "Right", "Recall", "95% interval", "", "Precision", "F1"]
    low, high = wilson_interval(6, 8)
    assert rows == [
        ["cat", "8", "6", "75.0%", f"{low:.1%} to {high:.1%}", "", "75.0%", "75.0%"],
        [SCRIPT, "5", "3", "60.0%", "23.1% to 88.2%", "", "75.0%", "66.7%"],
        ["$x^{ & two\\nlines", "3", "3", "100.0%", "43.9% to 100.0%", "", "100.0%", "100.0%"],
        ["unicorn", "0", "0", "–", "–", "", "0.0%", "0.0%"],
    ]


def test_confusion_matrix(run: Path) -> None:
    page = Page(run)
    head, *rows = page.table["confusion"]
    names = ["cat", SCRIPT, "$x^{ & two\\nlines", "unicorn"]
    assert head == ["", *names]
    assert [row[0] for row in rows] == names
    assert [[int(cell or 0) for cell in row[1:]] for row in rows] == CONFUSION
    assert f"{SCRIPT} taken for cat: 40.0%" in page.attributes("title")


def test_many_classes_show_the_most_confused() -> None:
    # of five classes, b and d mistake each other most, then e is taken for a
    confusion = np.diag([9, 9, 9, 9, 6])
    confusion[1, 3], confusion[4, 0], confusion[2, 2] = 4, 3, 50
    heatmap = draw_heatmap(list("abcde"), confusion, limit=3)
    assert heatmap.names == ["a", "b", "d"]
    assert heatmap.total == 5
    assert [[count for count, _ in row] for row in heatmap.rows] == [[9, 0, 0], [0, 9, 4], [0, 0, 9]]
    assert heatmap.rows[1][2][1] == pytest.approx(4 / 13)


def test_names_that_begin_alike_are_told_apart_and_explained_where_only_a_number_does() -> None:
    names = ["Tomato___Late_blight_severe", "Tomato___Late_blight_mild!", *["x" * 40 + c + "y" * 20 for c in "ab"]]
    heatmap = draw_heatmap(names, np.ones((4, 4), dtype=np.int64))
    assert len(set(heatmap.labels)) == 4
    assert [name for _, name in heatmap.told_by_number] == names[2:]
    assert {label for label, _ in heatmap.told_by_number} < set(heatmap.labels)


def test_letters_that_are_twice_as_wide_are_half_as_many() -> None:
    assert shortened("番" * 13) == "番" * 13
    assert shortened("番" * 20) == "番" * 6 + "…" + "番" * 6
    assert shortened("a" * 27) == "a" * 12 + "…" + "a" * 13


def test_mistakes_that_are_as_common_are_counted(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["confusion"] = [[6, 1, 0, 1], [1, 4, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert "for “$x^{ & two" not in Page(run).text["header"]
    assert "1 time, as often as 2 other mistakes." in Page(run).text["header"]


def test_mistakes_are_ordered_by_confidence(run: Path) -> None:
    asked: list[str] = []

    def thumbnails(names: list[str]) -> dict[str, bytes]:
        asked.extend(names)
        return {name: picture for name, picture in png(names).items() if name != names[2]} | {names[3]: b"not a PNG"}

    page = Page(run, thumbnails)
    wrong = sorted((row for row in predictions() if row[1] != row[2]), key=lambda row: -row[3])
    assert asked == [row[0] for row in wrong]
    assert page.attributes("alt") == asked[:2]
    assert len(page.figures) == 4
    for figure, (path, label, prediction, score) in zip(page.figures, wrong, strict=True):
        assert f"is {label}taken for {prediction}, {score:.1%}{path}" in figure
    assert ["cannot be read any more" in figure for figure in page.figures] == [False, False, True, True]
    assert all("pictures were not asked for" in figure for figure in Page(run).figures)


def test_only_the_worst_mistakes_are_shown(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    count = MAX_MISTAKES + 7
    write_csv(
        run / "predictions.csv",
        "path,label,prediction,score",
        [(f"{i}.png", "cat", "unicorn", 1 / (i + 1)) for i in range(count)],
    )
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"n": count}))
    page = Page(run, png)
    assert page.attributes("alt") == [f"{i}.png" for i in range(MAX_MISTAKES)]
    assert "The 24 most confident of 31 wrong predictions" in page.text["mistakes"]


def test_cost_skipped_images_and_recipe(run: Path) -> None:
    page = Page(run)
    assert dict(page.table["cost"]) == {
        "Training time": "1 min 40 s, 50 s per epoch",
        "Epochs": "2 of 3",
        "Speed": "1,234 images/s (median epoch)",
        "Peak memory": "612 MB",
        "Parameters": "1,234,567",
        "Multiply-adds (MACs) per image": "38.4 M",
        "Hardware": "AMD EPYC, 2 cores",
        "Versions": "tokenfusion 0.1.0, torch 2.14.1, timm 1.0.31, python 3.11.2",
    }
    assert page.table["skipped"][1:] == [
        ["a\\nb.jpg", SCRIPT, "test", "0 bytes"],
        ["c.png", "cat", "train", "truncated at 120 of 4,096 bytes"],
    ]
    assert (run / "recipe.toml").read_text().strip() in page.text["recipe"]


def test_long_names_are_broken_behind_their_signs_and_nothing_else_is_changed() -> None:
    said = prose("a & b of fuse(tf_efficientnet_lite0,<b>,probe) in `runs/x`")
    broken = "fuse(<wbr>tf_<wbr>efficientnet_<wbr>lite0,<wbr>&lt;b&gt;,probe)"
    assert str(said) == f"a &amp; b of {broken} in <code>runs/x</code>"
    assert re.sub("<wbr>|</?code>", "", said) == "a &amp; b of fuse(tf_efficientnet_lite0,&lt;b&gt;,probe) in runs/x"


def test_what_a_list_left_out_is_told_with_its_reasons(run: Path) -> None:
    (run / "excluded.csv").write_text("\ufeffpath,reason\na.jpg,exact duplicate of b.jpg\nc.jpg,\n")
    page = Page(run)
    assert page.table["excluded"][1:] == [["a.jpg", "exact duplicate of b.jpg"], ["c.jpg", "not said"]]
    (run / "excluded.csv").write_text("path\n" + "".join(f"{i}.jpg\n" for i in range(300)))
    page = Page(run)
    assert "the first 200 of 300; all are in excluded.csv" in page.text["excluded"]
    assert len(page.table["excluded"]) == 201


def test_risk_against_coverage_is_drawn_where_it_was_measured(run: Path) -> None:
    assert "risk" not in Page(run).text
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["risk_coverage"] = {"coverage": [0.5, 1.0], "risk": [0.0, 0.25], "area": 0.1}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = Page(run)
    assert "abstain 0.02" in page.text["risk"]
    assert any("wrong answers against" in label for label in page.attributes("aria-label"))
    (name,) = write_figures(run)
    drawn = (run / name).read_text()
    assert drawn.startswith("<svg xmlns")
    assert "Wrong answers (%)" in drawn


def test_of_many_classes_the_riskiest_are_drawn_and_any_name_is_shown_as_it_is(run: Path) -> None:
    names = ["_hidden", "$x$", "<b>", *(f"class {n}" for n in range(9))]
    curves = {n: {"coverage": [1.0], "risk": [0.1], "area": 0.9 - k / 20} for k, n in enumerate(names)}
    (run / "evaluation.json").write_text(json.dumps({"multi_label": True, "risk_coverage": curves}))
    (name,) = write_figures(run)
    drawn = (run / name).read_text()
    shown = [name for name in ("_hidden", "$x$", "&lt;b&gt;", *names[3:]) if f" {name}</text>" in drawn]
    assert shown == ["_hidden", "$x$", "&lt;b&gt;", *names[3:8]]


def test_without_an_evaluation_it_says_how_to_make_one(run: Path) -> None:
    (run / "evaluation.json").unlink()
    for path in run.glob("skipped*.csv"):
        path.unlink()
    page = Page(run, png)
    assert f"tokenfusion evaluate '{run}'" in page.text["header"]
    assert "its last epoch reached 61.25% accuracy" in page.text["header"]
    assert "None." in page.text["skipped"]
    assert list(page.text) == ["header", "training", "cost", "skipped", "recipe"]


def test_curves_leave_gaps_and_one_epoch_is_told_in_words(run: Path) -> None:
    lines = [json.dumps(epoch(number, val_loss=None, peak_memory_mb=None)) + "\n" for number in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(lines))
    page = Page(run)
    drawn = ["Loss at each epoch", "Accuracy (%) at each epoch", "Learning rate at each epoch"]
    assert page.attributes("aria-label")[:3] == drawn
    assert dict(page.table["cost"])["Peak memory"] == "not measured"
    (run / "metrics.jsonl").write_text(lines[0])
    page = Page(run)
    assert not set(drawn) & set(page.attributes("aria-label"))
    assert (
        "There was one epoch, so that there is no curve to draw: of the training images 50.0% are"
        in (page.text["training"])
    )


def test_five_classes_need_no_top_5(run: Path) -> None:
    assert len(CLASSES) <= 5
    assert "Top-5" not in Page(run).text["header"]


def test_everything_right(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation |= {"n": 3, "top1": 1.0, "confusion": [[0] * 4, [0] * 4, [0, 0, 3, 0], [0] * 4]}
    for scores in evaluation["per_class"].values():
        scores["n"] = 0
    evaluation["per_class"][CLASSES[2]]["n"] = 3
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    write_csv(
        run / "predictions.csv", "path,label,prediction,score", [(str(i), *CLASSES[2:3] * 2, 1.0) for i in range(3)]
    )
    page = Page(run, png)
    assert "There are none: every prediction is right." in page.text["mistakes"]
    assert "least often" not in page.text["header"]


@pytest.mark.skipif(sys.platform == "win32", reason="file names are Unicode there")
def test_a_name_that_is_not_utf8(run: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    rows = [
        (name if i == 0 else path, *rest)
        for i, (path, *rest) in enumerate(sorted(predictions(), key=lambda r: r[1] == r[2]))
    ]
    write_csv(run / "predictions.csv", "path,label,prediction,score", rows)
    asked: list[str] = []
    page = Page(run, lambda names: asked.extend(names) or png(names))
    assert name in asked
    assert "caf?.png" in page.text["mistakes"]


def test_the_same_run_gives_the_same_bytes_and_no_litter(run: Path) -> None:
    files = {path.name for path in run.iterdir()}
    first = write_report(run, png)
    assert first == run / "report.html"
    before = first.read_bytes()
    assert write_report(run, png).read_bytes() == before
    assert {path.name for path in run.iterdir()} == files | {"report.html"}


def damage(name: str, text: str | None) -> Callable[[Path], object]:
    """Replace a file of the run, or remove it."""
    return lambda run: (run / name).unlink() if text is None else (run / name).write_text(text)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (damage("model.json", None), r"ended before its first step; go on with `tokenfusion train --resume"),
        (damage("metrics.jsonl", ""), r"no finished epoch.*--resume"),
        (damage("metrics.jsonl", '{"epoch": 1'), r"metrics\.jsonl line 1 is not JSON"),
        (damage("metrics.jsonl", '{"epoch": 1}\n'), r"metrics\.jsonl is incomplete: it lacks lr, train_loss"),
        (
            damage("model.json", '{"format": 99}'),
            r"format 99, newer than the 3 that this version reads; update tokenfusion",
        ),
        (damage("model.json", "[]"), r"model\.json names no format"),
        (damage("recipe.toml", "flux = 3"), r"no field is called 'flux'"),
        (damage("evaluation.json", '{"n": 16'), r"evaluation\.json is not JSON"),
        (damage("evaluation.json", '{"n": 16}'), r"evaluation\.json is incomplete: it lacks data, split"),
        (damage("predictions.csv", None), r"no predictions\.csv.*`tokenfusion evaluate"),
        (damage("predictions.csv", "path,label,prediction,score\n"), r"0 images and evaluation\.json 16.*evaluate"),
        (damage("predictions.csv", "path,label\n"), r"predictions\.csv is incomplete: it lacks prediction, score"),
        (damage("predictions.csv", "path,label,prediction,score\na,b\n"), r"line 2 is cut short"),
        (damage("predictions.csv", "path,label,prediction,score\na,b,c,high\n"), r"score 'high' is not a number"),
    ],
)
def test_a_damaged_run_is_refused_and_an_older_report_kept(
    run: Path, fault: Callable[[Path], object], message: str
) -> None:
    (run / "report.html").write_text("older")
    fault(run)
    with pytest.raises(InputError, match=message):
        write_report(run)
    assert (run / "report.html").read_text() == "older"


def test_an_evaluation_of_another_model_is_refused(run: Path) -> None:
    model = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(model | {"classes": ["cat", "dog"]}))
    with pytest.raises(InputError, match=r"other classes than model\.json.*tokenfusion evaluate"):
        write_report(run)


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run \(it has no model\.json\); give"):
        write_report(tmp_path)
    with pytest.raises(InputError, match=r"nowhere: no such folder; .* give the folder that `tokenfusion train --out`"):
        write_report(tmp_path / "nowhere")


def test_heavy_libraries_are_imported_when_used() -> None:
    code = "import sys, tokenfusion.report, tokenfusion.metrics; from tokenfusion.data.open import open_dataset\n"
    code += "open_dataset('digits'); print({'matplotlib', 'jinja2', 'sklearn', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
