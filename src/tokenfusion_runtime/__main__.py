"""`python -m tokenfusion_runtime DIR IMAGE...`: the same output as `tokenfusion predict RUN IMAGE...`."""

import argparse
import io
import os
import sys

from tokenfusion_runtime.abstain import why_unsure
from tokenfusion_runtime.classifier import load
from tokenfusion_runtime.engines import leave_out_converter
from tokenfusion_runtime.errors import InputError
from tokenfusion_runtime.files import expand
from tokenfusion_runtime.output import first_widths, noting_unsure, print_predictions, spelled_out


def main(words: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser("python -m tokenfusion_runtime", description="Classify images.")
    parser.add_argument("folder", metavar="DIR", help="folder that `tokenfusion export` wrote")
    parser.add_argument("paths", metavar="IMAGE", nargs="+", help="files, folders, globs, or - for a list on stdin")
    parser.add_argument("--topk", type=int, default=5, help="how many classes to name")
    forms = "a table to read, JSON lines (an object for each image), or CSV"
    parser.add_argument("--format", choices=["table", "json", "csv"], default="table", help=forms)
    share = "largest share of wrong answers, such as 0.1: where the classifier is too unsure, the label is null; "
    share += "it needs at least 29 held-out images for 0.1, 59 for 0.05, 149 for 0.02"
    parser.add_argument("--abstain", type=float, help=share)
    given = parser.parse_args(words)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # what was closed, as by `>&-`, is nowhere
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be any bytes
    try:
        classifier = load(given.folder)
        if classifier.note:
            print(classifier.note, file=sys.stderr)
        topk = min(given.topk, len(classifier.classes))
        images = expand(given.paths) if "-" in given.paths else list(expand(given.paths))
        predictions = classifier.iter_predictions(images, topk=topk, abstain=given.abstain)
        if silent := "" if given.abstain is None else classifier.why_silent(given.abstain):
            print(f"nothing is answered: {silent}", file=sys.stderr)
        several, unsure = classifier.multi_label, list[str]()
        predictions = noting_unsure(predictions, unsure)
        widths = first_widths(images, classifier.classes, several)
        failed = print_predictions(predictions, given.format, topk=topk, multi_label=several, widths=widths)
    except InputError as error:
        print(f"error: {spelled_out(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if unsure and (reason := why_unsure(len(unsure), given.abstain, classifier.surest_errors)):
        print(reason, file=sys.stderr)
    if failed:
        print(f"{failed} of the images could not be read", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    leave_out_converter()
    sys.exit(main())
