"""Predict many images into a folder: a Parquet file a part, shared among processes, going on where a job was killed."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenfusion.classifier import Classifier, Prepared
from tokenfusion.compiled import compiled_classifier, require_compiler
from tokenfusion.data.decode import Hearing, UnreadableImage, decode_image
from tokenfusion.data.kinds import is_path
from tokenfusion.data.unlabelled import NamedImage, Part, find_parts
from tokenfusion.errors import InputError
from tokenfusion.files import FolderTaken, lock_folder, make_folder, refuse_inside, share_folder, write_json
from tokenfusion.hardware import keep_freed_memory
from tokenfusion.hub import fetch, is_reference
from tokenfusion.launch import Launch, choose_device, read_launch
from tokenfusion.predict.ahead import prepared_ahead
from tokenfusion.predict.table import COUNTS, Row, read_facts, schema_of, write_table
from tokenfusion.recipe import Reading
from tokenfusion.version import __version__
from tokenfusion_runtime.abstain import why_silent
from tokenfusion_runtime.description import hash_of
from tokenfusion_runtime.prediction import Answers

MANIFEST = "_manifest.json"
COMPARED = ("model_sha256", "topk", "abstain", "raw", "embeddings", "content")
"""What an existing part must have been made by, and of, to be kept."""
BATCHES_AHEAD = 4
IMAGES_PER_PART = 10_000
Heard = tuple[Prepared, str]
"""What `Classifier.prepare` gives of an image, and what libjpeg says of its damaged data, "" where it says nothing."""
Progress = Callable[[int, int, int], None]
"""Told of parts done, parts in all, and images done."""


class PartUnreadable(Exception):  # noqa: N818 - says what the part is
    """A part cannot be read to its end, and why."""


def predict_many(
    run: str | Path,
    sources: Sequence[str],
    out: Path,
    *,
    topk: int = 5,
    abstain: float | None = None,
    raw: bool = False,
    embeddings: bool = False,
    compile: bool = False,
    batch_size: int = 64,
    workers: int | None = None,
    images_per_part: int = IMAGES_PER_PART,
    reading: Reading = Reading(),  # noqa: B008 - frozen
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Predict images of any number into a folder of Parquet files, one a shard; those that are there are kept.

    Under torchrun or SLURM each process takes its share of the parts.

    Args:
        run: as in `Classifier.load`.
        sources: as in `find_parts`.
        out: the folder.
        topk, abstain: as in `Classifier.predict`.
        raw: give the scores of the logits as they are.
        embeddings: add the vectors that the head makes its logits of.
        compile: whether to compile the model first, which changes rounding alone.
        batch_size: images in the model at once.
        workers: threads that decode; as many as there are cores for this process when not given.
        images_per_part: of images that lie in no shard.
        reading: how lists and Parquet files are understood.
        progress: called after each batch.
        say: told why nothing is answered, where `abstain` cannot be promised.

    Returns:
        What `_manifest.json` holds: the model and its hash, options, numbers of `images`, `errors` and `damaged`, and
        the `parts`; and `waiting`, how many parts other processes have yet to write. The file is written once none is
        left.

    Raises:
        InputError: run, sources or folder cannot be used; or, once all others are written, some parts cannot be read.
    """
    launch = read_launch(os.environ)
    keep_freed_memory()
    if batch_size < 1 or (workers is not None and workers < 1):
        raise InputError(f"batch_size={batch_size}, workers={workers}: give 1 or more")
    folder = fetch(run) if is_reference(run) else Path(run)
    classifier = Classifier.load(folder, choose_device(launch) if launch else None)
    classifier = classifier.uncalibrated() if raw else classifier
    if compile:
        require_compiler(classifier.device)
    classifier = compiled_classifier(classifier, batch_size) if compile else classifier.packed()
    answers = classifier.answers(min(topk, len(classifier.classes)), abstain)
    if silent := "" if abstain is None else why_silent(abstain, classifier.surest_errors):
        say(f"nothing is answered: {silent}")
    facts: dict[str, Any] = {
        "model": classifier.name,
        "model_sha256": hash_of([folder / "model.safetensors", folder / "model.json"]),
        "tokenfusion": __version__,
    } | {"topk": answers.topk, "abstain": abstain, "raw": raw, "embeddings": embeddings}
    for source in filter(is_path, sources):
        refuse_inside(out, source)
    parts = find_parts(sources, images_per_part, reading)
    make_folder(out)
    with share_folder(out, job_of(launch)):
        refuse_others(out, parts)
        mine = parts[launch.rank :: launch.size] if launch else parts
        missing = [part for part in mine if not is_written(out, part, facts)]
        threads = workers or own_cores(launch)
        failed = write_parts(classifier, answers, missing, out, facts, batch_size, threads, progress)
    if failed:
        (_, reason), *more = failed
        raise InputError(
            f"{len(failed)} of {len(parts)} parts could not be read{' (the first follows)' * bool(more)}: {reason}. "
            "The others are written; mend it, or take it away, and run the same command again"
        )
    return end_job(out, parts, facts)


