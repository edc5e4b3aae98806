"""Faster ways to the same numbers; the modules that call them have the papers' equations.

Those of convolutions are in `fast_maps.py`, those on a GPU in `re_attention.py`.

Each has a benchmark that keeps it, whose figures are in `benchmarks/results`:

- `Linear`, float32 by oneDNN: `benchmarks/linear.py`;
- `prefers_products`, bfloat16 attention on CPUs: `benchmarks/attention.py`;
- `mix_heads`, `fold_norm`, `attend_mixed_in_training` and `by_parts`, Re-attention: `benchmarks/re_attention.py`;
- `attend_by_one`, CrossViT's single query, of whose 2NC² multiply-adds 2C² + 2NHC are left: `benchmarks/papers.py`.

Letters: B batch, M rows, K inputs, O outputs, N tokens, C channels, H heads, D head width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

ONEDNN = torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability() == "AVX512"
WORTHWHILE = 2**21  # multiply-adds; below, calling oneDNN in float32 costs more than it gains
MAPS_IN_CACHE = 2**19  # elements
MAPS_IN_MEMORY = 2**22  # elements of one image's maps, above which it is done a few queries at a time
MANY_LOGITS = 2**20  # below, a softmax in place is slower than one into memory that was freed a moment ago


def infers(module: nn.Module) -> bool:
    """Whether a module computes for its output alone: in evaluation, and without gradients."""
    return not (module.training or torch.is_grad_enabled())


def cast_to(x: Tensor) -> torch.dtype | None:
    """What autocast casts x to for a product on a CPU; None where it leaves x as it is."""
    enabled = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if enabled else None


# --- linear layers


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x wᵀ + b by oneDNN, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


if ONEDNN:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(lambda x, weight, *_, **__: 2 * x.numel() * weight[0])


class OneDNNLinear(torch.autograd.Function):
    """x wᵀ + b in float32, for x (M, K), w (O, K) and b (O,) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            OneDNNLinear.apply(gradient, weight.t(), None) if wants_x else None,
            OneDNNLinear.apply(gradient.t(), x.t(), None) if wants_weight else None,
            gradient.sum(0) if wants_bias else None,
        )


