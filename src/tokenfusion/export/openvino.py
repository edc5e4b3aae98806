"""OpenVINO, by way of ONNX: `convert_model` of a module traces with TorchScript, which fails on oneDNN's layers."""

import json
from pathlib import Path
from typing import Any

from tokenfusion.classifier import Classifier
from tokenfusion.export.deployable import quiet
from tokenfusion.export.onnx import calibration_batches


def save_openvino(graph: Any, classifier: Classifier, run: Path, path: Path, description: str) -> None:
    """Write an ONNX graph as OpenVINO's `model.xml` and `model.bin`, with the description as `rt_info`.

    Args:
        graph: an `onnx.ModelProto`.
        classifier, run: whose training images int8 is calibrated on.
        path: of the xml.
        description: JSON, with batch and precision: fp16 halves the weights; bf16 is a choice of the engine, made when
            the folder is loaded.
    """
    import openvino

    saved = json.loads(description)
    with quiet():
        model = openvino.Core().read_model(graph.SerializeToString())
        if saved["precision"] == "int8":
            import nncf

            batches = list(calibration_batches(classifier, run, saved["batch"] or 1))
            model = nncf.quantize(
                model, nncf.Dataset(batches), subset_size=len(batches), model_type=nncf.ModelType.TRANSFORMER
            )
        model.set_rt_info(json.dumps(saved), ["tokenfusion"])
        try:
            openvino.save_model(model, path, compress_to_fp16=saved["precision"] in ("fp16", "bf16"))
        except RuntimeError as error:  # its stream's, as on a full disk
            raise OSError(str(error)) from error
