"""Put measured figures into the documents, between their markers; nothing there is typed.

    python docs/update.py

Reads `docs/demo.txt` (what `make demo` printed), the models themselves, `tokenfusion.models.published`, and
`benchmarks/results/*.json`.
"""

import re
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, median

import check_page
import export_page
import front_page
import growth_page
import papers_page
import pretrained_page
import results_page
import serve_page
import speed_page
import stages_page
from results_page import listed, load, load_before, table
from stages_page import draws_by_count, gain, have

from tokenfusion.formatting import counted
from tokenfusion.models.cost import count_model, describe_models
from tokenfusion.models.published import PUBLISHED
from tokenfusion.profile import NOTES, compare_with_papers, paper_table
from tokenfusion.report.comparison_summary import told_apart

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"


def demo() -> str:
    """What `make demo` printed, but of its epochs and its images the first two and the last."""
    lines = [line for line in (DOCS / "demo.txt").read_text().splitlines() if line and line != "..."]
    for start in ("epoch ", "runs/demo/images/"):
        alike = [line for line in lines if line.startswith(start)]
        place = lines.index(alike[0])
        lines[place : place + len(alike)] = [*alike[:2], "...", alike[-1]]
    return "\n".join(["```console", *lines, "```"])


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


def photographs() -> str:
    """What a folder of photographs costs from files to a report, and how good the classifier is."""
    found = load("folder")
    rows = []
    for row in found["rows"]:
        low, high = row["top1_ci95"]
        minutes, memory = sum(row["seconds"].values()) / 60, max(row["peak_mb"].values()) / 1000
        what = ", ".join([f"{row['photographs']:,}", *[f"`{options}`" for options in [row["options"]] if options]])
        right = f"{row['top1']:.1%} ({low:.1%} to {high:.1%}) of {row['held_out']:,}"
        rows.append([what, f"{minutes:.1f}", f"{memory:.1f} GB", right])
    heading = ["photographs", "minutes", "memory", "named right (95 % interval)"]
    return (
        f"{table(heading, rows)}\n\nThese three commands on {found['hardware']}, with the weights at hand, on "
        "Imagenette's photographs of ten things, of 224×224 pixels and 10 kB: larger ones take longer to read. The "
        "CNN's weights were trained on most of these very photographs, held-out ones too: yours will be harder."
        f"{load_before(found)}"
    )


def results() -> str:
    """What training reached, beside what was aimed at, and on what."""
    rows, any_stale = [], False
    for name, what, aim in (
        ("cifar10_micro", "CIFAR-10", "90% in 15 minutes"),
        ("imagenette_128", "Imagenette, 128 px", "87.43%, fastai's leaderboard, a mean of 5 runs"),
    ):
        run = load(name)
        recipe = tomllib.loads((ROOT / "recipes" / f"{name}.toml").read_text())
        changed = [key for key, value in recipe.items() if run["recipe"][key] != value]
        assert not changed, f"recipes/{name}.toml has another {', '.join(changed)} than its result; measure again"
        low, high = run["evaluation"]["top1_ci95"]
        size = tuple(run["model"]["preprocess"]["img_size"])
        now, _ = count_model(run["model"]["name"], num_classes=10, img_size=size)  # both data sets have ten classes
        stale = now.parameters != run["model"]["parameters"]
        any_stale |= stale
        rows.append(
            [
                f"{what}, `{run['model']['name']}`{'†' * stale}, {run['recipe']['epochs']} epochs from random weights",
                f"{run['evaluation']['top1']:.2%} ({low:.2%} to {high:.2%})",
                aim,
                f"{run['minutes']:.1f}; {run['threads']}",
                f"{run['peak_memory_mb']:,.0f} MB",
            ]
        )
    footnote = "\n\n† measured before the model's last change; not measured again yet" * any_stale
    training = table(["training", "top-1 (95 % interval)", "aim", "minutes; threads", "peak memory"], rows)
    return f"One run each, on {load('cifar10_micro')['hardware']}:\n\n{training}{footnote}"


