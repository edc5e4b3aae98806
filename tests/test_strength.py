"""Faults of strength: damage, bombs, closed streams and wrong arguments end in a picture or an error, never worse."""

import gzip
import io
import json
import os
import random
import resource
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

from children import begin
from runs import after_step, tiny_recipe
from tokenfusion import Classifier, InputError, train
from tokenfusion.checkpoint import load_tensors, save_tensors
from tokenfusion.data.decode import UnreadableImage, decode_image
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split, never_held_out
from tokenfusion.formatting import PlainConsole
from tokenfusion.training import Interrupted, start
from tokenfusion.training.distributed.world import Requests
from tokenfusion.training.loop import stop_on_signals
from tokenfusion.training.state import fault_in_progress, read_progress
from tokenfusion_runtime.classifier import ExportedClassifier
from tokenfusion_runtime.image import MAX_SIDE
from tokenfusion_runtime.output import json_text

PIXELS = 100_000_000


def image_bytes(kind="PNG", size=(24, 32), mode="RGB", **options):
    file = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows, bits=8, colour=2, interlaced=0, level=-1):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, level)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(("bits", "colour", "row"), [(8, 2, 96), (8, 0, 32), (1, 0, 4), (16, 0, 64), (8, 6, 128)])
def test_a_png_whose_rows_end_too_early_is_damaged(bits, colour, row):
    rows = (b"\0" + b"\x7f" * row) * 10
    with pytest.raises(UnreadableImage, match="its rows end after"):
        decode_image(png(32, 32, rows, bits, colour), max_pixels=PIXELS)
    black = (b"\0" + bytes(row)) * 32  # a picture may be black, to its last row
    decode_image(png(32, 32, black, bits, colour), max_pixels=PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_jpeg_whose_data_ends_too_early_is_damaged_though_its_end_marker_is_there(mode, share, exported_decode):
    whole = image_bytes("JPEG", (64, 64), mode)
    cut = whole[: int(share * len(whole))] + b"\xff\xd9"
    for decode_one in (lambda data: decode_image(data, max_pixels=PIXELS), exported_decode):
        decode_one(whole)
        with pytest.raises(UnreadableImage, match="damaged image"):
            decode_one(cut)


@pytest.fixture
def exported_decode():
    """How an exported classifier decodes."""
    return ExportedClassifier({"max_pixels": PIXELS, "preprocess": {}}, engine=None).decode


def test_a_jpeg_may_be_gray_to_its_last_pixel(exported_decode):
    file = io.BytesIO()
    Image.new("RGB", (64, 40), (128, 128, 128)).save(file, "JPEG")
    assert decode_image(file.getvalue(), max_pixels=PIXELS).unique().tolist() == [128]
    assert exported_decode(file.getvalue()).getextrema() == ((128, 128),) * 3
    decode_image(file.getvalue().removesuffix(b"\xff\xd9"), max_pixels=PIXELS)


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


def test_one_huge_member_is_refused_by_name(tmp_path):
    header = tarfile.TarInfo("a/bomb.png")
    header.size = 10**9
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(header.tobuf() + bytes(4096)))
    with pytest.raises(InputError, match=r"a/bomb.png has 1,000,000,000 bytes"):
        open_dataset(str(tmp_path / "a.tar.gz"))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_name_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path, kind, ending):
    header = tarfile.TarInfo("a/1.png")
    header.type, header.size = kind, 8 * 10**9
    data = header.tobuf() + bytes(4096)
    (tmp_path / f"a{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    with pytest.raises(InputError, match="a header of 8,000,000,000 bytes"):
        open_dataset(str(tmp_path / f"a{ending}"))


@pytest.mark.parametrize(("name", "said"), [
    ("a.jsonl", "line 2: more than 1,048,576 bytes"), ("a.csv", "line 2: more than 1,048,576 bytes"),
    ("a.tsv", "line 2: more than 1,048,576 bytes"), ("a.json", "bytes, more than 268,435,456 of one JSON"),
])  # fmt: skip
def test_a_line_or_value_larger_than_the_memory_is_refused_before_it_is_read(tmp_path, name, said):
    with (tmp_path / name).open("wb") as file:
        file.write(b"path,label\n")
        file.truncate(2**38)  # of which nothing is on the disk
    with pytest.raises(InputError, match=said):
        open_dataset(str(tmp_path / name))


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


def test_weights_of_another_run_beside_a_description_are_refused(run, command, digit):
    described = json.loads((run / "model.json").read_text())
    tensors, _ = load_tensors(run / "model.safetensors", described["weights"])
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_tensors(run / "model.safetensors", tensors | {name: tensors[name] + 1})  # whole, and not this run's
    status, _, errors = command("predict", run, digit)
    assert status == 2
    assert "holds other weights than the model.json beside it" in errors
    (run / "model.json").write_text(json.dumps({k: v for k, v in described.items() if k != "weights"}))
    Classifier.load(run)  # an older run's description names none


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
    assert fault_in_progress(read_progress(path)) == ""
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
    status, _, errors = command("predict", run, __file__)
    assert status == 2
    assert "damaged" in errors


def test_sighup_and_many_ctrl_c_at_once_save_the_run(tmp_path):
    def press():
        for number in (signal.SIGHUP, *[signal.SIGINT] * 5):
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted):
        train(tiny_recipe(), tmp_path / "run", progress=after_step(3, press))
    assert read_progress(tmp_path / "run" / "state" / "last.safetensors").step == 3


