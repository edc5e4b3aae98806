"""The engines that run an exported graph: uint8 (B, C, h, w) in, probabilities float32 (B, K) out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenfusion_runtime.errors import InputError
from tokenfusion_runtime.image import Pixels
from tokenfusion_runtime.prediction import Floats

Engine = Callable[[Pixels], Floats]


def onnx_engine(graph: Path, _precision: str, threads: int) -> tuple[Engine, str]:
    """ONNX Runtime on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(missing("onnxruntime", "onnx")) from error

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0], ""


def openvino_engine(graph: Path, precision: str, threads: int) -> tuple[Engine, str]:
    """OpenVINO on the CPU."""
    try:
        import openvino
    except ImportError as error:
        raise InputError(missing("openvino", "openvino")) from error

    core, note = openvino.Core(), ""
    wanted = "bf16" if precision == "bf16" else "f32"
    if wanted == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        wanted, note = "f32", "this CPU has no bf16; the classifier runs in fp32"
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": wanted, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(str(graph), "CPU", config)
    return lambda images: compiled(images)[0], note


def missing(package: str, extra: str) -> str:
    """What to say where an engine is not installed."""
    return f"{package} is not installed, which runs this folder; pip install 'tokenfusion-runtime[{extra}]'"


ENGINES: dict[str, Callable[[Path, str, int], tuple[Engine, str]]] = {
    "onnx": onnx_engine,
    "openvino": openvino_engine,
}
