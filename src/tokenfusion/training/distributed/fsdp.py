"""Weights and optimiser state that are spread over processes (FSDP2), and checkpoints of which each writes its part.

A sharded checkpoint `last` is a folder `last.0` or `last.1` of safetensors, and a small file `last.json` that names the
folder and describes the run: the folder that is not named is written anew, and then the file is replaced.
"""

import json
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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

from tokenfusion.errors import InputError, first_line
from tokenfusion.files import sync, write_json
from tokenfusion.hardware import default_device
from tokenfusion.models.official import with_present_names
from tokenfusion.training.saved import last_good, pointer_of


def shard(model: nn.Module) -> nn.Module:
    """Spread a model's weights over the processes, in place; they are gathered when they are used: those of a
    transformer block by block, the rest at once."""
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


def slots_of(path: Path) -> tuple[Path, Path]:
    """The folders that sharded checkpoints of a name take turns in."""
    return path.with_suffix(".0"), path.with_suffix(".1")


class Pointer(NamedTuple):
    """Where a sharded checkpoint is, and what it says of itself."""

    folder: Path
    description: dict[str, Any]
    checksums: dict[str, int]
    """CRC-32 of each file in the folder; older checkpoints have none."""


def read_pointer(path: Path) -> Pointer:
    """The folder of a sharded checkpoint, and what it says of itself.

    Raises:
        InputError: it is damaged, or names another folder than its own, which would be removed in time.
    """
    pointer = pointer_of(path)
    try:
        saved = json.loads(pointer.read_text())
        folder = path.with_name(saved["folder"])
        found = Pointer(folder, dict(saved["description"]), dict(saved.get("checksums", {})))
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise damaged(path, first_failure(error)) from error
    if folder not in slots_of(path):
        known = " or ".join(slot.name for slot in slots_of(path))
        raise damaged(path, f"its folder is {saved['folder']!r}, not {known}")
    return found


def checksums_of(folder: Path) -> dict[str, int]:
    """CRC-32 of each file in a folder; each process reads its share of them, and all get all."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = {path.name: crc_of(path) for path in sorted(folder.iterdir())[rank::size]}
    parts: list[dict[str, int]] = [mine] * size
    if size > 1:
        dist.all_gather_object(parts, mine)
    return {name: crc for part in parts for name, crc in part.items()}


def crc_of(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            crc = zlib.crc32(part, crc)
    return crc


def damaged(path: Path, reason: str) -> InputError:
    """What to say of a sharded checkpoint that cannot be read."""
    return InputError(
        f"{pointer_of(path)} is damaged: {reason}; delete the folder {path.parent}, and --resume starts anew"
    )


def save_shards(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Let every process write its part of the tensors; the checkpoint before is there until all have.

    Raises:
        InputError: it cannot be written; what was there before is intact.
    """
    pointer, first = pointer_of(path), dist.get_rank() == 0
    before = read_pointer(path).folder if pointer.exists() else None
    folder = next(slot for slot in slots_of(path) if slot != before)
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
        checksums = checksums_of(folder)
    except (OSError, CheckpointException) as error:
        raise InputError(
            f"{folder} could not be written: {first_failure(error)}; {last_good(path)} make room, "
            "then go on with `tokenfusion train --resume RUN`"
        ) from error
    if first:
        saved = {"folder": folder.name, "description": dict(description), "checksums": checksums}
        write_json(pointer, saved)
        path.unlink(missing_ok=True)  # of the same run by processes that did not share weights
        if before:
            shutil.rmtree(before, ignore_errors=True)
    dist.barrier()  # nobody reads the old file's name for the next checkpoint


def first_failure(error: BaseException) -> str:
    """What an error says in a line; of those of several processes, the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


def forget_shards(path: Path) -> None:
    """Remove a sharded checkpoint, once there is a newer one in a single file."""
    pointer_of(path).unlink(missing_ok=True)
    for slot in slots_of(path):
        shutil.rmtree(slot, ignore_errors=True)


def load_shards(path: Path, own: Mapping[str, Tensor], parameters: list[Tensor]) -> dict[str, Tensor]:
    """Read what `save_shards` wrote, by any number of processes.

    Args:
        path: as for `save_shards`.
        own: tensors of the model and its average by name, which are overwritten.
        parameters: of the optimiser; what is saved of its state is spread as they are.

    Returns:
        All other tensors by name.

    Raises:
        InputError: it is damaged, or of another model.
    """
    folder, _, checksums = read_pointer(path)
    try:
        if checksums and checksums_of(folder) != checksums:
            raise ValueError(f"the files in {folder.name} are not those that were written")
        reader = HuggingFaceStorageReader(str(folder))
        entries = reader.read_metadata().state_dict_metadata
        stored = with_present_names({name: name for name in entries}, own)  # by present name
        own, others = {stored.get(name, name): tensor for name, tensor in own.items()}, {}
        for name, entry in entries.items():
            if name not in own:
                like = parameters[int(name.split(".")[1])] if name.startswith("optimizer.") else None
                spread = like is not None and like.shape == entry.size  # type: ignore[union-attr]
                others[name] = (
                    torch.empty_like(like)
                    if spread and like is not None
                    else torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
                )
        tensors = dict(own) | others
        with warnings.catch_warnings():  # a single process may read what several wrote
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        return {name: tensors[name] for name in others}
    except (OSError, ValueError, LookupError, RuntimeError, CheckpointException) as error:
        raise damaged(path, first_failure(error)) from error
