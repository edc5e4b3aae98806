"""Every command and every Python block of README.md is run, in the page's order, as the page writes it.

The words come from the page; what stands in for what a reader has is stated here: a small folder of generated
photographs in the place of `photos/`, timm's small test models with weights of this test, on a hub of this machine, in
the place of the pretrained pair, and `SHORTER` where a command trains. A renamed option fails a test.
"""

import glob
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save
from torch.distributed.run import get_args_parser

import fakehub
from children import fork_runs
from group import run_all
from services import service
from tokenfusion import cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text()
CNN, VIT = "test_efficientnet", "test_vit"
SHORTER = {
    ("train", "digits"): ["--epochs", "1", "--img-size", "8"],
    ("torchrun",): ["--epochs", "1", "--batch-size", "8"],
}
"""Words that are added to a command, by its first words."""
INSTEAD = {"compare digits": "compare photos/", "--nproc-per-node 8": "--nproc-per-node 2"}
"""Words in the place of others: fewer images, two cores."""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def console_lines():
    return [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]


def lines_of(program):
    """The words of each line of the page that calls a program, after its name, and the file that `>` names."""
    for line in console_lines():
        for words, others in INSTEAD.items():
            line = line.replace(words, others)
        called, *words = shlex.split(line, comments=True)
        if called == program:
            file = words.pop() if ">" in words else ""
            yield [word for word in words if word != ">"], file


def in_the_shell(words):
    """Patterns of files become files, and the words of `SHORTER` are added."""
    found = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    return found + next((more for start, more in SHORTER.items() if tuple(words[: len(start)]) == start), [])


def photographs(folder, count, start=0):
    """JPEGs of three classes that differ in colour."""
    for label, name in enumerate(("ant", "bee", "fly")):
        (folder / name).mkdir(parents=True)
        for number in range(start, start + count):
            pixels = np.random.default_rng([label, number]).integers(0, 120, (4, 6, 3), dtype=np.uint8)
            pixels[..., label] += 100
            smooth = Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC)
            smooth.save(folder / name / f"{number}.jpg", quality=95)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A reader's folder: photographs, new ones, others of the same classes; and a hub."""
    photographs(tmp_path / "photos", 12)
    photographs(tmp_path / "others", 2, start=100)
    (tmp_path / "new").mkdir()
    for number, path in enumerate(sorted((tmp_path / "others").glob("*/*.jpg"))):
        shutil.copy(path, tmp_path / "new" / f"{number}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tokenfusion.preset.PRETRAINED_PAIR", f"fuse({CNN},{VIT},probe)")
    fork_runs(monkeypatch)
    with fakehub.serving() as hub:
        for seed, name in enumerate((CNN, VIT)):
            torch.manual_seed(seed)
            repo = timm.get_pretrained_cfg(name).hf_hub_id
            hub.private[repo] = False
            hub.commit(repo, {"model.safetensors": save(timm.create_model(name).state_dict())})
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield tmp_path


def test_every_line_is_of_a_kind_that_is_run_here():
    known = {"pip": 1, "tokenfusion": 13, "torchrun": 1}
    called = [shlex.split(line, comments=True)[0] for line in console_lines()]
    assert {program: called.count(program) for program in called} == known
    assert len(blocks("python")) == 2


def test_the_page_installs_extras_that_there_are():
    ((words, _),) = lines_of("pip")
    extras = re.fullmatch(r"\.\[(.*)\]", words[1])[1].split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    assert set(extras) <= set(known)


def test_a_newcomer_with_nothing_but_the_page_reaches_a_served_classifier(room, command):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    pytest.importorskip("bentoml", reason="the extra `serve` is not installed")
    for words, file in lines_of("tokenfusion"):
        if words[0] == "serve":
            assert_it_is_served(words, room)
            continue
        status, output, errors = command(*in_the_shell(words))
        assert status == 0, f"{shlex.join(words)}: {errors}"
        if file:
            (room / file).write_text(output)
    assert (room / "runs/photos/report.html").exists()
    assert len((room / "answers.csv").read_text().splitlines()) == 1 + len(list(room.glob("new/*")))
    for words in inline_commands():
        status, _, errors = command(*in_the_shell(words))
        assert status == 0, f"{shlex.join(words)}: {errors}"


