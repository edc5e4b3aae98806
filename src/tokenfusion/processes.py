"""Work in a process of its own, so that no other work's memory, threads or compiled code count; and how one begins."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_fresh_process(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function in a new process that holds nothing of this one, and wait for its result.

    Ctrl-C ends the process without a word; the caller's own KeyboardInterrupt is what is answered.

    Raises:
        BrokenProcessPool: the system stopped the process, most often for want of memory.
        Exception: what the function raises.
    """
    with fresh_process() as process:
        return process.submit(function, *arguments, **options).result()


def fresh_process() -> ProcessPoolExecutor:
    """A process that holds nothing of this one, works off what it is given, and ends when the executor does.

    It is forked by a server that runs nothing, where the system has such; who starts many may let that server import
    before (`multiprocessing.set_forkserver_preload`). Ctrl-C in a terminal reaches it from here on.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    process = ProcessPoolExecutor(1, mp_context=context, initializer=die_of_interrupts)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the process answers it as it should
    try:
        wait([begun := process.submit(int)])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    begun.result()  # where Ctrl-C ended it, that has been answered by now
    return process


def die_of_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; this one leaves the traceback to nobody."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
