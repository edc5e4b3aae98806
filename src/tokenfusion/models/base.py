"""What every paper's model answers, in timm's words."""

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.checkpointing import checkpointed
from tokenfusion.layers.positions import Grid
from tokenfusion.models.official import OfficialNames

T = TypeVar("T")


class PaperModel(nn.Module):
    """An image classifier with timm's interface.

    A paper's model sets the attributes below and writes `forward_features`, `forward_head`, `forward_intermediates`,
    `prune_intermediate_layers`, `no_weight_decay` and `build_head`.
    """

    official_names: ClassVar[OfficialNames]
    num_classes: int
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    head: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Any:
        """Images to what the head reads."""
        raise NotImplementedError

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gave, to logits, or to the vector before them."""
        raise NotImplementedError

    def build_head(self, num_classes: int) -> nn.Module:
        """A new classifier."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """The module that makes logits."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes` classes; 0 leaves features.

        Raises:
            InputError: another pooling is asked for; each paper here has its own.
        """
        if global_pool:
            raise InputError(f"global_pool={global_pool!r} cannot be chosen: the paper fixes the pooling; leave it out")
        self.num_classes = num_classes
        anchor = next(self.parameters())
        self.head = self.build_head(num_classes).to(anchor.device, anchor.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def run(self, block: nn.Module, *args: Any) -> Any:
        """Call a block, checkpointed if so set."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpointed(block, *args)
        return block(*args)


def linear_head(dim: int, num_classes: int) -> nn.Module:
    """A linear classifier, or nothing for 0 classes."""
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def image_size(img_size: int | tuple[int, int]) -> Grid:
    """`img_size` as (height, width).

    Raises:
        InputError: a side is smaller than one pixel.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height < 1 or width < 1:
        raise InputError(f"img_size={img_size} has no pixels; give a side, or (height, width), of at least 1")
    return height, width


def choose(choices: Mapping[str, T], name: str, what: str) -> T:
    """One of several named choices.

    Raises:
        InputError: there is none of that name; the nearest is offered.
    """
    if name in choices:
        return choices[name]
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"{what}={name!r} is not known; {hint}there are: {', '.join(choices)}")


def check_output_format(output_fmt: str) -> None:
    """Raise InputError unless `output_fmt` is one of timm's."""
    choose({"NCHW": None, "NLC": None}, output_fmt, "output_fmt")
