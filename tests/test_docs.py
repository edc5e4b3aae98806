"""What the pages on the design say is there, is there."""

import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("page", ["docs/design.md", "CONTRIBUTING.md", "docs/training.md", "docs/folders.md"])
def test_files_that_a_page_names_exist(page):
    named = set(re.findall(r"`((?:[\w]+/)+[\w]+\.(?:py|md|json))`", (ROOT / page).read_text()))
    placed = {"data/KIND.py", "tests/data/test_KIND.py"}  # that a reader will write
    missing = {name for name in named - placed if not any((base / name).exists() for base in (ROOT, PACKAGE))}
    written = {"state/last.json"}  # in a run folder
    assert missing - written == set()
