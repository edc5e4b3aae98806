"""PyTorch's own archive of an exported program, which needs torch and neither this package nor its models."""

from pathlib import Path
from typing import Any

import torch

from tokenfusion.classifier import Classifier
from tokenfusion.errors import InputError
from tokenfusion.export.deployable import Deployable, example_images
from tokenfusion.export.onnx import quiet
from tokenfusion_runtime.engines import Engine


def save_pt2(classifier: Classifier, batch: int | None, path: Path, description: str) -> None:
    """Write the classifier, with its description inside.

    Args:
        classifier: what to export.
        batch: images of a call; None for any number.
        path: to write.
        description: JSON that is kept as the archive's file `tokenfusion.json`.

    Raises:
        InputError: the model cannot be traced.
    """
    shapes: Any = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    with quiet():
        try:
            module, images = Deployable(classifier).eval(), example_images(classifier, batch or 2)
            program = torch.export.export(module, (images,), dynamic_shapes=shapes)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{classifier.name} cannot be exported: {reason}; try --batch 1") from error
        torch.export.save(program, path, extra_files={"tokenfusion.json": description})


def pt2_engine(path: Path) -> Engine:
    """Run it."""
    module = torch.export.load(path).module()

    def run(images: Any) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return run
