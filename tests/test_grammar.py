"""What the command makes of its words: an option of several values leaves DATA to DATA."""

import pytest

from tokenfusion import cli
from tokenfusion.options import SEVERAL, data_first

VALUES = {
    "--img-size": ["32", "24"],
    "--loggers": ["wandb", "mlflow"],
    "--value-range": ["-1000", "400"],
    "--warm-start-from": ["runs/cnn", "runs/vit"],
    "--pretrained": ["cnn.safetensors", "vit.safetensors"],
    "--models": ["resnet18", "fuse(a,b,late)"],
    "--allow-origin": ["https://a.org", "http://b.org"],
}
VERBS = [(name,) for name in cli.app if name[0] != "-" and name != "analyze"]
VERBS += [("analyze", name) for name in cli.analyze if name[0] != "-"]


def arguments_of(verb):
    app = cli.app
    for name in verb:
        app = app[name]
    return app.assemble_argument_collection()


def options_of_several_values(verb):
    """Each option of a verb that takes more than one word, by its name."""
    for argument in arguments_of(verb):
        keyword = [name for name in argument.names if name.startswith("--")]
        if keyword and argument.token_count()[1]:
            yield keyword[0]


def takes_data(verb):
    return any("DATA" in argument.name or argument.name == "--data" for argument in arguments_of(verb))


CASES = [(verb, option) for verb in VERBS for option in options_of_several_values(verb)]


def test_every_option_of_several_values_is_known():
    assert {option for _, option in CASES} == set(SEVERAL) == set(VALUES)
    assert {verb[0] for verb, _ in CASES} == {"train", "compare", "check", "profile", "serve"}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("verb", "option"), CASES, ids=lambda part: " ".join(part) if isinstance(part, tuple) else part
)
def test_no_option_of_several_values_swallows_the_data(tmp_path, monkeypatch, verb, option, count):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    if option == "--warm-start-from":
        count = 2
    values = VALUES[option][:count]
    words = [*verb, option, *values, "photos", "--batch-size", "8"]
    assert data_first(words) == [*verb, "photos", option, *values, "--batch-size", "8"]
    assert data_first([*verb, "photos", option, *values]) == [*verb, "photos", option, *values]
    assert data_first([*verb, option, *values]) == [*verb, option, *values]


@pytest.mark.parametrize("data", ["digits", "s3://bucket/train", "train-{000..012}.tar"])
def test_data_that_lies_nowhere_is_told_from_values(data):
    assert data_first(["compare", "--models", "a", "b", data, "--out", "r"])[1] == data
    assert data_first(["train", "--pretrained", "hub", data])[1] == data


def test_a_word_that_may_be_a_value_is_left_and_the_message_says_what_happened(command, tmp_path):
    status, _, errors = command("compare", "--models", "vit_micro", "fotos", "--out", tmp_path / "out")
    assert status == 2
    assert "DATA is missing" in errors
    assert "--models took all words behind it, 'fotos' the last: put DATA before --models" in errors
    status, _, errors = command("train", "--warm-start-from", "runs/cnn", "fotos", "--out", tmp_path / "out")
    assert "--warm-start-from took all words behind it, 'fotos' the last" in errors
    assert not (tmp_path / "out").exists()


def test_words_that_belong_together_stay():
    for unchanged in (
        "train photos --img-size 32 24",
        "train photos --img-size big",
        "predict r -",
        "train --img-size",
    ):
        assert data_first(unchanged.split()) == unchanged.split()
