"""Files of weights, read without running any code that they carry."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tokenfusion.errors import InputError

WRAPPERS = ("model", "state_dict", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's

State = dict[str, Tensor]


def tensors_of(source: str | Path | Mapping[str, Any]) -> State:
    """The state dict of a file or a mapping, out of its wrappers and prefixes; InputError if it holds none."""
    name = str(source) if isinstance(source, str | Path) else "the state dict"
    content: Any = read(Path(source)) if isinstance(source, str | Path) else source
    for _ in WRAPPERS:  # one inside another, but not without end
        if isinstance(content, Mapping) and (inner := next((w for w in WRAPPERS if is_dict(content.get(w))), None)):
            content = content[inner]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{name} holds no weights but a {type(content).__name__}; give a state dict")
    if odd := [key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]:
        raise InputError(f"{name} holds something else than tensors, such as {odd[0]!r}; give a state dict")
    state = dict(content)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def is_dict(value: Any) -> bool:
    """Whether a wrapper's entry is what it wraps."""
    return isinstance(value, Mapping)


def read(path: Path) -> Any:
    """What a `.pth` or `.safetensors` file holds, without running any code it carries."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; give the path of a .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # official files keep their training's arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) and path.read_bytes().startswith((b"PK\x03\x04", b"\x80")):  # a zip or a pickle
            raise InputError(
                f"{path} holds other objects than tensors, which could carry code, and was not opened; "
                "save its state dict alone"
            ) from error
        raise InputError(f"{path} is damaged, or not a file of weights; fetch it again") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is damaged, or not a file of weights; fetch it again") from error