def assert_it_is_served(words, room):
    """The page that the command opens is there, where README says that it is."""
    (port,) = set(re.findall(r"http://127\.0\.0\.1:(\d+)", PAGE))
    served = cli.app["serve"].assemble_argument_collection()
    assert str(next(one.field_info.default for one in served if "--port" in one.names)) == port
    with service(*words[1:]) as running:
        assert running.predict(next(room.glob("new/*.jpg")).read_bytes())["label"] in ("ant", "bee", "fly")
        assert running.ask("/")[0] == 200


def inline_commands():
    """Commands inside the text: `tokenfusion ...`, or a verb with what it is given."""
    for text in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)):
        words = shlex.split(text)
        words = words[1:] if words[0] == "tokenfusion" else words
        if len(words) > 1 and words[0] in VERBS:
            yield words


VERBS = [name for name in cli.app if name[0] != "-"]


def test_commands_inside_the_text_are_found():
    assert ["train", "--resume", "runs/photos"] in list(inline_commands())
    assert ["evaluate", "runs/photos", "others/"] in list(inline_commands())


def test_every_option_that_the_text_names_is_one():
    texts = [text for text in re.findall(r"`([^`\n]+)`", PAGE) if not text.startswith("pip ")]
    named = {word for text in texts for word in text.split() if word.startswith("--")}
    arguments = [one for verb in VERBS if verb != "analyze" for one in cli.app[verb].assemble_argument_collection()]
    assert named <= {name for one in arguments for name in one.names}
    assert {"--dry-run", "--batch-size"} <= named


def test_a_dry_run_says_time_memory_and_disk_of_a_folder(room, command):
    line = next(words for words, _ in lines_of("tokenfusion") if "--pretrained" in words)
    status, output, errors = command(*line, "--dry-run")
    assert status == 0, errors
    assert not (room / "runs").exists()
    for name in ("memory", "disk"):
        assert re.search(rf"^{name} .*\d+ MB", output, re.MULTILINE), output
    assert re.search(r"^(probe|training) .*\d s", output, re.MULTILINE), output


def test_the_demo_and_the_first_python_block_run(room, command):
    for words in demo_lines():
        if words[0].endswith("tokenfusion"):
            status, _, errors = command(*in_the_shell(words[1:]))
            assert status == 0, f"{shlex.join(words)}: {errors}"
        else:
            script = {"__name__": "of the demo"}
            exec((ROOT / words[1]).read_text(), script)
            script["main"](*map(Path, words[2:]))
    assert (room / "runs/demo/report.html").exists()
    scope = {}
    exec(blocks("python")[0], scope)
    assert scope["prediction"].label in map(str, range(10))
    assert (room / "runs/python/model.json").exists()


def demo_lines():
    """The lines of `make demo` after the first, which removes an older run."""
    target = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    first, *lines = [shlex.split(line.replace("$(BIN)/", "")) for line in target.splitlines()]
    assert first == ["rm", "-rf", "runs/demo"]
    return lines


def test_the_second_python_block_makes_a_model_that_answers():
    import tokenfusion

    scope = {"tokenfusion": tokenfusion}
    with torch.device("meta"):
        exec(blocks("python")[1], scope)
        assert scope["model"](torch.empty(2, 3, 224, 224)).shape == (2, 7)


def one_of_several(rank, words):
    """What torchrun starts."""
    import sys

    sys.stdout = sys.stderr = open(f"{rank}.txt", "w", buffering=1)  # noqa: SIM115
    sys.argv = ["tokenfusion", *words]
    cli.main()


def test_several_processes_train_as_the_page_says(room):
    ((words, _),) = lines_of("torchrun")
    started = get_args_parser().parse_args(words)
    assert (started.module, started.training_script) == (True, "tokenfusion")
    size = int(started.nproc_per_node)
    ended = run_all(size, one_of_several, [*started.training_script_args, *SHORTER["torchrun",]])
    assert ended == [0] * size, (room / "0.txt").read_text()
    assert (room / "runs/gpus/model.safetensors").exists()
