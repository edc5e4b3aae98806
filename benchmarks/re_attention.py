"""Re-attention against a plain transcription of its published form, alone and in whole models, in turns.

    python benchmarks/re_attention.py --out benchmarks/results/re_attention.json         # on a CPU
    python benchmarks/re_attention.py --out benchmarks/results/re_attention_gpu.json     # on a GPU

The figures behind Re-attention's ways in `src/tokenfusion/layers/fast.py`. In training there is a
third way, `SecondMoments`, whose batch statistics come from the heads' second moments. All ways share their weights,
and agree in float64 before anything is timed.

On a GPU `ours` goes by tiles (`layers/re_attention.py`), `maps` as on a CPU, images are of 224 and 384 px, and the most
memory that a call takes beside its inputs is measured too. The file has the device's name. Where tiles do not run, it
has the reason in their place.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from common import environment, time_in_turns
from tokenfusion.files import write_json
from tokenfusion.hardware import as_dtype, autocast, default_device, keep_freed_memory
from tokenfusion.layers.attend import attention_map
from tokenfusion.layers.fast import by_head, track
from tokenfusion.models.deepvit import BatchNormMixing, ReAttention

DIM, HEADS = 384, 12
TOKENS = {224: 197, 384: 577}
"""Patches of 16 px and CLS, by an image's side."""
PRECISIONS = ("fp32", "bf16")


class ByMaps(ReAttention):
    """Re-attention as it is on a CPU, whatever the device."""

    def why_maps(self, kind: torch.dtype, device: torch.device) -> str | None:  # noqa: ARG002
        return "it is asked for"


