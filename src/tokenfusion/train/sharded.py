"""Weights and optimiser state that are spread over processes (FSDP2), and checkpoints of which each writes its part.

A sharded checkpoint `last` is a folder `last.0` or `last.1` of safetensors, and a small file `last.json` that names the
folder and describes the run: the folder that is not named is written anew, and then the file is replaced.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tokenfusion.errors import InputError
from tokenfusion.files import sync, write_json
from tokenfusion.hardware import default_device


def shard(model: nn.Module) -> nn.Module:
    """Spread a model's weights over the processes, in place, block by block; they are gathered when they are used."""
    model.to(memory_format=torch.contiguous_format)  # rows are spread, not channels
    mesh = init_device_mesh(default_device().type, (dist.get_world_size(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of every transformer inside."""
    for module in model.modules():
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, nn.ModuleList | nn.Sequential):
            yield from blocks


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes, in one piece; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be spread over them."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_into(tensor: Tensor, value: Tensor) -> None:
    """Overwrite a tensor that may be spread over the processes by one that is spread alike, or in one piece."""
    if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


def pointer_of(path: Path) -> Path:
    """The file that names the folder of a sharded checkpoint."""
    return path.with_suffix(".json")


def save_shards(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Let every process write its part of the tensors; the checkpoint before is there until all have.

    Raises:
        InputError: it cannot be written; what was there before is intact.
    """
    pointer, first = pointer_of(path), dist.get_rank() == 0
    before = json.loads(pointer.read_text())["folder"] if pointer.exists() else ""
    folder = path.with_suffix(".1" if before.endswith(".0") else ".0")
    try:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        dist.barrier()
        rows = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save(rows, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        if first:
            for file in (*folder.iterdir(), folder):
                sync(file)
    except (OSError, CheckpointException) as error:
        raise InputError(
            f"{folder} could not be written: {reason_of(error)}; the checkpoint before is intact: make room, "
            "then go on with `tokenfusion train --resume RUN`"
        ) from error
    if first:
        write_json(pointer, {"folder": folder.name, "description": dict(description)})
        path.unlink(missing_ok=True)  # of the same run by processes that did not share weights
        if before:
            shutil.rmtree(path.with_name(before), ignore_errors=True)
    dist.barrier()  # nobody reads the old file's name for the next checkpoint


def reason_of(error: BaseException) -> str:
    """What an error says in a line; of those of several processes, the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).partition("\n")[0] or type(error).__name__


def forget_shards(path: Path) -> None:
    """Remove a sharded checkpoint, once there is a newer one in a single file."""
    pointer_of(path).unlink(missing_ok=True)
    for slot in (".0", ".1"):
        shutil.rmtree(path.with_suffix(slot), ignore_errors=True)


def load_shards(path: Path, own: Mapping[str, Tensor], parameters: list[Tensor]) -> tuple[dict[str, Tensor], Any]:
    """Read what `save_shards` wrote, by any number of processes.

    Args:
        path: as for `save_shards`.
        own: tensors of the model and its average by name, which are overwritten.
        parameters: of the optimiser; what is saved of its state is spread as they are.

    Returns:
        All other tensors by name, and the description.

    Raises:
        InputError: it is damaged, or of another model.
    """
    try:
        saved = json.loads(pointer_of(path).read_text())
        reader = HuggingFaceStorageReader(str(path.with_name(saved["folder"])))
        others = {}
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            if name not in own:
                like = parameters[int(name.split(".")[1])] if name.startswith("optimizer.") else None
                spread = like is not None and like.shape == entry.size  # type: ignore[union-attr]
                others[name] = (
                    torch.empty_like(like)
                    if spread and like is not None
                    else torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
                )
        tensors = dict(own) | others
        load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        return {name: tensors[name] for name in others}, saved["description"]
    except (OSError, ValueError, KeyError, RuntimeError, CheckpointException) as error:
        raise InputError(
            f"{pointer_of(path)} is damaged: {reason_of(error)}; delete the folder {path.parent}, and "
            "--resume starts anew"
        ) from error
