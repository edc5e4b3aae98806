"""A variant, `with(NAME,OPTION=VALUE,...)`, is to whatever looks a model up by its name what NAME is."""

import pytest
import torch

from tokenfusion import create_model
from tokenfusion.models.controls import controls_of, parents_of
from tokenfusion.models.cost import count_model, native_size
from tokenfusion.names import is_fused, models_in
from tokenfusion.preset import begins_as_line, preset
from tokenfusion.training.warm_start import parent_names

PAIR = "resnet_micro,vit_micro"
SAME = {  # a model, and an option that leaves it as it is
    "cmt_micro": "drop_rate=0.0",
    "vit_tiny_patch16_224": "drop_rate=0.0",
    "tokenfusion_late_micro": "gate=1.0",
    f"fuse({PAIR},late)": "gate=1.0",
    f"fuse({PAIR},probe)": "mlp_ratio=2.0",
}
PLACES = {
    "preset": lambda name: preset(name, "photos"),
    "preset of the digits": lambda name: preset(name, "digits"),
    "start as a linear classifier": begins_as_line,
    "fused or not": is_fused,
    "models with names of their own": models_in,
    "size": native_size,
    "costs": lambda name: count_model(name, num_classes=5),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SAME)
def test_every_place_knows_a_variant_by_its_model(name, place):
    look_up = PLACES[place]
    assert (
        look_up(f"with({name},{SAME[name]})")
        == look_up(f" with( with({name},{SAME[name]}) , {SAME[name]})")
        == look_up(name)
    )


def test_a_micro_model_has_its_preset_under_every_name_that_it_goes_by():
    own = preset("cmt_micro", "photos")
    assert own
    for name in ("wide(cmt_micro,1.5)", "with(wide(cmt_micro,2),drop_rate=0.1)", f"fuse({PAIR},late)", f"mean({PAIR})"):
        assert preset(name, "photos") == own
    for name in ("", "resnet18", "fuse(resnet18,vit_micro,late)", "with(cmt_ti,drop_rate=0.1)"):
        assert preset(name, "photos") == {}


def test_a_variants_parents_have_the_options_that_are_theirs():
    name = "tokenfusion_late_micro"
    cnn, vit = parents_of(f"with({name},operator=add,conv_dims=(48,96,128),depth=3,drop_path_rate=0.1)")
    assert cnn == f"with(cnn({name}),dims=(48,96,128))"
    assert vit == f"with(vit({name}),depth=3,drop_path_rate=0.1)"
    assert (create_model(cnn).cnn.dims, len(create_model(vit).blocks)) == ((48, 96, 128), 3)
    assert parents_of(f"with({name},operator=add)") == parents_of(name)
    assert parents_of(f"with(fuse({PAIR},late),gate=0)") == parents_of(f"fuse({PAIR},late)") == tuple(PAIR.split(","))
    assert parent_names(f"with(fuse({PAIR},late),gate=0)") == PAIR.split(",")


def test_a_variants_controls_cost_what_it_does():
    controls = controls_of("with(tokenfusion_late_micro,depth=3)", num_classes=10)
    assert (controls.missing, controls.notes) == ({}, {})
    assert controls.wide_vit.startswith("wide(with(vit(tokenfusion_late_micro),depth=3),")


def test_a_variant_of_timms_plain_transformers_is_fused_at_any_size_as_they_are():
    with torch.device("meta"):
        model = create_model("fuse(resnet18,with(vit_tiny_patch16_224,drop_path_rate=0.1),late)", img_size=(96, 80))
        assert model.eval()(torch.empty(1, 3, 100, 84)).shape == (1, 1000)
