"""The recipe: whole through TOML, refused early."""

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from tokenfusion import InputError, Recipe
from tokenfusion.preset import preset
from tokenfusion.recipe import FIELDS, Reading, dump_recipe, load_recipe
from tokenfusion.recipe_fields import RANGES


def test_a_recipe_survives_toml(tmp_path):
    recipe = Recipe(data='a "b"\n', img_size=(96, 128), lr=3e-4, trivial_augment=True, precision="bf16", epochs=7)
    recipe = replace(recipe, warm_start_from=("/runs/a cnn", "/runs/a vit"), freeze="cnn", head_lr=3.0)
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    assert Recipe(**load_recipe(tmp_path / "recipe.toml")) == recipe
    assert load_recipe(tmp_path / "recipe.toml").keys() == set(FIELDS)


def test_one_number_is_both_sides():
    assert Recipe(img_size=(64,)).img_size == (64, 64)
    assert Recipe(img_size=64).img_size == (64, 64)  # as a TOML file may say it


def test_parents_are_named_so_that_the_run_can_be_resumed_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(warm_start_from=("cnn", "../vit"))
    assert recipe.warm_start_from == (str(tmp_path / "cnn"), str(tmp_path.parent / "vit"))
    monkeypatch.chdir("/")
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    assert Recipe(**load_recipe(tmp_path / "recipe.toml")) == recipe


def test_evaluation_keeps_the_sides_of_an_average_training_crop():
    assert Recipe(crop_scale=1.0).crop_pct == 1.0
    assert Recipe(crop_scale=0.28).crop_pct == pytest.approx(0.8)  # (0.28 + 1) / 2 = 0.64 of the area


def test_evaluation_keeps_what_it_is_told_to():
    assert Recipe(crop_scale=0.08, eval_crop=0.875).crop_pct == 0.875


@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": 0.5}, {"hflip": 0.1}, {"crop_padding": 4}, {"trivial_augment": True}, {"rand_augment": 1},
        {"color_jitter": 0.1}, {"random_erasing": 0.1},
    ],
)  # fmt: skip
def test_a_recipe_knows_whether_images_look_different_each_time(change):
    still = {"crop_scale": 1.0, "hflip": 0.0}
    assert not Recipe(**still).augments
    assert Recipe(**still | change).augments


def test_a_part_of_a_model_may_stay_as_it_is():
    assert (Recipe(backbone_lr=0).backbone_lr, Recipe(head_lr=0).head_lr) == (0, 0)


def test_whole_numbers_pass_as_floats():
    assert isinstance(Recipe(lr=1).lr, float)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "epochs=0 is out of range; give a value from 1"),
        ({"lr": float("nan")}, "lr=nan is out of range"),
        ({"lr": 0.0}, "lr=0.0 is out of range"),
        ({"epochs": 1.5}, "epochs=1.5 is of type float; give a value of type int"),
        ({"epochs": True}, "epochs=True is of type bool"),
        ({"hflip": "yes"}, "hflip='yes' is of type str"),
        ({"precision": "fp16"}, "precision='fp16' is not known; choose one of: auto, fp32, bf16"),
        ({"in_chans": 4}, "in_chans=4 is not known; choose one of: 1, 3"),
        ({"img_size": (32, 0)}, "has no pixels; the nearest that works is (32, 1"),
        ({"img_size": "32"}, "must be whole numbers"),
        ({"img_size": (32, 100_000)}, "is too large; give sides up to 16384"),
        ({"warm_start_from": (1, 2)}, r'must be texts, such as \["runs/cnn", "runs/vit"\]'),
        ({"warm_start_from": ("a", "b", "c")}, r"is no pair of run folders; give the CNN's and then"),
        ({"freeze": "head"}, "choose one of: none, cnn, vit, both"),
        ({"backbone_lr": -0.1}, "backbone_lr=-0.1 is out of range; give a value from 0"),
        ({"in_chans": 1.0}, "in_chans=1.0 is not known"),
        ({"batch_size": 10, "accumulate": 4}, "try batch_size=8"),
        ({"trivial_augment": True, "rand_augment": 9}, "rand_augment=9 both change an image; give one of them"),
        ({"compile": True, "grad_checkpointing": True}, "both decide what the backward pass computes again"),
        ({"compile": True, "tune": "probe"}, "compile=True with tune=probe would compile each of its"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "min_lr=0.001 is above lr=0.0001, from which it is reached"),
        ({"lr": -1}, "lr=-1.0 is out of range; give a value from 1e-12 to 100, or auto"),
    ],
)
def test_bad_values_are_refused_with_the_remedy(changes, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        Recipe(**changes)


def test_every_number_has_a_range_and_keeps_to_it():
    kinds = get_type_hints(Recipe)
    numbers = {name for name in FIELDS if {int, float} & {kinds[name], *get_args(kinds[name])[:-1]}}
    assert RANGES.keys() == numbers - {"img_size", "value_range"}
    for name, (low, high) in RANGES.items():
        for value in (low - 1, high + 1, float("nan")):
            if value != high:  # infinity
                with pytest.raises(InputError, match=f"^{name}=.* is (out of range|of type float); give a value"):
                    Recipe(**{name: value})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr = ", "give a readable TOML file"),
        ("learning_rate = 1", "no field is called 'learning_rate'"),
        ("model = 3", "recipe .*: model=3 is of type int; give a value of type str"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, said):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(InputError, match=said):
        load_recipe(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Recipe("photos", modell="vit_micro"), "^Recipe: no field is called 'modell'; did you mean model"),
        (lambda: Reading(groupby="x"), "^Reading: no field is called 'groupby'; did you mean group_by"),
        (lambda: replace(Recipe("photos"), epoch=3), "no field is called 'epoch'; did you mean epochs"),
        (lambda: Recipe(zzz=1), "no field is called 'zzz'; known fields: data, root, "),
        (lambda: Recipe("photos", "vit_micro"), "'vit_micro' stands behind data, where fields have to be named"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_nearest(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_fields_that_are_gone_pass_at_what_is_done_now_and_are_named_otherwise(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('on_bad_loss = "stop"\nmax_bad_steps = 10\nlr = 0.5')
    assert load_recipe(path) == {"lr": 0.5}
    for line in ('on_bad_loss = "skip"', "max_bad_steps = 3"):
        path.write_text(line)
        with pytest.raises(InputError, match=rf"{line.split()[0]}=.* is no longer known.*remove"):
            load_recipe(path)


def test_the_recipes_that_ship_are_recipes():
    shipped = list((Path(__file__).parents[1] / "recipes").glob("*.toml"))
    assert shipped
    for path in shipped:
        Recipe(**load_recipe(path))


def test_the_preset_of_digits_never_mirrors():
    assert preset("", "digits")["hflip"] == 0.0
    assert preset("", "digits")["model"] == "tokenfusion_early_micro"
    assert "model" not in preset("tokenfusion_late_tiny", "digits")
    assert "hflip" not in preset("tokenfusion_early_micro", "photos")


@pytest.mark.parametrize(
    ("images", "accumulate", "expected"), [(5, 1, 8), (241, 1, 8), (1438, 1, 64), (10**6, 1, 128), (1438, 3, 63)]
)
def test_a_batch_size_that_is_left_open_gives_20_steps_an_epoch(images, accumulate, expected):
    assert Recipe(accumulate=accumulate).batch_size_for(images) == expected
    assert Recipe(batch_size=96).batch_size_for(images) == 96
