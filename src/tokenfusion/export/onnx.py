"""ONNX, by PyTorch's own exporter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenfusion.classifier import Classifier
from tokenfusion.errors import InputError
from tokenfusion.export.deployable import quiet, trace
from tokenfusion.judged import read_own_part
from tokenfusion.recipe import Recipe, load_recipe

CALIBRATION_IMAGES = 300
"""Training images by which int8's ranges are chosen."""


def to_onnx(classifier: Classifier, batch: int | None) -> Any:
    """The classifier as an `onnx.ModelProto`.

    Args:
        classifier: what to export.
        batch: images of a call; None for any number.

    Raises:
        InputError: the model has an operation that ONNX lacks.
    """
    program = trace(classifier, batch)
    with quiet():
        try:
            written = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=["probabilities"],
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, NotImplementedError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise InputError(f"{classifier.name} cannot be exported to ONNX: {reason}; try --format pt2") from error
    assert written is not None
    return written.model_proto


def quantized_onnx(graph: Any, classifier: Classifier, run: Path, batch: int | None) -> Any:
    """A graph whose products are in int8, calibrated on training images."""
    import nncf
    from nncf.quantization.advanced_parameters import QuantizationParameters

    batches = [{"images": batch} for batch in calibration_batches(classifier, run, batch or 1)]
    # one range for all channels of what enters a depthwise convolution: ONNX Runtime takes no other
    one_range = nncf.AdvancedQuantizationParameters(
        activations_quantization_params=QuantizationParameters(per_channel=False)
    )
    with quiet():
        return nncf.quantize(
            graph,
            nncf.Dataset(batches),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=one_range,
        )


def calibration_batches(classifier: Classifier, run: Path, batch: int) -> Iterator[NDArray[np.uint8]]:
    """Training images of a run, prepared, each `batch` times; at most CALIBRATION_IMAGES, and never held-out ones."""
    recipe = Recipe(**load_recipe(run / "recipe.toml"))
    images, _, _ = read_own_part(run, recipe, split="train", most=CALIBRATION_IMAGES)
    for index in range(len(images)):
        yield classifier.preprocess.resize(images[index])[None].numpy().repeat(batch, 0)
