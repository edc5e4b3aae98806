"""What an installation takes on disk: this package with extras, and of that what only a GPU build of PyTorch brings.

    python benchmarks/install.py --out benchmarks/results/install.json

Counted in the environment that runs this, by following what each package says it needs; nothing is downloaded.
"""

import argparse
import platform
import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from tokenfusion.files import write_json

EXTRAS = {"": (), "hub,export,serve": ("hub", "export", "serve")}
FOR_GPUS = re.compile(r"nvidia-(?!ml-py)|cuda-|triton$")
"""Names of the packages that PyTorch's build for GPUs needs, and its build for CPUs does not."""


def needed(name: str, extras: tuple[str, ...], found: dict[str, set[str]]) -> None:
    """Add a package and all that it needs, with the extras that are asked of each, to those found."""
    asked = set(extras)
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found and asked <= found[key]:
        return
    found.setdefault(key, set()).update(asked)
    for text in metadata.requires(name) or ():
        wanted = Requirement(text)
        marker = wanted.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *found[key])):
            needed(wanted.name, tuple(wanted.extras), found)


def megabytes(name: str) -> float:
    """What a package's files take, as its own list of them names them."""
    listed = metadata.distribution(name).files or []
    paths = {Path(str(file.locate())) for file in listed}
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    options = parser.parse_args()
    rows = []
    for written, extras in EXTRAS.items():
        found: dict[str, set[str]] = {}
        needed("tokenfusion", extras, found)
        sizes = {name: megabytes(name) for name in sorted(found) if name != "tokenfusion"}
        gpu = sum(size for name, size in sizes.items() if FOR_GPUS.match(name))
        whole, torch = sum(sizes.values()), sizes["torch"]
        rows.append({"extras": written, "packages": len(sizes), "mb": whole, "mb_for_gpus": gpu, "mb_of_torch": torch})
        print(f"[{written}] {len(sizes)} packages, {whole:,.0f} MB, {gpu:,.0f} of them for GPUs, torch {torch:,.0f}")
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    write_json(options.out, {"system": system, "torch": metadata.version("torch"), "rows": rows})


if __name__ == "__main__":
    main()
