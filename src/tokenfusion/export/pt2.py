"""PyTorch's own archive of an exported program, which needs torch and neither this package nor its models."""

import io
from pathlib import Path
from typing import Any

import torch

from tokenfusion.classifier import Classifier
from tokenfusion.export.deployable import quiet, trace
from tokenfusion_runtime.engines import INSIDE, Engine


def save_pt2(classifier: Classifier, batch: int | None, path: Path) -> None:
    """Write the classifier.

    Args:
        classifier: what to export.
        batch: images of a call; None for any number.
        path: to write.

    Raises:
        InputError: the model cannot be traced.
    """
    archive = io.BytesIO()  # torch's own writer ends the process on a full disk
    with quiet():
        torch.export.save(trace(classifier, batch), archive)
    path.write_bytes(archive.getbuffer())


def pt2_engine(path: Path) -> tuple[Engine, str]:
    """What runs it, and the description inside; "" where there is none."""
    extra = {f"{INSIDE}.json": ""}
    module = torch.export.load(path, extra_files=extra).module()

    def run(images: Any) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return run, extra[f"{INSIDE}.json"]