def loading() -> str:
    """How fast images are loaded beside timm's loader."""
    rows: list[list[str]] = []
    alike: list[float] = []
    as_is: list[float] = []
    for size in load("loader")["results"]:
        rates, ratios = size["images_per_second"], size["ratios"]
        for pair, ratio in ratios.items():
            ours, theirs = pair.split(" / ")
            if "decoding" in ours:
                how, aim = "both decode in every epoch", "2×"
            elif theirs == "timm" and "timm_decoding" in rates:
                how, aim = "both hold decoded images", "2×"
            else:
                how, aim = "each as it comes: ours decodes once", ""
            (alike if aim else as_is).append(ratio)
            rows.append(
                [f"{size['size']} px, {how}", f"{rates[ours]:,.0f}", f"{rates[theirs]:,.0f}", f"{ratio:.2f}×", aim]
            )
    compared = table(["loading JPEG, augmentation included", "images/s", "timm's loader", "ratio", "aim"], rows)
    return (
        f"On {load('loader')['hardware']}. Like for like, the aim of twice timm's speed is {reaching(alike, 2)}; where "
        f"each comes as it is, it is {reaching(as_is, 2)}.\n\n{compared}"
    )


def reaching(ratios: list[float], aim: float) -> str:
    """Whether all ratios reach an aim, or how many do."""
    reached = sum(ratio >= aim for ratio in ratios)
    if reached == len(ratios):
        return "reached"
    return f"reached in {reached} of {len(ratios)} rows" if reached else "missed"


def speed() -> str:
    """How fast CrossViT and Re-attention are beside timm's and a plain transcription, and each paper's model alone."""
    papers, re_attention = load("papers"), load("re_attention")
    rows = []
    for pair in papers["pairs"]:
        aim = "1.3×" if pair["what"] == "inference" else "1×"
        what = f"{pair['what']}, batch {pair['batch']}"
        rows.append([pair["model"], what, pair["precision"], f"{pair['timm / ours']:.2f}×", aim])
    for result in re_attention["results"]:
        what = f"{'inference' if result['what'] == 'infer' else 'training step'}, batch {result['input'][0]}"
        for precision in ("fp32", "bf16"):
            rows.append([result["subject"], what, precision, f"{result[precision]['ours: speed-up']:.2f}×", "1.5×"])
    heading = ["model", "what", "precision", "times the peer's speed", "aim"]
    compared = table(heading, rows)
    rows = [
        [
            row["model"],
            f"{row['what']}, batch {row['batch']}",
            *(f"{row[precision]:.1f}" for precision in ("fp32", "bf16")),
        ]
        for row in papers["alone"]
    ]
    alone = table(["model", "what", "images/s, fp32", "bf16"], rows)
    return f"On {papers['hardware']}, {papers['threads']} threads:\n\n{compared}\n\n{alone}"


def scaling_plan() -> str:
    """ImageNet runs on 8, 64 and 512 GPUs: what `benchmarks/scaling_plan.py` makes of the recipes."""
    result, rows = load("scaling_plan"), []
    for row in result["rows"]:
        for plan in row["plans"]:
            of_a_gpu = f"{plan['compute_seconds'] + plan['sending_seconds']:.3f}"
            hours, efficiency = f"{plan['hours']:.1f}", f"{plan['efficiency']:.0%}"
            counts = (f"{plan['gpus']}", f"{plan['images_of_a_gpu']:g}", of_a_gpu, f"{plan['mb_sent']:,.0f}")
            cores = f"{plan['loader_cores_of_a_gpu']:.1f}"
            rows.append([f"`{row['recipe']}`, batch {row['batch_size']:,}", *counts, efficiency, hours, cores])
    measured = sorted({row["measured_on"] for row in result["rows"] if row["measured_on"]})
    peak, share = result["peak_tflops"], result["utilisation"]
    steps = (
        f"measured on {', '.join(measured)}"
        if measured
        else f"assumed: {share:.0%} of {peak:g} TFLOP/s; none was measured"
    )
    rate = result["loader_images_per_s_of_a_worker"]
    heading = [
        "recipe",
        "GPUs",
        "images of a GPU",
        "seconds a step",
        "MB sent a step",
        "computing",
        "hours",
        "loader cores a GPU",
    ]
    return (
        f"Steps: {steps}; {result['overhead']:.1%} on top for the path of several processes (measured, above). "
        f"Each GPU sends at {result['gbit']:g} Gbit/s, in turn with computing. A loader's core gives {rate:,.0f} "
        f"images/s (measured on {load('loader')['hardware']}).\n\n{table(heading, rows)}"
    )


