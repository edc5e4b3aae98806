"""Names, controls and budgets: what is settled before anything is trained."""

import pytest
import torch

from tokenfusion.compare.contenders import choose_contenders, members_of, slug, split_names
from tokenfusion.compare.ensemble import mean_log_probabilities
from tokenfusion.compare.plan import Budget
from tokenfusion.errors import InputError
from tokenfusion.models.cost import count_macs, count_model
from tokenfusion.recipe import Recipe

RECIPE = Recipe(img_size=(32, 32))


def test_names_are_split_at_commas_outside_parentheses():
    words = ["fuse(resnet18,vit_tiny_patch16_224,layerwise),cmt_micro", "mean(fuse(a,b),c)", "cmt_micro"]
    expected = ["fuse(resnet18,vit_tiny_patch16_224,layerwise)", "cmt_micro", "mean(fuse(a,b),c)"]
    assert split_names(words) == expected
    assert members_of("mean(fuse(a,b),c)") == ("fuse(a,b)", "c")
    assert members_of("resnet_micro") == ()
    assert slug("fuse(resnet18,vit_tiny_patch16_224,layerwise)") == "fuse-resnet18-vit_tiny_patch16_224-layerwise"


@pytest.mark.parametrize("word", ["fuse(a,b", "a)", "a),(b"])
def test_a_lone_parenthesis_is_refused(word):
    with pytest.raises(InputError, match="do not match"):
        split_names([word])


@pytest.mark.parametrize("name", ["mean(a)", "mean()", "mean(a,mean(b,c))"])
def test_a_mean_of_less_than_two_models_is_refused(name):
    with pytest.raises(InputError, match=r"mean\(A,B\)"):
        members_of(name)


def test_members_of_a_mean_are_trained_too():
    everyone, _, _ = choose_contenders(["mean(a,b)", "b"], RECIPE, 10, controls=False)
    assert [(one.name, one.role) for one in everyone] == [
        ("mean(a,b)", "model"),
        ("b", "model"),
        ("a", "member of mean(a,b)"),
    ]


def test_names_that_would_share_a_folder_are_refused():
    with pytest.raises(InputError, match="share the folder"):
        choose_contenders(["fuse(a,b)", "fuse-a-b"], RECIPE, 10, controls=False)
    with pytest.raises(InputError, match="name at least one"):
        choose_contenders([], RECIPE, 10, controls=False)


def test_controls_are_both_parents_plain_and_wide_and_their_mean():
    everyone, missing, _ = choose_contenders(["tokenfusion_late_micro", "cmt_micro"], RECIPE, 10, controls=True)
    roles = {one.role.removesuffix(" of tokenfusion_late_micro"): one for one in everyone if one.role != "model"}
    assert missing == []
    assert set(roles) == {
        "CNN parent", "transformer parent", "widened CNN parent", "widened transformer parent", "mean of the parents",
    }  # fmt: skip
    assert roles["mean of the parents"].members == (roles["CNN parent"].name, roles["transformer parent"].name)
    fused = count_macs("tokenfusion_late_micro", num_classes=10)
    for side in ("CNN", "transformer"):
        plain, wide = (count_macs(roles[f"{prefix}{side} parent"].name, num_classes=10) for prefix in ("", "widened "))
        assert plain < wide
        assert wide == pytest.approx(fused, rel=0.1)


def test_controls_of_models_that_fuse_nothing_are_refused():
    with pytest.raises(InputError, match="leave out --controls"):
        choose_contenders(["resnet_micro", "vit_micro"], RECIPE, 10, controls=True)


def test_epochs_are_as_many_as_the_budget_pays_for():
    assert Budget.parse("epochs=7").epochs({"a": 1, "b": 1}) == {"a": 7, "b": 7}
    assert Budget.parse("macs=1e9").epochs({"a": 2.9e8, "b": 1e9}) == {"a": 3, "b": 1}
    assert Budget.parse("minutes=1.5").epochs({"a": 0.5, "b": 0.4}) == {"a": 3, "b": 3}


def test_the_smallest_budget_that_works_is_named_and_works():
    costs = {"a": 2.0, "b": 1234567.0}
    with pytest.raises(InputError, match=r"less than one epoch of b; the smallest that works is macs=\S+") as refusal:
        Budget.parse("macs=1234566").epochs(costs)
    named = str(refusal.value).rpartition(" ")[2]
    assert Budget.parse(named).epochs(costs)["b"] == 1
    assert Budget.parse(named).amount == pytest.approx(1234567, rel=0.002)


@pytest.mark.parametrize(
    "text", ["epochs", "epochs=", "epochs=0", "epochs=2.5", "hours=1", "macs=inf", "minutes=nan", ""]
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(InputError, match=r"budget="):
        Budget.parse(text)


def test_an_unknown_name_and_a_size_that_does_not_suit_are_refused():
    with pytest.raises(InputError, match="did you mean"):
        count_model("resnet_mikro")
    with pytest.raises(InputError, match=r"cannot take 3-channel images of 8×9 pixels: .*; try its own size, 299×299"):
        count_model("inception_v3", img_size=(8, 9))


def test_the_mean_of_probabilities_is_not_that_of_logits():
    # softmax (0.9, 0.1) and (0.3, 0.7); then one that is sure of what the other rules out
    one = torch.tensor([[0.9, 0.1], [1.0, 1.0]]).log() + torch.tensor([[3.0], [0.0]])
    other = torch.tensor([[0.3, 0.7], [1.0, 1.0]]).log()
    one[1], other[1] = torch.tensor([0.0, 900.0]), torch.tensor([900.0, 0.0])
    mean = mean_log_probabilities([one, other])
    assert torch.allclose(mean.exp(), torch.tensor([[0.6, 0.4], [0.5, 0.5]], dtype=torch.float64))
    assert mean_log_probabilities([one[1:], one[1:]]).isfinite().all()
