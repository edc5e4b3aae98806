"""What the command does with its options before a verb sees them: refuse fractions, fill in from recipe and preset."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cyclopts import App, Argument, ArgumentCollection, CycloptsError, CycloptsPanel, UnusedCliTokensError
from cyclopts.config import Dict
from cyclopts.help import DefaultFormatter, HelpPanel

from tokenfusion.errors import InputError
from tokenfusion.names import split_names
from tokenfusion.places import require_begun, require_data, require_files, require_no_run, require_run
from tokenfusion.preset import preset
from tokenfusion.recipe import AUTO_FIELDS, HUB, Recipe, load_recipe

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.panel import Panel
    from rich.text import Text


TRAINING = (("train",), ("compare",))
"""Commands whose options are those of a Recipe."""
REMEDIES = {
    "--data": "name a folder of labelled images, or `digits` for a first try",
    "--models": "name models, such as --models tokenfusion_early_micro,resnet_micro",
    "--out": "name the folder to write to, such as --out runs/first",
}
"""What to do where an argument is missing."""
AUTO_OPTIONS = {f"--{name.replace('_', '-')}" for name in AUTO_FIELDS}


WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
"""Endings of files that a model may begin with."""
SEVERAL: dict[str, Callable[[str, int], bool]] = {
    "--img-size": lambda word, _: is_number(word),
    "--value-range": lambda word, _: is_number(word),
    "--loggers": lambda word, _: word in ("wandb", "mlflow"),
    "--warm-start-from": lambda _, before: before < 2,
    "--pretrained": lambda word, before: before < 2 and (word.endswith(WEIGHTS) or not seems_data(word)),
    "--models": lambda word, _: not seems_data(word),
    "--allow-origin": lambda word, _: word.startswith(("http://", "https://")),
}
"""Options of several values, and whether a word is one of them, given how many stand before it."""


VALUES = {
    "--pretrained": "hub to fetch weights, or the files of weights: --pretrained CNN_FILE VIT_FILE",
    "--img-size": "a number of pixels, or a height and a width",
    "--warm-start-from": "two run folders, the CNN's first",
}
"""What to give where an option of several values has none."""


def seems_data(word: str) -> bool:
    """Whether a word is DATA if it may be: it is there, or it is a pattern or address of shards."""
    return word == "digits" or os.path.exists(word) or "://" in word or "{" in word


def data_first(words: Sequence[str]) -> list[str]:
    """The command's words; where `--img-size 32 photos` would take DATA for a value, DATA stands before the option."""
    ordered = list(words)
    for option, is_value in SEVERAL.items():
        if option in ordered:
            start = end = ordered.index(option) + 1
            while (
                end < len(ordered)
                and (is_number(ordered[end]) or not ordered[end].startswith("-"))
                and is_value(ordered[end], end - start)
            ):
                end += 1
            if start < end < len(ordered) and not ordered[end].startswith("-"):
                ordered.insert(start - 1, ordered.pop(end))
    return ordered


