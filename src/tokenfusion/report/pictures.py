"""Where the model looked at its worst mistakes, as `tokenfusion explain RUN` drew it."""

from dataclasses import dataclass
from pathlib import Path

from tokenfusion.report.run_folder import read_json, require_fields


@dataclass(frozen=True)
class Overlay:
    """A picture of where one branch looked.

    Attributes:
        caption: method and branch.
        png: the file's bytes.
    """

    caption: str
    png: bytes


def overlays_of(run: Path) -> dict[tuple[str, str], list[Overlay]]:
    """What RUN/explain/mistakes holds, by an image's name and the class explained; nothing where there is no such.

    Names are as `data.dataset.printable` spells them.

    Raises:
        InputError: its explain.json is damaged.
    """
    folder = run / "explain" / "mistakes"
    if not (folder / "explain.json").is_file():
        return {}
    found = read_json(folder / "explain.json")
    require_fields(found, {"method": str, "images": list}, folder / "explain.json")
    overlays: dict[tuple[str, str], list[Overlay]] = {}
    for image in found["images"]:
        require_fields(image, {"path": str}, folder / "explain.json")
        if "error" in image:
            continue
        require_fields(image, {"overlays": list}, folder / "explain.json")
        for drawn in image["overlays"]:
            require_fields(drawn, dict.fromkeys(("branch", "class", "file"), str), folder / "explain.json")
            path = folder / Path(drawn["file"]).name
            if path.is_file():
                caption = f"{found['method']}, {drawn['branch'].replace('_', ' ')}"
                overlays.setdefault((image["path"], drawn["class"]), []).append(Overlay(caption, path.read_bytes()))
    return overlays
