"""Files of a run that somebody altered by hand: each is read, or refused in words."""

import json
import random
import shutil

import pytest

from tokenfusion.checkpoint import load_description
from tokenfusion.errors import InputError
from tokenfusion.evaluate import evaluate
from tokenfusion.json_files import NUMBER, fault_in
from tokenfusion.report import write_report
from tokenfusion.report.run_folder import read_results

VALUES = [None, True, -1, 1e308, "x", "fuse(" * 300, [], {}, [1], {"a": 1}, [[1]], "\0", 10**30]


@pytest.fixture(scope="module")
def judged(trained, tmp_path_factory):
    run = shutil.copytree(trained, tmp_path_factory.mktemp("judged") / "run")
    evaluate(run)
    return run


def places(value, place=()):
    """Every place in a value of JSON, but few of a list."""
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*place, key))


def altered(value, place, new):
    if not place:
        return new
    copy = json.loads(json.dumps(value))
    inside = copy
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = new
    return copy


@pytest.mark.parametrize("name", ["model.json", "evaluation.json", "metrics.jsonl"])
def test_any_value_anywhere_is_read_or_refused_in_words(judged, tmp_path, name):
    run, chance = shutil.copytree(judged, tmp_path / "run"), random.Random(name)
    value = json.loads((run / name).read_text().splitlines()[0] if name.endswith("l") else (run / name).read_text())
    refused = 0
    for place in places(value):
        for new in chance.sample(VALUES, 4):
            (run / name).write_text(json.dumps(altered(value, place, new)) + "\n")
            try:
                load_description(run)
                read_results(run)
            except InputError:
                refused += 1
    assert refused > 20


def test_the_numbers_that_a_report_is_made_of_are_numbers(judged, tmp_path):
    run = shutil.copytree(judged, tmp_path / "run")
    evaluation = json.loads((run / "evaluation.json").read_text())
    for place in (("top1_ci95", 0), ("per_class", "3", "n"), ("confusion", 2, 1), ("ece_ci95", 1), ("loss",)):
        (run / "evaluation.json").write_text(json.dumps(altered(evaluation, place, [])))
        with pytest.raises(InputError, match=r"evaluation\.json is damaged: .* is \[\]; restore it"):
            write_report(run)


def test_what_does_not_fit_a_shape_is_named_by_its_place():
    shape = {"a": [NUMBER], "b?": (int, str), "*": {"c": bool}}
    fine = {"a": [1, 2.5], "b": [1, "x"], "any": {"c": True}}
    assert fault_in(fine, shape) == fault_in({"a": []}, shape) == ""
    for wrong, said in (
        ({}, "it lacks a"), ({"a": [True]}, "a part of a of it is True"), ({"a": [float("nan")]}, "is nan"),
        ({"a": [], "b": [1]}, "b of it is [1]"), ({"a": [], "z": {"c": 1}}, "c of z of it is 1"), ([], "it is []"),
    ):  # fmt: skip
        assert said in fault_in(wrong, shape)
