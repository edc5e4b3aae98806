"""How fast each family is beside its official code, compiled beside uncompiled, and where a training step goes."""

import json
from itertools import product
from typing import Any

from results_page import RESULTS, load, table

from tokenfusion.formatting import counted

KEPT = "official, memory kept"


def official() -> str:
    """How fast each family is beside its official code, and how much of the CPU's peak that is; a table a machine."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("official*.json"))]
    return "\n\n".join(map(beside_official, found))


def beside_official(found: dict[str, Any]) -> str:
    """The same of one machine, and which aims are missed."""
    rows, missed, short = [], [], []
    for row in sorted(found["results"], key=lambda row: row["model"]):
        speeds, share = row["images_per_s"], row["share_of_peak"]["ours"]
        of_peak = f"{share:.0%}" + (f" (aim: {row['share_aim']:.0%})" if row["share_aim"] else "")
        what = f"{row['what']}, batch {row['batch']}"
        rates = (f"{speeds[side]:.1f}" for side in ("official", "ours"))
        kept = f"{speeds['ours'] / speeds[KEPT]:.2f}×" if KEPT in speeds else "not measured"
        ratio = f"{row['ratio']:.2f}×"
        needed = f"{row['aim'] * row['share_of_peak']['official']:.0%}"
        aim = f"{row['aim']}×"
        rows.append([row["model"], what, row["precision"], *rates, ratio, aim, kept, of_peak, needed])
        cell = f"{row['model']} ({what}, {row['precision']})"
        missed += [cell] * (row["ratio"] < row["aim"])
        short += [cell] * (share < (row["share_aim"] or 0))
    products = [
        f"{min(peaks):,.0f} to {max(peaks):,.0f} in {precision}"
        for precision in found["results"][0]["peak_flops"]
        if (peaks := [row["peak_flops"][precision] / 1e9 for row in found["results"]])
    ]
    how = "processor time of one thread" if found["clock"] == "process_time" else f"{found['threads']} threads"
    over_kept = "ratio where the official code's memory is kept, too"
    heading = ["model", "what", "precision", "official images/s", "ours", "ratio", "aim", over_kept, "of the peak"]
    heading += ["the aim takes of it"]
    done = {(row["model"], row["cell"]) for row in found["results"]}
    cells = list(product(found.get("models", ()), found.get("cells", ())))
    lacking = [f"{model} {cell}" for model, cell in cells if (model, cell) not in done]
    with_aim = sum(row["share_aim"] is not None for row in found["results"])
    return (
        f"On {found['hardware']}, {how}, whose fastest products of matrices reached, in GFLOP/s, "
        f"{', '.join(products)}:\n\n{table(heading, rows)}\n\n"
        f"The aim for speed is missed in {few_or_none(missed, len(rows))}"
        + f"; the aim for the share of the peak in {few_or_none(short, with_aim)}" * bool(with_aim)
        + "."
        + f" Not measured yet: {', '.join(lacking)}." * bool(lacking)
    )


def compiled() -> str:
    """What `--compile` brings, what its start costs, and for which models it brings nothing."""
    if not (RESULTS / "compiled.json").exists():
        return "Not measured yet: `python benchmarks/compiled.py --out benchmarks/results/compiled.json`."
    found = load("compiled")
    rows, slower, faster = [], [], []
    for row in sorted(found["results"], key=lambda row: (row["what"], row["batch"])):
        what = f"{row['what']}, batch {row['batch']}"
        cell = f"`{row['model']}` ({what})"
        slower += [cell] * (row["ratio"] < 1)
        faster += [cell] * (row["ratio"] >= 1.1)
        rates, start_up = row["images_per_s"], row["start_up_s"]
        saved = 1 / rates["eager"] - 1 / rates["compiled"]
        repaid = f"{start_up['first'] / saved:,.0f}" if saved > 0 else "never"
        seconds = f"{start_up['first']:.0f} ({start_up['again']:.0f})"
        speeds = (f"{rates[way]:,.0f}" for way in ("eager", "compiled"))
        rows.append([f"`{row['model']}`", what, *speeds, f"{row['ratio']:.2f}×", seconds, repaid])
    differences = [row["difference"] for row in found["results"] if "difference" in row]
    apart = f" Logits differ by {max(differences):.1g} of the largest at most." if differences else ""
    precisions = " and ".join(sorted({row["precision"] for row in found["results"]}))
    heading = ["model", "what", "images/s", "compiled", "ratio", "start in s (again)", "repaid after images"]
    return (
        f"On {found['hardware']}, {counted(found['threads'], 'thread')}, {precisions}; *again* finds on disk what the "
        f"first start left there:\n\n{table(heading, rows)}\n\n"
        f"Compiled is faster by a tenth or more in {few_or_none(faster, len(rows))}. It is slower in "
        f"{few_or_none(slower, len(rows))}.{apart}"
    )


def few_or_none(named: list[str], total: int) -> str:
    """So many of all, and which."""
    return f"{len(named) or 'none'} of {total}" + f": {', '.join(named)}" * bool(named)


PARTS = ("CNN", "transformer", "exchange and head", "optimiser", "average", "host", "loading")


def steps() -> str:
    """Where a training step of a fused preset goes, and its throughput a multiply-add beside its CNN parent."""
    found = json.loads((RESULTS / "steps.json").read_text())
    rows, missed = [], []
    for row in found["results"]:
        parts = {"CNN": row["ms"]["gradients"]} | row["ms"]
        spent = [f"{parts[part]:.1f}" if part in parts else "–" for part in PARTS]
        beside = f"{row['beside_parent']:.2f}×"
        rows.append([f"`{row['model']}`", f"{row['macs'] / 1e6:.1f}", f"{row['ms']['step']:.1f}", *spent, beside])
        missed += [f"`{row['model']}`"] * (row["beside_parent"] < found["aim"])
    heading = [
        "model",
        "million multiply-adds",
        "ms of a step",
        *PARTS,
        f"images/s × multiply-adds (aim: {found['aim']}×)",
    ]
    return (
        f"Processor time of one thread on {found['hardware']}, {found['batch_size']} images a step:\n\n"
        f"{table(heading, rows)}\n\nThe aim is missed by {few_or_none(missed, len(rows))}."
    )
