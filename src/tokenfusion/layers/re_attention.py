"""Re-attention on a GPU by tiles of all heads, with no map in memory: when, and what is left to PyTorch.

The kernels and the derivation are in `re_attention_kernel.py`, which imports Triton and is imported when it is first
needed. `benchmarks/re_attention.py` measures the way; on no GPU yet.

Letters: B batch, N tokens, H heads, D head width.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokenfusion.layers.fast import by_head, fold_norm, track

KINDS = (torch.float32, torch.float16, torch.bfloat16)
TILE = 16
"""Rows and columns of a tile: as few as a GPU's matrix units take."""
LARGEST = 2048
"""Most heads × channels, each rounded up to a power of 2: two sums of so many numbers for each row of a tile have to
find room in a GPU's registers."""


# --- whether


def why_not(
    heads: int, width: int, kind: torch.dtype, device: torch.device, norm: nn.Module | None, dropout: float
) -> str | None:
    """Why Re-attention forms its maps; None where it goes by tiles.

    Args:
        heads, width, kind, device: H, D, kind of numbers and device of Q, K and V.
        norm: what norms the mixed maps.
        dropout: rate at which elements of the maps are dropped.
    """
    if device.type != "cuda":
        return f"tiles are for NVIDIA's GPUs, and this is on {device.type}"
    if torch.compiler.is_compiling():
        return "a compiled or exported model is made of PyTorch's own operations"
    if dropout:
        return f"attn_drop_rate={dropout:g} drops elements of the maps, and no map is kept"
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm | None):
        return f"{type(norm).__name__} over the heads needs each element of the mixed maps"
    if norm is not None and norm.training and type(norm) is not nn.BatchNorm2d:
        return f"{type(norm).__name__} trains by the statistics of other processes too"
    if kind == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return "float32 in full needs more shared memory than GPUs have; allow TF32, or compute in bf16"
    return why_not_here(heads, width, kind, device)


@lru_cache(maxsize=64)
def why_not_here(heads: int, width: int, kind: torch.dtype, device: torch.device) -> str | None:
    """The same of a GPU and a kind of numbers; by a trial in the end, since no test has met that very GPU."""
    if torch.version.hip:
        return "tiles are for NVIDIA's GPUs, and this is one of AMD's"
    if find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch for CUDA on Linux"
    if kind not in KINDS:
        return f"{in_words(kind)} is not among {', '.join(map(in_words, KINDS))}"
    if (size := rounded_up(heads) * rounded_up(width)) > LARGEST:
        return f"{heads} heads of {width} channels, rounded up {size} numbers a token, are more than {LARGEST}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere (compute capability 8.0)"
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        return trial(heads, width, kind, device)


