"""Files that are written whole or not at all."""

import csv
import errno
import fcntl
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tokenfusion.errors import InputError


class FolderTaken(InputError):  # noqa: N818 - says what the folder is
    """Another process is writing to a folder."""


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it into place.

    Whatever happens on the way (a kill, a full disk, an exception), `path` holds its old bytes or all of its new ones.

    Args:
        path: the file to replace; its folder must exist.
        write: called with the temporary file's path.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise InputError(
            f"{path} could not be written: {error}; what was there before is intact: make room or name another folder, "
            "then run the command again (training goes on with `tokenfusion train --resume RUN`)"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file under a line of headings, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text)  # with lines that end in \n alone, a \r in a cell would not be quoted
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file that has at least these columns; names may hold any byte, newlines too.

    Raises:
        InputError: it lacks a column, or a line is cut short.
    """
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.DictReader(file)
        if missing := [name for name in columns if name not in (rows.fieldnames or ())]:
            raise InputError(f"{path} is incomplete: it lacks {', '.join(missing)}; restore it, or make it anew")
        for row in rows:
            if any(row[name] is None for name in columns):
                raise InputError(f"{path} line {rows.line_num} is cut short; restore it, or make it anew")
            yield row


def make_folder(path: Path) -> None:
    """Make a folder where it is missing.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; give another --out") from error


def missing_folders(folder: Path) -> list[Path]:
    """A folder and those above it that are still to be made, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, of which each holds the one before it, as far as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Make a folder where it is missing, and have it to ourselves while we write; left empty, it is removed again.

    Raises:
        InputError: it cannot be made, or another process writes to it.
    """
    made = missing_folders(folder)
    make_folder(folder)
    try:
        with lock_folder(folder):
            yield folder
    finally:
        remove_empty(made)


@contextmanager
def own_results(run: Path) -> Iterator[None]:
    """Write a finished run's results, or read them for a report, while nobody else writes them; whoever does is waited
    for. They have a lock of their own: a report is wanted while training goes on, too."""
    with lock(run / ".results.lock", run, wait=lambda: None):
        yield


def lock_folder(
    folder: Path, wait: Callable[[], object] | None = None, grace: float = 0.0
) -> AbstractContextManager[int]:
    """Have a folder, which exists, to ourselves while we write to it; two writers would leave a mixture of both."""
    return lock(folder / ".lock", folder, wait, grace)


@contextmanager
def lock(path: Path, what: Path, wait: Callable[[], object] | None = None, grace: float = 0.0) -> Iterator[int]:
    """Hold a lock, which ends with the last process that has it open, however that ends.

    A file system without locks lets all in.

    Args:
        path: the file that is the lock; it is removed at the end.
        what: is locked by it, for messages.
        wait: called once before the lock is waited for; without it, what is taken is refused.
        grace: seconds before it is refused: loader processes of a killed run have the lock until they notice.

    Yields:
        the lock's descriptor, for processes that are to hold it as well.

    Raises:
        FolderTaken: another process writes there.
        InputError: nobody can.
    """
    refused_from = time.monotonic() + grace
    while True:
        file = open_lock(path, what)
        if not try_lock(file, fcntl.LOCK_EX):
            if wait is None:
                file.close()
                if time.monotonic() < refused_from:
                    time.sleep(0.1)
                    continue
                raise taken(what)
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        if is_at(path, file):
            break
        file.close()  # whoever held it has removed it meanwhile
    try:
        yield file.fileno()
    finally:
        with suppress(OSError):  # a folder that cannot be written any more keeps the file; the lock itself ends
            path.unlink()
        file.close()


@contextmanager
def share_folder(folder: Path, job: str, grace: float = 5.0) -> Iterator[None]:
    """Have a folder together with the other processes of one job, each of which writes other files.

    Args:
        folder: exists; its file `.lock`, which says whose job holds it, is the lock.
        job: what the processes of a job have in common, and no other process has.
        grace: seconds before a folder that is taken is refused: who comes first, or is last, has it alone for a moment.

    Raises:
        FolderTaken: another job, or a process alone, writes to the folder.
        InputError: nobody can write to it.
    """
    path, refused_from = folder / ".lock", time.monotonic() + grace
    while True:
        file = open_lock(path, folder)
        if try_lock(file, fcntl.LOCK_EX):  # nobody is there
            file.truncate(0)
            file.write(job)
            file.flush()
        shared = try_lock(file, fcntl.LOCK_SH) and is_at(path, file)
        file.seek(0)
        if shared and file.read() == job:
            break
        file.close()
        if shared or time.monotonic() > refused_from:
            raise taken(folder)
        time.sleep(0.05)
    try:
        yield
    finally:
        with suppress(OSError):
            if try_lock(file, fcntl.LOCK_EX):  # the last one
                path.unlink()
        file.close()


def open_lock(path: Path, what: Path) -> IO[str]:
    """The file of a lock, made where there is none; InputError where it cannot be, or is a link to some other file."""
    try:
        return open(path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
    except OSError as error:
        raise InputError(f"{what} cannot be written: {error.strerror}; give another folder") from error


def try_lock(file: IO[str], kind: int) -> bool:
    """Lock a file, LOCK_EX or LOCK_SH, unless others are in the way; a file system without locks lets all in."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return True


def is_at(path: Path, file: IO[str]) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def taken(folder: Path) -> FolderTaken:
    return FolderTaken(f"{folder}: another process is writing there; wait for its end, or name another folder")


def refuse_inside(folder: Path, data: str) -> None:
    """Refuse to write into a folder of images: what is written would be taken for data the next time.

    Raises:
        InputError: the folder is DATA or lies in it; `digits` lies nowhere.
    """
    images, written = Path(data).resolve(), folder.resolve()
    if data not in ("", "digits") and images.is_dir() and written.is_relative_to(images):
        raise InputError(
            f"{folder} lies inside the images in {images}, and would be taken for some of them; "
            f"give a folder outside, such as --out {images.parent / (images.name + '-' + written.name)}"
        )


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