def distributed() -> str:
    """What several processes cost and bring where there are two cores and no GPU."""
    result = load("distributed")
    rates = {way: median(runs) for way, runs in result["images_per_second"].items()}
    ways = {
        "plain": "one process",
        "torchrun 1": "one process of `torchrun`",
        "torchrun 2": "two processes of `torchrun`",
    }
    rows = [[what, f"{rates[way]:,.0f}"] for way, what in ways.items()]
    sent = ", ".join(f"{mb:.2f} MB on {n}" for n, mb in result["mb_sent_per_step"].items())
    turns = len(result["images_per_second"]["plain"])
    pairs = zip(result["images_per_second"]["plain"], result["images_per_second"]["torchrun 1"], strict=True)
    costs = [plain / alone - 1 for plain, alone in pairs]
    return (
        f"`{result['model']}`, batch {result['batch_size']}, {result['threads_of_each_process']} thread a process, on "
        f"{result['hardware']}; medians of {turns} turns:\n\n"
        f"{table(['training', 'images/s'], rows)}\n\nTurn by turn, the path of several processes costs a single one "
        f"{result['overhead_on_one_process']:.1%} ({min(costs):.1%} to {max(costs):.1%}; aim: less than 3%), and two "
        f"of them are {result['speed_of_two_processes']:.2f} times as fast as one. Each sends, a step: {sent} "
        "processes."
    )


def pays() -> str:
    """Where fusing pays and where it does not, in a sentence each."""
    counted = [(n, draws) for n, draws in draws_by_count(load("pretrained")) if have(draws, "mean_tokens")]
    told = [
        f"{fmean(d['votes'] for d in draws):.1%} with {count:,} training images (the CNN alone "
        f"{fmean(d['cnn_tokens'] for d in draws):.1%}, the mean of both parents' own predictions "
        f"{fmean(d['mean_tokens'] for d in draws):.1%})"
        for count, draws in counted
    ]
    gains = [gain("votes", "mean_tokens", draws) or (0.0, 0.0) for _, draws in counted]
    if all(low > 0 for low, _ in gains):
        control = "fusing is ahead of that mean"
    elif all(high < 0 for _, high in gains):
        control = "that mean is ahead of fusing"
    else:
        control = "whether fusing adds to that mean cannot be told"
    short, longer = from_random_weights("cifar10_comparison"), from_random_weights("cifar10_longer")
    return (
        "**Does fusing pay?** With pretrained parents and few images two know more than one: of CIFAR-10's test "
        f"images a classifier on the tokens of both names {listed(told)}; {control} ([how](docs/stages.md)). "
        f"From random weights, at equal cost, on CIFAR-10: {short}; {longer} "
        "([all comparisons](docs/results/README.md))."
    )


def from_random_weights(name: str) -> str:
    """Of a comparison, whether its best fused preset is ahead of the CNN of equal cost."""
    result = results_page.with_crossed_tests(load(name))
    models = {model["name"]: model for model in result["models"]}
    cnn = models["resnet_micro"]
    fused = max((m for n, m in models.items() if n.startswith("tokenfusion")), key=lambda model: model["top1_mean"])
    ahead = "yes" if fused["top1_mean"] > cnn["top1_mean"] else "no"
    verdict, why = (ahead, "more than chance") if told_apart(result, fused, cnn) else ("not told", "maybe by chance")
    trained = f"{counted(cnn['epochs'], 'epoch')} and {counted(len(cnn['runs']), 'seed')}"
    return (
        f"{verdict} by {trained} (the best fused model {fused['top1_mean']:.1%}, the CNN alone {cnn['top1_mean']:.1%}, "
        f"{why})"
    )


