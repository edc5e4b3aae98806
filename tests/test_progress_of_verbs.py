"""What takes minutes tells how far it is, all along and to its end."""

import pytest

from tokenfusion.analyze.collapse import analyze_collapse
from tokenfusion.analyze.explain import explain
from tokenfusion.analyze.tokens import analyze_tokens
from tokenfusion.evaluate import evaluate


class Heard(dict):
    """A `Progress` that keeps what it is told, by task."""

    def __call__(self, task, done, total):
        self.setdefault(task, []).append((done, total))


def assert_to_its_end(heard, least):
    """Each task has at least so many steps, never goes back, and ends with all that there was to do."""
    for task, steps in least.items():
        assert len(heard[task]) >= steps, task
    for task, steps in heard.items():
        assert steps == sorted(steps), task
        assert steps[-1][0] == steps[-1][1], task


def test_explaining_tells_of_every_look(run, digit):
    heard = Heard()
    explain(run, [str(digit)], faithfulness=20, progress=heard)
    looks = 2 * 2 * 3 * 17  # batches; two curves, by the map and two orders that know nothing, at 17 shares
    assert_to_its_end(heard, {"explaining": 1, "measuring faithfulness": looks})
    judged, mistakes = Heard(), Heard()
    evaluate(run, progress=judged)
    assert_to_its_end(judged, {"reading images": 2, "judging images": 2})
    explain(run, progress=mistakes)
    assert_to_its_end(mistakes, {"explaining": 2})


@pytest.mark.parametrize(
    ("analyze", "task", "steps"), [(analyze_tokens, "replacing tokens", 3), (analyze_collapse, "measuring images", 2)]
)
def test_analyses_tell_of_what_takes_longest(run, analyze, task, steps):
    heard = Heard()
    analyze(str(run), num_images=20, progress=heard)
    assert_to_its_end(heard, {"reading images": 1, task: steps})
