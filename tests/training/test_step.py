"""A step: what it waits for, and what a bad one says."""

import pytest
from rich.console import Console
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from runs import tiny_recipe
from tokenfusion.training import start, step

WAITS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
"""Operators that bring a number to the host, and so wait for a GPU."""


class Operators(TorchDispatchMode):
    """Notes the tensors that such operators read."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in WAITS:
            self.read.append(args[0].data_ptr())
        return function(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Notes the methods that copy a tensor to the host."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tolist", "numpy", "cpu"):
            self.called.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_waits_for_the_device_once(tmp_path, monkeypatch, optimizer):
    """Counted on a CPU, where the same calls are made; the optimiser's count of steps lies on the host anyway."""
    train_step, waits = step.train_step, []

    def counted(setup, state, *arguments):
        with Operators() as operators, Methods() as methods:
            result = train_step(setup, state, *arguments)
        on_host = {moments["step"].data_ptr() for moments in state.optimizer.state.values() if "step" in moments}
        waits.append((methods.called, [pointer for pointer in operators.read if pointer not in on_host]))
        return result

    monkeypatch.setattr(step, "train_step", counted)
    recipe = tiny_recipe(epochs=1, batch_size=512, balance="loss", accumulate=2, drop_path=0.0, optimizer=optimizer)
    start(recipe, tmp_path / "run", Console(quiet=True))
    assert waits == [(["tolist"], [])] * 2
