"""What the report says of a fused run's parents: how much each knows, what fusing adds, and whether it is worth it."""

import csv
import shutil

import numpy as np
import pytest

from tokenfusion.evaluate import evaluate
from tokenfusion.report import write_report
from tokenfusion.report.parents import RUN, WAYS, difference, verdict


def hits(count, first, total=100):
    """Which of the images are named correctly: so many, from some place on."""
    found = np.zeros(total, dtype=bool)
    found[first : first + count] = True
    return found


def answers(cnn, vit, mean, run):
    return dict(zip([*WAYS.values(), RUN], [cnn, vit, cnn, mean, run], strict=True))


def test_more_than_chance_is_worth_it():
    said = verdict(answers(hits(60, 0), hits(50, 0), hits(62, 0), hits(80, 0)))
    assert said.startswith("Fusing is worth it here: the CNN alone names 60 of 100 images correctly, this run 80")
    assert "and more than the mean of the parents' predictions too" in said


def test_what_the_mean_reaches_as_well_is_said():
    said = verdict(answers(hits(60, 0), hits(50, 0), hits(79, 0), hits(80, 0)))
    assert "but the mean of the parents' predictions names 79: maybe by chance" in said


@pytest.mark.parametrize(("run", "reason"), [(hits(60, 40), "no better"), (hits(61, 0), "may be chance (p = 1,")])
def test_what_chance_explains_is_plainly_not_worth_it(run, reason):
    said = verdict(answers(hits(50, 0), hits(60, 0), hits(60, 0), run))
    assert said.startswith("Fusing is not worth it here. The Transformer alone names 60 of 100 images correctly")
    assert reason in said


def test_of_few_images_the_verdict_is_said_to_be_preliminary():
    few = [hits(9, 0, 10), hits(10, 0, 10), hits(9, 0, 10), hits(9, 0, 10)]
    assert "10 images are few to judge by: with more the verdict may be another." in verdict(answers(*few))
    assert "few to judge by" not in verdict(answers(*[hits(60, 0)] * 4))


def test_the_chance_is_that_of_scipy_on_images_that_only_one_names():
    assert difference(hits(8, 0, 10), hits(2, 8, 10)) == (6, pytest.approx(0.109375))
    assert difference(hits(3, 0, 10), hits(3, 0, 10)) == (0, 1.0)


def test_the_page_stands_in_the_report_of_a_run_with_parents(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    evaluate(run)
    assert 'id="parents"' not in write_report(run).read_text()
    with (run / "predictions.csv").open(newline="") as file:
        rows = [(row["path"], row["label"]) for row in csv.DictReader(file)]
    with (run / "parents.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", *WAYS, "mixture"])
        writer.writerows([path, label, label, "0", label, label, label] for path, label in rows)
    page = write_report(run).read_text().replace("<wbr>", "")
    assert 'id="parents"' in page
    assert "Fusing is not worth it here. The CNN alone names" in page
    assert f"Which tokens decide: <code>tokenfusion analyze tokens {run}</code>, then" in page
