import io
import json
import os
import queue
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making import LIMIT, batches_of, pixels_of, write_parquet, write_tar
from PIL import Image

from serving import add, picture, png, serving, write_shard, write_shards
from tokenfusion.data import remote, shards
from tokenfusion.data.augment import Augment
from tokenfusion.data.cache import Cache
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import unread_images
from tokenfusion.data.kinds import resolved
from tokenfusion.data.loader import Batch, TrainLoader
from tokenfusion.data.open import open_dataset
from tokenfusion.data.sampler import ShardOrder, Share
from tokenfusion.data.shards import Shard, ShardRanges
from tokenfusion.data.split import choose_split
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading

SIZES = {"train-0.tar": 7, "train-1.tar": 5, "val-0.tar": 4}
AUGMENT = Augment((8, 8), 3, crop_scale=0.5, hflip=0.5, trivial_augment=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", SIZES)


def check(source: Dataset) -> None:
    """The sixteen pictures of SIZES, each with its own pixels, label and split."""
    assert source.labels.tolist() == [number % 3 for number in range(16)]
    assert source.splits == ["train"] * 12 + ["val"] * 4
    assert source.shards is not None
    assert source.shards.tolist() == [0] * 7 + [1] * 5 + [2] * 4
    for number in (15, 0, 6, 7, 11, 12):
        assert np.array_equal(pixels_of(source, number), picture(number))


def parquet_shards(root: Path) -> Path:
    first = 0
    for name, size in SIZES.items():
        numbers = range(first, first + size)
        files = [png(picture(number)) for number in numbers]
        write_parquet(root / name.replace("tar", "parquet"), files, [n % 3 for n in numbers], ["a", "b", "c"])
        first += size
    return root


def test_local_shards_are_read_in_place(folder: Path, cache: Path) -> None:
    source = open_dataset(folder)
    check(source)
    assert source.classes == ("0", "1", "2")
    assert source.names[7] == "train-1.tar/0007.png"
    assert not shards_in(cache)
    check(open_dataset(f"file://{folder}"))
    check(open_dataset(f"{folder}/{{train-{{0..1}},val-0}}.tar"))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_behind_urls_are_fetched_when_they_are_wanted(kind: str, folder: Path, tmp_path: Path) -> None:
    root = folder if kind == "tar" else parquet_shards(tmp_path / "parquet")
    with serving(root) as server:
        check(open_dataset(server.url))
        once = dict(server.sent)
        check(open_dataset(server.url + f"/{{train-0,train-1,val-0}}.{kind}"))
        if kind == "tar":  # which the cache still has
            assert {path: server.sent[path] for path in once if path.endswith(kind)} == {
                path: once[path] for path in once if path.endswith(kind)
            }


def test_local_parquet_by_url_is_laid_out_in_the_cache(tmp_path: Path, cache: Path) -> None:
    root = parquet_shards(tmp_path / "parquet")
    source = open_dataset(f"file://{root}")
    check(source)
    assert source.classes == ("a", "b", "c")
    assert source.names[:2] == ["train-0.parquet/0", "train-0.parquet/1"]
    laid_out = sum(path.stat().st_size for path in cache.glob("*-images"))
    assert laid_out == sum(len(png(picture(number))) for number in range(16))
    assert not list(cache.glob("*.packed"))


def test_labels_in_json_are_names(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", SIZES, labels="json")
    source = open_dataset(folder)
    check(source)
    assert source.classes == ("a", "b", "c")


@pytest.mark.parametrize(("file", "text"), [("classes.txt", "x\ny\nz\nw\n"), ("classes.json", '["x", "y", "z", "w"]')])
def test_integer_labels_take_the_names_beside_the_shards(file: str, text: str, folder: Path) -> None:
    (folder / file).write_text(text)
    assert open_dataset(folder).classes == ("x", "y", "z")  # none is a `w`
    assert open_dataset(f"{folder}/val-{{0..0}}.tar").classes == ("x", "y", "z")  # none is a `w`
    with serving(folder) as server:
        assert open_dataset(server.url).classes == ("x", "y", "z")  # none is a `w`
    (folder / file).write_text('["x", 3]' if file.endswith("json") else "x\ny\n")
    with pytest.raises(InputError, match=r"must list the class names|label 2, none of the 2 class names; add its name"):
        open_dataset(folder)


def test_an_index_is_kept_until_its_shard_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    through = shards.index_tar
    monkeypatch.setattr(shards, "index_tar", lambda name, file: read.append(Path(name).name) or through(name, file))
    open_dataset(folder)
    open_dataset(folder)
    assert sorted(read) == sorted(SIZES)
    write_shard(folder / "train-1.tar", range(20, 23))
    assert open_dataset(folder).labels.tolist()[7:10] == [2, 0, 1]
    assert len(read) == 4
    for index in (Path(os.environ["TOKENFUSION_CACHE"]) / "indexes").iterdir():
        index.write_text("{damaged")
    assert len(open_dataset(folder)) == 14
    assert len(read) == 7


def test_a_cache_that_cannot_keep_an_index_is_named_with_the_remedy(folder: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / "indexes").write_text("a file where a folder belongs")
    with pytest.raises(InputError, match=r"cache/indexes: File exists; make room .* TOKENFUSION_CACHE"):
        open_dataset(folder)


def test_a_sample_is_all_that_shares_its_key(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set-train.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.b/x.json", json.dumps({"label": 4, "size": 1}).encode())
        add(tar, "a.b/x.cls", b"7\n")  # which counts more than what JSON says
        add(tar, "a.b/x.seg.png", png(picture(9)))
        add(tar, "a.b/x.JPG", png(picture(1)))
        add(tar, "ü.png", png(picture(2)))
        add(tar, "ü.json", b'{"label": 2}')
    source = open_dataset(tmp_path / "set-train.tar")
    assert source.names == ["set-train.tar/a.b/x.JPG", "set-train.tar/ü.png"]
    assert (source.classes, source.labels.tolist(), source.ignored) == (("2", "7"), [1, 0], 1)
    assert source.splits == ["train"] * 2
    assert np.array_equal(pixels_of(source, 1), picture(2))


def test_a_tar_of_class_folders_stays_one(tmp_path: Path) -> None:
    tree = {f"{name}/{number}.png": picture(number) for name in ("cat", "dog") for number in range(3)}
    source = open_dataset(write_tar(tmp_path / "data.tar", tree))
    assert source.classes == ("cat", "dog")
    assert source.shards is None


def with_member(path: Path, name: str, data: bytes) -> None:
    with tarfile.open(path, "a") as tar:
        add(tar, name, data)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("lonely.png", b"x", r"val-0.tar: 'lonely.png' has no label; beside key.jpg a shard needs key.cls"),
        ("0012.jpg", b"x", r"'0012.png' and '0012.jpg' are one sample"),
        ("0012.json", b"{", r"val-0.tar/0012.json: not readable as JSON"),
        ("0012.json", b'{"label": [1]}', r"label \[1\] is neither an integer nor a text"),
        ("0012.cls", b"\xff", r"not readable as text"),
        ("0012.cls", b"word", r"some labels are integers and others texts"),
        ("0012.cls", b"1" * 2**21, r"too many for a label"),
    ],
)
def test_samples_that_make_no_sense_are_refused(name: str, data: bytes, message: str, folder: Path) -> None:
    with_member(folder / "val-0.tar", name, data)
    with pytest.raises(InputError, match=message):
        open_dataset(folder)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("length", [0, 100, 700, 1024, -1024])
def test_a_truncated_shard_is_named(kind: str, length: int, folder: Path, tmp_path: Path) -> None:
    root = folder if kind == "tar" else parquet_shards(tmp_path / "parquet")
    path = root / f"train-1.{kind}"
    whole = path.read_bytes()
    path.write_bytes(whole[: length if length >= 0 else len(whole) - 10_240 if kind == "tar" else len(whole) - 9])
    with pytest.raises(InputError, match=rf"train-1.{kind}: .*(truncated|damaged|no label|not readable)"):
        open_dataset(f"file://{root}")


def test_compressed_shards_are_refused_with_a_remedy(folder: Path) -> None:
    import gzip

    (folder / "train-0.tar").write_bytes(gzip.compress((folder / "train-0.tar").read_bytes()))
    with pytest.raises(InputError, match=r"train-0.tar: not a plain tar.*without compression"):
        open_dataset(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "train-1.tar").unlink()
    with pytest.raises(InputError, match=r"train-1.tar: there is no such file; put it back"):
        open_dataset(f"{folder}/train-{{0..1}}.tar")


def test_a_local_shard_that_vanishes_or_changes_ends_the_run(folder: Path) -> None:
    source = open_dataset(folder)
    write_shard(folder / "train-0.tar", range(30))
    with pytest.raises(InputError, match=r"train-0.tar had \d+ bytes and has \d+ now"):
        source.decode(0, LIMIT)
    (folder / "train-0.tar").unlink()
    with pytest.raises(InputError, match=r"train-0.tar cannot be read: No such file.*; put it back"):
        source.decode(0, LIMIT)


def test_a_cache_smaller_than_the_data_is_enough(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = max(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setenv("TOKENFUSION_CACHE_GB", repr(1.5 * largest / 2**30))
    with serving(folder) as server:
        source = open_dataset(server.url)
        for _ in range(2):
            for index in (0, 8, 13):
                assert np.array_equal(pixels_of(source, index), picture(index))
                assert sum(path.stat().st_size for path in cache.iterdir() if path.is_file()) <= 1.5 * largest
        assert server.sent["/train-0.tar"] in (2, 3)  # at the end of indexing it may have been left there
        with pytest.raises(
            InputError, match=r"training draws from 8 shards at a time and needs .*TOKENFUSION_CACHE_GB"
        ):
            source.reader.require_room()
    open_dataset(folder).reader.require_room()  # local shards need none


def test_whole_shards_are_held_out_where_none_is_named(tmp_path: Path) -> None:
    source = open_dataset(write_shards(tmp_path / "shards", {f"{n}.tar": 3 + n for n in range(5)}))
    split = choose_split(source, 0.4, seed=0)
    numbers = source.shards
    assert numbers is not None
    train, val = set(numbers[split.train]), set(numbers[split.val])
    assert (len(train), len(val), train & val) == (3, 2, set())
    assert len(split.train) + len(split.val) == len(source) == 25
    assert not np.array_equal(choose_split(source, 0.4, seed=1).val, split.val)
    with pytest.raises(InputError, match="a single shard, and none to hold out"):
        choose_split(open_dataset(f"{tmp_path}/shards/{{0..0}}.tar"), 0.4, seed=0)


def test_what_is_announced_is_fetched_beside_the_training(served: Dataset, cache: Path) -> None:
    images = unread_images(served, np.arange(len(served)), LIMIT)
    for path in shards_in(cache):
        path.unlink()
    loader = TrainLoader(images, AUGMENT, batch_size=4, seed=3, workers=0)
    assert loader.prefetcher is not None
    fetched: queue.SimpleQueue[int] = queue.SimpleQueue()
    fetch = loader.prefetcher.fetch

    def note(number: int) -> None:
        fetch(number)
        fetched.put(number)

    loader.prefetcher.fetch = note
    next(loader.epoch(0))
    numbers = {fetched.get(timeout=30) for _ in range(9)}
    loader.close()
    assert {shard(served, number).file.key for number in numbers} == {path.name for path in shards_in(cache)}


def test_shards_of_which_images_are_left_out_are_fetched_ahead_and_need_room(
    served: Dataset, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.csv").write_text(f"path\n{served.names[0]}\n")
    remaining = open_dataset(served.where, str(tmp_path / "list.csv"))
    for path in shards_in(cache):
        path.unlink()
    remaining.reader.fetch(3)
    assert [path.name for path in shards_in(cache)] == [shard(served, 3).file.key]
    assert isinstance(remaining.reader, ShardRanges)
    remaining.reader.blobs[:] = [replace(shard, cache=Cache(cache, 1)) for shard in remaining.reader.blobs]
    with pytest.raises(InputError, match=r"training draws from 8 shards at a time and needs"):
        remaining.reader.require_room()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here fails to be read")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_ends_training_with_the_name_of_the_shard(workers: int, folder: Path) -> None:
    source = open_dataset(folder)
    assert isinstance(source.reader, ShardRanges)
    for number, one in enumerate(source.reader.blobs):  # fails from 0 on
        source.reader.blobs[number] = replace(one, file=replace(one.file, url="/proc/self/mem", size=0))
    with pytest.raises(InputError, match=r"/proc/self/mem cannot be read: \[Errno 5\].*; check its disk"):
        loaded(source, workers)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Dataset]:
    """Nine shards behind a URL."""
    folder = write_shards(tmp_path / "many", {f"train-{n}.tar": 7 + n % 3 for n in range(9)})
    with serving(folder) as server:
        yield open_dataset(server.url + "/train-{0..8}.tar")


def loaded(source: Dataset, workers: int, start: int = 0, share: Share = Share()) -> list[Batch]:  # noqa: B008
    images = unread_images(source, np.arange(len(source)), LIMIT)
    loader = TrainLoader(images, AUGMENT, batch_size=8, seed=3, workers=workers, share=share)
    try:
        return list(loader.epoch(1, start))
    finally:
        loader.close()


def same(one: Batch, other: Batch) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers_or_start(workers: int, served: Dataset) -> None:
    expected = loaded(served, 0)
    assert len(expected) == len(served) // 8 == 9
    assert all(map(same, loaded(served, workers), expected))
    assert all(map(same, loaded(served, workers, start=4), expected[4:]))


def shard(source: Dataset, number: int) -> Shard:
    assert isinstance(source.reader, ShardRanges)
    return source.reader.blobs[number]


def shards_in(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if "." not in path.name and path.name != "indexes"]


def test_workers_fetch_each_shard_once_between_them(tmp_path: Path, cache: Path) -> None:
    with serving(write_shards(tmp_path / "many", {f"train-{n}.tar": 8 for n in range(9)})) as server:
        source = open_dataset(server.url + "/train-{0..8}.tar")
        expected = loaded(source, 0)
        for path in shards_in(cache):
            path.unlink()
        server.sent.clear()
        server.failures.update({f"/train-{n}.tar": 1 for n in range(9)})
        images = unread_images(source, np.arange(len(source)), LIMIT)
        loader = TrainLoader(images, AUGMENT, batch_size=8, seed=3, workers=3)
        assert loader.prefetcher is not None
        loader.prefetcher.fetch = lambda _: None  # so that the workers do
        assert all(map(same, loader.epoch(1), expected))
        loader.close()
        assert set(server.sent.values()) == {1}
        assert len(server.sent) == 9


def test_the_disk_stays_bounded_while_workers_load(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path / "many", {f"train-{n}.tar": 8 for n in range(9)})
    expected = loaded(open_dataset(folder), 0)
    limit = 5 * max(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setenv("TOKENFUSION_CACHE_GB", repr(limit / 2**30))
    with serving(folder) as server:
        source = open_dataset(server.url)
        images = unread_images(source, np.arange(len(source)), LIMIT)
        loader = TrainLoader(images, AUGMENT, batch_size=8, seed=3, workers=2)
        for batch, one in zip(loader.epoch(1), expected, strict=True):
            assert same(batch, one)
            with shard(source, 0).cache.lock("room"):  # without which nothing is evicted
                assert sum(path.stat().st_size for path in shards_in(cache)) <= limit
        loader.close()


def test_processes_load_the_slices_of_one_process(served: Dataset) -> None:
    expected = loaded(served, 0)
    halves = [loaded(served, 1, share=Share(rank, 2)) for rank in (0, 1)]
    for batch, one, other in zip(expected, *halves, strict=True):
        assert same(batch, tuple(torch.cat(parts) for parts in zip(one, other, strict=True)))


def test_drawing_classes_evenly_from_shards_is_refused(served: Dataset) -> None:
    images = unread_images(served, np.arange(len(served)), LIMIT)
    with pytest.raises(InputError, match="classes cannot be drawn evenly"):
        TrainLoader(images, AUGMENT, batch_size=8, seed=3, workers=0, balanced=True)


@pytest.fixture
def damaged(tmp_path: Path) -> Dataset:
    """Shards in which picture 5 is no image."""
    with tarfile.open(write_shards(tmp_path, {"train-1.tar": 9}) / "train-0.tar", "w") as tar:
        for number in range(20, 27):
            add(tar, f"{number}.png", b"no image" if number == 25 else png(picture(number)))
            add(tar, f"{number}.cls", b"0")
    return open_dataset(f"{tmp_path}/train-{{0..1}}.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_another_stands_in_for_an_unreadable_image_and_it_is_told(workers: int, damaged: Dataset) -> None:
    images = unread_images(damaged, np.arange(16), LIMIT)
    told: dict[int, str] = {}
    plain = Augment((8, 8), 3, crop_scale=1.0, hflip=0.0, trivial_augment=False)
    loader = TrainLoader(images, plain, batch_size=4, seed=3, workers=workers, on_unreadable=told.update)
    order = batches_of(ShardOrder(np.array([0] * 7 + [1] * 9), 4, 3))
    step, batch = next((step, batch) for step, batch in enumerate(order) if 5 in batch)
    pixels, labels = list(loader.epoch(0))[step]
    loader.close()
    assert list(told) == [5]
    assert "not an image" in told[5]
    place = batch.index(5)
    stand_in = batch[place + 1] if place < 3 else batch[0]
    expected = [*batch[:place], stand_in, *batch[place + 1 :]]
    assert labels.tolist() == damaged.labels[expected].tolist()
    assert torch.equal(pixels[place], plain(images[stand_in]))


def test_imagenet_as_it_is_unpacked(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 1)):
        for synset in ("n01440764", "n01443537"):
            for number in range(count):
                path = tmp_path / part / synset / f"{synset}_{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(number)).save(path)
    (tmp_path / "val/ILSVRC2012_val_00000001.txt").write_text("no image")
    source = open_dataset(tmp_path)
    assert source.classes == ("n01440764", "n01443537")
    assert (source.splits.count("train"), source.splits.count("val")) == (6, 2)
    assert io.BytesIO(source.read(0)).read(2) == b"\xff\xd8"


def test_a_pattern_or_url_means_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolved("train-{0..3}.tar") == f"{tmp_path}/train-{{0..3}}.tar"
    assert resolved("s3://bucket/train-{0..3}.tar") == "s3://bucket/train-{0..3}.tar"


def test_what_shards_say_of_their_images_is_honoured(tmp_path: Path) -> None:
    said = [("train", 2, "p"), ("Validation", 1, "q"), ("train", 0.5, "p"), ("test", 1, "r")]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for number, (split, weight, group) in enumerate(said):
            add(tar, f"{number}.png", png(picture(number)))
            text = {"label": "aabb"[number], "split": split, "weight": weight, "group": group}
            add(tar, f"{number}.json", json.dumps(text).encode())
    columns = {
        "split": [s for s, _, _ in said],
        "weight": [float(w) for _, w, _ in said],
        "group": [g for *_, g in said],
    }
    files = [png(picture(number)) for number in range(4)]
    write_parquet(tmp_path / "parquet" / "0.parquet", files, [0, 0, 1, 1], ["a", "b"], **columns)
    for place in (tmp_path / "tars", f"file://{tmp_path / 'parquet'}"):
        source = open_dataset(place)
        assert source.splits == ["train", "val", "train", "test"]
        assert source.weights is not None
        assert source.groups is not None
        assert source.weights.tolist() == [2, 1, 0.5, 1]
        assert source.groups.tolist() == [0, 1, 0, 2]
        assert [np.array_equal(pixels_of(source, n), picture(n)) for n in range(4)] == [True] * 4
        assert open_dataset(place).splits == source.splits  # by the index that was kept


@pytest.mark.parametrize(
    ("said", "reason"),
    [({"split": "monday"}, "split='monday' is not known"), ({"weight": -1}, "weight=-1 is no weight")],
)
def test_what_shards_say_and_nobody_understands_is_refused(
    said: dict[str, object], reason: str, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "0.png", png(picture(0)))
        add(tar, "0.json", json.dumps({"label": "a"} | said).encode())
    with pytest.raises(InputError, match=rf"0.tar/0.json: {reason}"):
        open_dataset(tmp_path)


def test_columns_of_shards_are_chosen_as_those_of_parquet(tmp_path: Path) -> None:
    files, masks = ([png(picture(number + more)) for number in range(4)] for more in (0, 50))
    write_parquet(tmp_path / "0.parquet", files, [0, 1, 0, 1], image="scan", mask=masks, kind=["x", "y", "y", "y"])
    place = f"file://{tmp_path}"
    masked = open_dataset(place, reading=Reading(image_column="mask", label_column="kind"))
    assert masked.classes == ("x", "y")
    assert np.array_equal(pixels_of(masked, 1), picture(51))
    scans = open_dataset(place, reading=Reading(image_column="scan"))
    assert scans.labels.tolist() == [0, 1, 0, 1]
    assert np.array_equal(pixels_of(scans, 1), picture(1))


def test_flags_of_a_samples_json_tell_splits(tmp_path: Path) -> None:
    def shard(name: str, *rows: dict[str, object]) -> Path:
        with tarfile.open(tmp_path / name, "w") as tar:
            for number, row in enumerate(rows):
                add(tar, f"{number}.png", png(picture(1)))
                add(tar, f"{number}.json", json.dumps({"label": "ab"[number % 2]} | row).encode())
        return tmp_path / name

    values = (False, False, True, "yes")
    assert open_dataset(shard("1.tar", *({"is_valid": value} for value in values))).splits == [
        *("train", "train", "val", "val")
    ]
    rows = [{"subset": name, "group_id": name, "sample_weight": 2} for name in ("train", "train", "dev", "dev")]
    source = open_dataset(shard("4.tar", *rows))
    assert source.splits == ["train", "train", "val", "val"]
    assert source.weights is not None
    assert source.groups is not None
    assert source.groups.tolist() == [1, 1, 0, 0]
    assert open_dataset(shard("5.tar", {"subset": "?"}, {"subset": ""})).splits == ["", ""]
    with pytest.raises(InputError, match="is_test='maybe' is neither yes nor no"):
        open_dataset(shard("2.tar", {"is_test": "maybe"}, {"is_test": True}))
    with pytest.raises(InputError, match="'is_valid', 'is_test' all tell splits"):
        open_dataset(shard("3.tar", {"is_valid": True, "is_test": False}, {}))
