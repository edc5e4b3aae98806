import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import Server, serving
from tokenfusion.data import remote
from tokenfusion.data.remote import RemoteFile, download, find_files, read_small
from tokenfusion.errors import InputError


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off without the waiting."""
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(3):
        (folder / f"train-{number}.tar").write_bytes(bytes([number]) * (1000 + number))
    with serving(folder) as server:
        yield server


def fetched(file: RemoteFile, folder: Path) -> bytes:
    path = folder / "fetched"
    download(file, path)
    return path.read_bytes()


def test_a_pattern_stands_for_its_files_in_order(tmp_path: Path) -> None:
    for name in ("train/b-09.tar", "train/b-10.tar", "val/0.tar", "val/other.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    files = find_files(f"{tmp_path}/{{train/b-{{09..10}},val/0}}.tar", (".tar",))
    assert [(file.name, file.size, file.local) for file in files] == [
        ("train/b-09.tar", 14, True),
        ("train/b-10.tar", 14, True),
        ("val/0.tar", 9, True),
    ]
    for folder in (str(tmp_path), f"file://{tmp_path}", f"file://{tmp_path}/"):
        assert [file.name for file in find_files(folder, (".tar",))] == [
            "train/b-09.tar",
            "train/b-10.tar",
            "val/0.tar",
        ]
    assert {file.url for file in find_files(f"file://{tmp_path}", (".tar",))} == {file.url for file in files}


def test_files_are_found_over_http_and_in_memory(server: Server, tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://bucket/deep/train-0.tar", "wb") as file:
        file.write(b"in memory")
    (file,) = find_files("memory://bucket", (".tar",))
    assert (file.name, file.size, file.local, fetched(file, tmp_path)) == ("deep/train-0.tar", 9, False, b"in memory")
    listed = find_files(server.url, (".tar",))
    assert [file.name for file in listed] == ["train-0.tar", "train-1.tar", "train-2.tar"]
    signed = find_files(server.url + "/train-{0..2}.tar?signature=secret", (".tar",))
    assert [(file.name, file.size) for file in signed] == [(file.name, file.size) for file in listed]
    assert "secret" not in signed[0].shown
    assert fetched(signed[1], tmp_path) == b"\x01" * 1001


def test_what_fails_for_a_while_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.failures["/train-1.tar"] = 6  # a look-up asks twice, by HEAD and by GET
    (file,) = find_files(f"{server.url}/train-1.tar", (".tar",))
    server.failures["/train-1.tar"] = 3
    assert fetched(file, tmp_path) == b"\x01" * 1001
    server.failures["/train-1.tar"] = 4
    with pytest.raises(InputError, match=r"train-1.tar: failed 4 times within 0 s, .*503.*; check the network"):
        fetched(file, tmp_path)
    server.failures["/train-1.tar"] = 99
    with pytest.raises(InputError, match=r"failed 4 times .*503"):
        find_files(f"{server.url}/train-1.tar", (".tar",))


def test_the_waits_between_tries_grow(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.undo()
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.failures["/train-0.tar"] = 99
    with pytest.raises(InputError, match="failed 7 times within 63 s"):
        find_files(f"{server.url}/train-0.tar", (".tar",))
    assert waits == [1, 2, 4, 8, 16, 32]


def test_a_missing_file_is_named_at_once(server: Server, tmp_path: Path) -> None:
    for url in (server.url, f"file://{tmp_path}/served", f"{tmp_path}/served"):
        with pytest.raises(InputError, match=r"train-3.tar: there is no such file; put it back"):
            find_files(url + "/train-{0..3}.tar", (".tar",))
    assert read_small(f"{server.url}/classes.txt", 10) is None
    with pytest.raises(InputError, match="has 1000 bytes, more than 10"):
        read_small(f"{server.url}/train-0.tar", 10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("TMP/{{0..3}.tar", "braces do not match"),
        ("TMP/{0..999}-{0..999}.tar", "more than 100,000 files"),
        ("TMP", "no file called"),
        ("nonsense://host/0.tar", "nonsense"),
        ("http://127.0.0.1:1/0.tar", "failed 4 times"),
    ],
)
def test_what_cannot_be_looked_up_is_refused(data: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        find_files(data.replace("TMP", str(tmp_path)), (".tar",))


def test_a_transfer_that_is_cut_short_or_stands_still_fails(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = find_files(f"{server.url}/train-2.tar", (".tar",))
    server.cut_short.add("/train-2.tar")
    with pytest.raises(InputError, match="failed 4 times"):
        fetched(file, tmp_path)
    (tmp_path / "served/train-2.tar").write_bytes(b"short")
    server.cut_short.clear()
    with pytest.raises(InputError, match="5 bytes came, of 1002: it was cut short, or changed"):
        fetched(file, tmp_path)
    never = threading.Event()
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.05)
    with pytest.raises(InputError, match=r"failed 4 times .*nothing coming for 0.05 s"):
        remote.persistently(never.wait, file.url)
    never.set()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError("403 Forbidden")])
def test_what_waiting_does_not_mend_is_not_tried_again(error: OSError) -> None:
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise error

    with pytest.raises(InputError, match=r"s3://bucket/0.tar: .*(No space left|403 Forbidden)"):
        remote.persistently(fail, "s3://bucket/0.tar")
    assert len(tries) == 1


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(InputError, match=r"http://host/0.tar: .*aiohttp.* install the library for such URLs"):
        find_files("http://host/0.tar", (".tar",))


def test_a_key_is_a_plain_name_whatever_the_url_holds() -> None:
    files = [
        RemoteFile(url, "x", size, "", False) for url in ("s3://a/../../etc/x.tar", "s3://b\0/x") for size in (1, 2)
    ]
    assert len({file.key for file in files}) == 4
    assert all(len(file.key) == 32 and set(file.key) <= set("0123456789abcdef") for file in files)
