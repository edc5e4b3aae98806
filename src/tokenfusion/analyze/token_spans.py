"""Where a model's tokens can be met from outside: as arguments of its blocks and of its operators.

Letters: B batch, T tokens, C channels, h w grid.
"""

from typing import Any, NamedTuple

from torch import nn

from tokenfusion.layers.tokens import TokenGroup, TokenLayout
from tokenfusion.models.adapters import as_transformer
from tokenfusion.models.token_fusion import EarlyFusion, JointEarlyFusion, TokenFusion

Grid = tuple[int, int]


class Span(NamedTuple):
    """Tokens of one source inside an argument.

    Attributes:
        argument: which positional argument of the module holds them, (B, T, C).
        start, stop: from which token to which.
        grid: rows and columns that they fill, row by row.
    """

    argument: int
    start: int
    stop: int
    grid: Grid


class TokenInput(NamedTuple):
    """A module that takes tokens.

    Attributes:
        module: its dotted name.
        spans: its tokens that have a place in the image, by their source.
    """

    module: str
    spans: dict[str, Span]


def spans_of(tokens: TokenLayout, argument: int) -> dict[str, Span]:
    """Where the tokens that have a place are, in an argument laid out like this."""
    spans, start = {}, 0
    for group in tokens:
        if group.grid:
            spans[group.source] = Span(argument, start, start + group.count, group.grid)
        start += group.count
    return spans


def block_places(model: nn.Module, size: Grid) -> list[TokenInput]:
    """The transformer's blocks (CrossViT's stages), in order.

    Args:
        model: a fusion, or a transformer alone.
        size: height and width of the images.

    Raises:
        InputError: the model has no row of blocks over its patches.
    """
    vit: Any = as_transformer(model.vit if isinstance(model, TokenFusion) else model)
    if hasattr(vit, "branch_layouts"):
        small, large = vit.branch_layouts(size)
        spans = spans_of(small, 0) | spans_of(large, 1)
    else:
        spans = spans_of(model.block_layout(size) if isinstance(model, TokenFusion) else vit.stream_layout(size), 0)
    names = {module: name for name, module in model.named_modules()}
    return [TokenInput(names[block], spans) for block in vit.blocks]


def operator_places(model: TokenFusion, size: Grid) -> list[TokenInput]:
    """The operators, in order."""
    own = spans_of(model.vit_layout(size), 0)
    places = []
    for name, grid in model.operator_grids(size).items():
        places.append(TokenInput(name, own | spans_of((TokenGroup("pixel", grid),), 1)))
    return places


def token_places(model: nn.Module, size: Grid) -> list[TokenInput]:
    """Where a model's kinds of tokens meet: the operators of a late or layerwise fusion, else the blocks' inputs.

    An early fusion whose operator is not joint attention has one at the entrance, then blocks.

    Raises:
        InputError: as in `block_places`.
    """
    if not isinstance(model, TokenFusion):
        return block_places(model, size)
    operators = operator_places(model, size)
    return operators + block_places(model, size) if isinstance(model, EarlyFusion | JointEarlyFusion) else operators