def test_a_training_goes_on_where_nobody_reads_its_lines(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        console = PlainConsole(file=file)
        console.outlives_reader = True
        start(tiny_recipe(epochs=1), tmp_path / "run", console)
        assert console.quiet
    Classifier.load(tmp_path / "run")


def test_what_is_pressed_while_a_stopped_command_ends_says_nothing_more():
    words = "import signal, tokenfusion.terminal as t\ntry: t.end_stopped('stopped')\nfinally: signal.raise_signal(2)"
    ended = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "\nstopped\n")


def test_a_hangup_that_is_ignored_as_by_nohup_stops_nothing():
    requests, before = Requests(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(requests, together=False):
            signal.raise_signal(signal.SIGHUP)
            assert not requests.stop
            signal.raise_signal(signal.SIGTERM)
            assert requests.stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_json_on_a_terminal_cannot_move_the_cursor_and_says_the_same():
    value = {"\x1b[2J\x9b\u202e": ["Größe", "a\nb"]}
    for indent in (None, 2):
        text = json_text(value, indent)
        assert json.loads(text) == value
        assert not {"\x1b", "\x9b", "\u202e"} & set(text)
        assert "Größe" in text


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
    kinds = [data, io.BytesIO(data), array, Image.open(io.BytesIO(data))]
    first, *others = (classifier.predict([kind])[0] for kind in kinds)  # rows of a batch may round otherwise
    assert all(other.topk == first.topk for other in others)
    assert classifier.predict(data) == [first]
    assert not classifier.predict(premultiplied)[0].error
    closed = io.BytesIO()
    closed.close()
    wrong = (
        None,
        3,
        torch.zeros(3, 8, 8),
        np.zeros((0, 0), dtype=np.uint8),
        np.zeros((4, 4)),
        bytearray(data),
        closed,
        {"a": data},
        {data},
    )
    exported = ExportedClassifier(
        {"max_pixels": PIXELS, "preprocess": {}, "surest_errors": [], "thresholds": [], "classes": []}, engine=None
    )
    for thing in wrong:
        for given in (thing, [thing]):
            for one in (classifier, exported):
                with pytest.raises(InputError, match="is not an image"):
                    one.predict(given)
    view = np.broadcast_to(np.uint8(1), (600_000, 600_000, 3))  # a terabyte, were it copied
    assert "has a side that is not" in classifier.predict(view)[0].error
    assert "damaged" in classifier.predict(b"no image \x89PNG")[0].error or classifier.predict(b"no")[0].error


def test_patience_says_that_it_stopped_early(tmp_path, command):
    words = "--model wide(vit_micro,0.1) --img-size 8 --epochs 30 --patience 1 --lr 1e-9 --ema 0 --batch-size 512"
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
    train(tiny_recipe(model="wide(vit_micro,0.2)", ema=0.9999, patience=1, epochs=3), run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3  # the average has learned nothing yet, and did not stop it
    assert records[-1]["val_top1"] > 0.3
    answers = Classifier.load(run).predict([np.zeros((8, 8), dtype=np.uint8)])
    assert not answers[0].error


def predict_fork_and_predict(run):
    torch.set_num_threads(2)
    classifier, images = Classifier.load(run), [np.zeros((900, 900, 3), dtype="uint8")] * 32
    classifier.predict(images)
    child = os.fork()
    if not child:
        classifier.predict(images)
        os._exit(7)
    signal.alarm(50)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_a_classifier_answers_after_a_fork(trained):
    process = begin(predict_fork_and_predict, trained)
    process.join()
    assert process.exitcode == 7


@pytest.fixture
def rare(tmp_path):
    """Two classes of several images, and two of one."""
    for name, count in (("a", 8), ("b", 8), ("rare", 1), ("rarer", 1)):
        for index in range(count):
            path = tmp_path / "photos" / name / f"{index}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            noise = np.random.default_rng([len(name), ord(name[0]), index]).integers(0, 256, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    return tmp_path / "photos"


def test_classes_of_one_image_are_named_at_once_or_trained_on(rare):
    data = open_dataset(str(rare))
    with pytest.raises(InputError, match=r"'rare' has 1 .*so do 1 more: 'rarer'.*--rare-classes train.*drop"):
        choose_split(data, 0.2, 0)
    split = choose_split(data, 0.2, 0, "train")
    assert sorted([*split.train, *split.val]) == list(range(18))
    assert set(data.labels[split.val]) == {0, 1}
    assert never_held_out(data, split).endswith("'rare', 'rarer'")


def test_classes_of_one_image_are_dropped_by_name_for_training_evaluation_and_check(rare, tmp_path, command):
    run, words = tmp_path / "run", ("--model", "vit_micro", "--img-size", 8, "--epochs", 1, "--rare-classes", "drop")
    status, output, _ = command("train", rare, *words, "--out", run)
    assert status == 0
    assert "dropped, for a single image cannot be held out too: 'rare', 'rarer'" in output
    assert json.loads((run / "model.json").read_text())["classes"] == ["a", "b"]
    assert command("evaluate", run)[0] == 0
    status, output, _ = command("check", rare, "--rare-classes", "drop", "--out", tmp_path / "check")
    assert status == 0
    assert "'rare', 'rarer'" in output
    assert "to be mended first" not in output
    status, _, errors = command("evaluate", run, shutil.copytree(rare, tmp_path / "others"))  # other data keeps its own
    assert status == 2
    assert "classes that the model does not know: 'rare', 'rarer'" in errors


def test_rows_are_printed_as_they_are_known(capsys):
    from tokenfusion_runtime.output import print_predictions
    from tokenfusion_runtime.prediction import Prediction

    def slowly():
        yield Prediction("a.png", (("cat", 0.9), ("dog", 0.1)))
        assert "a.png" in capsys.readouterr().out
        yield Prediction("b.png", error="gone")

    assert print_predictions(slowly(), "table", topk=2) == 1
    assert capsys.readouterr().out.split(maxsplit=1)[1].strip() == "error: gone"


def test_predict_shows_progress_on_a_terminal_and_rows_where_they_belong(trained, digit, command, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    status, output, errors = command("predict", trained, digit, digit, "--format", "json")
    assert status == 0
    assert [json.loads(line)["path"] for line in output.splitlines()] == [str(digit)] * 2
    assert "100%" in errors
    assert str(digit) not in errors


def test_a_label_that_is_a_whole_text_is_refused_and_not_printed_in_full(tmp_path, command):
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = {"bytes": image_bytes(), "path": "1.png"}
    table = pa.table({"image": [image] * 4, "label": ["a", "b", "a", "x" * 10**7]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = [{"path": f"{label[0]}.png", "label": label} for label in ("a", "y" * 10**6)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name, said in (("a.parquet", "(10,000,000 characters)"), ("a.json", "(1,000,000 characters)")):
        status, output, errors = command("check", tmp_path / name, "--out", tmp_path / "check")
        assert status == 2
        assert said in errors
        assert "is no name of a class; give one of up to 1000 characters" in errors
        assert len(output + errors) < 1000


def test_an_error_is_never_longer_than_a_person_reads(command, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"path": "p" * 900_000, "label": "a"}))
    status, output, errors = command("check", tmp_path / "a.jsonl", "--out", tmp_path / "check")
    assert status == 2
    assert len(output + errors) < 25_000


def note_peak_of_decoding(path):
    """Bytes a pixel that this process grows by."""
    from tokenfusion.data import decode
    from tokenfusion.report.pictures import shrink

    width, height = 5000, 5000
    large = png(width, height, (b"\0" + b"\x7f" * width) * height, colour=0, level=1)
    before = peak_bytes()
    decode.THREADS = 4
    decoded = decode.decode_ahead([large] * 4, lambda one: shrink(decode_image(one, max_pixels=10**8), 48))
    assert [image.shape for _, image in decoded] == [(3, 48, 48)] * 4
    path.write_text(json.dumps((peak_bytes() - before) / (width * height)))


def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_large_images_are_decoded_one_at_a_time(tmp_path):
    """Four of 25 million pixels would take forty bytes a pixel together."""
    process = begin(note_peak_of_decoding, tmp_path / "peak")
    process.join()
    assert process.exitcode == 0
    assert 3 < json.loads((tmp_path / "peak").read_text()) < 20


def test_an_image_of_one_huge_side_is_reported_and_the_check_up_goes_on(rare, tmp_path, command):
    (rare / "a" / "line.png").write_bytes(png(1, 100_000_000, b""))
    (rare / "a" / "thin.png").write_bytes(png(MAX_SIDE, 2, (b"\0" + b"\x7f" * 3 * MAX_SIDE) * 2))
    assert command("check", rare, "--out", tmp_path / "check")[0] == 0
    found = json.loads((tmp_path / "check" / "check.json").read_text())
    assert [image["path"] for image in found["unreadable"]] == ["a/line.png"]
    assert "has a side that is not 1 to 65536 pixels" in found["unreadable"][0]["reason"]
    assert found["images"] == 20
