"""Processes that tests start, kill and wait for: children of one that has imported everything and run nothing yet."""

import gc
import multiprocessing
import os
import signal
import sys
from types import SimpleNamespace

import torch

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        *("tokenfusion.training", "tokenfusion.cli", "tokenfusion.predict.many"),
        *("scipy.optimize", "torch.utils.tensorboard", "torch.distributed"),
    ]
)


def begin(work, *words):
    """Start a process that calls a function of a module."""
    process = server.Process(target=as_the_command, args=(multiprocessing.get_start_method(), work, words))
    process.start()
    return process


def as_the_command(start_method, work, words):
    """Loader processes start as the command's own do, and not by another server that imports everything first."""
    multiprocessing.set_start_method(start_method, force=True)
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which the server may have been started under
    gc.freeze()  # a look through all that is imported takes longer than most of what tests start
    work(*words)


def begin_command(log, *words):
    """Start the command in a process and a group of its own; what it prints goes to a file."""
    return begin(run_command, log, ["tokenfusion", *map(str, words)])


def fork_runs(patch):
    """Let the runs of comparisons be forked too, instead of started as interpreters of their own."""
    from tokenfusion.compare import jobs

    patch.setattr(jobs, "subprocess", SimpleNamespace(Popen=ForkedRun, DEVNULL=None))


class ForkedRun:
    """What a comparison asks of a run's process.

    Args:
        command: an interpreter, `-c`, code, and a word for it.
        stdout: the file for what it prints.
        env: its variables.
        **others: that are of a real process alone; the comparison's lock is not held by this one.
    """

    def __init__(self, command, *, stdout, env, **others):  # noqa: ARG002
        self.process = begin(run_code, *command[2:], stdout.name, env)
        self.kill = self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.returncode

    def wait(self):
        self.process.join()

    def send_signal(self, number):
        os.kill(self.process.pid, number)


def run_code(code, word, log, variables):
    os.setpgid(0, 0)
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 - as long as the process
    sys.argv = ["-c", word]
    exec(code, {})


def run_command(log, words):
    os.setsid()
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    sys.argv = words
    from tokenfusion import cli

    cli.main()
