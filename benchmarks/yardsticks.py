"""The papers' networks operation for operation as their public code runs them, as yardsticks of speed.

Own words: written from what is known of each code's operations, their order and their layouts, with its names of
modules, so that `weights.to_official` gives the state dict. Nothing here is made faster or slower than it is there:
products of attention are explicit, reshapes copy where the public code's do, every norm and activation is a module of
its own. `tests/models/test_yardsticks.py` holds that each computes what ours does with equal weights, gradients too.

`yardstick_of(model)` gives the yardstick of one of this package's models, with its weights. Letters: B batch, N tokens,
C channels, H heads, D head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.models.cmt import CMT
from tokenfusion.models.crossvit import CrossViT
from tokenfusion.models.deepvit import DeepViT, RescaledBlock, SelfAttention
from tokenfusion.weights import to_official


def yardstick_of(model: nn.Module) -> nn.Module:
    """The public code's network of the same shape, with a copy of the model's weights.

    Args:
        model: a CMT, DeepViT or CrossViT as published; dropout and stochastic depth are left out.

    Raises:
        KeyError: a model of another paper.
        RuntimeError: a variant that is not the published one, whose weights do not fit.
    """
    yardstick = YARDSTICKS[type(model)](model)
    parameter = next(model.parameters())
    yardstick.to(parameter.device, parameter.dtype).train(model.training)
    yardstick.load_state_dict(to_official(model))
    return yardstick


def layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(tokens)))


class Attention(nn.Module):
    """Self-attention by one product for Q, K and V, as in DeiT."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        packed = self.qkv(tokens).reshape(batch, count, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        queries, keys, values = packed[0], packed[1], packed[2]
        maps = self.mix(((queries @ keys.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        return self.proj((maps @ values).transpose(1, 2).reshape(batch, count, dim))

    def mix(self, maps: Tensor) -> Tensor:
        return maps


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); rescaled, branches read half of x and are divided by a half."""

    def __init__(self, dim: int, attention: nn.Module, hidden: int, rescale: float = 1.0) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = layer_norm(dim), attention, layer_norm(dim), Mlp(dim, hidden)
        self.rescale = rescale

    def forward(self, tokens: Tensor) -> Tensor:
        if self.rescale == 1:
            tokens = tokens + self.attn(self.norm1(tokens))
            return tokens + self.mlp(self.norm2(tokens))
        tokens = tokens + self.attn(self.norm1(tokens * self.rescale)) / self.rescale
        return tokens + self.mlp(self.norm2(tokens * self.rescale)) / self.rescale


# --- DeepViT (zhoudaquan/dvit_repo)


class ReAttention(Attention):
    def __init__(self, dim: int, heads: int, scale: float) -> None:
        super().__init__(dim, heads)
        self.reatten_matrix, self.var_norm = nn.Conv2d(heads, heads, 1), nn.BatchNorm2d(heads)
        self.reatten_scale = scale

    def mix(self, maps: Tensor) -> Tensor:
        return self.var_norm(self.reatten_matrix(maps)) * self.reatten_scale


class ConvPatches(nn.Module):
    """The stem of the shared-code variants: two convolutions at half the size, then one of the rest of the stride."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.proj = nn.Conv2d(64, dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.bn1(self.conv1(images)))
        return self.proj(self.relu(self.bn2(self.conv2(features))))


class LinearPatches(nn.Module):
    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class OfficialDeepViT(nn.Module):
    def __init__(self, ours: Any) -> None:
        super().__init__()
        dim, tokens = ours.embed_dim, ours.embed.positions.table.shape[1]
        stem = LinearPatches if isinstance(ours.embed.patches, nn.Conv2d) else ConvPatches
        self.patch_embed = stem(ours.in_chans, dim, ours.patch_size)
        self.cls_token, self.pos_embed = (nn.Parameter(torch.zeros(1, n, dim)) for n in (1, tokens))
        self.blocks = nn.ModuleList(self.block(dim, block) for block in ours.blocks)
        self.norm, self.head = layer_norm(dim), nn.Linear(dim, ours.num_classes)

    @staticmethod
    def block(dim: int, ours: Any) -> Block:
        plain, heads = isinstance(ours.attn, SelfAttention), ours.attn.heads
        attention = Attention(dim, heads) if plain else ReAttention(dim, heads, ours.attn.mixing.scale)
        return Block(dim, attention, ours.mlp.fc1.out_features, 0.5 if isinstance(ours, RescaledBlock) else 1.0)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


# --- CMT (ggjy/CMT.pytorch)


class CMTMlp(nn.Module):
    """IRFFN: 1×1 up, depthwise 3×3 beside the identity, 1×1 down, each with its norm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.BatchNorm2d(hidden))
        self.proj = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.proj_act, self.proj_bn = nn.GELU(), nn.BatchNorm2d(hidden)
        self.conv2 = nn.Sequential(nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        batch, _, dim = tokens.shape
        features = self.conv1(tokens.permute(0, 2, 1).reshape(batch, dim, height, width))
        features = self.proj_bn(self.proj_act(self.proj(features) + features))
        return self.conv2(features).flatten(2).permute(0, 2, 1)


class CMTAttention(nn.Module):
    """LMHSA: keys and values of a map that a depthwise convolution has pooled."""

    def __init__(self, dim: int, heads: int, pooling: int) -> None:
        super().__init__()
        self.heads, self.scale, self.pooling = heads, (dim // heads) ** -0.5, pooling
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        if pooling > 1:
            pool = nn.Conv2d(dim, dim, pooling, stride=pooling, groups=dim)
            self.sr = nn.Sequential(pool, nn.BatchNorm2d(dim))

    def forward(self, tokens: Tensor, height: int, width: int, relative: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        queries, pooled = self.split(self.q(tokens)), tokens
        if self.pooling > 1:
            pooled = self.sr(tokens.permute(0, 2, 1).reshape(batch, dim, height, width))
            pooled = pooled.reshape(batch, dim, -1).permute(0, 2, 1)
        keys, values = self.split(self.k(pooled)), self.split(self.v(pooled))
        maps = ((queries @ keys.transpose(-2, -1)) * self.scale + relative).softmax(dim=-1)
        return self.proj((maps @ values).transpose(1, 2).reshape(batch, count, dim))

    def split(self, tokens: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        return tokens.reshape(batch, count, self.heads, dim // self.heads).permute(0, 2, 1, 3)


class CMTBlock(nn.Module):
    """Depthwise convolution beside the identity, LMHSA, IRFFN."""

    def __init__(self, dim: int, heads: int, pooling: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.attn, self.mlp = CMTAttention(dim, heads, pooling), CMTMlp(dim, hidden)
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, height: int, width: int, relative: Tensor) -> Tensor:
        batch, _, dim = tokens.shape
        features = tokens.permute(0, 2, 1).reshape(batch, dim, height, width)
        tokens = (self.proj(features) + features).flatten(2).permute(0, 2, 1)
        tokens = tokens + self.attn(self.norm1(tokens), height, width, relative)
        return tokens + self.mlp(self.norm2(tokens), height, width)


class CMTPatches(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_chans, dim, 2, stride=2), nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> tuple[Tensor, int, int]:
        features = self.proj(features)
        return self.norm(features.flatten(2).transpose(1, 2)), features.shape[2], features.shape[3]


class OfficialCMT(nn.Module):
    def __init__(self, ours: Any) -> None:
        super().__init__()
        width, stride = ours.stem.conv1.out_channels, ours.stem.conv1.stride
        self.stages = "abcd"[: len(ours.stages)]
        for i, (chans, step) in enumerate(((ours.in_chans, stride), (width, 1), (width, 1)), start=1):
            self.add_module(f"stem_conv{i}", nn.Conv2d(chans, width, 3, stride=step, padding=1))
            self.add_module(f"stem_relu{i}", nn.GELU())
            self.add_module(f"stem_norm{i}", nn.BatchNorm2d(width))
        for letter, before, dim, stage in zip(
            self.stages, (width, *ours.dims[:-1]), ours.dims, ours.stages, strict=True
        ):
            blocks, table = stage.blocks, stage.positions.table
            self.add_module(f"patch_embed_{letter}", CMTPatches(before, dim))
            self.register_parameter(f"relative_pos_{letter}", nn.Parameter(torch.empty(table.shape)))
            hidden, heads = blocks[0].ffn.conv.in_channels, blocks[0].attn.heads
            made = (CMTBlock(dim, heads, stage.pooling, hidden) for _ in blocks)
            self.add_module(f"blocks_{letter}", nn.ModuleList(made))
        self._fc, self._bn = nn.Conv2d(ours.dims[-1], ours.num_features, 1), nn.BatchNorm2d(ours.num_features)
        self._pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(ours.num_features, ours.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        parts: dict[str, Any] = dict(self.named_children())
        features = images
        for i in (1, 2, 3):
            features = parts[f"stem_norm{i}"](parts[f"stem_relu{i}"](parts[f"stem_conv{i}"](features)))
        for letter in self.stages:
            tokens, height, width = parts[f"patch_embed_{letter}"](features)
            for block in parts[f"blocks_{letter}"]:
                tokens = block(tokens, height, width, getattr(self, f"relative_pos_{letter}"))
            features = tokens.reshape(len(images), height, width, -1).permute(0, 3, 1, 2).contiguous()
        features = self._bn(self._fc(features))
        features = features * torch.sigmoid(features)
        return self.head(self._pool(features).flatten(1))


# --- CrossViT (IBM/CrossViT)


class CrossAttention(nn.Module):
    """CLS alone attends, to itself and the patches that follow it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        shape = self.heads, dim // self.heads
        queries = self.wq(tokens[:, :1]).reshape(batch, 1, *shape).permute(0, 2, 1, 3)
        keys = self.wk(tokens).reshape(batch, count, *shape).permute(0, 2, 1, 3)
        values = self.wv(tokens).reshape(batch, count, *shape).permute(0, 2, 1, 3)
        maps = ((queries @ keys.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((maps @ values).transpose(1, 2).reshape(batch, 1, dim))


class CrossBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = layer_norm(dim), CrossAttention(dim, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, :1] + self.attn(self.norm1(tokens))


def projection(dim: int, wide: int) -> nn.Sequential:
    return nn.Sequential(layer_norm(dim), nn.GELU(), nn.Linear(dim, wide))


class MultiScaleBlock(nn.Module):
    """Each branch's blocks; each branch's CLS, projected, attends to the other's patches, and is projected back."""

    def __init__(self, dims: Sequence[int], branches: Sequence[Any]) -> None:
        super().__init__()
        heads = [branch[0].attn.heads for branch in branches]

        def made(branch: Any, dim: int, count: int) -> nn.Sequential:
            hidden = branch[0].mlp.fc1.out_features
            return nn.Sequential(*(Block(dim, Attention(dim, count), hidden) for _ in branch))

        self.blocks = nn.ModuleList(map(made, branches, dims, heads))
        self.projs = nn.ModuleList(map(projection, dims, dims[::-1]))
        self.fusion = nn.ModuleList(map(CrossBlock, dims[::-1], heads[::-1]))
        self.revert_projs = nn.ModuleList(map(projection, dims[::-1], dims))

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        outs = [block(tokens) for block, tokens in zip(self.blocks, branches, strict=True)]
        cls = [project(tokens[:, :1]) for project, tokens in zip(self.projs, outs, strict=True)]
        fused = []
        for i, (fusion, revert) in enumerate(zip(self.fusion, self.revert_projs, strict=True)):
            attended = fusion(torch.cat((cls[i], outs[1 - i][:, 1:]), dim=1))
            fused.append(torch.cat((revert(attended[:, :1]), outs[i][:, 1:]), dim=1))
        return fused


class CrossPatches(nn.Module):
    """Patches by one convolution, or by the dagger's three."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()

        def same(conv: nn.Conv2d) -> nn.Conv2d:
            return nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)  # type: ignore[arg-type]

        if isinstance(ours, nn.Conv2d):
            self.proj: nn.Module = same(ours)
        else:
            layers = ours.children()
            self.proj = nn.Sequential(*(same(m) if isinstance(m, nn.Conv2d) else nn.ReLU(inplace=True) for m in layers))

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class OfficialCrossViT(nn.Module):
    def __init__(self, ours: Any) -> None:
        super().__init__()
        embeddings, dims = (ours.embed_small, ours.embed_large), ours.embed_dim
        scales = ours.scale_small, ours.scale_large
        self.sizes = [tuple(n * s.patch_size for n in s.grid(*ours.img_size)) for s in scales]
        self.patch_embed = nn.ModuleList(CrossPatches(embedding.patches) for embedding in embeddings)
        self.cls_token = nn.ParameterList(torch.zeros(1, 1, dim) for dim in dims)
        self.pos_embed = nn.ParameterList(torch.zeros(embedding.positions.table.shape) for embedding in embeddings)
        self.blocks = nn.ModuleList(MultiScaleBlock(dims, (stage.small, stage.large)) for stage in ours.stages)
        self.norm = nn.ModuleList(map(layer_norm, dims))
        self.head = nn.ModuleList(nn.Linear(dim, ours.num_classes) for dim in dims)

    def forward(self, images: Tensor) -> Tensor:
        branches = []
        for i, size in enumerate(self.sizes):
            seen = images
            if tuple(images.shape[-2:]) != size:
                seen = F.interpolate(images, size=size, mode="bicubic")
            cls = self.cls_token[i].expand(len(images), -1, -1)
            branches.append(torch.cat((cls, self.patch_embed[i](seen)), dim=1) + self.pos_embed[i])
        for block in self.blocks:
            branches = block(branches)
        branches = [norm(tokens) for norm, tokens in zip(self.norm, branches, strict=True)]
        logits = [head(tokens[:, 0]) for head, tokens in zip(self.head, branches, strict=True)]
        return torch.mean(torch.stack(logits, dim=0), dim=0)


YARDSTICKS: dict[type[nn.Module], Any] = {CMT: OfficialCMT, DeepViT: OfficialDeepViT, CrossViT: OfficialCrossViT}
