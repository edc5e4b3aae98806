"""OpenVINO, by way of ONNX: `convert_model` of a module traces with TorchScript, which fails on oneDNN's layers."""

from pathlib import Path
from typing import Any

from tokenfusion.classifier import Classifier
from tokenfusion.export.deployable import quiet
from tokenfusion.export.onnx import calibration_batches


def save_openvino(graph: Any, classifier: Classifier, run: Path, path: Path, description: dict[str, Any]) -> None:
    """Write an ONNX graph as OpenVINO's `model.xml` and `model.bin`.

    Args:
        graph: an `onnx.ModelProto`.
        classifier, run: whose training images int8 is calibrated on.
        path: of the xml.
        description: of which batch and precision are looked at: fp16 halves the weights; bf16 is a choice of the
            engine, made when the folder is loaded.
    """
    import openvino

    with quiet():
        model = openvino.Core().read_model(graph.SerializeToString())
        if description["precision"] == "int8":
            import nncf

            batches = list(calibration_batches(classifier, run, description["batch"] or 1))
            model = nncf.quantize(
                model, nncf.Dataset(batches), subset_size=len(batches), model_type=nncf.ModelType.TRANSFORMER
            )
        try:
            openvino.save_model(model, path, compress_to_fp16=description["precision"] in ("fp16", "bf16"))
        except RuntimeError as error:  # its stream's, as on a full disk
            raise OSError(str(error)) from error
