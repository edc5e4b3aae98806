"""Re-attention's kernels by Triton's interpreter, beside float64; `test_re_attention.py` runs this in its own process.

The interpreter must be chosen before Triton is imported, hence no test here is collected with the others.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenfusion.layers import re_attention
from tokenfusion.layers.re_attention import re_attend, trial
from tokenfusion.models.deepvit import BatchNormMixing, HeadMixing, ReAttention

CPU = torch.device("cpu")
CASES = [  # B, H, N, D, rows of a tile: heads and widths of the variants, odd ones, tiles that are full and not
    (1, 12, 197, 33, 128),
    (3, 12, 7, 32, 16),
    (1, 16, 37, 35, 32),
    (1, 4, 18, 16, 16),
    (2, 5, 17, 64, 32),
    (3, 1, 16, 5, 16),
    (3, 3, 1, 7, 16),
    (1, 17, 19, 20, 32),
]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error allowed, as a share of the exact result's length; with 16 bits, of exact results of rounded inputs."""


def plain(queries, keys, values, mixing):
    """As published: softmax, 1×1 convolution, norm, product with the values."""
    maps = (queries @ keys.mT * queries.shape[3] ** -0.5).softmax(3)
    mixed = mixing.matrix(maps)
    if hasattr(mixing, "norm"):
        mixed = mixing.norm(mixed)
    return mixing.scale * mixed @ values


def tiled(queries, keys, values, mixing):
    return re_attend(queries, keys, values, mixing.matrix, getattr(mixing, "norm", None), mixing.scale)


def random_mixing(heads, scale=0.3, kind=BatchNormMixing):
    torch.manual_seed(1)
    mixing = kind(heads, scale)
    nn.init.normal_(mixing.matrix.bias)
    if kind is BatchNormMixing:
        nn.init.normal_(mixing.norm.weight)
        nn.init.normal_(mixing.norm.bias)
        nn.init.uniform_(mixing.norm.running_var, 0.5, 2)
        nn.init.normal_(mixing.norm.running_mean)
    return mixing


def results(way, mixing, inputs, weights, passes=1):
    """By name: the output, all gradients, the running statistics."""
    tensors = [tensor.clone().requires_grad_() for tensor in inputs]
    for _ in range(passes):
        output = way(*tensors, mixing)
    (output * weights).sum().backward()
    gradients = {name: tensor.grad for name, tensor in zip(("dQ", "dK", "dV"), tensors, strict=True)}
    parameters = {f"d {name}": parameter.grad for name, parameter in mixing.named_parameters()}
    return {"output": output.detach(), **gradients, **parameters, **dict(mixing.named_buffers())}


def require_close(found, exact, tolerance):
    assert found.keys() == exact.keys()
    longest = max(value.double().norm() for name, value in exact.items() if name.startswith("d "))
    for name, value in exact.items():
        scale = longest * 1e-3 if name.startswith("d ") else 1e-6  # where the exact gradient is 0
        error = (found[name].double() - value).norm() / max(value.double().norm(), scale)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture(autouse=True)
