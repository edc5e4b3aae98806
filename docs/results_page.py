"""What `docs/results/README.md` tells of a comparison, and its figure; all from a committed `comparison.json`.

A file from elsewhere has the same fields; a row whose `role` is "WHAT of NAME" is a control of the fused model NAME.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from tokenfusion.compare.statistics import crossed_t
from tokenfusion.compare.table import comparison_table, gaps, methods
from tokenfusion.formatting import counted
from tokenfusion.metrics import t_interval
from tokenfusion.report.comparison_plots import plot_cost
from tokenfusion.report.comparison_summary import fusion_against_others, headline
from tokenfusion.report.plots import GRID, HELD_OUT, STYLE, TRAIN, standalone, to_svg

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def load_before(found: dict[str, Any]) -> str:
    """A sentence on what else the machine was doing before a run; "" where it was idle."""
    before = max(found["load_average_before"])
    return f" (Load before the run: up to {before:.1f}.)" if before > 1 else ""


PAGE = DOCS / "results" / "README.md"
COMPARISONS = (
    "cifar10_comparison",
    "cifar10_pair",
    "cifar10_longer",
    "imagenette_comparison",
    "cifar10_operators",
    "cifar10_contenders",
    "ablation_crossvit",
    "ablation_deepvit",
    "ablation_cmt",
)
"""Files in `benchmarks/results`, and blocks of the page."""
Row = dict[str, Any]
"""What was measured of one trained model."""


def table(heading: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, all but the first column aligned right."""
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, rule, *rows])


def comparison(name: str) -> str:
    """A comparison's verdict, figure and table; writes the figure beside the page."""
    path = RESULTS / f"{name}.json"
    assert path.exists(), f"{PAGE} has a block {name}, but {path} is not measured yet; measure, or take the block out"
    result = with_crossed_tests(json.loads(path.read_text()))
    (PAGE.parent / f"{name}.svg").write_text(standalone(plot_cost(result)) + "\n")
    heading, *rows = comparison_table(result)
    hardware = f"{result['hardware']}, {counted(result['threads'], 'thread')} a run, {result['precision']}"
    notes = [*methods(result), f"minutes and images/s: of training, on {hardware}", *gaps(result)]
    notes += [
        f"but {row['name']} on {counted(row['threads'], 'thread')}" for row in result["models"] if "threads" in row
    ]
    if not any(row.get("sides") for row in result["models"]):
        notes.append("what each side of a fused model is worth was not measured, and the runs were not kept")
    return "\n\n".join(
        [
            headline(result),
            *fusion_against_others(result),
            f"![Accuracy against multiply-adds, with 95 % intervals]({name}.svg)",
            table(heading, rows),
            "\n".join(f"- {note}" for note in notes),
        ]
    )


def with_crossed_tests(result: dict[str, Any]) -> dict[str, Any]:
    """Tests over several seeds as `compare` makes them now: seeds that are judged by one test set are not paired.

    Of these comparisons no predictions were kept, so that images count as given.
    """
    first = {run["seed"]: run.get("top1") for run in result["models"][0]["runs"]}
    tests = []
    for test, row in zip(result["tests"], result["models"][1:], strict=True):
        runs = {run["seed"]: run["top1"] for run in row["runs"] if first.get(run["seed"]) is not None}
        if len(runs) > 1 and test["method"].startswith("paired t over"):
            test = test | crossed_t(list(runs.values()), [first[seed] for seed in runs])
        tests.append(test)
    return result | {"tests": tests}


def transfer(name: str) -> str:
    """What `benchmarks/transfer.py` wrote, as a table under what it shows."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    lines = []
    for row in result["rows"]:
        seen = ", ".join(f"{value:.2%}" for value in row["top1"])
        costs = (f"{row[key] / 1e9:.3f}" for key in ("macs", "training_macs_per_image"))
        lines.append([in_code(row["name"]), seen, *costs])
    seeds = counted(max(len(row["top1"]) for row in result["rows"]), "seed")
    epochs = f"{result['parents_epochs']} epochs of each parent, {result['warm_epochs']} of the pair made of them"
    heading = ["model", "top-1, seed by seed", "GMACs", "GMACs of forward passes in training, an image"]
    return "\n\n".join([f"{epochs}; {seeds}.", *on_transfer(result["rows"]), table(heading, lines)])


def in_code(name: str) -> str:
    """A model's expression marked as code, but not how it was trained."""
    model, comma, how = name.partition(", ")
    return f"`{model}`{comma}{how}"


