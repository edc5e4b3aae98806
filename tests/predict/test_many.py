"""Many images predicted into a folder: any place, any number of processes, killed and gone on with."""

import itertools
import json
import os
import re
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from children import begin
from killing import WRITES, die_by
from serving import add, picture, png, serving, write_shard
from tokenfusion import Classifier, InputError, cli
from tokenfusion.predict.many import MANIFEST, predict_many
from tokenfusion_runtime.abstain import SurestErrors

COLUMNS = ["path", "label", "score", "topk", "error", "damage"]


def save_run(run: Path, seed: int = 0, **options) -> Path:
    """A finished run of random weights."""
    torch.manual_seed(seed)
    run.mkdir()
    classifier = Classifier.create("wide(vit_micro,0.1)", ("a", "b", "c"), img_size=(8, 8), precision="fp32", **options)
    errors = SurestErrors.among([0.5] * 400, [True] * 399 + [False])
    classifier = replace(classifier, temperature=0.5, surest_errors=(errors,) * (3 if options else 1))
    classifier.save(run)
    return run


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("untrained") / "run")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Seven pictures, in class folders and beside them, and what is no picture."""
    root = tmp_path / "photos"
    (root / "cat").mkdir(parents=True)
    for number in range(7):
        (root / ("cat" if number % 2 else "") / f"{number}.png").write_bytes(png(picture(number)))
    (root / "notes.txt").write_text("none")
    return root


def rows_in(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def said(run: Path, numbers: range) -> list[tuple]:
    """What the classifier says of pictures, one at a time."""
    classifier = Classifier.load(run)
    return [
        (found.label, pytest.approx(found.score, abs=1e-5)) for n in numbers for found in classifier.predict(picture(n))
    ]


def parquet(path: Path, numbers: range) -> Path:
    images = pa.array([{"bytes": png(picture(n)), "path": None} for n in numbers])
    pq.write_table(pa.table({"image": images, "note": [""] * len(numbers)}), path, row_group_size=2)
    return path


def bare_tar(path: Path, numbers: range) -> Path:
    """A tar of pictures alone, without a label."""
    import tarfile

    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for n in numbers:
            add(tar, f"./deep/{n}.png", png(picture(n)))
        add(tar, "read me.txt", b"no picture")
    return path


def test_a_folder_becomes_chunks_of_rows_in_order(untrained, photos, tmp_path):
    found = predict_many(untrained, [str(photos)], tmp_path / "out", images_per_part=3, topk=2, batch_size=2)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [MANIFEST, "images-00000.parquet", "images-00001.parquet", "images-00002.parquet"]
    rows = rows_in(tmp_path / "out")
    assert list(rows[0]) == COLUMNS
    numbers = [0, 2, 4, 6, 1, 3, 5]
    assert [row["path"] for row in rows] == [f"{photos}/{'cat/' * (n % 2)}{n}.png" for n in numbers]
    assert [(row["label"], row["score"]) for row in rows] == said(untrained, numbers)
    assert all(len(row["topk"]) == 2 and row["topk"][0]["label"] == row["label"] for row in rows)
    assert (found["images"], found["errors"], found["waiting"], len(found["parts"])) == (7, 0, 0, 3)


def test_the_model_is_named_in_every_part_and_the_manifest_counts_all(untrained, photos, tmp_path):
    (photos / "9.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    predict_many(untrained, [str(photos)], out, images_per_part=5)
    manifest = json.loads((out / MANIFEST).read_text())
    assert (manifest["images"], manifest["errors"]) == (8, 1)
    assert [part["images"] for part in manifest["parts"]] == [5, 3]
    for part in manifest["parts"]:
        facts = json.loads(pq.read_metadata(out / part["file"]).metadata[b"tokenfusion"])
        assert facts["model_sha256"] == manifest["model_sha256"]
        assert re.fullmatch("[0-9a-f]{64}", facts["model_sha256"])


PLACES = {
    "a list without labels": lambda root: write_list(root, "file_name\n{}\n"),
    "a list without a header": lambda root: write_list(root, "{}\n", "list.txt"),
    "a list of absolute paths": lambda root: write_list(root, "path\n{}\n", absolute=True),
    "JSON lines": lambda root: write_list(root, '{{"path": "{}"}}\n', "list.jsonl"),
    "Parquet": lambda root: str(parquet(root / "some.parquet", range(4))),
    "a folder of Parquet": lambda root: str(parquet(root / "some.parquet", range(4)).parent),
    "a tar": lambda root: str(bare_tar(root / "some.tar", range(4))),
    "a compressed tar": lambda root: str(bare_tar(root / "some.tgz", range(4))),
    "shards with labels": lambda root: str(write_shard(root / "shards" / "s-0.tar", range(4)).parent),
    "a pattern of shards": lambda root: str(write_shard(root / "s-0.tar", range(4))).replace("-0", "-{0..0}"),
}


def write_list(root: Path, lines: str, name: str = "list.csv", absolute: bool = False) -> str:
    """A list of four pictures; a first line stays the first."""
    *head, line = lines.splitlines(keepends=True)
    for number in range(4):
        (root / f"{number}.png").write_bytes(png(picture(number)))
        head.append(line.format(f"{root}/{number}.png" if absolute else f"{number}.png"))
    (root / name).write_text("".join(head))
    return str(root / name)


@pytest.mark.parametrize("kind", PLACES)
def test_every_kind_of_data_is_taken_without_its_labels(untrained, tmp_path, kind):
    (tmp_path / "data").mkdir()
    source = PLACES[kind](tmp_path / "data")
    predict_many(untrained, [source], tmp_path / "out")
    rows = rows_in(tmp_path / "out")
    assert [(row["label"], row["score"]) for row in rows] == said(untrained, range(4))
    assert len({row["path"] for row in rows}) == 4


def test_digits_and_several_places_at_once(untrained, photos, tmp_path):
    sources = ["digits", str(photos), str(write_shard(tmp_path / "one.tar", range(3)))]
    found = predict_many(untrained, sources, tmp_path / "out", images_per_part=1000, batch_size=256)
    assert [(part["file"][:4], part["images"]) for part in found["parts"]] == [
        ("one-", 3),
        ("imag", 1000),
        ("imag", 804),
    ]
    assert rows_in(tmp_path / "out")[0]["path"].startswith("digits")


def test_shards_behind_urls_are_fetched_and_signatures_not_shown(untrained, tmp_path):
    for number in range(3):
        write_shard(tmp_path / "served" / f"s-{number}.tar", range(4 * number, 4 * number + 4))
    with serving(tmp_path / "served") as server:
        found = predict_many(untrained, [f"{server.url}/s-{{0..2}}.tar?secret=1"], tmp_path / "out")
    assert [(row["label"], row["score"]) for row in rows_in(tmp_path / "out")] == said(untrained, range(12))
    assert "secret" not in json.dumps(found)
    assert rows_in(tmp_path / "out")[5]["path"] == "s-1.tar/0005.png"


def test_bad_images_are_rows_with_an_error(untrained, tmp_path):
    broken = [png(picture(0)), b"", png(picture(1))[:60], None]
    images = pa.array(
        [{"bytes": data, "path": None} for data in broken], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"image": images}), tmp_path / "some.parquet")
    found = predict_many(untrained, [str(tmp_path / "some.parquet"), str(tmp_path / "gone.jpg")], tmp_path / "out")
    assert (found["images"], found["errors"]) == (5, 4)
    good, *bad = sorted(rows_in(tmp_path / "out"), key=lambda row: row["error"] or "")
    assert good["error"] is None
    for row in bad:
        assert {name: row[name] for name in ("label", "score", "topk")} == {"label": None, "score": None, "topk": None}
    assert [row["error"].split(":")[0] for row in bad] == [
        "damaged image", "the file cannot be read", "the file is empty (0 bytes)",
        "the row holds no bytes; image files must be inside the Parquet file",
    ]  # fmt: skip


def test_embeddings_are_what_the_head_reads(untrained, photos, tmp_path):
    (photos / "8.png").write_bytes(b"no picture")
    predict_many(untrained, [str(photos)], tmp_path / "out", embeddings=True)
    *rows, bad = rows_in(tmp_path / "out")[:5]
    assert bad["embedding"] is None
    classifier = Classifier.load(untrained)
    model = classifier.model
    batch = torch.stack([classifier.prepare(picture(n))[1] for n in (0, 2, 4, 6)])
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(classifier.to_input(batch)), pre_logits=True)
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-5)
    found = np.array([row["embedding"] for row in rows], np.float32)
    logits = model.get_classifier()(torch.from_numpy(found))
    assert [row["label"] for row in rows] == ["abc"[i] for i in logits.argmax(1)]


def test_multi_label_models_give_labels_and_what_they_leave_open(photos, tmp_path):
    run = save_run(tmp_path / "run", multi_label=True)
    predict_many(run, [str(photos)], tmp_path / "out", abstain=0.02)
    rows = rows_in(tmp_path / "out")
    assert list(rows[0]) == ["path", "labels", "unsure", "topk", "error", "damage"]
    expected = Classifier.load(run).predict([row["path"] for row in rows], abstain=0.02)
    for row, prediction in zip(rows, expected, strict=True):
        assert [label["label"] for label in row["labels"]] == [name for name, _ in prediction.labels]
        assert row["unsure"] == list(prediction.unsure)


def test_where_the_model_is_too_unsure_the_label_is_null(untrained, photos, tmp_path):
    predict_many(untrained, [str(photos)], tmp_path / "out", abstain=0.0001)
    assert {row["label"] for row in rows_in(tmp_path / "out")} == {None}
    assert all(row["score"] > 0 for row in rows_in(tmp_path / "out"))


def predict_in_child(run: Path, source: str, out: Path, death) -> None:
    if death:
        die_by(death)
    predict_many(run, [source], out, images_per_part=2, workers=2)


def bytes_in(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_killed_ten_times_the_output_equals_an_uninterrupted_one(untrained, tmp_path):
    source = tmp_path / "many"
    source.mkdir()
    for number in range(40):
        (source / f"{number:02d}.png").write_bytes(png(picture(number)))
    predict_in_child(untrained, str(source), tmp_path / "whole", None)
    whole, out, before = bytes_in(tmp_path / "whole"), tmp_path / "out", 0
    for kill in range(10):
        process = begin(predict_in_child, untrained, str(source), out, (WRITES[kill % 4], 1 + kill % 3))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        there = [name for name in bytes_in(out) if name.endswith(".parquet") and not name.startswith(".")]
        assert before <= len(there) < 20
        assert all(whole[name] == (out / name).read_bytes() for name in there)
        before = len(there)
    assert before > 5
    process = begin(predict_in_child, untrained, str(source), out, None)
    process.join()
    assert process.exitcode == 0
    assert bytes_in(out) == whole


def test_what_is_there_is_kept_and_what_is_damaged_is_written_anew(untrained, photos, tmp_path):
    out = tmp_path / "out"
    predict_many(untrained, [str(photos)], out, images_per_part=3)
    before = bytes_in(out)
    kept, damaged = out / "images-00000.parquet", out / "images-00001.parquet"
    time = kept.stat().st_mtime_ns
    damaged.write_bytes(before[damaged.name][:-20])
    predict_many(untrained, [str(photos)], out, images_per_part=3)
    assert bytes_in(out) == before
    assert kept.stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": 1}, "was written by another model"),
        ({"topk": 1}, "was written with topk=3, not 1"),
        ({"embeddings": True}, "was written with embeddings=False, not True"),
        ({"images_per_part": 2}, "was written of other images, or with another --images-per-part"),
    ],
)
def test_what_another_model_or_other_options_wrote_is_refused(untrained, photos, tmp_path, change, reason):
    out = tmp_path / "out"
    predict_many(untrained, [str(photos)], out)
    before = bytes_in(out)
    run = save_run(tmp_path / "other", seed=1) if change.pop("run", 0) else untrained
    with pytest.raises(InputError, match=f"{reason}; give another --out"):
        predict_many(run, [str(photos)], out, **change)
    assert bytes_in(out) == before


def test_a_folder_that_holds_something_else_or_lies_in_the_images_is_refused(untrained, photos, tmp_path):
    with pytest.raises(InputError, match=r"holds '.*', which is no prediction of these images"):
        predict_many(untrained, [str(photos)], tmp_path)
    with pytest.raises(InputError, match="lies inside the images"):
        predict_many(untrained, [str(photos)], photos / "out")
    with pytest.raises(InputError, match=r"no such file or folder; did you mean .*/photos\?"):
        predict_many(untrained, [str(tmp_path / "fotos")], tmp_path / "out")


def test_shards_that_came_since_are_added(untrained, tmp_path):
    write_shard(tmp_path / "shards" / "s-0.tar", range(3))
    predict_many(untrained, [str(tmp_path / "shards")], tmp_path / "out")
    (first,) = (tmp_path / "out").glob("*.parquet")
    time = first.stat().st_mtime_ns
    write_shard(tmp_path / "shards" / "s-1.tar", range(3, 5))
    found = predict_many(untrained, [str(tmp_path / "shards")], tmp_path / "out")
    assert ([part["images"] for part in found["parts"]], first.stat().st_mtime_ns) == ([3, 2], time)


def test_a_damaged_shard_leaves_the_others_written_and_is_gone_on_with(untrained, tmp_path):
    shards = [write_shard(tmp_path / "shards" / f"s-{n}.tar", range(4 * n, 4 * n + 4)) for n in range(3)]
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:2000])
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"1 of 3 parts could not be read: .*s-1\.tar.*run the same command again"):
        predict_many(untrained, [str(shards[0].parent)], out)
    assert [path.name[:3] for path in sorted(out.iterdir())] == ["s-0", "s-2"]
    shards[1].write_bytes(whole)
    assert predict_many(untrained, [str(shards[0].parent)], out)["images"] == 12
    assert [(row["label"], row["score"]) for row in rows_in(out)] == said(untrained, range(12))


def test_a_full_disk_keeps_what_is_written_and_is_gone_on_with(untrained, photos, tmp_path):
    out = tmp_path / "out"
    predict_many(untrained, [str(photos)], tmp_path / "whole", images_per_part=3)
    most = max(path.stat().st_size for path in (tmp_path / "whole").glob("*.parquet")) - 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(InputError, match=r"could not be written: .*make room"):
            predict_many(untrained, [str(photos)], out, images_per_part=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in out.iterdir() if path.suffix != ".parquet"]  # nothing temporary, no lock, no manifest
    predict_many(untrained, [str(photos)], out, images_per_part=3)
    assert bytes_in(out) == bytes_in(tmp_path / "whole")


def as_rank(monkeypatch, rank: int, size: int) -> None:
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


def test_the_processes_of_a_launcher_share_the_parts(untrained, photos, tmp_path, monkeypatch):
    predict_many(untrained, [str(photos)], tmp_path / "whole", images_per_part=2)
    out = tmp_path / "out"
    as_rank(monkeypatch, 1, 2)
    found = predict_many(untrained, [str(photos)], out, images_per_part=2)
    assert (found["images"], found["waiting"]) == (3, 2)
    assert sorted(bytes_in(out)) == ["images-00001.parquet", "images-00003.parquet"]
    as_rank(monkeypatch, 0, 2)
    assert predict_many(untrained, [str(photos)], out, images_per_part=2)["waiting"] == 0
    assert bytes_in(out) == bytes_in(tmp_path / "whole")


def predict_as_rank(rank: int, run: Path, source: str, out: Path) -> None:
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in place.items()})
    predict_many(run, [source], out, images_per_part=1)


def test_processes_at_once_write_what_one_alone_does(untrained, photos, tmp_path):
    processes = [begin(predict_as_rank, rank, untrained, str(photos), tmp_path / "out") for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    predict_many(untrained, [str(photos)], tmp_path / "whole", images_per_part=1)
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole")


def test_the_command_writes_instead_of_printing(command, untrained, photos, tmp_path):
    (photos / "9.png").write_bytes(b"no picture")
    status, output, errors = command("predict", untrained, photos, "--out", tmp_path / "out", "--workers", 1)
    assert (status, output, errors) == (
        0,
        f"8 images, of which 1 could not be read, in 1 part in {tmp_path / 'out'}\n",
        "",
    )


@pytest.mark.parametrize("name", ["list.csv", "data.parquet", "shard.tar"])
def test_what_holds_images_is_predicted_with_out_alone_and_that_is_said(command, untrained, tmp_path, name):
    (tmp_path / name).write_text("path\nphotos/0.png\n")
    status, _, errors = command("predict", untrained, tmp_path / name)
    assert status == 1
    assert f"{name} is no image; to predict the images that it names or holds, give --out DIR" in errors


@pytest.mark.usefixtures("photos")
def test_a_list_of_which_most_files_are_not_there_is_refused(command, untrained, tmp_path):
    (tmp_path / "list.csv").write_text("path\nphotos/0\nphotos/2\nphotos/8.png\n")
    status, _, errors = command("predict", untrained, tmp_path / "list.csv", "--out", tmp_path / "out")
    assert status == 2
    assert "3 of 3 paths do not exist, the first are 'photos/0'" in " ".join(errors.split())
    assert "exists with .png" in " ".join(errors.split())
    assert not (tmp_path / "out").exists()


def test_the_command_fails_where_no_image_can_be_read(command, untrained, tmp_path):
    (tmp_path / "0.png").write_bytes(b"no picture")
    status, output, errors = command("predict", untrained, tmp_path / "0.png", "--out", tmp_path / "out")
    assert (status, output) == (1, f"1 image, of which 1 could not be read, in 1 part in {tmp_path / 'out'}\n")
    assert errors == f"no image could be read; the column error in {tmp_path / 'out'} says why\n"


def press_ctrl_c(run: Path, source: Path, out: Path) -> None:
    """The command, which is interrupted once its second part is there."""
    replace, parts = os.replace, itertools.count(1)

    def rename(part, target) -> None:
        replace(part, target)
        if str(target).endswith(".parquet") and next(parts) == 2:
            signal.raise_signal(signal.SIGINT)

    os.replace = rename
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = out.with_suffix(".txt").open("w", buffering=1)
    sys.argv = ["tokenfusion", "predict", str(run), str(source), "--out", str(out), "--images-per-part", "1"]
    cli.main()


def test_ctrl_c_says_how_to_go_on(untrained, tmp_path):
    source = tmp_path / "many"
    source.mkdir()
    for number in range(5):
        (source / f"{number}.png").write_bytes(png(picture(0)))
    process = begin(press_ctrl_c, untrained, source, tmp_path / "out")
    process.join()
    assert process.exitcode == 130
    assert (tmp_path / "out.txt").read_text() == "\nstopped; the same command goes on\n"
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--embeddings"], "--embeddings is for many images; give --out DIR too"),
        (["--images-per-part", "3"], "--images-per-part is for many images"),
        (["--out", "out", "--format", "csv"], "--format csv is printed, and --out writes Parquet"),
        (["--out", "out", "--workers", "0"], "workers=0: give 1 or more"),
        (["--out", "out", "--images-per-part", "0"], "images_per_part=0 leaves no image in a part"),
    ],
)
def test_options_that_do_not_go_together_are_refused(command, untrained, photos, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    status, _, errors = command("predict", untrained, photos, *words)
    assert (status, reason in " ".join(errors.split())) == (2, True)
    assert not Path("out").exists()


def test_the_ten_lines_for_ray_give_the_same(untrained, photos, monkeypatch):
    """Its class, on a batch as Ray hands it over."""
    page = (Path(__file__).parents[2] / "docs" / "predict.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 11
    before_ray = code[code.index("class ") : code.index("images = ")]
    monkeypatch.chdir(untrained.parent)
    names = {}
    exec("import tokenfusion\n" + before_ray.replace("runs/photos", "run"), names)
    (made,) = [value for name, value in names.items() if isinstance(value, type)]
    files = sorted(photos.glob("*.png"))
    batch = {"path": np.array(list(map(str, files))), "bytes": np.array([path.read_bytes() for path in files], object)}
    found = made()(batch)
    assert list(zip(found["label"], found["score"], strict=True)) == said(untrained, (0, 2, 4, 6))
