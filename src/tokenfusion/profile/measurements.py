"""What inference takes on this machine: memory and time."""

import statistics
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from tokenfusion.errors import InputError
from tokenfusion.hardware import Precision, autocast, default_device, is_out_of_memory, resident_mb
from tokenfusion.models import create_model
from tokenfusion.processes import in_fresh_process

WARM_UP, REPETITIONS, SECONDS = 2, 5, 1.0


@dataclass(frozen=True)
class Measurements:
    """What inference takes on this machine.

    Attributes:
        peak_memory_mb: MiB that weights, activations and the kernels' buffers take at most. On a GPU, the most that
            tensors held. On a CPU, the growth of a fresh process's resident memory from before the model was built;
            None where the system has no /proc.
        images_per_second: the batch over the median of several forward passes, after warm-up.
    """

    peak_memory_mb: float | None
    images_per_second: float


def measure_model(name: str, img_size: tuple[int, int], batch_size: int, precision: Precision = "auto") -> Measurements:
    """Measure inference in a process of its own, so that no other model's memory or threads count.

    Raises:
        InputError: the batch does not fit into memory.
    """
    remedy = f"try batch_size={batch_size // 2 or 1}"
    try:
        return in_fresh_process(run_inference, name, img_size, batch_size, precision, torch.get_num_threads())
    except BrokenProcessPool as error:
        raise InputError(f"{name} was stopped by the system, most likely for want of memory; {remedy}") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{name} does not fit into memory with batch_size={batch_size}; {remedy}") from error


def run_inference(
    name: str, img_size: tuple[int, int], batch_size: int, precision: Precision, threads: int
) -> Measurements:
    """What `measure_model` runs."""
    torch.set_num_threads(threads)
    device = default_device()
    before = resident_mb("VmRSS")
    model = create_model(name, img_size=img_size).eval().to(device)
    images = torch.rand(batch_size, 3, *img_size, device=device)
    times: list[float] = []
    while len(times) < WARM_UP + REPETITIONS or sum(times) < SECONDS:
        start = time.perf_counter()
        with torch.inference_mode(), autocast(device, precision):
            model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    after = resident_mb("VmHWM")
    if device.type == "cuda":
        peak: float | None = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = None if before is None or after is None else after - before
    return Measurements(peak, batch_size / statistics.median(times[WARM_UP:]))
