"""Work in a process of its own: its result, its errors, and an end by Ctrl-C without a word from it."""

import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from tokenfusion.processes import in_fresh_process

SLOW = """
import time
from tokenfusion.processes import in_fresh_process
if __name__ == "__main__":
    print("begun", flush=True)
    in_fresh_process(time.sleep, 60)
"""


def test_the_process_is_another_one():
    assert in_fresh_process(os.getpid) != os.getpid()


def test_its_exceptions_come_back():
    with pytest.raises(ValueError, match="invalid literal"):
        in_fresh_process(int, "seven")


def test_a_process_that_the_system_stops_is_told_apart():
    with pytest.raises(BrokenProcessPool):
        in_fresh_process(os.abort)


def test_ctrl_c_ends_both_and_only_the_caller_answers(tmp_path):
    """As a terminal does it: every process of the group gets the signal, whatever the new one is doing."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "begun\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:  # the resource tracker and the new process
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
