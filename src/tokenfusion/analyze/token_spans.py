"""Where a model's tokens can be met from outside: as arguments of its blocks and of its operators.

Letters: B batch, T tokens, C channels, h w grid.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import TokenLayout
from tokenfusion.models.adapters import as_transformer
from tokenfusion.models.fused_model import FusedModel


class TokenSpan(NamedTuple):
    """Tokens of one source in the input of a module.

    Attributes:
        module: its dotted name.
        source: what the tokens are, such as "patch" or "pixel".
        argument: which positional argument of the module holds them, (B, T, C).
        start, stop: from which token to which.
        grid: rows and columns that they fill, row by row.
    """

    module: str
    source: str
    argument: int
    start: int
    stop: int
    grid: Grid


def token_spans(model: nn.Module, size: Grid) -> list[TokenSpan]:
    """Where a model's kinds of tokens meet (`FusedModel.meetings`); in the blocks of a transformer alone.

    Args:
        model: a fusion, or a transformer alone.
        size: height and width of the images.

    Raises:
        InputError: the model has no row of blocks over its patches.
    """
    return all_spans(model.meetings(size)) if isinstance(model, FusedModel) else block_spans(model, size)


def block_spans(model: nn.Module, size: Grid) -> list[TokenSpan]:
    """In the inputs of the transformer's blocks (CrossViT's stages), in order; arguments as in `token_spans`."""
    if isinstance(model, FusedModel):
        return all_spans(model.block_layouts(size))
    vit = as_transformer(model)
    names = {module: name for name, module in model.named_modules()}
    return all_spans({names[block]: vit.branch_layouts(size) for block in vit.blocks})


def all_spans(places: Mapping[str, tuple[TokenLayout, ...]]) -> list[TokenSpan]:
    """The tokens that have a place in the image, in the first arguments of modules."""
    return [
        span
        for module, arguments in places.items()
        for number, tokens in enumerate(arguments)
        for span in spans_in(module, number, tokens)
    ]


def spans_in(module: str, argument: int, tokens: TokenLayout) -> list[TokenSpan]:
    """The tokens that have a place in the image, in an argument laid out like this."""
    spans, start = [], 0
    for group in tokens:
        if group.grid:
            spans.append(TokenSpan(module, group.source, argument, start, start + group.count, group.grid))
        start += group.count
    return spans