class PlainReAttention(nn.Module):
    """The yardstick: softmax, 1×1 convolution over the heads, BatchNorm2d, product with the values."""

    def __init__(self, ours: ReAttention) -> None:
        super().__init__()
        mixing = ours.mixing
        assert isinstance(mixing, BatchNormMixing)
        self.heads, self.mixing_scale = ours.heads, mixing.scale
        self.qkv, self.proj = plain_linear(ours.qkv), plain_linear(ours.proj)
        self.matrix, self.norm = mixing.matrix, mixing.norm

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        packed = self.qkv(tokens).reshape(batch, count, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        queries, keys, values = packed[0], packed[1], packed[2]
        maps = ((queries @ keys.transpose(-2, -1)) * queries.shape[-1] ** -0.5).softmax(dim=-1)
        mixed = self.norm(self.matrix(maps))
        if self.mixing_scale != 1:
            mixed = mixed * self.mixing_scale
        return self.proj((mixed @ values).transpose(1, 2).reshape(batch, count, dim))


def plain_linear(layer: nn.Linear) -> nn.Linear:
    """PyTorch's own linear layer, with the weights of another."""
    plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


class HeadCovariance(torch.autograd.Function):
    """Mean (H,) and covariance (H, H) of the heads of softmax maps (B, H, N, N), whose mean is about 1/N."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> tuple[Tensor, Tensor]:
        wide, keys = torch.promote_types(maps.dtype, torch.float32), maps.shape[3]
        count = maps.numel() // maps.shape[1]
        centred = (maps - 1 / keys).flatten(2)
        mean = centred.sum(2).to(wide).sum(0) / count
        covariance = torch.bmm(centred, centred.mT).to(wide).sum(0) / count - mean.outer(mean)
        ctx.save_for_backward(maps, mean)
        return mean + 1 / keys, covariance

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor, covariance_gradient: Tensor) -> Tensor:
        maps, mean = ctx.saved_tensors
        count, keys = maps.numel() // maps.shape[1], maps.shape[3]
        slope = (covariance_gradient + covariance_gradient.T) / count
        offset = (mean_gradient / count - slope @ (mean + 1 / keys)).to(maps.dtype)
        slopes = slope.to(maps.dtype).expand(len(maps), *slope.shape)
        return torch.baddbmm(offset[None, :, None], slopes, maps.flatten(2)).view(maps.shape)


class SecondMoments(ByMaps):
    """Training's statistics before anything is mixed.

    With μ_g the mean of head g's map and C_gk = mean A_g A_k - μ_g μ_k, the mixture Σ_g Θ_hg A_g + b_h has the mean
    Σ_g Θ_hg μ_g + b_h and the variance Σ_gk Θ_hg C_gk Θ_hk = Θ_hᵀ C Θ_h. So the norm's factor can be folded into Θ.
    """

    def attend_faster(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mixing: Any = self.mixing
        if not mixing.norm.training:
            return super().attend_faster(queries, keys, values)
        maps = self.attn_drop(attention_map(queries, keys))
        weight, bias = mixing.matrix.weight.flatten(1), mixing.matrix.bias
        mean, covariance = HeadCovariance.apply(maps)
        mixed_mean, variance = weight @ mean, ((weight @ covariance) * weight).sum(1)
        track(mixing.norm, mixed_mean + bias, variance, maps.numel() // self.heads)
        ratio = mixing.scale * mixing.norm.weight * torch.rsqrt(variance + mixing.norm.eps)
        shift = mixing.scale * mixing.norm.bias - ratio * mixed_mean + 0 * bias
        folded = (ratio[:, None] * weight).expand(len(maps), self.heads, self.heads)
        mixed = torch.bmm(folded, maps.flatten(2)).view(maps.shape)
        return (mixed @ values + by_head(shift) * values.sum(2, keepdim=True)).to(values.dtype)


def another(kind: type[ReAttention], ours: ReAttention) -> ReAttention:
    """The same weights, in another way."""
    other = kind(ours.proj.out_features, ours.heads, ours.mixing)
    other._modules = dict(ours._modules)
    return other


def infer(model: nn.Module, precision: Any, inputs: Tensor) -> Tensor:
    with torch.inference_mode(), autocast(inputs.device, precision):
        return finished(model(inputs))


def train(model: nn.Module, precision: Any, inputs: Tensor) -> Tensor:
    model.zero_grad()
    with autocast(inputs.device, precision):
        output = model(inputs).float()
    output.square().mean().backward()
    return finished(output)


def finished(output: Tensor) -> Tensor:
    if output.is_cuda:
        torch.cuda.synchronize()
    return output


def check(ways: dict[str, nn.Module]) -> None:
    """All ways give the same output and gradients in float64."""
    tokens = torch.randn(3, 11, DIM, dtype=torch.float64)
    results = []
    for way in ways.values():
        way = copy.deepcopy(way).double().train()
        output = train(way, "fp32", tokens)
        gradients = {key.removeprefix("mixing."): parameter.grad for key, parameter in way.named_parameters()}
        buffers = {key.removeprefix("mixing."): buffer for key, buffer in way.named_buffers()}
        results.append({"output": output, **gradients, **buffers})
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-9)


def compare(
    ways: dict[str, nn.Module], call: Callable[..., Tensor], inputs: Tensor, repetitions: int
) -> dict[str, Any]:
    """Milliseconds of each way, and how much faster than the plain one each is, in both precisions."""
    rows = {}
    for precision in PRECISIONS:
        times = time_in_turns({name: partial(call, way, precision, inputs) for name, way in ways.items()}, repetitions)
        speed_up = {f"{name}: speed-up": times["plain"] / times[name] for name in ways if name != "plain"}
        rows[precision] = times | speed_up
        if inputs.is_cuda:
            rows[precision] |= {f"{name}: MiB": peak(call, way, precision, inputs) for name, way in ways.items()}
    print(call.__name__, tuple(inputs.shape), rows, flush=True)
    return {"what": call.__name__, "input": list(inputs.shape), **rows}


def peak(call: Callable[..., Tensor], way: nn.Module, precision: Any, inputs: Tensor) -> float:
    """Most MiB that a call takes on a GPU, beside what there was before."""
    way.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(way, precision, inputs)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def with_plain_re_attention(model: nn.Module) -> nn.Module:
    """A copy of a DeepViT with the yardstick in the place of its Re-attention."""
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        if isinstance(block.attn, ReAttention):
            block.attn = PlainReAttention(block.attn)
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    device = default_device()
    result: dict[str, Any] = {**environment(), "unit": "ms per call, median", "results": []}
    ours = ReAttention(DIM, HEADS, BatchNormMixing(HEADS)).to(device)
    ways = {"plain": PlainReAttention(ours), "ours": ours, "second moments": another(SecondMoments, ours)}
    check({name: copy.deepcopy(way).cpu() for name, way in ways.items()})
    sizes, batches, reasons = [224], (1, 8, 16), {}
    if device.type == "cuda":
        ways["maps"] = another(ByMaps, ours)
        sizes, batches = [224, 384], (1, 8, 64)
        reasons = {precision: ours.why_maps(as_dtype(precision, device), device) for precision in PRECISIONS}
    result["no tiles because"] = {precision: reason for precision, reason in reasons.items() if reason}
    subjects: list[tuple[str, dict[str, nn.Module], Tensor, int]] = [
        ("Re-attention", ways, torch.randn(batch, TOKENS[size], DIM, device=device), options.repetitions)
        for size in sizes
        for batch in batches
    ]
    for name in ("deepvit_16", "deepvit_s"):
        for size in sizes:
            model = timm.create_model(name, img_size=size).to(device)
            pair = {"plain": with_plain_re_attention(model), "ours": model}
            subjects.append((name, pair, torch.randn(8, 3, size, size, device=device), 3))
    for call in (infer, train):
        if call is train:
            keep_freed_memory()  # as `tokenfusion train` does; inference runs as PyTorch comes
        for name, ways, inputs, repetitions in subjects:
            chosen = {way: module.train(call is train) for way, module in ways.items()}
            if call is infer:
                chosen.pop("second moments", None)  # in evaluation it is ours
            result["results"].append({"subject": name} | compare(chosen, call, inputs, repetitions))
    write_json(options.out, result)


if __name__ == "__main__":
    main()
