"""Work in a process of its own, so that no other work's memory, threads or compiled code count."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_fresh_process(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function in a new process that imports everything anew, and wait for its result.

    Ctrl-C ends the process without a word; the caller's own KeyboardInterrupt is what is answered.

    Raises:
        BrokenProcessPool: the system stopped the process, most often for want of memory.
        Exception: what the function raises.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=die_of_interrupts) as process:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the process answers it as it should
        try:
            run = process.submit(function, *arguments, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return run.result()


def die_of_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; this one leaves the traceback to nobody."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
