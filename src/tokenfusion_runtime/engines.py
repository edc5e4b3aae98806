"""The engines that run an exported graph: uint8 (B, C, h, w) in, probabilities float32 (B, K) out."""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tokenfusion_runtime.errors import InputError
from tokenfusion_runtime.image import Pixels
from tokenfusion_runtime.prediction import Floats

Engine = Callable[[Pixels], Floats]
INSIDE = "tokenfusion"
"""Name of the description inside a graph's file."""

MANY = 7
"""Images that OpenVINO is given at once in int8, where there are so many, and else one by one: the gate of exports
tries batches of both."""


def onnx_engine(graph: Path, _precision: str, threads: int) -> tuple[Engine, str, str]:
    """ONNX Runtime on the CPU; see ENGINES."""
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(missing("onnxruntime")) from error

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would keep decoders from the cores
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    inside = session.get_modelmeta().custom_metadata_map.get(INSIDE, "")
    return lambda images: session.run(None, {"images": images})[0], "", inside


def leave_out_converter() -> None:
    """Keep OpenVINO, in a process that only runs graphs, from importing its converter, and that its telemetry.

    It goes on without where that cannot be imported.
    """
    sys.modules["openvino.tools.ovc"] = None  # type: ignore[assignment]


def openvino_engine(graph: Path, precision: str, threads: int) -> tuple[Engine, str, str]:
    """OpenVINO on the CPU; see ENGINES."""
    try:
        import openvino
    except ImportError as error:
        raise InputError(missing("openvino")) from error

    core = openvino.Core()
    hint, note = arithmetic(precision, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    model = core.read_model(str(graph))
    inside = model.get_rt_info(INSIDE).astype(str) if model.has_rt_info(INSIDE) else ""
    if precision == "int8" and model.is_dynamic():
        return of_fixed_sizes(model, lambda part: core.compile_model(part, "CPU", config)), note, inside
    compiled = core.compile_model(model, "CPU", config)
    return lambda images: compiled(images)[0], note, inside


def of_fixed_sizes(model: Any, compile_part: Callable[[Any], Any]) -> Engine:
    """A graph of any number of images, run by graphs of a fixed number: OpenVINO 2026.4 answers otherwise in int8 where
    the number is open, by some convolutions, which on the digits cost 10 points of accuracy."""

    @cache
    def compiled(size: int) -> Any:
        part = model.clone()
        part.reshape([size, *list(model.input(0).get_partial_shape())[1:]])
        return compile_part(part)

    def run(images: Pixels) -> Floats:
        many = len(images) // MANY * MANY
        parts = [(MANY, start) for start in range(0, many, MANY)] + [(1, start) for start in range(many, len(images))]
        return np.concatenate([compiled(size)(images[start : start + size])[0] for size, start in parts])

    compiled(1)  # what cannot be compiled is said when it is loaded
    return run


def arithmetic(precision: str, capabilities: Sequence[str]) -> tuple[str, str]:
    """What OpenVINO computes in on a CPU of these capabilities, and what to say where that is not what was asked."""
    if precision != "bf16":
        return "f32", ""
    if "BF16" in capabilities:
        return "bf16", ""
    return "f32", "this CPU has no bf16; the classifier runs in fp32"


def missing(package: str) -> str:
    """What to say where an engine is not installed."""
    return f"{package} is not installed, which runs this folder; pip install {package}"


ENGINES: dict[str, Callable[[Path, str, int], tuple[Engine, str, str]]] = {
    "onnx": onnx_engine,
    "openvino": openvino_engine,
}
"""From a graph's file, precision and threads: what runs it, what that does otherwise than asked, and the description
inside the file; "" for what there is not."""