class Linear(nn.Linear):
    """`nn.Linear`, in float32 by oneDNN where that is faster.

    PyTorch takes MKL there, which leaves AVX-512 idle on processors that are not Intel's. In bfloat16 it takes oneDNN
    itself. No cast weight is kept from call to call, since nothing tells for certain that the weight has not changed;
    autocast keeps one as long as its context lasts, so that inference on a CPU casts on its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., O)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x wᵀ + b for x (..., K), w (O, K) and b (O,) or None, as `Linear` has it."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    kind = cast_to(x)
    if kind and not torch.is_grad_enabled():
        return F.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
    if kind or not ONEDNN or x.dtype != torch.float32 or x.numel() * len(weight) < WORTHWHILE:
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


# --- attention


def prefers_products(queries: Tensor) -> bool:
    """Whether two plain products are faster than the fused kernel."""
    return queries.dtype == torch.bfloat16 and queries.device.type == "cpu"


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in place where they are many and need no gradient: fresh memory costs more."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or logits.numel() < MANY_LOGITS:
        return logits.softmax(dim=-1)
    return torch.softmax(logits, dim=-1, out=logits)


def by_parts(attend: Callable[..., Tensor], queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`attend` of (B, H, N, D) each, a few images at a time on a CPU, so that their maps stay in its cache.

    Of an image whose maps are large, a few queries at a time: memory then grows with N. What `attend` gives of a query
    must not depend on other queries.
    """
    if torch.is_grad_enabled() or queries.device.type != "cpu" or torch.compiler.is_compiling():
        return attend(queries, keys, values)
    row = queries.shape[1] * keys.shape[2]  # elements of all heads
    images, rows = max(1, MAPS_IN_CACHE // (row * queries.shape[2])), max(1, MAPS_IN_MEMORY // row)
    parts = zip(*(torch.split(part, images) for part in (queries, keys, values)), strict=True)
    if images > 1 or queries.shape[2] <= rows:
        return torch.cat([attend(*part) for part in parts])
    return torch.cat(
        [torch.cat([attend(some, k, v) for some in torch.split(q, rows, dim=2)], dim=2) for q, k, v in parts]
    )


# --- Re-attention (DeepViT): s · Norm(Θᵀ A) V, with the map A_g of head g. Below Θ stands for the paper's Θᵀ: Θ and b
# are the convolution's weight and bias, μ σ² γ β ε BatchNorm's


def mix_heads(maps: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Σ_g M_hg A_g + c_h for maps (B, H, N, N), as one matrix product."""
    batch, heads, queries, keys = maps.shape
    mixed = torch.baddbmm(shift[None, :, None], matrix.expand(batch, heads, heads), maps.flatten(2))
    return mixed.view(batch, heads, queries, keys)


def fold_norm(matrix: nn.Conv2d, norm: Any, scale: float) -> tuple[Tensor, Tensor]:
    """M (H, H) and c (H,), with which `mix_heads` does in evaluation what convolution and norm do:

        s · (γ_h (Σ_g Θ_hg A_g + b_h - μ_h) / √(σ²_h + ε) + β_h)  =  Σ_g M_hg A_g + c_h,

    where r_h = s γ_h / √(σ²_h + ε),  M_hg = r_h Θ_hg,  c_h = r_h (b_h - μ_h) + s β_h.
    """
    ratio = scale * norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = ratio * (matrix.bias - norm.running_mean) + scale * norm.bias
    return ratio[:, None] * matrix.weight.flatten(1), shift


class HeadMoments(torch.autograd.Function):
    """Mean (H,) and variance (H,) of maps (B, H, N, N), whose mean should be near 0 lest the variance cancel."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(maps.dtype, torch.float32)
        count = maps.numel() // maps.shape[1]
        mean = maps.sum(3).to(wide).sum((0, 2)) / count
        square = torch.linalg.vector_norm(maps, dim=3).to(wide).square().sum((0, 2)) / count
        ctx.save_for_backward(maps, mean)
        return mean, square - mean.square()

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor, variance_gradient: Tensor) -> Tensor:
        maps, mean = ctx.saved_tensors
        count = maps.numel() // maps.shape[1]
        slope = 2 * variance_gradient / count
        offset = mean_gradient / count - slope * mean
        return maps.mul(by_head(slope).to(maps.dtype)).add_(by_head(offset).to(maps.dtype))


def by_head(vector: Tensor) -> Tensor:
    """(H,) to (H, 1, 1), to go with maps and with values."""
    return vector[:, None, None]


def attend_mixed_in_training(matrix: nn.Conv2d, norm: Any, scale: float, maps: Tensor, values: Tensor) -> Tensor:
    """s · Norm(Θᵀ A) V by the batch's statistics: (B, H, N, N) and (B, H, N, D) to (B, H, N, D).

    The rows of a map sum to 1, so that its mean is 1/N, and with Z_h = Σ_g Θ_hg (A_g - 1/N) nothing cancels in

        μ_h = mean Z_h + Σ_g Θ_hg / N + b_h,    σ²_h = mean Z²_h - (mean Z_h)².

    What is left of the norm is a factor and a shift of a head, which values take as well as maps, and they are fewer:
    (r Z + t) V = r (Z V) + t ΣV, with t_h = s β_h - r_h mean Z_h. Hence no normed map is ever written. b is taken out
    again by the norm: its gradient is 0.
    """
    batch, heads, queries, keys = maps.shape
    weight, bias = matrix.weight.flatten(1), matrix.bias
    assert bias is not None
    mixed = torch.bmm(weight.expand(batch, heads, heads), (maps - 1 / keys).flatten(2)).view(maps.shape)
    mean, variance = HeadMoments.apply(mixed)
    track(norm, mean + weight.sum(1) / keys + bias, variance, batch * queries * keys)
    ratio = scale * norm.weight * torch.rsqrt(variance + norm.eps)
    shift = scale * norm.bias - ratio * mean + 0 * bias
    attended = by_head(ratio) * (mixed @ values) + by_head(shift) * values.sum(2, keepdim=True)
    return attended.to(values.dtype)


@torch.no_grad()
def track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Update the running statistics by a batch's, of `count` values a head, as BatchNorm2d does."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    unbiased = variance * (count / (count - 1))
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        momentum = norm.num_batches_tracked.to(running).reciprocal() if norm.momentum is None else norm.momentum
        running.lerp_(new.to(running), momentum)


# --- cross-attention of one query (CrossViT)


def absorbs(module: nn.Module, tokens: Tensor) -> bool:
    """Whether cross-attention is to project its query and its result instead of the tokens: in inference.

    Not on the meta device, where costs are counted: those are to be the paper's.
    """
    return infers(module) and not tokens.is_meta


def in_full_precision(module: nn.Module, tokens: Tensor) -> AbstractContextManager[Any]:
    """No autocast where projections are absorbed: too little is left to multiply for half precision to repay casts."""
    return torch.autocast(tokens.device.type, enabled=False) if absorbs(module, tokens) else nullcontext()


def attend_by_one(query: Tensor, tokens: Tensor, keys: nn.Linear, values: nn.Linear, drop: nn.Module) -> Tensor:
    """Attention of one query (B, H, 1, D) without projecting the tokens (B, N, C): (B, H, 1, D).

    For one query both projections can change places with the sums over tokens. With the query q_h of head h, its rows
    W_h and b_h of the keys' projection, V_h and c_h of the values', and the map a_h over the tokens x_n,

        q_h · (W_h x_n + b_h) = (W_hᵀ q_h) · x_n + constant,    Σ_n a_hn (V_h x_n + c_h) = V_h (Σ_n a_hn x_n) + c_h.

    The softmax does not see the constant.
    """
    heads, width, dim = query.shape[1], query.shape[3], tokens.shape[2]
    by_key, by_value = (layer.weight.view(heads, width, dim) for layer in (keys, values))
    wanted = each_head(query.squeeze(2) * width**-0.5, by_key)  # (B, H, C)
    maps = drop((wanted @ tokens.transpose(1, 2)).softmax(dim=2).unsqueeze(2))  # (B, H, 1, N)
    mean = maps.squeeze(2) @ tokens  # (B, H, C)
    return (each_head(mean, by_value.transpose(1, 2)) + values.bias.view(heads, width)).unsqueeze(2)


def each_head(vectors: Tensor, matrices: Tensor) -> Tensor:
    """A vector for each head (B, H, I) through a matrix for each head (H, I, O): (B, H, O)."""
    return torch.bmm(vectors.transpose(0, 1), matrices).transpose(0, 1)
