"""What every model of this package can do, whatever its paper."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import tokenfusion
from tokenfusion.models.cost import count_macs

NAMES = tokenfusion.list_models("tokenfusion_*")  # test_papers.py asks the same of the other papers
MICRO = [name for name in NAMES if name.endswith("_micro")]
CLASSES = 5


def build(name, **kwargs):
    torch.manual_seed(0)
    return tokenfusion.create_model(name, num_classes=CLASSES, **kwargs)


def images(height, width, channels=3, batch=2):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reaches_every_parameter(name):
    model = build(name, img_size=64).train()
    F.cross_entropy(model(images(64, 64)), torch.tensor([1, 2])).backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    flat = [key for key, parameter in model.named_parameters() if parameter.grad.abs().max() == 0]
    assert flat == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), [(37, 61), (64, 40)])
def test_odd_and_non_square_sizes_give_one_row_of_logits_per_image(name, height, width):
    model = build(name).eval()
    with torch.no_grad():
        both = model(images(height, width))
        alone = model(images(height, width)[1:])
    assert both.shape == (2, CLASSES)
    torch.testing.assert_close(
        both[1:], alone, rtol=1e-3, atol=1e-4
    )  # an image's logits do not depend on its neighbours


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels(name, channels):
    model = build(name, in_chans=channels, img_size=48).eval()
    with torch.no_grad():
        one = model(images(48, 48, channels))
        changed = images(48, 48, channels)
        changed[:, -1] += 1
        assert not torch.allclose(one, model(changed))  # the last channel is looked at


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_head_on_the_features(name):
    model = build(name, img_size=48).eval()
    with torch.no_grad():
        features = model.forward_features(images(48, 48))
        assert torch.equal(model.forward_head(features), model(images(48, 48)))
        pre_logits = model.forward_head(features, pre_logits=True)
        assert torch.equal(model.get_classifier()(pre_logits), model(images(48, 48)))
    assert pre_logits.shape == (2, model.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_reset_classifier_changes_the_head_alone(name):
    model = build(name, img_size=48).eval()
    with torch.no_grad():
        before = model.forward_features(images(48, 48))
        model.reset_classifier(7)
        assert model(images(48, 48)).shape == (2, 7)
        assert model.num_classes == 7
        model.reset_classifier(0)
        assert torch.equal(
            model(images(48, 48)), model.forward_head(model.forward_features(images(48, 48)), pre_logits=True)
        )
        assert torch.equal(model.forward_features(images(48, 48)), before)


@pytest.mark.parametrize("name", NAMES)
def test_intermediates_have_the_channels_and_reductions_that_feature_info_says(name):
    model = build(name, img_size=64).eval()
    with torch.no_grad():
        final, features = model.forward_intermediates(images(64, 96))
        assert torch.equal(final, model.forward_features(images(64, 96)))
    assert len(features) == len(model.feature_info)
    for info, feature in zip(model.feature_info, features, strict=True):
        reduction = info["reduction"]
        assert feature.shape == (2, info["num_chs"], -(-64 // reduction), -(-96 // reduction))


@pytest.mark.parametrize("name", MICRO)
def test_features_only_through_timm(name):
    model = timm.create_model(name, features_only=True, out_indices=[0, -1]).eval()
    with torch.no_grad():
        first, last = model(images(32, 48))
    assert [first.shape[1], last.shape[1]] == model.feature_info.channels()
    assert first.shape[2] == -(-32 // model.feature_info.reduction()[0])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name):
    gradients = []
    for enable in (False, True):
        model = build(name, img_size=48, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(images(48, 48)).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()} | dict(model.named_buffers()))
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name):
    model = build(name, img_size=48).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images(48, 48))
        assert torch.equal(compiled, model(images(48, 48)))


@pytest.mark.parametrize("name", MICRO)
def test_compiles_for_training_to_the_same_gradient(name):
    model = build(name).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images(32, 32)).square().sum().backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    other = build(name).train()
    other(images(32, 32)).square().sum().backward()
    for key, parameter in other.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_exports(name):
    model = build(name, img_size=48).eval()
    program = torch.export.export(model, (images(48, 48),))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(48, 48)), model(images(48, 48)))


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_weights_give_the_same_bits(name, tmp_path):
    model = build(name, img_size=48).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.manual_seed(9)
    other = tokenfusion.create_model(name, num_classes=CLASSES, img_size=48).eval()
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(images(48, 48)), model(images(48, 48)))


@pytest.mark.parametrize("name", NAMES)
def test_timm_builds_the_same_model(name):
    torch.manual_seed(0)
    from_timm = timm.create_model(name, num_classes=CLASSES, img_size=48)
    ours = build(name, img_size=48)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, from_timm.state_dict()[key]), key


BUDGETS = {"micro": 40e6, "tiny": 1.6e9, "small": 5.5e9, "base": 18e9}  # MACs at 32×32, else 224×224


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("tokenfusion_")])
def test_costs_at_most_its_budget_and_most_of_it(name):
    budget = BUDGETS[name.rsplit("_", 1)[1]]
    assert 0.8 * budget <= count_macs(name) <= budget
