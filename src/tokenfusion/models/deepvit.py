"""DeepViT (Zhou et al., arXiv 2103.11886): deeper vision transformers by mixing the heads of attention.

Source: the paper and the facts of its public code (zhoudaquan/dvit_repo); written anew. Deviations: any image size
(padded with zeros to whole patches, position table interpolated) and any number of channels.

Letters: B batch, N tokens, C channels, H heads, D head width, h w grid.
"""

from collections import OrderedDict
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.attend import SelfAttention, attention_map, check_heads, merge_heads, split_heads
from tokenfusion.layers.blocks import (
    Block,
    PaddedConv,
    TokenEmbedding,
    init_linear_and_norm,
    layer_norm,
    pad_to_multiple,
    rising_rates,
)
from tokenfusion.layers.fast import Linear, attend_mixed_in_training, by_parts, fold_norm, mix_heads
from tokenfusion.layers.re_attention import re_attend, why_not
from tokenfusion.layers.tokens import grid_of
from tokenfusion.models.base import at_least, choose, image_size
from tokenfusion.models.official import OfficialNames, read_pretrained
from tokenfusion.models.registration import register_variants
from tokenfusion.models.transformer import PlainTransformer


class ReAttention(nn.Module):
    """Norm(Θᵀ softmax(Q Kᵀ / √D)) V (section 4.2).

    While `fused_attn` is false, the maps of the whole batch pass through `attn_drop` and `mixing`, where they can be
    observed. When true, `attend_faster` gives the same numbers: on a GPU without forming a map, unless `why_maps` says
    why not.

    Args:
        dim: width C of a token.
        heads: number of attention heads H.
        mixing: what mixes the heads' maps: Norm(Θᵀ ·).
        attn_drop: dropout rate of the map, before it is mixed.
        proj_drop: dropout rate of the result.
    """

    def __init__(
        self, dim: int, heads: int, mixing: "HeadMixing", attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.fused_attn = True
        self.qkv = Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.mixing = mixing
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        queries, keys, values = (split_heads(part, self.heads) for part in self.qkv(tokens).chunk(3, dim=2))
        if not self.fused_attn:
            maps = self.attn_drop(attention_map(queries, keys))  # softmax(Q Kᵀ / √D), (B, H, N, N)
            mixed = self.mixing(maps)  # Norm(Θᵀ maps)
            attended = mixed @ values
        elif self.training or getattr(self.mixing, "norm", self).training:  # by the batch's statistics
            attended = self.attend_faster(queries, keys, values)
        else:
            attended = by_parts(self.attend_faster, queries, keys, values)
        return self.proj_drop(self.proj(merge_heads(attended)))

    def attend_faster(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same, of Q, K and V (B, H, N, D): (B, H, N, D).

        By `layers/re_attention.py` or else by `layers/fast.py`, where training writes no normed map.
        """
        norm = getattr(self.mixing, "norm", None)
        if self.why_maps(queries.dtype, queries.device) is None:
            return re_attend(queries, keys, values, self.mixing.matrix, norm, self.mixing.scale)
        maps = self.attn_drop(attention_map(queries, keys))
        if isinstance(norm, nn.BatchNorm2d) and norm.training:  # SyncBatchNorm is none: it knows the other batches
            return attend_mixed_in_training(self.mixing.matrix, norm, self.mixing.scale, maps, values)
        return self.mixing(maps) @ values

    def why_maps(self, kind: torch.dtype, device: torch.device) -> str | None:
        """Why maps are formed for Q, K and V of a kind and on a device; None where they are not."""
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        width = self.proj.in_features // self.heads
        return why_not(self.heads, width, kind, device, getattr(self.mixing, "norm", None), dropout)


def maps_in_words(model: nn.Module, kind: torch.dtype, device: torch.device) -> str:
    """Why a model, as it trains or infers, re-attends by whole maps on a GPU; empty where it does not, and on a CPU."""
    layers = [module for module in model.modules() if isinstance(module, ReAttention)]
    reasons = {reason: None for layer in layers if (reason := layer.why_maps(kind, device)) and device.type == "cuda"}
    return f"Re-attention forms its maps, N² numbers a head: {'; '.join(reasons)}" if reasons else ""


class HeadMixing(nn.Module):
    """s · Θᵀ A: the map of a head becomes a learned mixture of all heads' maps; no norm.

    Args:
        heads: number of attention heads H.
        scale: factor s on the result.
    """

    def __init__(self, heads: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.matrix = nn.Conv2d(heads, heads, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps A (B, H, N, N) to mixed maps (B, H, N, N)."""
        bias = self.matrix.bias
        assert bias is not None
        return mix_heads(maps, self.scale * self.matrix.weight.flatten(1), self.scale * bias)

    def packed(self, _kind: torch.dtype) -> nn.Module:
        """As it is: its few weights are folded in float32, whatever maps are in; see `layers/packed.py`."""
        return self


class BatchNormMixing(HeadMixing):
    """s · Norm(Θᵀ A), BatchNorm over the heads: as published."""

    def __init__(self, heads: int, scale: float = 1.0) -> None:
        super().__init__(heads, scale)
        self.norm = nn.BatchNorm2d(heads)

    def forward(self, maps: Tensor) -> Tensor:
        if self.norm.training:
            return self.norm(self.matrix(maps)) * self.scale
        return mix_heads(maps, *fold_norm(self.matrix, self.norm, self.scale))


class LayerNormMixing(HeadMixing):
    """Re-attention with LayerNorm over the heads, as other copies in circulation have it."""

    def __init__(self, heads: int, scale: float = 1.0) -> None:
        super().__init__(heads, scale)
        self.norm = nn.LayerNorm(heads)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(self.matrix(maps).movedim(1, -1)).movedim(-1, 1) * self.scale


class TemperedAttention(SelfAttention):
    """softmax(Q Kᵀ / (τ √D)) V: below τ = 1 each token attends to fewer others, above to more.

    Args:
        dim, heads, attn_drop, proj_drop: as in `SelfAttention`.
        temperature: τ.
    """

    def __init__(
        self, dim: int, heads: int, temperature: float, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__(dim, heads, attn_drop, proj_drop)
        self.temperature = temperature

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        queries, keys, values = (split_heads(part, self.heads) for part in self.qkv(tokens).chunk(3, dim=2))
        return self.proj_drop(self.proj(merge_heads(self.attend(queries / self.temperature, keys, values))))


class RescaledBlock(Block):
    """A block whose branches read half of the stream and write double: x + 2 branch(norm(x / 2))."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        tokens = tokens + 2 * self.drop_path(self.attn(self.norm1(tokens / 2)))
        return tokens + 2 * self.drop_path(self.mlp(self.norm2(tokens / 2)))


class T2TPatches(nn.Sequential):
    """Patches through two convolutions at half the image's size, then one of the rest of the stride (T2T's stem)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, hidden: int = 64) -> None:
        if patch_size % 2:
            raise InputError(f"patch_size={patch_size} is odd, and the conv stem halves it; try {patch_size + 1}")
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(in_chans, hidden, 7, stride=2, padding=3, bias=False),
                norm1=nn.BatchNorm2d(hidden),
                act1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
                norm2=nn.BatchNorm2d(hidden),
                act2=nn.ReLU(inplace=True),
                proj=nn.Conv2d(hidden, dim, patch_size // 2, stride=patch_size // 2),
            )
        )
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, C, h, w)."""
        return super().forward(pad_to_multiple(images, self.patch_size))  # type: ignore[no-untyped-call]


def linear_patches(in_chans: int, dim: int, patch_size: int) -> nn.Module:
    """Patches, each through one linear map (ViT)."""
    return PaddedConv(in_chans, dim, patch_size, stride=patch_size)


MIXINGS = {"none": HeadMixing, "batch_norm": BatchNormMixing, "layer_norm": LayerNormMixing}
STEMS = {"linear": linear_patches, "conv": T2TPatches}
BLOCKS = {"plain": Block, "rescaled": RescaledBlock}


class DeepViT(PlainTransformer):
    """A plain vision transformer whose last blocks re-attend.

    Args:
        img_size: height and width the position table is learned on, in pixels; forward takes any other too.
        in_chans: channels of an image.
        num_classes: outputs; 0 for none.
        patch_size: side of a patch in pixels.
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads of a block.
        mlp_ratio: hidden width of the MLPs, in units of `dim`.
        re_attention: how many of the last blocks re-attend, the others having plain attention; all if None.
        mixing_norm: norm after the mixing of heads: "none", "batch_norm" or "layer_norm".
        mixing_scale: multiply the mixed maps by 1/√D once more, as `deepvit_s` does.
        learn_mixing: whether Θ is learned; else it stays at the random numbers that it begins with.
        temperature: τ of the blocks that do not re-attend, softmax(Q Kᵀ / (τ √D)) V.
        stem: how patches become tokens: "linear" or "conv".
        block: "plain", or "rescaled" by a half and back.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, after the positions, after
            linear maps, of attention maps.
        drop_path_rate: rate of stochastic depth at the last block.

    Raises:
        InputError: heads that do not divide the width, an unknown choice, an impossible size or number; a temperature
            where every block re-attends.
    """

    official_names = OfficialNames(
        rules=(
            (r"^embed\.cls_token$", "cls_token"),
            (r"^embed\.positions\.table$", "pos_embed"),
            (r"^embed\.patches\.(weight|bias)$", r"patch_embed.proj.\1"),
            (r"^embed\.patches\.norm(\d)", r"patch_embed.bn\1"),
            (r"^embed\.patches\.", "patch_embed."),
            (r"\.mixing\.matrix\.", ".reatten_matrix."),
            (r"\.mixing\.norm\.", ".var_norm."),
        ),
        signature=r"\.reatten_matrix\.",
    )

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 16,
        dim: int = 384,
        depth: int = 16,
        heads: int = 12,
        mlp_ratio: float = 3.0,
        re_attention: int | None = None,
        mixing_norm: str = "batch_norm",
        mixing_scale: bool = False,
        learn_mixing: bool = True,
        temperature: float = 1.0,
        stem: str = "linear",
        block: str = "plain",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        re_attention = depth if re_attention is None else re_attention
        at_least(1, dim=dim, depth=depth, patch_size=patch_size, in_chans=in_chans)
        at_least(0, re_attention=re_attention)
        if re_attention > depth:
            raise InputError(f"re_attention={re_attention} is more than all depth={depth} blocks; try {depth}")
        if not (isinstance(temperature, int | float) and 0 < temperature < inf):
            raise InputError(f"temperature={temperature} is none; give a number above 0, such as 0.5")
        if temperature != 1 and re_attention == depth:
            raise InputError(
                f"temperature={temperature} is of plain attention, and all blocks re-attend; give re_attention=0"
            )
        check_heads(dim, heads)
        mixing = choose(MIXINGS, mixing_norm, "mixing_norm")
        scale = (dim // heads) ** -0.5 if mixing_scale else 1.0
        drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        plain = SelfAttention if temperature == 1 else partial(TemperedAttention, temperature=temperature)

        def attention(index: int) -> nn.Module:
            if index < depth - re_attention:
                return plain(dim, heads, **drops)
            return ReAttention(dim, heads, mixing(heads, scale), **drops)

        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.img_size, self.patch_size = image_size(img_size), patch_size
        patches = choose(STEMS, stem, "stem")(in_chans, dim, patch_size)
        self.embed = TokenEmbedding(patches, dim, grid_of(self.img_size, patch_size), pos_drop_rate)
        block_cls = choose(BLOCKS, block, "block")
        self.blocks = nn.ModuleList(
            block_cls(dim, attention(i), mlp_ratio, proj_drop_rate, path)
            for i, path in enumerate(rising_rates(drop_path_rate, depth))
        )
        self.norm = layer_norm(dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(init_linear_and_norm)
        for part in self.modules():
            if isinstance(part, HeadMixing):
                part.matrix.requires_grad_(learn_mixing)
        self.head = self.build_head(num_classes)


PLAIN: dict[str, Any] = {"img_size": 224, "dim": 384}
RESCALED: dict[str, Any] = {"img_size": 224, "stem": "conv", "block": "rescaled"}
MICRO: dict[str, Any] = {"img_size": 32, "num_classes": 10, "patch_size": 4, "stem": "conv"}
OFFICIAL: dict[str, tuple[type[DeepViT], dict[str, Any]]] = {
    "deepvit_16": (DeepViT, PLAIN | {"depth": 16}),
    "deepvit_24": (DeepViT, PLAIN | {"depth": 24}),
    "deepvit_32": (DeepViT, PLAIN | {"depth": 32}),
    "deepvit_s": (DeepViT, RESCALED | {"dim": 396, "depth": 16, "re_attention": 5, "mixing_scale": True}),
    "deepvit_l": (DeepViT, RESCALED | {"dim": 420, "depth": 32, "re_attention": 12}),
    "deepvit_l_384": (DeepViT, RESCALED | {"dim": 420, "depth": 32, "re_attention": 12, "img_size": 384}),
}
VARIANTS = OFFICIAL | {"deepvit_micro": (DeepViT, MICRO | {"dim": 64, "depth": 8, "heads": 4})}
OFFICIAL_CONFIG: dict[str, Any] = {
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


def config(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What timm knows of a variant."""
    official = OFFICIAL_CONFIG | ({"crop_pct": 1.0} if arguments["img_size"] > 224 else {}) if name in OFFICIAL else {}
    return official | {"first_conv": "embed.patches.conv1" if "stem" in arguments else "embed.patches"}


CONFIGS = {name: config(name, arguments) for name, (_, arguments) in VARIANTS.items()}
register_variants(__name__, VARIANTS, configs=CONFIGS, out_indices=(-3, -2, -1), read_pretrained=read_pretrained)