def on_transfer(rows: Sequence[Row]) -> list[str]:
    """By how much each pair made of trained parents is above, or below, everything else."""
    reached = {row["name"]: fmean(row["top1"]) for row in rows}
    warm = [name for name in reached if name.endswith("from its trained parents")]
    sentences = []
    for name in warm:
        gaps = [f"{100 * (reached[name] - reached[other]):+.2f} to {in_code(other)}" for other in reached.keys() - warm]
        sentences.append(f"{in_code(name)}, in percentage points: {listed(sorted(gaps))}.")
    return sentences


def depth(name: str) -> str:
    """What `benchmarks/depth.py` wrote: whether DeepViT's finding repeats, its two plots and a table."""
    path = RESULTS / f"{name}.json"
    assert path.exists(), f"{PAGE} has a block {name}, but {path} is not measured yet; measure, or take the block out"
    result = json.loads(path.read_text())
    kinds = {(row["depth"], row["re_attention"]) for row in result["rows"]}
    depths = sorted(at for at, re_attends in kinds if re_attends and (at, False) in kinds)
    assert len(depths) > 1, f"{path} has fewer than two depths with and without Re-attention; measure more"
    rows = [row for row in result["rows"] if row["depth"] in depths]
    for figure, draw in (("accuracy", plot_depths), ("collapse", plot_collapse)):
        (PAGE.parent / f"{name}_{figure}.svg").write_text(standalone(draw(rows, depths)) + "\n")
    seeds = len({row["seed"] for row in rows})
    over = f"Student's t over {seeds} seeds" if seeds > 1 else "over the images of one seed: another may give others"
    recipe = f"{result['epochs']} epochs on {result['images']:,} training images of CIFAR-10, width {result['dim']}"
    return "\n\n".join(
        [
            on_collapse(rows, depths),
            on_cure(rows, depths),
            on_accuracy(result["differences"], depths),
            f"![Accuracy against depth, with and without Re-attention]({name}_accuracy.svg)",
            f"![Similar blocks against depth, and neighbours' similarity in the deepest models]({name}_collapse.svg)",
            depth_table(rows, depths),
            *untrained_table(),
            f"- {recipe}, {counted(seeds, 'seed')}, on {result['hardware']}, {counted(result['threads'], 'thread')}\n"
            f"- 95 % intervals: {over}; similarity: of {result['looked_at']} test images",
        ]
    )


def untrained_table() -> list[str]:
    """What `benchmarks/depth_untrained.py` wrote, if it did: neighbours' similarity at random initialisation."""
    path = RESULTS / "depth_untrained.json"
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    ways = [f"{stage}, {way}" for way in ("as it is", "centred") for stage in ("before mixing", "applied")]
    lines, centred = [], [abs(row["applied, centred"]["mean"]) for row in result["rows"]]
    raw = [row["applied, as it is"]["mean"] for row in result["rows"] if not row["re_attention"]]
    for row in result["rows"]:
        cells = [f"{row[way]['mean']:.2f} ({' to '.join(f'{end:.2f}' for end in row[way]['ci95'])})" for way in ways]
        lines.append([f"depth {row['depth']}, {KINDS[row['re_attention']]}, untrained", *cells])
    heading = ["neighbours' similarity", *(way.replace("as it is", "as they are") for way in ways)]
    seeds = f"{counted(result['seeds'], 'seed')}, 95 % intervals over them; {result['images']} test images"
    said = (
        f"At random initialisation plain maps are alike ({min(raw):.4f} at least) as they are; centred, no kind of map "
        f"is further than {max(centred):.2f} from 0 ({seeds}; `benchmarks/depth_untrained.py`):"
    )
    return [said, table(heading, lines)]


KINDS = {False: "plain attention", True: "Re-attention"}


