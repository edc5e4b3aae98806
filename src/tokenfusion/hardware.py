"""What a model runs on: the device, its arithmetic, its memory."""

import ctypes
import os
import platform
import re
import resource
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def as_placed(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model on a device, its convolutions channels-last."""
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are done by the hardware rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `auto` means on this device."""
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return precision


def as_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The kind of numbers of matrix products in this precision."""
    return torch.bfloat16 if resolve_precision(precision, device) == "bf16" else torch.float32


def autocast(device: torch.device, precision: Precision = "auto") -> AbstractContextManager[None]:
    """Do matrix products and convolutions in the given precision; weights, norms and softmax stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(precision, device) == "bf16")


def hardware_name(device: torch.device) -> str:
    """What the work runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = cpu_facts(Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "")
    return f"{found or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


CPU_FEATURES = {"avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_bf16": "AMX bf16"}
"""Flags of a processor that decide how fast its products are, and what they are called."""


def cpu_facts(text: str) -> str:
    """A processor's name with what tells generations of one name apart, from the text of Linux's /proc/cpuinfo.

    Returns:
        Such as "AMD EPYC (family 25, model 17, AVX-512, bf16)"; empty where nothing is said.
    """
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    first = {key.strip(): value.strip() for key, _, value in lines}
    flags = first.get("flags", "").split()
    facts = [f"{key.removeprefix('cpu ')} {first[key]}" for key in ("cpu family", "model") if key in first]
    facts += [word for flag, word in CPU_FEATURES.items() if flag in flags]
    name = first.get("model name", "")
    return f"{name} ({', '.join(facts)})" if name and facts else name


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: the GPU's tensors, or on a CPU the whole process, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident_mb("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def resident_mb(field: Literal["VmRSS", "VmHWM"]) -> float | None:
    """MiB that this process holds (`VmRSS`) or has held at most (`VmHWM`); None where the system has no /proc.

    Not `getrusage`, whose maximum a child on Linux inherits from its parent.
    """
    status = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) / 2**10 if found else None


def available_mb(device: torch.device) -> float | None:
    """MiB that could still be taken: of the GPU, or on a CPU of the machine and of this process's control group.

    Returns:
        None where the system has no /proc.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return min(int(found[1]) / 2**10, group_available_mb(Path("/sys/fs/cgroup"))) if found else None


def memory_in_words(peak: float, available: float | None) -> str:
    """What a dry run says of memory, in MiB: what was measured, and what there is."""
    known = "unknown" if available is None else f"{available:,.0f} MB"
    return f"{peak:,.0f} MB at most measured, {known} available; kept images add to it"


def group_available_mb(root: Path) -> float:
    """MiB up to the limit of a control group (version 2), not counting files that the system can drop; inf for none."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        droppable = re.search(r"^inactive_file (\d+)", (root / "memory.stat").read_text(), re.MULTILINE)
    except OSError:  # no such limit
        return float("inf")
    return float("inf") if limit == "max" else (int(limit) - used + int(droppable[1] if droppable else 0)) / 2**20


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor instead of giving it back to the system.

    A training step frees and takes the same megabytes again and again; without the page faults that this causes, micro
    models train faster on a CPU (benchmarks/allocator.py). Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on whatever device, or Python says that memory ran out; oneDNN gives no other reason for it."""
    said = isinstance(error, RuntimeError) and re.search(
        "can't allocate memory|not enough memory|out of memory|bad_alloc|could not create a (primitive|memory)",
        str(error),
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(said)
