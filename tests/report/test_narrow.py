"""Pages on a telephone, in a real browser: nothing is cut off, and what scrolls shows that it does."""

import shutil

import pytest

from tokenfusion.evaluate import evaluate
from tokenfusion.report import write_report

WIDER_THAN_ITS_BOX = """() => [...document.querySelectorAll("body *")]
    .filter((box) => box.scrollWidth > box.clientWidth + 1 && box.clientWidth > 0)
    .filter((box) => ["auto", "scroll"].includes(getComputedStyle(box).overflowX))
    .map((box) => [box.className, getComputedStyle(box).maskImage])"""


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    run = shutil.copytree(trained, tmp_path_factory.mktemp("narrow") / "run")
    evaluate(run, corruptions=True)
    return write_report(run)


@pytest.mark.parametrize("width", [320, 500, 1280])
def test_a_page_is_as_wide_as_the_screen_and_tables_that_scroll_fade_at_their_edge(browser, report, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".bar").first.is_visible() == (width == 1280)  # where it would push numbers off the screen
    scrolling = page.evaluate(WIDER_THAN_ITS_BOX)
    page.close()
    assert all("linear-gradient" in mask for _, mask in scrolling), scrolling
    assert scrolling or width == 1280  # the confusion matrix of ten classes at least
