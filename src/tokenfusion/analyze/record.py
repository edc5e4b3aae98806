"""Attention maps as they are computed, observed from outside.

Letters: B batch, H heads, N query tokens, M key tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, size_of
from tokenfusion.models.deepvit import HeadMixing

Size = tuple[int, int]


@dataclass(eq=False)
class AttentionRecord:
    """What one attention module computed in the last forward pass.

    Attributes:
        name: the module's dotted name.
        layout: what the maps' rows and columns are; of the model's own image size until it has run.
        passes: how many forward passes were seen.
        reduced: what `reduce` gave, one item a forward pass; empty without `reduce`. The caller may take items out.
    """

    name: str
    layout: AttentionLayout
    passes: int = 0
    reduced: list[Any] = field(default_factory=list)
    _map: Tensor | None = field(default=None, repr=False)
    _mixed: Tensor | None = field(default=None, repr=False)

    @property
    def map(self) -> Tensor:
        """The map after the softmax, (B, H, N, M), a part of the graph where gradients are computed.

        Raises:
            InputError: there is none, or `reduce` has consumed it.
        """
        if self._map is None:
            reason = "was handed to reduce and not kept" if self.passes else "has not been computed yet"
            raise InputError(f"the map of {self.name} {reason}; run the model, without reduce, before you read it")
        return self._map

    @property
    def mixed(self) -> Tensor | None:
        """Re-attention's mixture of the heads' maps, (B, H, N, M), which the values are multiplied by; else None."""
        return self._mixed

    @property
    def applied(self) -> Tensor:
        """The map that the values are multiplied by: the mixed one where there is one."""
        return self.map if self.mixed is None else self.mixed


Reduce = Callable[[AttentionRecord], Any]


@contextmanager
def record_attention(model: nn.Module, *, reduce: Reduce | None = None) -> Iterator[Mapping[str, AttentionRecord]]:
    """Record the attention maps of every forward pass inside the context.

        with record_attention(model) as maps:
            model(images)
        maps["blocks.0.attn"].map  # (B, H, N, M)

    Attention takes its explicit path meanwhile, and the one it had before afterwards, whatever happens; outputs stay
    equal up to rounding. Call the model itself, not its parts, so that the images' size is known.

    Args:
        model: any model of this package, or one of timm's whose attention has the flag `fused_attn` and is followed by
            a dropout `attn_drop`: VisionTransformer, DeiT, BEiT, EVA.
        reduce: called with each module's record as soon as its maps are there; what it gives is appended to `reduced`,
            and the maps are let go, so that only one module's are in memory at a time. Without it the records keep the
            maps of the last forward pass.

    Yields:
        records by the attention modules' dotted names, in order.

    Raises:
        InputError: the model has no attention or some that cannot be seen, a map never arrived, or one has values that
            are not finite.
    """
    layouts = attention_layouts(model)
    require_all_seen(model, layouts)
    records = {name: AttentionRecord(name, layout) for name, layout in layouts.items()}
    with ExitStack() as stack:
        for name, record in records.items():
            module = model.get_submodule(name)
            for handle in observe(module, record, reduce):
                stack.callback(handle.remove)
            stack.enter_context(explicit(module))
        handle = model.register_forward_pre_hook(partial(forget, records), with_kwargs=True)
        stack.callback(handle.remove)
        yield records
        for record in records.values():
            if not record.passes:
                raise InputError(f"the map of {record.name} never arrived; run the model, uncompiled, in the context")


def attention_layouts(model: Any, img_size: Size | None = None) -> dict[str, AttentionLayout]:
    """What each attention module's queries and keys are, by dotted name, in order.

    Args:
        model: as in `record_attention`.
        img_size: height and width of the images; the model's own when not given.

    Raises:
        InputError: the model has no attention, or some that cannot be seen.
    """
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl for module in model.modules()):
        raise InputError("a compiled model cannot be observed; give the model as it was before torch.compile")
    if hasattr(model, "attention_layouts"):
        layouts = model.attention_layouts(img_size)
    elif hasattr(model, "num_prefix_tokens") and hasattr(getattr(model, "patch_embed", None), "grid_size"):
        layouts = timm_layouts(model, img_size)
    else:
        layouts = {}
    if not layouts:
        raise InputError(
            f"{type(model).__name__} has no attention that can be seen; "
            "give a model of this package, or a VisionTransformer, DeiT, BEiT or EVA of timm"
        )
    return layouts


def require_all_seen(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a model with attention beside what is recorded, such as a pool at the head that attends to the tokens."""
    seen = tuple(f"{name}." for name in names)
    for name, module in model.named_modules():
        attends = hasattr(module, "fused_attn") or isinstance(module, nn.MultiheadAttention)
        if attends and not f"{name}.".startswith(seen):
            raise InputError(
                f"the attention of {name}, a {type(module).__name__}, cannot be seen: only that of the blocks is; give "
                "a model whose head reads CLS or the mean of the tokens (in timm global_pool='token' or 'avg')"
            )


