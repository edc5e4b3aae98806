"""Faults of strength: damage, bombs, closed streams and wrong arguments end in a picture or an error, never worse."""

import gzip
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from runs import after_step, tiny_recipe
from tokenfusion import Classifier, InputError, train
from tokenfusion.checkpoint import load_tensors, save_tensors
from tokenfusion.data.decode import UnreadableImage, decode_image
from tokenfusion.data.open import open_dataset
from tokenfusion.data.table import LONGEST_LINE
from tokenfusion.options import data_first
from tokenfusion.training import Interrupted
from tokenfusion.training.state import fault_of, read_progress
from tokenfusion_runtime.image import MAX_SIDE

PIXELS = 100_000_000


def image_bytes(kind="PNG", size=(24, 32), mode="RGB", **options):
    file = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows, bits=8, colour=2, interlaced=0):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("bits", "colour", "row"), [(8, 2, 96), (8, 0, 32), (1, 0, 4), (16, 0, 64), (8, 6, 128)])
def test_a_png_whose_rows_end_too_early_is_damaged(bits, colour, row):
    rows = (b"\0" + b"\x7f" * row) * 10
    with pytest.raises(UnreadableImage, match="its rows end after"):
        decode_image(png(32, 32, rows, bits, colour), max_pixels=PIXELS)
    black = (b"\0" + bytes(row)) * 32  # a picture may be black, to its last row
    decode_image(png(32, 32, black, bits, colour), max_pixels=PIXELS)


def test_an_interlaced_png_may_be_black_and_must_be_whole():
    sizes = [(4, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32)]  # rows and columns of the passes, 32×32
    passes = b"".join((b"\0" + bytes(columns)) * rows for rows, columns in sizes)
    assert decode_image(png(32, 32, passes, colour=0, interlaced=1), max_pixels=PIXELS).shape == (3, 32, 32)
    with pytest.raises(UnreadableImage, match="damaged image"):
        decode_image(png(32, 32, passes[:-300], colour=0, interlaced=1), max_pixels=PIXELS)


def test_a_side_that_no_picture_has_is_refused_before_any_pixel_is_made():
    bomb = png(1, MAX_SIDE + 1, b"")
    with pytest.raises(UnreadableImage, match="has a side that is not 1 to"):
        decode_image(bomb, max_pixels=PIXELS)


