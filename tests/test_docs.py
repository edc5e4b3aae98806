"""What the pages on the design say is there, is there."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tokenfusion import options
from tokenfusion.cli import app
from tokenfusion.models.fuse import FUSABLE
from tokenfusion.models.operators import OPERATORS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tokenfusion"


def test_the_design_is_one_page_with_a_picture_of_all_rooms():
    text = (ROOT / "docs" / "design.md").read_text()
    assert len(text.splitlines()) <= 150
    assert text.count("![") == 1
    drawn = set(re.findall(r"[\w]+", (ROOT / "docs" / "rooms.svg").read_text()))
    files = [path for path in PACKAGE.glob("**/*.py") if path.stem not in ("__init__", "__main__")]
    # a folder in a room is drawn as one
    rooms = {path.stem if len(path.relative_to(PACKAGE).parts) < 3 else path.parent.name for path in files}
    assert rooms - drawn == set(), "run `python docs/rooms.py`"


def test_the_drawing_of_fusion_is_what_its_program_draws(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import fusion_drawing

    assert fusion_drawing.DRAWING.read_text() == fusion_drawing.draw(), "run `python docs/fusion_drawing.py`"
    with pytest.raises(ValueError, match="does not fit into 60 pixels; shorten it"):
        fusion_drawing.box(0, 0, 60, "a long label", "cnn")


@pytest.mark.parametrize("page", ["docs/design.md", "CONTRIBUTING.md", "docs/training.md", "docs/folders.md"])
def test_files_that_a_page_names_exist(page):
    named = set(re.findall(r"`((?:[\w]+/)+[\w]+\.(?:py|md|json))`", (ROOT / page).read_text()))
    placed = {"data/KIND.py", "tests/data/test_KIND.py"}  # that a reader will write
    bases = (ROOT, PACKAGE, PACKAGE.parent)
    missing = {name for name in named - placed if not any((base / name).exists() for base in bases)}
    written = {"state/last.json"}  # in a run folder
    assert missing - written == set()
    alone = set(re.findall(r"`([\w]+\.py)`", (ROOT / page).read_text()))
    assert alone <= {path.name for path in PACKAGE.rglob("*.py")}


def test_what_the_design_says_is_found_in_a_file_is_defined_there():
    table = (ROOT / "docs" / "design.md").read_text().partition("## Where to find")[2].partition("\n## ")[0]
    found = 0
    for row in re.findall(r"^\|.*", table, re.MULTILINE):
        places = re.findall(r"`([\w./]+)`", row)
        files = [path for name in places for path in (PACKAGE / name, PACKAGE.parent / name) if path.suffix == ".py"]
        text = "".join(path.read_text() for path in files if path.exists())  # that they do, another test says
        for symbol in (name for name in places if re.fullmatch(r"\w+(\.(?!py$)\w+)?", name)):
            assert all(re.search(rf"(?:class|def) {part}\b", text) for part in symbol.split(".")), symbol
            found += 1
    assert found >= 8


def test_pages_on_fusing_name_every_strategy_and_operator():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "fuse.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted([*FUSABLE, *OPERATORS])
    assert {*FUSABLE, *OPERATORS} <= set(re.findall(r"\w+", (ROOT / "docs/papers/token_fusion.md").read_text()))


def commands_of(page):
    """Words of each `tokenfusion` command in a page's code blocks, as the shell would give them."""
    for block in re.findall(r"^```(?:console|sh|)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ")
        for line in re.findall(r"^(?:\$ )?(?:torchrun .* -m )?tokenfusion (.*)$", lines, re.MULTILINE):
            words = shlex.split(line, comments=True)
            yield words[: next((i for i, word in enumerate(words) if word in (">", "|", "&&")), None)]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_are_commands(page, monkeypatch):
    for words in commands_of(page):
        monkeypatch.setattr(sys, "argv", ["tokenfusion", *words])
        if not {"...", "$@", "--recipe"} & set(words):
            app.parse_args(options.data_first(words), exit_on_error=False, print_error=False)


def test_the_front_page_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(list(commands_of(ROOT / "README.md"))) >= 10
    named = text + (ROOT / "docs" / "README.md").read_text()
    pages = [path.relative_to(ROOT / "docs") for path in PAGES[1:] if path != ROOT / "docs" / "README.md"]
    assert [page for page in pages if f"{page}" not in named] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        place, _, anchor = target.partition("#")
        if "://" in place:
            continue
        file = page.parent / place if place else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target
