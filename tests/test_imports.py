"""What takes seconds to import is imported by the verb that needs it, and not searched for garbage meanwhile."""

import inspect
import os
import subprocess
import sys

import pytest

from tokenfusion.cli import app
from tokenfusion.predict.cli import print_images, write_predictions

FIRST = """
import gc, sys
from tokenfusion.imports import first_import
with first_import("sched"):
    import sched
    paused = not gc.isenabled()
assert (paused, gc.isenabled(), gc.get_freeze_count() > 1000) == (True, True, True)
before = gc.get_freeze_count()
with first_import("sched"):
    assert gc.isenabled()
assert gc.get_freeze_count() == before
"""


def test_a_first_import_is_not_searched_for_garbage():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", FIRST], check=True, env=environment)


WITHOUT_COMPILER = """
import sys
from tokenfusion.imports import COMPILER, LaterCompiler, import_timm_alone
import torch
disable = torch.compiler.disable
import_timm_alone()
import timm, torchvision
assert "torch._dynamo" not in sys.modules and torch.compiler.disable is disable
kept = torchvision.ops.roi_align.__globals__["is_compile_supported"]
sys.modules[COMPILER] = LaterCompiler(COMPILER)
from torch._dynamo.utils import counters
assert counters is sys.modules[COMPILER].counters
assert kept("cpu") is sys.modules[COMPILER].is_compile_supported("cpu")
image = torchvision.tv_tensors.wrap(torch.ones(3, 4, 4), like=torchvision.tv_tensors.Image(torch.zeros(3, 4, 4)))
assert type(image) is torchvision.tv_tensors.Image
"""


def test_the_compiler_is_imported_when_something_of_it_is_called():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], check=True, env=environment)


FUNCTIONS = {"predict": (print_images, write_predictions), "serve": ()}
"""Verbs that import elsewhere than in themselves; a service's process does it by itself."""


@pytest.mark.parametrize("verb", [name for name in app if not name.startswith("-")])
def test_every_verb_imports_so(verb):
    own = [app[verb][name] for name in ("collapse", "tokens")] if verb == "analyze" else [app[verb]]
    for function in FUNCTIONS.get(verb, [one.default_command for one in own]):
        assert 'with first_import("timm"):' in inspect.getsource(function)