def calibration() -> str:
    """Calibration errors on held-out images, by where the temperature comes from."""
    ways = {
        "none": "raw scores",
        "other half": "temperature of the other half",
        "training images": "of training images",
    }
    rows = [
        [run["data"], f"`{run['model']}`, {run['epochs']} epochs", f"{run['held_out']:,}"]
        + ["{:.2%} ({:.2%} to {:.2%})".format(*run["ece"][way]) for way in ways]
        for run in load("calibration")["runs"]
    ]
    return table(["data", "run", "held-out images", *ways.values()], rows)


def checksum() -> str:
    """What looking at the weights' checksums costs."""
    found = load("checksum")
    rows = []
    for name, row in found["weights"].items():
        times = (f"{row[key]:.1f}" for key in ("read_ms", "checksum_ms"))
        rows.append(
            [f"`{name}`", f"{row['megabytes']:.0f}", *times, f"{row['checksum_ms'] / row['build_model_ms']:.1%}"]
        )
    kept = found["kept_rows"]
    heading = ["weights", "MB", "ms to read", "ms to check", "checking over building the model"]
    return (
        f"Processor time on {found['hardware']}, files in the page cache:\n\n{table(heading, rows)}\n\n"
        f"What is kept of frozen parents ({kept['megabytes']:.0f} MB) takes {kept['check_ms']:.0f} ms to check."
    )


def many() -> str:
    """How much of the model's own throughput predicting many images reaches."""
    if not (RESULTS / "predict.json").exists():
        return "Not measured yet: `python benchmarks/predict.py DATA`."
    found = load("predict")
    rows = [
        [f"`{row['model']}`", f"{row['alone']:.1f}", f"{row['predict']:.1f}", f"{row['share']:.1%}"]
        for row in found["models"]
    ]
    heading = ["model", "images/s alone", "images/s of `predict --out`", "share (aim: 90%)"]
    images = found["images"]
    packed = "Both are packed." if found.get("packed") else "Measured before `predict` packed its model: neither is."
    return (
        f"{images['count']:,} images of {images['size']} pixels and {images['bytes'] / 1000:.1f} kB (medians), into "
        f"the model at 224 px, batch {found['batch_size']}, on {found['hardware']}:\n\n{table(heading, rows)}\n\n"
        f"{packed}{load_before(found)}"
    )


BLOCKS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"pays": pays, "photographs": photographs, "install": front_page.install, "demo": demo},
    DOCS / "models.md": {"models": models},
    DOCS / "training.md": {"loading": loading, "compiled": speed_page.compiled, "steps": speed_page.steps},
    DOCS / "stages.md": {
        "pretrained": stages_page.pretrained,
        "digits": partial(stages_page.pretrained, "pretrained_digits"),
        "cost": stages_page.cost,
    },
    pretrained_page.PAGE: {"files": pretrained_page.files},
    DOCS / "papers" / "README.md": {"published": published, "official": speed_page.official, "speed": speed},
    DOCS / "papers" / "cmt.md": {"detector": papers_page.detector},
    DOCS / "papers" / "deepvit.md": {"collapse": papers_page.collapse},
    DOCS / "check.md": {"check": check_page.check},
    DOCS / "export.md": {"calibration": calibration, "shipped": export_page.shipped, "cold": export_page.cold},
    DOCS / "predict.md": {"many": many},
    DOCS / "safety.md": {"checksum": checksum},
    DOCS / "scale.md": {"scaling_plan": scaling_plan, "distributed": distributed, "growth": growth_page.growth},
    serve_page.PAGE: {"figures": serve_page.figures},
    results_page.PAGE: {"results": results} | results_page.blocks(),
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
