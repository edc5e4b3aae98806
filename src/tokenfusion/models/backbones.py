"""The two parents of a fusion: a CNN that gives a map after each stage, a transformer that carries tokens by blocks.

A backbone owns the modules that it is made of, and makes whatever they need besides the map or the tokens (rotary
tables, biases, CrossViT's small branch) anew in every forward pass: a `context` that the caller hands back to it.
This package's own networks are backbones; `models/adapters.py` makes them of timm's.

Letters: B batch, T tokens of a transformer (its prefix, CLS first, then patches row by row), C channels, h w grid.
"""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.errors import InputError, first_line
from tokenfusion.layers.checkpointing import Checkpointed
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import TokenLayout, grid_of, size_of
from tokenfusion.models.base import PaperModel, on_meta


class CNNBackbone(Checkpointed):
    """M_0 = stem(images),  M_s = stage_s(M_{s-1}).

    Args:
        stem: from images to the first stage's input.
        stages: each a module from map to map.
        dims: channels of the map after each stage.
        reductions: pixels of the image per place of that map, along one side.

    Attributes:
        two_way: whether a stage reads the map that it is given, so that something can be added to it.
        rescale: changes images that were normalised for the other parent to what this CNN wants.
    """

    two_way = True

    def __init__(
        self, stem: nn.Module, stages: Iterable[nn.Module], dims: Sequence[int], reductions: Sequence[int]
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.dims, self.reductions = tuple(dims), tuple(reductions)
        self.rescale: nn.Module = nn.Identity()
        self.found: dict[tuple[int, int, int], list[Grid]] = {}

    def start(self, images: Tensor) -> tuple[Tensor, Any]:
        """Images (B, in_chans, H, W) to M_0 and the context."""
        return self.stem(self.rescale(images)), None

    def stage(self, index: int, feature_map: Tensor, context: Any) -> Tensor:  # noqa: ARG002
        """M_s of M_{s-1}, for s = `index` + 1: (B, dims[index], h, w)."""
        return self.run(self.stages[index], feature_map)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) to every stage's map."""
        feature_map, context = self.start(images)
        return [feature_map := self.stage(index, feature_map, context) for index in range(len(self.stages))]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last stage's map (B, dims[-1], h, w)."""
        feature_map, context = self.start(images)
        for index in range(len(self.stages)):
            feature_map = self.stage(index, feature_map, context)
        return feature_map

    def layers(self) -> list[str]:
        """Patterns that parameters' names begin with, layer by layer from the images on."""
        return [r"stem\.", *(rf"stages\.{i}\." for i in range(len(self.stages)))]

    def grids(self, img_size: Grid, in_chans: int) -> list[Grid]:
        """Rows and columns of each stage's map for images (H, W); found once a size, on the meta device.

        Raises:
            InputError: such images give no maps, or not those that `dims` names.
        """
        key = (*img_size, in_chans)
        if key not in self.found:
            self.found[key] = self.find_grids(img_size, in_chans)
        return self.found[key]

    def find_grids(self, img_size: Grid, in_chans: int) -> list[Grid]:
        try:
            maps = on_meta(self).eval().maps(torch.empty(2, in_chans, *img_size, device="meta"))
            if not all(isinstance(m, Tensor) for m in maps):
                raise ValueError("a stage of it gives several tensors")
            if any(m.shape[1] != dim or min(size_of(m)) < 1 for m, dim in zip(maps, self.dims, strict=True)):
                raise ValueError("they are not of the channels that it names, or vanish")
            return [size_of(m) for m in maps]
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = first_line(error)
            raise InputError(
                f"the CNN gives no maps (B, C, h, w) for {in_chans}-channel images of {img_size[0]}×{img_size[1]} "
                f"pixels: {reason}; give a larger img_size or the in_chans that it was built for, or take another CNN"
            ) from error


class TokenBackbone(PaperModel):
    """X = embed(images),  X <- block(X) for every block,  features = finish(X).

    Attributes:
        embed: from images (B, in_chans, H, W) to the tokens that fuse (B, T, C) and the context.
        dim, heads: width C of a token; attention heads of a block.
        prefix: what the tokens before the patches are, such as ("cls",).
        reads: what the head reads: "cls", or "patch" for the mean of the patches.
        reduction: side of a patch in pixels.
        rigid: why no further tokens can pass through the blocks; "" where they can.
        head_name: what the names of the head's parameters begin with.
    """

    embed: Callable[[Tensor], tuple[Tensor, Any]]
    blocks: Sequence[nn.Module] | nn.ModuleList
    dim: int
    heads: int
    reduction: int | Fraction
    prefix: tuple[str, ...] = ("cls",)
    reads: str = "cls"
    rigid: str = ""
    head_name: str = "head"

    def step(self, block: nn.Module, tokens: Tensor, context: Any) -> Tensor:  # noqa: ARG002
        """Tokens (B, T, C) through one block."""
        return self.run(block, tokens)

    def through(self, blocks: Iterable[nn.Module], tokens: Tensor, context: Any) -> Tensor:
        """Tokens (B, T, C) through some of the blocks."""
        for block in blocks:
            tokens = self.step(block, tokens, context)
        return tokens

    def finish(self, tokens: Tensor, context: Any) -> Any:
        """What `forward_head` reads."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Any:
        """Images (B, in_chans, H, W) to what the head reads."""
        tokens, context = self.embed(images)
        return self.finish(self.through(self.blocks, tokens, context), context)

    def grid(self, size: Grid) -> Grid:
        """Rows and columns of the patches of images (H, W)."""
        return grid_of(size, self.reduction)

    def stream_layout(self, img_size: Grid | None = None) -> TokenLayout:
        """What each of the tokens that fuse is."""
        return self.token_layout(img_size)

    def branch_layouts(self, img_size: Grid | None = None) -> tuple[TokenLayout, ...]:
        """What each token in a block's arguments is: of one stream, or of CrossViT's two branches."""
        return (self.stream_layout(img_size),)
