import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest

from tokenfusion.data import cache as caches
from tokenfusion.data.cache import Cache, default_cache
from tokenfusion.errors import InputError


def write(data: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(data)

    return make


def refuse(_path: Path) -> None:
    raise AssertionError("it is there already")


def content(cache: Cache, key: str, data: bytes, make: Callable[[Path], None] | None = None) -> bytes:
    with cache.open(key, len(data), make or write(data)) as file:
        return file.read()


def size_of(cache: Cache) -> int:
    total = 0
    for path in cache.folder.rglob("*"):
        with suppress(FileNotFoundError):  # evicted a moment ago
            total += path.stat().st_size if path.is_file() else 0
    return total


def test_a_cache_makes_a_file_once_and_evicts_the_one_used_longest_ago(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 250)
    for age, key in enumerate(("a", "b")):
        assert content(cache, key, key.encode() * 100) == key.encode() * 100
        os.utime(cache.folder / key, (age, age))
    assert content(cache, "a", b"a" * 100, refuse) == b"a" * 100  # which is a use
    assert content(cache, "c", b"c" * 100) == b"c" * 100
    assert content(cache, "a", b"a" * 100, refuse) == b"a" * 100
    assert size_of(cache) == 200
    assert content(cache, "b", b"B" * 100) == b"B" * 100  # made anew


def test_a_cache_never_grows_over_its_limit(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 350)
    most = 0
    lock = threading.Lock()

    def make(path: Path) -> None:
        nonlocal most
        path.write_bytes(bytes(100))
        with lock:
            most = max(most, size_of(cache))

    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda number: content(cache, str(number % 12), bytes(100), make), range(60))
        assert all(result == bytes(100) for result in results)
    assert 200 <= most <= 350
    assert not list(cache.folder.glob("*.part"))


def test_an_evicted_file_can_still_be_read_by_who_has_it_open(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 100)
    with cache.open("a", 100, write(b"a" * 100)) as file:
        content(cache, "b", b"b" * 100)
        assert not (cache.folder / "a").exists()
        assert file.read() == b"a" * 100


def test_what_a_killed_process_left_behind_takes_no_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 100)
    cache.folder.mkdir()
    (cache.folder / "a.100.part").write_bytes(bytes(60))
    assert content(cache, "a", b"a" * 100) == b"a" * 100
    (cache.folder / "other.100.part").write_bytes(bytes(60))
    os.utime(cache.folder / "other.100.part", (0, 0))
    assert content(cache, "b", b"b" * 100) == b"b" * 100
    assert size_of(cache) == 100


def test_a_cache_that_is_too_small_or_locked_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache", 99)
    with pytest.raises(InputError, match=r"no room for .*TOKENFUSION_CACHE_GB"):
        content(cache, "a", bytes(100))
    monkeypatch.setattr(caches, "LOCK_SECONDS", 0.01)
    with cache.lock("a"), pytest.raises(InputError, match=r"a.lock is held by another process"):
        content(cache, "a", bytes(10))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="name another folder by TOKENFUSION_CACHE"):
        content(Cache(tmp_path / "file/cache", 99), "a", bytes(10))

    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device; make room"):
        content(cache, "b", bytes(10), full)
    assert not (cache.folder / "b").exists()


def test_a_cache_whose_disk_fails_says_so(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 99)
    with pytest.raises(InputError, match=r"k{248} could not be kept: .*TOKENFUSION_CACHE"):
        content(cache, "k" * 248, bytes(10))  # its lock may be called so, the file that is being made not
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=r"a could not be kept: .*Is a directory"):
        content(cache, "a", bytes(10))


def count_and_write(cache: Cache, log: Path) -> None:
    def make(path: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        path.write_bytes(b"x" * 50)

    assert content(cache, "shared", b"x" * 50, make) == b"x" * 50


def test_several_processes_make_a_file_once(tmp_path: Path) -> None:
    cache, log = Cache(tmp_path / "cache", 100), tmp_path / "log"
    processes = [get_context("fork").Process(target=count_and_write, args=(cache, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "made\n"


@pytest.mark.parametrize("text", ["many", "0", "-1", "nan"])
def test_a_limit_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFUSION_CACHE_GB", text)
    with pytest.raises(InputError, match="TOKENFUSION_CACHE_GB="):
        default_cache()


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TOKENFUSION_CACHE", raising=False)
    monkeypatch.delenv("TOKENFUSION_CACHE_GB", raising=False)
    assert default_cache() == Cache(tmp_path / "xdg/tokenfusion", 50 * 2**30)
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("TOKENFUSION_CACHE_GB", "0.5")
    assert default_cache() == Cache(tmp_path / "own", 2**29)
