"""Where a model's tokens can be met from outside: as arguments of its blocks and of its operators.

Letters: B batch, T tokens, C channels, h w grid.
"""

from typing import Any, NamedTuple

from torch import nn

from tokenfusion.layers.tokens import TokenGroup, TokenLayout
from tokenfusion.models.adapters import as_transformer
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.models.token_fusion import EarlyFusion, JointEarlyFusion, TokenFusion

Grid = tuple[int, int]


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
    """Where a model's kinds of tokens meet: the operators of a late or layerwise fusion, else the blocks' inputs.

    Of `fuse(CNN,VIT,probe)` it is what both parents see.

    An early fusion whose operator is not joint attention has one at the entrance, then blocks.

    Args:
        model: a fusion, or a transformer alone.
        size: height and width of the images.

    Raises:
        InputError: the model has no row of blocks over its patches.
    """
    if not isinstance(model, TokenFusion):
        return block_spans(model, size)
    if isinstance(model, ProbeFusion):  # all that decides reads what both parents see
        kinds = (model.meeting_layout(size), (TokenGroup("pixel", model.cells(size)),))
        return [span for argument, tokens in enumerate(kinds) for span in spans_in("sight", argument, tokens)]
    operators = [
        span
        for name, grid in model.operator_grids(size).items()
        for argument, tokens in enumerate((model.token_layout(size), (TokenGroup("pixel", grid),)))
        for span in spans_in(name, argument, tokens)
    ]
    return operators + block_spans(model, size) if isinstance(model, EarlyFusion | JointEarlyFusion) else operators


def block_spans(model: nn.Module, size: Grid) -> list[TokenSpan]:
    """In the inputs of the transformer's blocks (CrossViT's stages), in order; arguments as in `token_spans`."""
    vit: Any = as_transformer(model.vit if isinstance(model, TokenFusion) else model)
    if hasattr(vit, "branch_layouts"):
        layouts = vit.branch_layouts(size)
    else:
        layouts = (model.block_layout(size) if isinstance(model, TokenFusion) else vit.stream_layout(size),)
    names = {module: name for name, module in model.named_modules()}
    return [
        span
        for block in vit.blocks
        for argument, tokens in enumerate(layouts)
        for span in spans_in(names[block], argument, tokens)
    ]


def spans_in(module: str, argument: int, tokens: TokenLayout) -> list[TokenSpan]:
    """The tokens that have a place in the image, in an argument laid out like this."""
    spans, start = [], 0
    for group in tokens:
        if group.grid:
            spans.append(TokenSpan(module, group.source, argument, start, start + group.count, group.grid))
        start += group.count
    return spans
