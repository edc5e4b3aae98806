"""A part's predictions as a Parquet file, whose metadata says by which model and how they were made."""

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenfusion.classifier import batched
from tokenfusion.files import write_atomic
from tokenfusion_runtime.prediction import Prediction

KEY = b"tokenfusion"
ROWS = 4096
"""Of a row group, and so the most that wait in memory."""
SCORES = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))
Row = tuple[Prediction, np.ndarray | None, str]
"""What is said of an image, its embedding (F,), None where it has none, and what libjpeg says of damaged data."""
COUNTS = ("images", "errors", "damaged")
"""How many images there are, and of how many there is an error, or damaged data."""


def schema_of(*, multi_label: bool, abstains: bool, embeddings: bool) -> pa.Schema:
    """The columns: `path, label, score, topk, error, damage`, of multi-label models `labels` for label and score."""
    said = [("labels", SCORES)] if multi_label else [("label", pa.string()), ("score", pa.float32())]
    said += [("unsure", pa.list_(pa.string()))] * (multi_label and abstains)
    vector = [("embedding", pa.list_(pa.float32()))] * embeddings
    words = [("error", pa.string()), ("damage", pa.string())]
    return pa.schema([("path", pa.string()), *said, ("topk", SCORES), *words, *vector])


def write_table(
    path: Path, schema: pa.Schema, batches: Iterable[Sequence[Row]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write predictions, whole or not at all, one row group in memory.

    Args:
        path: of the file.
        schema: as `schema_of` gives it.
        batches: the rows.
        facts: what the metadata says of them.

    Returns:
        The facts, with `COUNTS`.

    Raises:
        InputError: it cannot be written.
    """
    counts = dict.fromkeys(COUNTS, 0)

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for rows in batched(chain.from_iterable(batches), ROWS):
                writer.write_table(as_table(rows, schema))
                counts["images"] += len(rows)
                counts["errors"] += sum(bool(prediction.error) for prediction, *_ in rows)
                counts["damaged"] += sum(bool(damage) for *_, damage in rows)
            writer.add_key_value_metadata({KEY: json.dumps(facts | counts, ensure_ascii=False).encode()})

    write_atomic(path, write)
    return facts | counts


def as_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Rows as columns; what an image has not is null."""
    columns = {name: [value_of(name, *row) for row in rows] for name in schema.names}
    return pa.table(columns, schema)


def value_of(name: str, prediction: Prediction, embedding: np.ndarray | None, damage: str) -> Any:
    """What stands in a column."""
    if name == "damage":
        return damage or None
    if name in ("path", "error"):
        return getattr(prediction, name) or None
    if prediction.error:
        return None
    if name == "embedding":
        return embedding
    if name in ("topk", "labels"):
        return [{"label": label, "score": score} for label, score in getattr(prediction, name)]
    return getattr(prediction, name) if name != "label" else prediction.label or None


def read_facts(path: Path) -> dict[str, Any] | None:
    """What a file's metadata says of its predictions; None where there is no such file, or it is not whole."""
    try:
        facts: dict[str, Any] = json.loads(pq.read_metadata(path).metadata[KEY])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    return facts