def own_cores(launch: Launch | None) -> int:
    """Cores that this process may use, of which those that a launcher started on its machine have each a share."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if launch else cores


def job_of(launch: Launch | None) -> str:
    """What the processes that a launcher started together have in common, and no other process has."""
    if launch is None:
        return f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
    master = socket.gethostname() if launch.master in ("localhost", "127.0.0.1", "::1") else launch.master
    return f"{master}:{launch.port} {launch.size} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"


def file_of(out: Path, part: Part) -> Path:
    return out / f"{part.name}.parquet"


def refuse_others(out: Path, parts: Sequence[Part]) -> None:
    """Refuse a folder that holds anything but these parts' predictions.

    Raises:
        InputError: it does.
    """
    ours = {MANIFEST, *(file_of(out, part).name for part in parts)}
    others = sorted(path.name for path in out.iterdir() if path.name not in ours and not path.name.startswith("."))
    if others:
        raise InputError(
            f"{out} holds {others[0]!r}, which is no prediction of these images in parts of this size; give the "
            "images and --images-per-part of before, or another --out"
        )


def is_written(out: Path, part: Part, facts: dict[str, Any]) -> bool:
    """Whether a part's predictions are there, whole, and made by the same model of the same images.

    Raises:
        InputError: they were made otherwise, or of other images.
    """
    path = file_of(out, part)
    there, wanted = read_facts(path), facts | {"content": part.content}
    if there is None:
        return False
    for name in COMPARED:
        if there.get(name) != wanted[name]:
            what = f"{name}={there.get(name)!r}, not {wanted[name]!r}"
            what = {
                "content": "of other images, or with another --images-per-part",
                "model_sha256": "by another model",
            }.get(name, f"with {what}")
            raise InputError(f"{path} was written {what}; give another --out, or remove it")
    return True


def write_parts(
    classifier: Classifier,
    answers: Answers,
    parts: Sequence[Part],
    out: Path,
    facts: dict[str, Any],
    batch_size: int,
    threads: int,
    progress: Progress,
) -> list[tuple[Part, str]]:
    """Predict parts; those that cannot be read, with the reasons."""
    schema = schema_of(multi_label=classifier.multi_label, abstains=bool(answers.cuts), embeddings=facts["embeddings"])
    waiting = max(BATCHES_AHEAD * batch_size, 2 * threads)
    failed, images = [], 0
    hear = partial(prepare, classifier, Hearing())
    with closing(prepared_ahead(parts, hear, threads=threads, waiting=waiting)) as stream:

        def rows(done: int) -> Iterator[list[Row]]:
            nonlocal images
            for batch in batches_of_part(stream, batch_size):
                yield predict_batch(classifier, batch, answers, facts["embeddings"])
                images += len(batch)
                progress(done, len(parts), images)

        for done, part in enumerate(parts):
            try:
                its = {"source": part.source, "content": part.content}
                write_table(file_of(out, part), schema, rows(done), facts | its)
            except PartUnreadable as error:
                failed.append((part, str(error)))
    return failed


def prepare(classifier: Classifier, hearing: Hearing, image: NamedImage) -> Heard:
    """An image's path, and its prepared pixels or why there are none; and what libjpeg says of damaged data."""
    try:
        content, damage = image.read(), ""
        if isinstance(content, bytes):
            most, low_high = classifier.max_pixels, classifier.preprocess.value_range
            pixels, damage = hearing.hear(partial(decode_image, content, max_pixels=most, value_range=low_high))
        else:
            pixels = content
        return (image.path, classifier.preprocess.resize(pixels)), damage
    except UnreadableImage as error:
        return (image.path, str(error)), ""


def batches_of_part(stream: Iterator[Any], size: int) -> Iterator[list[Heard]]:
    """The images of the next part, as `prepared_ahead` gives them; no batch has images of two parts.

    Raises:
        PartUnreadable: it cannot be read to its end.
    """
    batch: list[Heard] = []
    while (item := next(stream)) is not None:
        if isinstance(item, InputError):
            raise PartUnreadable(str(item))
        batch.append(item.result())
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def predict_batch(classifier: Classifier, heard: Sequence[Heard], answers: Answers, embeddings: bool) -> list[Row]:
    """What the model says of each image, its embedding if there is to be one, and what libjpeg says."""
    batch, damage = [prepared for prepared, _ in heard], [said for _, said in heard]
    readable = [pixels for _, pixels in batch if not isinstance(pixels, str)]
    if not embeddings or not readable:
        found = classifier.predict_prepared(batch, answers)
        return [(prediction, None, said) for prediction, said in zip(found, damage, strict=True)]
    logits, vectors = classifier.logits_and_embeddings(torch.stack(readable))
    predictions = answers.predictions(batch, classifier.scores(logits).numpy())
    remaining = iter(vectors.numpy())
    rows = zip(predictions, batch, damage, strict=True)
    return [(found, None if isinstance(pixels, str) else next(remaining), said) for found, (_, pixels), said in rows]


def end_job(out: Path, parts: Sequence[Part], facts: dict[str, Any]) -> dict[str, Any]:
    """What was written, put into `_manifest.json` by the last process of a job."""
    written = [(file_of(out, part), found) for part in parts if (found := read_facts(file_of(out, part))) is not None]
    kept = ("source", "content", *COUNTS)
    listed = [{"file": path.name} | {name: found.get(name, 0) for name in kept} for path, found in written]
    manifest = facts | {name: sum(part[name] for part in listed) for name in COUNTS} | {"parts": listed}
    if len(listed) == len(parts):
        try:
            with lock_folder(out):
                write_json(out / MANIFEST, manifest)
        except FolderTaken:  # whoever is still there has read the same, or ends later
            pass
    return manifest | {"waiting": len(parts) - len(listed)}