def mean_of(rows: Sequence[Row], depth: int, re_attends: bool, value: Callable[[Row], float]) -> float:
    """The mean over seeds of a value of the models of a depth and kind."""
    return fmean(value(row) for row in rows if (row["depth"], row["re_attention"]) == (depth, re_attends))


def likeness(row: Row) -> float:
    """Mean cosine similarity of blocks next to each other."""
    return fmean(row["neighbours"]["1"])


def share(row: Row) -> float:
    return float(row["share_of_similar_blocks"])


def similar_blocks(rows: Sequence[Row], depths: Sequence[int], re_attends: bool) -> str:
    """How many blocks are similar at each depth, in words."""
    return listed([f"{mean_of(rows, at, re_attends, share) * at:.3g} of {at}" for at in depths])


def on_collapse(rows: Sequence[Row], depths: Sequence[int]) -> str:
    """Whether more blocks are alike in deeper models."""
    shares = [mean_of(rows, at, False, share) for at in depths]
    rises = shares[-1] > shares[0]
    verdict = "it repeats" if rises else "it does not repeat, the smallest depth has as large a share of similar blocks"
    uniform = mean_of(rows, depths[-1], False, lambda row: fmean(row["share_of_uniform_entropy"]))
    return (
        f"**Attention collapses with depth: {verdict}.** {similar_blocks(rows, depths, False)} blocks of plain ViTs "
        f"are similar to another one (above 0.8); at depth {depths[-1]} the similarity of neighbours is "
        f"{mean_of(rows, depths[-1], False, likeness):.2f} on average. Their attention has {uniform:.0%} of the "
        "entropy of uniform attention, whose maps are alike at any depth."
    )


def on_cure(rows: Sequence[Row], depths: Sequence[int]) -> str:
    """Whether Re-attention's maps are further apart than plain ones, as far as these rows can tell.

    Mixed maps went through BatchNorm and are centred; plain ones are positive. Their cosines differ by that alone, so
    that the two are never compared with each other: before mixing with plain, and centred with centred.
    """
    at = depths[-1]
    plain, mixed = (mean_of(rows, at, re_attends, likeness) for re_attends in (False, True))
    shown = [f"At depth {at} neighbours' similarity is {plain:.2f} for plain attention"]
    if all(row["neighbours_before_mixing"] for row in rows if row["re_attention"]):
        shown.append(f"{mean_of(rows, at, True, before_mixing):.2f} for Re-attention's maps before mixing")
    shown.append(f"{mixed:.2f} for those after it")
    heads = mean_of(rows, at, False, lambda row: max(row["head_similarity"]))
    alike = f"; heads of a block are as alike as {heads:.2f}, where the paper's stay below 0.5" * (heads > 0.5)
    return (
        "**Re-attention keeps blocks apart: not judged here.** An earlier edition of this page said that it repeats; "
        "that is withdrawn: BatchNorm centres the mixed maps, which makes their cosines small in an untrained model as "
        f"well. {listed(shown)}{alike}. Trained models' centred maps were not measured, and the runs were not kept."
    )


def before_mixing(row: Row) -> float:
    """Mean cosine similarity of blocks next to each other before the heads are mixed; without mixing, as they are."""
    return fmean((row["neighbours_before_mixing"] or row["neighbours"])["1"])


def on_accuracy(differences: Sequence[dict[str, Any]], depths: Sequence[int]) -> str:
    """Whether depth helps less without Re-attention, and whether Re-attention helps."""
    sentences = []
    for re_attends, kind in KINDS.items():
        change = difference(differences, (depths[-1], re_attends), (depths[0], re_attends))
        sentences.append(f"From depth {depths[0]} to {depths[-1]}, top-1 with {kind} {judged(*change)}.")
    against = {at: difference(differences, (at, True), (at, False)) for at in depths}
    sentences += [f"At depth {at}, Re-attention {judged(*change)}." for at, change in against.items()]
    helps = [at for at, (_, (low, _)) in against.items() if low > 0]
    found = f"it repeats at depth {listed(helps)}" if helps else "it does not repeat at this scale"
    return f"**Deeper ViTs are better with Re-attention: {found}.** {' '.join(sentences)}"