def refuse_words(_app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse a word other than `auto` where a number may be chosen by measuring."""
    if commands not in TRAINING:
        return
    for argument in arguments:
        if argument.name in AUTO_OPTIONS:
            for token in argument.tokens:
                if token.value != "auto" and not is_number(token.value):
                    raise InputError(f"{argument.name}={token.value} is no number; give one, or auto")


def refuse_nothing(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse an option of several values that is given none."""
    for argument in arguments:
        if argument.name in SEVERAL and argument.tokens and not any(token.value for token in argument.tokens):
            what = VALUES.get(argument.name, "one or more")
            raise InputError(f"{argument.name} has no value behind it; give {what}, or leave it out")


def refuse_fractions(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse a fraction where a whole number belongs; the parser would round it."""
    for argument in arguments:
        for token in argument.tokens:
            # of what is no number at all the parser says more
            if mentions(argument.hint, int) and is_number(token.value) and not float(token.value).is_integer():
                raise InputError(f"{argument.name}={token.value} is not a whole number; give one without a fraction")


def with_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give a verb that trains what its options leave open: first from the recipe file, then from the preset."""
    if commands not in TRAINING:
        return
    given = {argument.name.removeprefix("--"): [token.value for token in argument.tokens] for argument in arguments}
    if given.get("resume"):
        moved = ("resume", "data", "root")  # where its images lie is no part of what a run is
        others = [f"--{name}" for name, values in given.items() if values and name not in moved]
        if others:
            raise InputError(f"--resume goes on with the run's own recipe; leave out {', '.join(others)}")
        return
    path = given["recipe"][0] if given.get("recipe") else ""
    file = load_recipe(Path(path)) if path else {}
    fill(app, commands, arguments, file, source=path)
    if commands == ("compare",):
        given["model"] = first_of_several(given)
    model, data = (given[name][0] if given.get(name) else file.get(name, "") for name in ("model", "data"))
    tune = given["tune"][0] if given.get("tune") else file.get("tune", "")
    pretrained = bool(given.get("pretrained") or file.get("pretrained"))
    fill(app, commands, arguments, preset(model, data, tune, pretrained), source="preset")


def first_of_several(given: dict[str, list[str]]) -> list[str]:
    """The model whose preset all of a comparison's models take; refuses options that contradict each other."""
    if given.get("model"):
        raise InputError("--model names one model; name several with --models A,B")
    if given.get("epochs") and given.get("budget") and given["budget"] != [f"epochs={given['epochs'][0]}"]:
        raise InputError(f"--epochs {given['epochs'][0]} and --budget {given['budget'][0]} differ; give one of them")
    return split_names(given.get("models", []))[:1]


def fill(
    app: App, commands: tuple[str, ...], arguments: ArgumentCollection, values: dict[str, Any], source: str
) -> None:
    """Set the arguments that have no value yet."""
    options = {name.replace("_", "-"): value for name, value in values.items()}
    Dict(data=options, source=source, use_commands_as_keys=False)(app, commands, arguments)


def require_all(_app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Name all that is missing at once; DATA may have come from a recipe file, and a dry run writes nothing."""
    known = {name for argument in arguments for name in (*argument.names, *argument.negatives)}
    if any(word.startswith("--") and word.partition("=")[0] not in known for word in sys.argv[1:]):
        return  # a misspelt option may be the one that is missing: the parser names it
    given = {argument.name for argument in arguments if argument.tokens}
    wanted = [argument.name for argument in arguments if argument.required]
    if commands in TRAINING and "--resume" not in given:
        wanted = ["--data", *wanted]
        wanted += ["--out"] * ("--out" not in wanted and "--dry-run" not in given)
    missing = [name for name in wanted if name not in given]
    if missing:
        *first, last = ("DATA" if name == "--data" else name for name in missing)
        names = f"{', '.join(first)} and {last} are" if first else f"{last} is"
        remedies = [REMEDIES[name] for name in missing if name in REMEDIES]
        remedies += [took_all(argument) for argument in arguments if "--data" in missing and argument.name in SEVERAL]
        remedies = [remedy for remedy in remedies if remedy]
        help_of_verb = f"`{' '.join(('tokenfusion', *commands, '--help'))}` says what to give"
        raise InputError(f"{names} missing; {'; '.join(remedies) or help_of_verb}")


def took_all(argument: Argument) -> str:
    """What to say of an option of several values that may have taken DATA for one; "" where it was not given."""
    given = [token.value for token in argument.tokens if token.source == "cli"]
    option = argument.name
    return f"{option} took all words behind it, {given[-1]!r} the last: put DATA before {option}" if given else ""


def require_trainable(settings: Recipe, out: Path | None, resume: Path | None) -> None:
    """Refuse paths that cannot be right before anything heavy is imported.

    Raises:
        InputError: data, weights, a list or a run is not there, or a run is where one is to be written.
    """
    if {"RANK", "SLURM_PROCID"} & os.environ.keys():  # of several processes: once they have met, so that all are told
        return
    if resume:
        require_begun(resume)
        return
    require_data(settings.data)
    require_files(tuple(name for name in settings.pretrained if name != HUB), "--pretrained")
    require_files((settings.exclude,) if settings.exclude else (), "--exclude")
    for run in settings.warm_start_from:
        require_run(Path(run))
    if out is not None:
        require_no_run(out)


def explain_error(error: CycloptsError) -> "Panel | Text":
    """What the parser says of an error, or more where DATA seems to be a pattern that the shell has expanded."""
    words = error.unused_tokens if isinstance(error, UnusedCliTokensError) else None
    if words and all("://" in word or word.endswith((".tar", ".parquet")) for word in words):
        from rich.text import Text

        return Text(f"error: DATA is one name, but {words[0]} follows; the shell expanded a pattern: put it in quotes")
    return CycloptsPanel(error)


class HelpWithAutos(DefaultFormatter):
    """Help with `INT|auto` where `auto` is taken in place of a number."""

    def __call__(self, console: "Console", options: "ConsoleOptions", panel: HelpPanel) -> None:
        entries = [
            entry.copy(metavar=str(entry.metavar).replace("CHOICE", "auto"), choices=())
            if AUTO_OPTIONS.intersection(entry.names)
            else entry
            for entry in panel.entries
        ]
        super().__call__(console, options, panel.copy(entries=entries))


def shown_default(value: Any) -> str | None:
    """A default as one would type it; None of what stands for nothing: (), "" and a flag that is not set."""
    if value is False or value in (None, "", ()):
        return None
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def mentions(hint: Any, kind: type) -> bool:
    """Whether a type is `kind`, or is made of it as `tuple[kind, ...] | None` is."""
    return hint is kind or any(mentions(part, kind) for part in get_args(hint))


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
