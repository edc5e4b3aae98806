"""Draw README's picture of a report: its verdict, what fusing adds, and the worst mistakes, of a run on photographs.

    python docs/picture.py runs/photos/report.html

Wants a Chromium and the extra `dev`. The run: 600 of Imagenette's photographs (`benchmarks/folder.py` says which),
their folders named in words, by the commands of the front page, and `explain` before `report`.
"""

import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

SECTIONS = ("training", "classes", "confusion", "calibration", "risk", "cost", "skipped", "recipe")
"""Of a report, what the picture leaves out."""
SHORTER = """folder => {
    document.body.innerHTML = document.body.innerHTML.replaceAll(folder + "/", "");
    for (const row of [...document.querySelectorAll("#parents tbody tr")].slice(4)) row.remove();
}"""
"""Of paths the last part alone, and of the parents' table the first rows."""
WIDTH, HEIGHT = 1050, 1790


def main() -> None:
    report = Path(sys.argv[1]).resolve()
    with sync_playwright() as started:
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(report.as_uri())
        page.add_style_tag(content=", ".join(f"#{section}" for section in SECTIONS) + " { display: none }")
        page.evaluate(SHORTER, str(report.parents[2]))
        shot = Image.open(BytesIO(page.screenshot(full_page=True)))
        browser.close()
    shot = shot.crop((0, 0, shot.width, min(shot.height, HEIGHT)))
    shot.convert("P", palette=Image.Palette.ADAPTIVE, colors=192).save(
        Path(__file__).parent / "report.png", optimize=True
    )


if __name__ == "__main__":
    main()