def difference(
    differences: Sequence[dict[str, Any]], one: tuple[int, bool], other: tuple[int, bool]
) -> tuple[float, tuple[float, float]]:
    """By how much one kind of model is above another, over seeds, and its 95 % interval."""
    pair = (one, other)
    found = [of for of in differences if tuple(tuple(of[end].values()) for end in ("of", "above")) == pair]
    low, high = t_interval([of["mean"] for of in found]) or found[0]["ci95"]
    return fmean(of["mean"] for of in found), (low, high)


def judged(mean: float, interval: tuple[float, float]) -> str:
    """A change of accuracy in words: what it is, and whether it can be told from none."""
    low, high = interval
    verb = "gains" if low > 0 else "loses" if high < 0 else "may gain or lose"
    return f"{verb} ({100 * mean:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f})"


def listed(parts: Sequence[object]) -> str:
    """Things as a person lists them."""
    *first, last = map(str, parts)
    return f"{', '.join(first)} and {last}" if first else last


def top1(rows: Sequence[Row], depth: int, re_attends: bool) -> tuple[float, float, float]:
    """Accuracy over seeds and its interval; of one seed, over images."""
    mine = [row for row in rows if (row["depth"], row["re_attention"]) == (depth, re_attends)]
    low, high = t_interval([row["top1"] for row in mine]) or mine[0]["top1_ci95"]
    return fmean(row["top1"] for row in mine), low, high


def depth_table(rows: Sequence[Row], depths: Sequence[int]) -> str:
    heading = [
        "model",
        "top-1",
        "95 % interval",
        "similar blocks",
        "neighbours' similarity",
        "before mixing",
        "parameters M",
        "GMACs",
    ]
    lines = []
    for at in depths:
        for re_attends, kind in KINDS.items():
            mean, low, high = top1(rows, at, re_attends)
            values = {key: mean_of(rows, at, re_attends, itemgetter(key)) for key in ("parameters", "macs")}
            cost = [f"{values['parameters'] / 1e6:.2f}", f"{values['macs'] / 1e9:.3f}"]
            alike = [f"{mean_of(rows, at, re_attends, share):.0%}"]
            alike += [f"{mean_of(rows, at, re_attends, value):.2f}" for value in (likeness, before_mixing)]
            lines.append([f"depth {at}, {kind}", f"{mean:.2%}", f"{low:.2%} to {high:.2%}", *alike, *cost])
    return table(heading, lines)


def plot_depths(rows: Sequence[Row], depths: Sequence[int]) -> Markup:
    """Accuracy against depth, with intervals, a line a kind."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.0, 4.0), layout="constrained")
        axes = figure.subplots()
        for (re_attends, kind), colour in zip(KINDS.items(), (TRAIN, HELD_OUT), strict=True):
            found = [[100 * value for value in top1(rows, at, re_attends)] for at in depths]
            below, above = ([abs(of[0] - of[end]) for of in found] for end in (1, 2))
            axes.errorbar(
                depths, [of[0] for of in found], [below, above], fmt="o-", capsize=3, color=colour, label=kind
            )
        axes.set(title="Top-1 accuracy (%)", xlabel="blocks", xticks=depths)
        axes.legend()
        return to_svg(figure, "depths", "Accuracy against depth, with and without Re-attention")


def plot_collapse(rows: Sequence[Row], depths: Sequence[int]) -> Markup:
    """The share of similar blocks against depth, and the similarity of blocks k apart in the deepest models."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (re_attends, kind), colour in zip(KINDS.items(), (TRAIN, HELD_OUT), strict=True):
            shares = [100 * mean_of(rows, at, re_attends, share) for at in depths]
            left.plot(depths, shares, "o-", color=colour, label=kind)
            deepest = [row for row in rows if (row["depth"], row["re_attention"]) == (depths[-1], re_attends)]
            for k, dashes in zip(deepest[0]["neighbours"], ("-", "--", ":"), strict=False):
                curve = [fmean(values) for values in zip(*(row["neighbours"][k] for row in deepest), strict=True)]
                blocks = range(1 + int(k), len(curve) + 1 + int(k))
                right.plot(blocks, curve, dashes, color=colour, label=f"{kind}, k = {k}")
        left.set(title="Similar blocks (%)", xlabel="blocks", xticks=depths, ylim=(-3, 103))
        right.axhline(0.8, color=GRID, linewidth=1)
        right.set(title=f"Similarity to k blocks before, depth {depths[-1]}", xlabel="block")
        left.legend()
        right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return to_svg(figure, "alike", "Similar blocks against depth, and similarity of neighbouring blocks")