def timm_layouts(model: Any, img_size: Size | None) -> dict[str, AttentionLayout]:
    """The same for timm's vision transformers: prefix tokens, then patches."""
    embed = model.patch_embed
    grid = embed.grid_size if img_size is None else embed.dynamic_feat_size(img_size)
    names = ["cls"] * (getattr(model, "cls_token", None) is not None) + ["dist"] * hasattr(model, "dist_token")
    names += ["register"] * (model.num_prefix_tokens - len(names))
    tokens = (*map(TokenGroup, names), TokenGroup("patch", tuple(grid)))
    return {
        name: AttentionLayout.among(tokens)
        for name, module in model.named_modules()
        if name.startswith("blocks.") and name.endswith(".attn") and not isinstance(module, nn.Identity)
    }


def forget(
    records: dict[str, AttentionRecord], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a forward pass: let go of the last one's maps, and lay the tokens out for the size of these images."""
    images = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    layouts = attention_layouts(model, size_of(images))
    for name, record in records.items():
        record.layout, record._map, record._mixed = layouts[name], None, None


def observe(module: nn.Module, record: AttentionRecord, reduce: Reduce | None) -> list[Any]:
    """Hook what passes through an attention module; gives the hooks' handles.

    Raises:
        InputError: its map cannot be seen.
    """
    inside = list(module.named_modules())
    drops = [part for name, part in inside if name.rpartition(".")[2] == "attn_drop"]
    if len(drops) != 1 or not any(hasattr(part, "fused_attn") for _, part in inside):
        raise InputError(
            f"the attention of {record.name}, a {type(module).__name__}, cannot be seen: it has no explicit path to "
            "switch to (a flag `fused_attn` and a dropout `attn_drop`)"
        )

    def see(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        record._map = checked(inputs[0], record)

    def see_mixed(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        record._mixed = checked(output, record)

    def finish(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        if record._map is None or (mixings and record._mixed is None):
            raise InputError(f"the map of {record.name} never arrived; call model.eval() before")
        record.passes += 1
        if reduce is not None:
            record.reduced.append(reduce(record))
            record._map = record._mixed = None

    mixings = [part for _, part in inside if isinstance(part, HeadMixing)]
    return [
        drops[0].register_forward_hook(see),
        *(mixing.register_forward_hook(see_mixed) for mixing in mixings),
        module.register_forward_hook(finish),
    ]


def checked(maps: Tensor, record: AttentionRecord) -> Tensor:
    """Maps as they are.

    Raises:
        InputError: they hold NaN or infinity, or do not have the tokens of the layout.
    """
    expected = [sum(group.count for group in tokens) for tokens in record.layout]
    if list(maps.shape[2:]) != expected:
        raise InputError(
            f"the map of {record.name} has {list(maps.shape[2:])} tokens where {expected} were expected; "
            "call the model itself on images (B, channels, H, W)"
        )
    if not torch.isfinite(maps.detach().sum(dtype=torch.float32)):
        raise InputError(
            f"the map of {record.name} has values that are not finite; look for NaN in the images or the weights"
        )
    return maps


@contextmanager
def explicit(module: nn.Module) -> Iterator[None]:
    """Attention through its map, not fused, inside the context."""
    with keeping(module, "fused_attn") as parts:
        for part in parts:
            part.fused_attn = False
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode inside the context; every part is in its own mode again afterwards."""
    with keeping(model, "training"):
        model.eval()
        yield


@contextmanager
def keeping(module: nn.Module, attribute: str) -> Iterator[list[Any]]:
    """The parts of a module that have an attribute, which has its old values again after the context."""
    before = {part: getattr(part, attribute) for part in module.modules() if hasattr(part, attribute)}
    try:
        yield list(before)
    finally:
        for part, value in before.items():
            setattr(part, attribute, value)