def tile(monkeypatch, request):
    """The interpreter takes its time for each tile, whatever its size."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    monkeypatch.setattr(re_attention, "TILE", params["case"][4] if "case" in params else 64)


def compare(case, mixing, kind, passes=1):
    batch, heads, tokens, width, _ = case
    torch.manual_seed(0)
    inputs = [torch.randn(batch, heads, tokens, width).to(kind) for _ in range(3)]
    inputs[0] = inputs[0] * 2  # maps that are neither flat nor of one token each
    weights = torch.randn(batch, heads, tokens, width).to(kind)
    exact = results(
        plain, copy.deepcopy(mixing).double(), [tensor.double() for tensor in inputs], weights.double(), passes
    )
    found = results(tiled, mixing, inputs, weights, passes)
    assert found["output"].dtype == kind
    require_close(found, exact, TOLERANCE[kind])
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_by_the_batch_s_statistics(case):
    mixing = random_mixing(case[1]).train()
    found = compare(case, mixing, torch.float32)
    assert found["d matrix.bias"].abs().max() == 0  # exactly: the norm takes b out again


@pytest.mark.parametrize("case", [(2, 3, 5, 4, 16)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_two_passes(case, momentum):
    mixing = random_mixing(case[1]).train()
    mixing.norm.momentum = momentum
    compare(case, mixing, torch.float32, passes=2)
    assert mixing.norm.num_batches_tracked == 2


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [(1, 12, 20, 33, 32), (1, 4, 18, 16, 16)], ids=str)
def test_sixteen_bits_with_sums_in_float32(case, kind):
    compare(case, random_mixing(case[1]).train(), kind)


@pytest.mark.parametrize("case", [(1, 12, 20, 33, 32), (3, 3, 1, 7, 16)], ids=str)
def test_running_statistics_are_folded(case):
    compare(case, random_mixing(case[1]).eval(), torch.float32)


def test_without_a_norm():
    compare((2, 5, 17, 8, 64), random_mixing(5, kind=HeadMixing).train(), torch.float32)


def test_flat_maps_are_normed_no_worse_than_by_batch_norm():
    """A batch of nearly uniform maps: 1/N is taken out before anything is rounded."""
    torch.manual_seed(0)
    mixing = random_mixing(4, scale=1.0).train()
    queries, keys, values, weights = (torch.randn(2, 4, 37, 16) for _ in range(4))
    inputs, errors = (0.02 * queries, keys, values), {}
    exact = results(plain, copy.deepcopy(mixing).double(), [tensor.double() for tensor in inputs], weights.double())
    for way in (plain, tiled):
        found = results(way, copy.deepcopy(mixing), inputs, weights)
        errors[way] = [((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in ("output", "dQ")]
    for ours, plains in zip(errors[tiled], errors[plain], strict=True):
        assert ours <= max(plains, 2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_layer_is_what_it_is_by_maps(monkeypatch, training):
    """Q, K and V are views of one projection, and images follow each other in it."""
    torch.manual_seed(0)
    by_maps, tokens = ReAttention(36, 3, random_mixing(3)).train(training), torch.randn(2, 19, 36)
    by_maps.fused_attn = False
    by_tiles = copy.deepcopy(by_maps)
    by_tiles.fused_attn = True
    monkeypatch.setattr(ReAttention, "why_maps", lambda *_: None)
    outcomes = []
    for layer in (by_tiles, by_maps):
        given = tokens.clone().requires_grad_()
        output = layer(given)
        output.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        if training:
            gradients.pop("mixing.matrix.bias")  # 0 but for rounding
        outcomes.append({"output": output, "tokens": given.grad} | gradients | dict(layer.named_buffers()))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-3, atol=2e-4)


def test_images_do_not_depend_on_each_other_in_inference():
    mixing = random_mixing(3).eval()
    queries, keys, values = torch.randn(3, 3, 3, 18, 5)
    with torch.inference_mode():
        whole = tiled(queries, keys, values, mixing)
        for image in range(3):
            alone = slice(image, image + 1)
            assert torch.equal(tiled(queries[alone], keys[alone], values[alone], mixing), whole[alone])


class Largest(TorchDispatchMode):
    """Notes the largest tensor that PyTorch makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        made = [tensor.numel() for tensor in tensors if tensor.is_floating_point()]  # the interpreter copies bytes
        self.elements = max(self.elements, *made, 0)
        return output


def test_no_tensor_grows_with_the_square_of_the_tokens():
    batch, heads, tokens, width = 1, 3, 65, 4
    inputs = [torch.randn(batch, heads, tokens, width) for _ in range(3)]
    weights, elements = torch.randn(batch, heads, tokens, width), []
    for way in (tiled, plain):
        with Largest() as largest:
            results(way, random_mixing(heads).train(), inputs, weights)
        elements.append(largest.elements)
    assert elements == [batch * heads * tokens * width, batch * heads * tokens**2]


@pytest.mark.parametrize("kind", re_attention.KINDS, ids=str)
def test_the_trial_passes_where_the_kernels_are_right(kind):
    assert trial(3, 8, kind, CPU) is None


@pytest.mark.parametrize("kernel", ["sum_rows", "sum_products", "attend_mixed", "gradients_by_rows"])
def test_the_trial_finds_kernels_that_are_wrong(monkeypatch, kernel):
    launch = re_attention.launch

    def wrong(name, *given, **flags):
        launch(name, *given, **flags)
        if name == kernel:
            written = {"sum_rows": 2, "sum_products": 3, "attend_mixed": 5, "gradients_by_rows": 7}[name]
            given[written].mul_(1.2)

    monkeypatch.setattr(re_attention, "launch", wrong)
    assert "other numbers" in trial(3, 8, torch.float32, CPU)


def test_the_trial_reports_kernels_that_do_not_run(monkeypatch):
    def refuses(*_given, **_flags):
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(re_attention, "launch", refuses)
    assert trial(3, 8, torch.float32, CPU) == (
        "the kernels do not run here (RuntimeError: out of resource: shared memory)"
    )
