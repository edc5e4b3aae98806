"""Put measured figures into the documents, between their markers; nothing there is typed.

    python docs/update.py

Reads `docs/demo.txt` (what `make demo` printed), the models themselves, `tokenfusion.models.published`, and
`benchmarks/results/*.json`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenfusion.models.cost import describe_models
from tokenfusion.models.published import PUBLISHED
from tokenfusion.profile import NOTES, compare_with_papers, paper_table

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"


def table(heading: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, all but the first column aligned right."""
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, rule, *rows])


def demo() -> str:
    """What `make demo` printed."""
    return f"```console\n{(DOCS / 'demo.txt').read_text().strip()}\n```"


def models() -> str:
    """Names and costs of all the models."""
    rows = []
    for model in describe_models():
        height, width = model["img_size"]
        cost = f"{model['macs'] / 1e9:.3f}" if model["macs"] < 1e9 else f"{model['macs'] / 1e9:.2f}"
        rows.append([f"`{model['name']}`", f"{model['parameters'] / 1e6:.2f}", cost, f"{height}×{width}"])
    return table(["model", "parameters M", "GMACs", "input"], rows)


def published() -> str:
    """What `tokenfusion profile --paper` prints of every model with published figures."""
    heading, *rows = paper_table(compare_with_papers(list(PUBLISHED)))
    notes = "\n".join(f"- `{sign}`: {note}" for sign, note in NOTES.items())
    return f"{table(heading, rows)}\n\n{notes}"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def results() -> str:
    """What training reached, how fast images are loaded, and on what."""
    rows = []
    for name, what in (("cifar10_micro", "CIFAR-10"), ("imagenette_128", "Imagenette, 128 px")):
        if not (RESULTS / f"{name}.json").exists():  # not measured yet: nothing is said of it
            continue
        run = load(name)
        low, high = run["evaluation"]["top1_ci95"]
        rows.append(
            [
                f"{what}, `{run['model']['name']}`, {run['recipe']['epochs']} epochs from random weights",
                f"{run['evaluation']['top1']:.2%} ({low:.2%} to {high:.2%})",
                f"{run['minutes']:.1f}",
                f"{run['peak_memory_mb']:,.0f} MB",
            ]
        )
    training = table(["training", "top-1 (95 % interval)", "minutes", "peak memory"], rows)
    loader = load("loader")
    rows = []
    for size in loader["results"]:
        rates, ratios = size["images_per_second"], size["ratios"]
        for pair, ratio in ratios.items():
            ours, theirs = pair.split(" / ")
            how = "decoded in every epoch" if "decoding" in ours else "decoded once"
            rows.append([f"{size['size']} px, {how}", f"{rates[ours]:,.0f}", f"{rates[theirs]:,.0f}", f"{ratio:.2f}×"])
    loading = table(["loading, augmentation included", "images/s", "timm's loader", "ratio"], rows)
    return f"On {load('cifar10_micro')['hardware']}:\n\n{training}\n\n{loading}"


BLOCKS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"demo": demo, "models": models, "results": results},
    DOCS / "papers" / "README.md": {"published": published},
}


def main() -> None:
    for path, blocks in BLOCKS.items():
        text = path.read_text()
        for name, write in blocks.items():
            pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
            text, found = re.subn(pattern, lambda m, write=write: f"{m[1]}{write()}\n{m[2]}", text, flags=re.DOTALL)
            assert found == 1, f"{path} has no place for {name}"
        path.write_text(text)


if __name__ == "__main__":
    main()
