"""A model card: what a model was trained on and how, how good it is, and where that ends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_CLASSES = 50
"""Classes with a line of their own; of more, those that are recognised worst."""


def model_card(
    repo: str,
    description: Mapping[str, Any],
    recipe: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    compared: int,
) -> str:
    """The card as Markdown, with the front matter that hubs read.

    Paths of the machine that it was trained on are left out, but for the data's own name.

    Args:
        repo: `ORG/NAME`.
        description: the run's `model.json`.
        recipe: what its recipe sets.
        evaluation: its `evaluation.json`; None where it was not evaluated.
        compared: images by which timm's model of the folder was compared with the run's.
    """
    parts = [
        front_matter(evaluation),
        f"# {repo}",
        introduction(description),
        usage(repo, description),
        training(description, recipe),
        results(evaluation),
        limits(description, evaluation),
        "## Parity\n\nBefore this folder was sent, timm's model of it and the run itself were given the same "
        f"{compared} images of noise: all logits were equal to the bit.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(evaluation: Mapping[str, Any] | None) -> str:
    """What hubs sort models by. The licence is the author's to fill in."""
    metric = "" if evaluation is None else "metrics:\n- " + ("f1" if evaluation.get("multi_label") else "accuracy")
    lines = ["---", "library_name: timm", "pipeline_tag: image-classification", "tags:"]
    lines += ["- image-classification", "- timm", "- transformers", "- tokenfusion", *metric.splitlines()]
    return "\n".join([*lines, "# license: fill in, such as apache-2.0", "---"])


def introduction(description: Mapping[str, Any]) -> str:
    classes, size = description["classes"], description["preprocess"]["img_size"]
    kind = "any number of" if description["multi_label"] else "one of"
    return (
        f"An image classifier of {kind} {len(classes)} classes: `{description['name']}`, "
        f"{description['parameters'] / 1e6:.2f} million parameters, {description['macs'] / 1e9:.3f} billion "
        f"multiply-adds for an image of {size[0]}×{size[1]} pixels. Trained with tokenfusion "
        f"{description['versions']['tokenfusion']}."
    )


def usage(repo: str, description: Mapping[str, Any]) -> str:
    size, channels = description["preprocess"]["img_size"], description["preprocess"]["in_chans"]
    temperature = description["temperature"]
    raw = f" `Classifier` calibrates its scores; for those of timm and transformers divide logits by {temperature:.4g}."
    return f"""## Use

```python
from tokenfusion import Classifier
Classifier.load("hf://{repo}").predict("image.jpg")     # with its own preprocessing and class names

import timm, tokenfusion                                 # importing tokenfusion registers its models
model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()

import tokenfusion
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("{repo}")
```

Images of {size[0]}×{size[1]} pixels, {channels} channel(s), normalised as `config.json` says.{raw}"""


def training(description: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    hidden = {"data", "exclude", "warm_start_from", "workers", "cache_mb", "save_minutes", "every", "loggers", "recipe"}
    named = (item for item in recipe.items() if item[0] not in hidden and not str(item[0]).endswith("_dir"))
    shown = {key: value for key, value in named if value not in ("", (), [])}
    rows = "\n".join(f"| {key} | {value} |" for key, value in shown.items())
    data = Path(str(recipe.get("data", "")).rstrip("/")).name or "unknown"
    names = ", ".join(map(plain, description["classes"][:MAX_CLASSES]))
    more = f" and {len(description['classes']) - MAX_CLASSES} more" * (len(description["classes"]) > MAX_CLASSES)
    return (
        f"## Training\n\nData: `{data}`, of the classes {names}{more}. On: {description['hardware']}. What was set:\n\n"
        f"| setting | value |\n|---|---|\n{rows}"
    )


def results(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "## Results\n\nIt has not been measured on images that it was not trained on."
    data = Path(str(evaluation["data"]).rstrip("/")).name
    judged = evaluation["split"] == "train" or (evaluation.get("trained_on") and not evaluation["trained_on_left_out"])
    head = f"## Results\n\nOn {evaluation['n']} images of `{data}` ({evaluation['split']})"
    head += ", some or all of which were trained on" if judged else " that were not trained on"
    skipped = f", {evaluation['skipped']} unreadable ones left out" if evaluation["skipped"] else ""
    return "\n\n".join([f"{head}{skipped}:", measures(evaluation), per_class(evaluation), calibration(evaluation)])


def measures(evaluation: Mapping[str, Any]) -> str:
    rows = [("measure", "value", "95 % interval"), ("---", "---", "---")]
    if evaluation.get("multi_label"):
        interval = evaluation.get("map_ci95")
        rows.append(("mean average precision", share(evaluation["map"]), between(interval)))
        rows += [("F1, macro", share(evaluation["f1_macro"]), ""), ("F1, micro", share(evaluation["f1_micro"]), "")]
    else:
        rows.append(("accuracy", share(evaluation["top1"]), between(evaluation["top1_ci95"])))
        if len(evaluation["per_class"]) > 5:
            rows.append(("accuracy of five guesses", share(evaluation["top5"]), ""))
    rows.append(("cross-entropy before calibration", f"{evaluation['loss']:.4f}", ""))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def per_class(evaluation: Mapping[str, Any]) -> str:
    """A line a class, the worst first where there are too many."""
    classes = list(evaluation["per_class"].items())
    note = ""
    if len(classes) > MAX_CLASSES:
        classes = sorted(classes, key=lambda item: (item[1]["f1"] is None, item[1]["f1"] or 0))[:MAX_CLASSES]
        note = f"The {MAX_CLASSES} classes that are recognised worst:\n\n"
    lines = ["| class | images | precision | recall | F1 |", "|---|---|---|---|---|"]
    for name, scores in classes:
        values = (share(scores[key]) for key in ("precision", "recall", "f1"))
        lines.append(f"| {plain(name)} | {scores['n']} | {' | '.join(values)} |")
    return note + "\n".join(lines)


def calibration(evaluation: Mapping[str, Any]) -> str:
    if "ece" not in evaluation:
        return "Calibration was not measured."
    interval = f" (95 % interval {between(evaluation['ece_ci95'])})" if "ece_ci95" in evaluation else ""
    raw = f"; raw scores by {share(evaluation['ece_raw'])}" if "ece_raw" in evaluation else ""
    return f"Calibration: scores and accuracy differ by {share(evaluation['ece'])} on average{interval}{raw}."


def limits(description: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    lines = ["- It answers with one of its classes whatever the image shows; scores are no proof that it knows."]
    if description["multi_label"]:
        lines = ["- It knows no class but its own; that none is named is no proof that there is none."]
    if evaluation is not None:
        lines.append("- The figures hold for images like those it was measured on, and within their interval.")
        rare = [name for name, scores in evaluation["per_class"].items() if scores["n"] < 20]
        if rare:
            names = ", ".join(map(plain, rare[:10])) + (" and others" if len(rare) > 10 else "")
            lines.append(f"- Measured on fewer than 20 images each, so that their figures say little: {names}.")
    return "## Limits\n\n" + "\n".join(lines)


def plain(name: str) -> str:
    """A class's name where Markdown is read: on one line, no mark-up, no cell's end."""
    escaped = "".join(f"\\{letter}" if letter in r"\`*_[]<>|#" else letter for letter in name)
    return "".join(letter if letter.isprintable() else "�" for letter in escaped)


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def between(interval: tuple[float, float] | None) -> str:
    return "" if not interval else f"{interval[0]:.2%} to {interval[1]:.2%}"