def trial(heads: int, width: int, kind: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with the kernels on a device, found by a small case beside the plain operations in float64."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, heads, 37, width, generator=generator).to(device, kind) for _ in range(4)]
    drawn.append(torch.randn(heads, heads, generator=generator).to(device))
    try:
        found = outcomes(by_tiles, drawn)
    except Exception as error:  # whatever compiler, driver and GPU have to say
        return f"the kernels do not run here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    tolerance = 1e-2 if kind == torch.float32 else 5e-2
    for one, other in zip(found, outcomes(by_maps, [tensor.double() for tensor in drawn]), strict=True):
        if not (one.double() - other).norm() <= tolerance * other.norm():
            return "the kernels give other numbers here than PyTorch's operations; please report that"
    return None


def outcomes(way: Callable[..., tuple[Tensor, Tensor]], drawn: Sequence[Tensor]) -> list[Tensor]:
    """Σ_h M_gh Z_h V_g, the covariance, and gradients of Q, K, V, M by both, of Q, K, V, weights and M."""
    queries, keys, values, weights, matrix = (tensor.detach().requires_grad_() for tensor in drawn)
    attended, covariance = way(queries, keys, values, matrix)
    loss = (attended * weights).sum(dtype=torch.float64)
    loss = loss + keys.shape[2] ** 2 * (covariance * matrix).sum(dtype=torch.float64)
    return [attended, covariance, *torch.autograd.grad(loss, (queries, keys, values, matrix))]


def by_tiles(queries: Tensor, keys: Tensor, values: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    sums = sum_rows(queries, keys)
    return AttendMixed.apply(queries, keys, values, matrix, sums), Covariance.apply(queries, keys, sums)


def by_maps(queries: Tensor, keys: Tensor, values: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    centred = (queries @ keys.mT * queries.shape[3] ** -0.5).softmax(3) - 1 / keys.shape[2]
    covariance = torch.einsum("bhij,bkij->hk", centred, centred) / count_of(queries)
    return torch.einsum("gh,bhij->bgij", matrix, centred) @ values, covariance


def in_words(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def rounded_up(count: int) -> int:
    """To a power of 2 that a GPU's matrix units take."""
    return max(16, 1 << (count - 1).bit_length())


# --- how


def re_attend(queries: Tensor, keys: Tensor, values: Tensor, matrix: nn.Conv2d, norm: Any, scale: float) -> Tensor:
    """s · Norm(Θᵀ softmax(Q Kᵀ / √D)) V of (B, H, N, D) each: (B, H, N, D).

    With Z = P - 1/N of the maps P, the mixture M P + c is M Z + (c + Σ_h M_gh / N), whose second term reaches the
    result as a multiple of ΣV. While BatchNorm trains it takes out all that is constant, b included, and leaves s β.

    Args:
        queries, keys, values: of a kind and on a device for which `why_not` is None.
        matrix: Θ and b, a 1×1 convolution over the heads.
        norm: BatchNorm over the heads, whose running statistics a training pass moves; or None.
        scale: s.
    """
    with torch.autocast(queries.device.type, enabled=False):
        sums = sum_rows(queries, keys)
        assert matrix.bias is not None
        weight, bias, tokens = matrix.weight.flatten(1).float(), matrix.bias.float(), keys.shape[2]
        if norm is not None and norm.training:
            exact = weight.double()  # of Θ's gradient by way of the norm little is left, of one head nearly nothing
            variance = ((exact @ Covariance.apply(queries, keys, sums).double()) * exact).sum(1)
            track(norm, weight.sum(1) / tokens + bias, variance, count_of(queries))
            mixing = ((scale * norm.weight.double() * torch.rsqrt(variance + norm.eps))[:, None] * exact).float()
            shift = scale * norm.bias.float() + 0 * bias
        else:
            folded = (scale * weight, scale * bias) if norm is None else fold_norm(matrix, norm, scale)
            mixing, shift = (tensor.float() for tensor in folded)
            shift = shift + mixing.sum(1) / tokens
        attended = AttendMixed.apply(queries, keys, values, mixing, sums)
        constant = by_head(shift) * values.sum(2, keepdim=True, dtype=torch.float32)
        return (attended + constant).to(values.dtype)


class AttendMixed(torch.autograd.Function):
    """Σ_h M_gh Z_h V_g for Q, K, V (B, H, N, D), M (H, H) and what `sum_rows` gives: (B, H, N, D)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, matrix: Tensor, sums: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys, values, matrix, sums)
        (queries, keys, values), stride = token_major(queries, keys, values)
        attended = like_tokens(queries)
        launch("attend_mixed", queries, keys, values, sums, matrix.contiguous(), attended, stride)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, matrix, sums = ctx.saved_tensors
        return *gradients(queries, keys, sums, matrix, values, gradient), None


class Covariance(torch.autograd.Function):
    """mean Z_h Z_k for Q, K (B, H, N, D) and what `sum_rows` gives: (H, H)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, sums: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys, sums)
        (queries, keys), stride = token_major(queries, keys)
        products = by_program(queries)
        launch("sum_products", queries, keys, sums, products, stride)
        return products.sum(0) / count_of(queries)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, sums = ctx.saved_tensors
        matrix = (gradient + gradient.T) / count_of(queries)
        return *gradients(queries, keys, sums, matrix)[:2], None


def gradients(
    queries: Tensor,
    keys: Tensor,
    sums: Tensor,
    matrix: Tensor,
    values: Tensor | None = None,
    d_attended: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV, dM of `AttendMixed`, or dQ, dK of `Covariance` by its symmetric E, where there are no values."""
    of_attention = values is not None and d_attended is not None
    (queries, keys, values), stride = token_major(queries, keys, queries if values is None else values)
    d_attended = queries if d_attended is None else d_attended.transpose(1, 2).contiguous()
    d_queries, d_keys, d_values = like_tokens(queries), like_tokens(queries), like_tokens(queries)
    row_dots, d_matrix = torch.empty_like(sums), by_program(queries)
    given = (queries, keys, values, sums, matrix.contiguous(), d_attended, row_dots)
    launch("gradients_by_rows", *given, d_queries, d_matrix, stride, of_attention=of_attention)
    launch("gradients_by_columns", *given, d_keys, d_values, stride, of_attention=of_attention)
    return d_queries, d_keys, d_values, d_matrix.sum(0)


@torch.no_grad()
def sum_rows(queries: Tensor, keys: Tensor) -> Tensor:
    """log Σ_j exp(q_i · k_j / √D), float32 (B, H, N), of (B, H, N, D) each; no gradient, the others see to it."""
    (queries, keys), stride = token_major(queries, keys)
    sums = torch.empty(queries.shape[:3], dtype=torch.float32, device=queries.device)
    launch("sum_rows", queries, keys, sums, stride)
    return sums


def token_major(*tensors: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """(B, H, N, D) whose channels, heads, tokens and images follow each other, and the stride of their tokens.

    Views of one projection, as `split_heads` makes them, are left as they are.
    """
    heads, tokens, width = tensors[0].shape[1:]
    stride = tensors[0].stride(2)
    wanted = (tokens * stride, width, stride, 1)
    if all(
        size == 1 or has == want
        for tensor in tensors
        for size, has, want in zip(tensor.shape, tensor.stride(), wanted, strict=True)
    ):
        return tensors, stride
    return tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors), heads * width


def like_tokens(queries: Tensor) -> Tensor:
    """Room for (B, H, N, D) that lies as (B, N, H, D), so that merging the heads moves nothing."""
    batch, heads, tokens, width = queries.shape
    return queries.new_empty(batch, tokens, heads, width).transpose(1, 2)


def by_program(queries: Tensor) -> Tensor:
    """Room for (H, H) of each block of rows."""
    heads = queries.shape[1]
    return torch.empty(blocks_of(queries), heads, heads, dtype=torch.float32, device=queries.device)


def blocks_of(queries: Tensor) -> int:
    """Blocks of rows in a batch (B, H, N, D)."""
    return len(queries) * -(-queries.shape[2] // TILE)


def count_of(queries: Tensor) -> int:
    """Elements of a head's maps."""
    return len(queries) * queries.shape[2] ** 2


def launch(name: str, queries: Tensor, *given: Tensor | int, **flags: bool) -> None:
    """Run a kernel, a program for each block of rows (or columns: they are as many)."""
    import triton
    import triton.language as tl

    from tokenfusion.layers import re_attention_kernel

    _, heads, tokens, width = queries.shape
    operand = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[queries.dtype]
    exact = queries.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    sizes = {"row_tile": TILE, "column_tile": TILE, "width_tile": rounded_up(width)}
    if name == "sum_rows":
        programs = blocks_of(queries) * heads  # the heads apart
    else:
        programs, sizes = blocks_of(queries), sizes | {"head_tile": rounded_up(heads)}
    with torch.cuda.device_of(queries):  # type: ignore[no-untyped-call]
        getattr(re_attention_kernel, name)[(programs,)](
            *(queries, *given),
            *(tokens, heads, width, width**-0.5),
            operand=tl.float32 if triton.knobs.runtime.interpret else operand,  # numpy multiplies no bfloat16
            precision="ieee" if exact else "tf32",
            **(sizes | flags),
            num_warps=4 if name == "sum_rows" else 8,  # with fewer, a tile of all heads does not fit into registers
            num_stages=1,
        )