def awake(name: str) -> str:
    """What each way to train does to the worth of either side, and to accuracy."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    tests = {(test["model"], test["arm"], test["measure"]): test for test in result["tests"]}
    rows, reached = [], {True: list[str](), False: list[str]()}
    for row in result["rows"]:
        key, worth = (row["model"], row["arm"]), [row[f"lost without {side}"] for side in ("patch", "pixel")]
        changes = [gained(tests.get((*key, measure))) for measure in ("lost without patch", "top1")]
        cost = f"{row['training_macs'] / 1e6:.1f}"
        figures = [f"{spread(row['top1'])} %", *map(spread, worth), *changes]
        rows.append([f"`{row['model']}`", row["arm"], str(len(row["seeds"])), cost, *figures])
        if len(row["seeds"]) > 1:
            good = all(side["mean"] >= 0.01 and side["ci95"][0] > 0 for side in worth)
            reached[good].append(f"`{row['model']}`, {row['arm']}")
    heading = ["model", "arm", "seeds", "MMACs", "top-1", "points lost without patches", "without pixels"]
    heading += ["patches are worth more", "top-1 gains"]
    expected = [
        [arm, what["changes"], *(f"{points:+.1f}" for points in what["expected"] or ())]
        for arm, what in result["arms"].items()
        if what["expected"] and any(row["arm"] == arm for row in result["rows"])
    ]
    used = dict.fromkeys(test["method"] for test in tests.values())
    sure = [test for test in tests.values() if test["p_holm"] is not None and test["p_holm"] < 0.05]
    names = {"lost without patch": "what patches are worth", "top1": "top-1"}
    said = "; ".join(f"`{t['model']}`, {t['arm']}: {names[t['measure']]} {gained(t)}" for t in sure)
    return "\n\n".join(
        [
            table(["arm", "what it changes", "patches, expected at least", "top-1, expected at least"], expected),
            table(heading, rows),
            f"Told apart from the preset as it is (p < 0.05): {said or f'none of {len(tests)} differences'}.",
            "Each side worth a point, its interval over seeds above 0: "
            + "; not: ".join("; ".join(reached[good]) or "none" for good in (True, False))
            + ".",
            f"- {counted(result['epochs'], 'epoch')} on {result['images']:,} training images of CIFAR-10, judged by "
            f"{result['held_out']:,} others of its training file\n- ±: 95 % intervals over seeds (Student's t); of "
            f"differences {'; '.join(used)}, p by Holm's correction over all of this table\n"
            "- MMACs: millions of multiply-adds of an image's forward pass in training\n"
            f"- on {result['hardware']}, {counted(result['threads'], 'thread')}",
        ]
    )


def gained(test: dict[str, Any] | None) -> str:
    """A difference in points with its interval and p, as far as they are known."""
    if test is None:
        return "–"
    sure = " to ".join(f"{100 * end:+.1f}" for end in test["ci95"] or ())
    p = f"; p = {test['p_holm']:.2g}" if test["p_holm"] is not None else ""
    return f"{100 * test['difference_mean']:+.1f}" + (f" ({sure}{p})" if sure else "")


def spread(values: dict[str, Any]) -> str:
    """A mean in percent or points, with half its interval."""
    half = f" ± {50 * (values['ci95'][1] - values['ci95'][0]):.1f}" if values["ci95"] else ""
    return f"{100 * values['mean']:.1f}{half}"


def blocks() -> dict[str, Callable[[], str]]:
    """What writes each block that the page has, or must have because its comparison is measured."""
    text = PAGE.read_text()
    writers = dict.fromkeys(COMPARISONS, comparison) | {"transfer": transfer, "depth": depth}
    writers |= dict.fromkeys(("awake", "awake_two_seeds"), awake)
    wanted = [name for name in writers if f"<!-- {name} -->" in text or (RESULTS / f"{name}.json").exists()]
    return {name: partial(writers[name], name) for name in wanted}