def damaged(data, chance):
    """The same bytes, with some flipped, cut off, doubled or put in."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(len(data))
        data[place] ^= 1 << chance.randrange(8)
    if chance.random() < 0.3:
        del data[chance.randrange(len(data)) :]
    if chance.random() < 0.2:
        data[0:0] = data[: chance.randrange(9)]
    return bytes(data)


KINDS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images_give_a_picture_or_a_reason(kind):
    chance, whole = random.Random(kind), image_bytes(kind)
    for _ in range(1000 // len(KINDS) + 1):
        try:
            assert decode_image(damaged(whole, chance), max_pixels=10**6).shape[0] == 3
        except UnreadableImage:
            continue


def a_tar(folder, ending):
    path = folder / f"a{ending}"
    with tarfile.open(path, "w:gz" if ending.endswith("gz") else "w") as tar:
        for name in ("a/1.png", "b/2.png"):
            member = tarfile.TarInfo(name)
            data = image_bytes()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def a_parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "a.parquet"
    table = {"image": [{"bytes": image_bytes(), "path": "1.png"}] * 4, "label": ["a", "b", "a", "b"]}
    pq.write_table(pa.table(table), path)
    return path


def a_list(folder, ending):
    path = folder / f"a{ending}"
    rows = ["1.png,a", "2.png,b", "3.png,a"]
    lines = [json.dumps(dict(zip(("path", "label"), row.split(","), strict=True))) for row in rows]
    path.write_text("\n".join(["path,label", *rows] if ending == ".csv" else lines) + "\n")
    return path


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".tar", ".tar.gz", ".parquet"])
def test_damaged_data_is_read_or_refused(tmp_path, ending):
    make = {".parquet": a_parquet}.get(ending) or (lambda at: (a_tar if "tar" in ending else a_list)(at, ending))
    path, chance = make(tmp_path), random.Random(ending)
    whole = path.read_bytes()
    for _ in range(1000):
        path.write_bytes(damaged(whole, chance))
        try:
            data = open_dataset(str(path))
            for index in range(min(len(data), 4)):
                data.reader.read(index)
        except InputError:
            continue


def test_one_huge_line_and_one_huge_member_are_refused_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"path": "a.png", "label": "x" * LONGEST_LINE}))
    with pytest.raises(InputError, match=r"line 1: more than 1,048,576 characters") as refused:
        open_dataset(str(tmp_path / "a.jsonl"))
    assert len(str(refused.value)) < 500
    header = tarfile.TarInfo("a/bomb.png")
    header.size = 10**9
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(header.tobuf() + bytes(4096)))
    with pytest.raises(InputError, match=r"a/bomb.png has 1,000,000,000 bytes"):
        open_dataset(str(tmp_path / "a.tar.gz"))


def flip_bits(path, count):
    """Flip bits of the tensors' bytes, the file's second half."""
    data, chance = bytearray(path.read_bytes()), random.Random(0)
    for _ in range(count):
        data[chance.randrange(len(data) // 2, len(data))] ^= 1
    path.write_bytes(data)


def test_weights_with_flipped_bits_are_refused(run):
    Classifier.load(run)
    flip_bits(run / "model.safetensors", 1)
    with pytest.raises(InputError, match="damaged: its tensors are not those that were written"):
        Classifier.load(run)
    flip_bits(run / "state" / "last.safetensors", 1)
    with pytest.raises(InputError, match="damaged: its tensors are not those"):
        load_tensors(run / "state" / "last.safetensors")


def test_every_type_has_a_checksum_and_files_without_one_are_read(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    tensors = {str(kind): torch.ones(3, 2, dtype=kind) for kind in kinds} | {"0": torch.tensor(1.0), "e": torch.ones(0)}
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert load_tensors(tmp_path / "a.safetensors")[0].keys() == tensors.keys()
    save_file(tensors, tmp_path / "b.safetensors")
    assert load_tensors(tmp_path / "b.safetensors")[0].keys() == tensors.keys()


WRONG = [
    ("epoch", 10**9), ("epoch", "4"), ("epoch", None), ("step", -1), ("step", 1.5), ("step", True), ("records", {}),
    ("records", [1, 2, 3, 4]), ("records", [{"loss": "x"}] * 4), ("identity", []), ("identity", {"recipe": 1}),
    ("seconds", float("nan")), ("best_epoch", 99), ("processes", 0), ("finished", 1), ("key", 3), ("accumulate", -2),
    ("step_in_epoch", 10**6), ("loss_sum", float("inf")), ("decay_epoch", 10**9), ("correct", 10**12),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_checkpoint_altered_by_hand_is_refused_in_words(run, command, field, value):
    path = run / "state" / "last.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert fault_of(read_progress(path)) == ""
    description = json.loads(metadata["description"]) | {field: value}
    save_file(tensors, path, metadata | {"description": json.dumps(description)})
    (run / "model.safetensors").unlink()
    status, _, errors = command("train", "--resume", run)
    assert status == 2
    assert "delete the folder" in errors


@pytest.mark.parametrize("name", ["optimizer.0.a.b", "optimizer.x.exp", "optimizer.999999.exp_avg"])
def test_moments_that_fit_no_weight_are_refused(run, command, name):
    path = run / "state" / "last.safetensors"
    tensors, description = load_tensors(path)
    save_tensors(path, tensors | {name: torch.ones(3)}, description)
    (run / "model.safetensors").unlink()
    status, _, errors = command("train", "--resume", run)
    assert status == 2
    assert "fits no weight" in errors


def test_deep_json_is_damage(run, command):
    (run / "model.json").write_text("[" * 100_000)
    status, _, errors = command("predict", run, "a.png")
    assert status == 2
    assert "damaged" in errors


def test_sighup_and_many_ctrl_c_at_once_save_the_run(tmp_path):
    def press():
        for number in (signal.SIGHUP, *[signal.SIGINT] * 5):
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted):
        train(tiny_recipe(), tmp_path / "run", progress=after_step(3, press))
    assert read_progress(tmp_path / "run" / "state" / "last.safetensors").step == 3


@pytest.mark.parametrize(
    ("streams", "status"), [("<&- >&- 2>&-", 0), (">&-", 0), ("| head -1 >/dev/null", 0), (">/dev/full", 1)]
)
def test_closed_and_broken_streams_leave_no_traceback(streams, status):
    words = f"{sys.executable} -m tokenfusion --help {streams}"
    ended = subprocess.run(words, shell=True, capture_output=True, text=True)
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    assert ended.returncode == status


def test_bytes_are_images_and_other_things_are_one_kind_of_error(trained):
    classifier, data = Classifier.load(trained), image_bytes()
    array = np.asarray(Image.open(io.BytesIO(data)))
    premultiplied = Image.open(io.BytesIO(data)).convert("LA").convert("La")
    first, *others = classifier.predict([data, io.BytesIO(data), array, Image.open(io.BytesIO(data))])
    assert all(other.topk == first.topk for other in others)
    assert classifier.predict(data) == [first]
    assert not classifier.predict(premultiplied)[0].error
    wrong = (None, 3, torch.zeros(3, 8, 8), np.zeros((0, 0), dtype=np.uint8), np.zeros((4, 4)))
    for thing in wrong:
        with pytest.raises(InputError, match="is not an image"):
            classifier.predict(thing)
        with pytest.raises(InputError, match="is not an image"):
            classifier.predict([thing])
    assert "damaged" in classifier.predict(b"no image \x89PNG")[0].error or classifier.predict(b"no")[0].error


def test_an_option_of_several_values_does_not_swallow_the_data():
    assert data_first(["train", "--img-size", "32", "photos", "--out", "r"]) == [
        "train",
        "photos",
        "--img-size",
        "32",
        "--out",
        "r",
    ]
    assert data_first(["train", "--img-size", "32", "24", "photos"]) == ["train", "photos", "--img-size", "32", "24"]
    assert data_first(["train", "--loggers", "mlflow", "photos"]) == ["train", "photos", "--loggers", "mlflow"]
    for unchanged in ("train photos --img-size 32 24", "train photos --img-size big", "predict r -"):
        assert data_first(unchanged.split()) == unchanged.split()


def test_patience_says_that_it_stopped_early(tmp_path, command):
    words = "--model vit_micro --img-size 8 --epochs 30 --patience 1 --lr 1e-9 --ema 0 --batch-size 512"
    status, output, _ = command("train", "digits", *words.split(), "--out", tmp_path / "run")
    assert status == 0
    assert "stopped early after epoch" in output
    assert "patience=1" in output


def test_a_copy_of_a_run_still_loads(run, tmp_path):
    Classifier.load(shutil.copytree(run, tmp_path / "copy"))


def test_names_cannot_move_the_cursor_of_a_terminal(tmp_path, command, digit, trained):
    hostile = tmp_path / "\x1b[2Ja\x9bb\u202e.png"
    shutil.copy(digit, hostile)
    status, output, _ = command("predict", trained, hostile)
    assert status == 0
    assert "\\x1b[2Ja\\x9bb\\u202e.png" in output
    assert not {"\x1b", "\x9b", "\u202e"} & set(output)
    status, output, _ = command("predict", trained, hostile, "--format", "csv")
    assert str(hostile) in output  # data keeps the truth


def test_patience_keeps_the_better_of_the_weights_and_their_average(tmp_path):
    run = tmp_path / "run"
    train(tiny_recipe(model="vit_micro", ema=0.9999, patience=1, epochs=3), run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3  # the average has learned nothing yet, and did not stop it
    assert records[-1]["val_top1"] > 0.3
    answers = Classifier.load(run).predict([np.zeros((8, 8), dtype=np.uint8)])
    assert not answers[0].error


def test_a_classifier_answers_after_a_fork(trained):
    code = (
        "import os, sys, numpy, torch; torch.set_num_threads(2); from tokenfusion import Classifier\n"
        "c = Classifier.load(sys.argv[1]); x = [numpy.zeros((900, 900, 3), dtype='uint8')] * 32; c.predict(x)\n"
        "child = os.fork()\n"
        "if not child: c.predict(x); os._exit(7)\n"
        "import signal; signal.alarm(50)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code, trained], check=False).returncode == 7


def test_classes_of_one_image_are_named_at_once_or_trained_on(tmp_path):
    from tokenfusion.data.split import choose_split, never_held_out

    for name, count in (("a", 4), ("rare", 1), ("rarer", 1)):
        for index in range(count):
            path = tmp_path / name / f"{index}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image_bytes())
    data = open_dataset(str(tmp_path))
    with pytest.raises(InputError, match=r"'rare' has 1 .*so do 1 more: 'rarer'.*--rare-classes train"):
        choose_split(data, 0.2, 0)
    split = choose_split(data, 0.2, 0, "train")
    assert sorted([*split.train, *split.val]) == list(range(6))
    assert data.labels[split.val].tolist() == [0]
    assert never_held_out(data, split).endswith("'rare', 'rarer'")


def test_headings_of_long_names_stay_different():
    from tokenfusion.report.run import headings

    names = [
        "Tomato___Late_blight_severe",
        "Tomato___Late_blight_mild!",
        "cat",
        *["x" * 40 + c + "y" * 20 for c in "ab"],
    ]
    short = headings(names)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= 26
    assert short[2] == "cat"


def test_rows_are_printed_as_they_are_known(capsys):
    from tokenfusion_runtime.output import print_predictions
    from tokenfusion_runtime.prediction import Prediction

    def slowly():
        yield Prediction("a.png", (("cat", 0.9), ("dog", 0.1)))
        assert "a.png" in capsys.readouterr().out
        yield Prediction("b.png", error="gone")

    assert print_predictions(slowly(), "table", topk=2) == 1
    assert capsys.readouterr().out.split(maxsplit=1)[1].strip() == "error: gone"
