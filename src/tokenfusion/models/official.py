"""How a model's state-dict keys are called in its paper's public code, and translation both ways."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from tokenfusion.layers.positions import PositionTable, RelativePositionTable

T = TypeVar("T")
Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class OfficialNames:
    """A paper's key names, as substitutions.

    Args:
        rules: (pattern, replacement), applied one after another, turn a key of ours into the official one.
        copies: the same, from the spelling of another copy of the official code to the official one.
        signature: a pattern found in the keys of the paper's files, and in no other paper's.
    """

    rules: Rules
    signature: str
    copies: Rules = ()

    def official(self, key: str) -> str:
        """The official name of one of our keys."""
        return substitute(key, self.rules)

    def translate(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """A state dict in the official spelling, a copy's or ours, in ours; keys unknown to the model stay."""
        ours = {self.official(key): key for key in model.state_dict()}
        return {ours.get(substitute(key, self.copies), key): value for key, value in state.items()}


def substitute(key: str, rules: Rules) -> str:
    """Apply every rule to the key, in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


RENAMED: Rules = (
    (r"(^|\.)vit\.(?!model\.)", r"\1vit.model."),  # a transformer of timm's stands inside its backbone
    (r"\breadout_gate\.", "readout.gate."),
    (r"\.ask_(pixels|tokens)\.", r".to_\1."),
)
"""Names of tensors in older runs and checkpoints, and what they are called now."""


def with_present_names(tensors: Mapping[str, T], present: Collection[str]) -> dict[str, T]:
    """Tensors of an older run or checkpoint by the names `present` that they have now; others keep theirs."""
    names = {}
    for name in tensors:
        spellings = [name]
        for rule in RENAMED:
            spellings += [substitute(spelling, (rule,)) for spelling in spellings]
        names[name] = next((spelling for spelling in spellings if spelling in present), name)
    return {names[name]: tensor for name, tensor in tensors.items()}


def fit_position_tables(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The position tables in `state` whose size is not the model's, resized to it where only the grid differs."""
    resized = {}
    for name, module in model.named_modules():
        key = f"{name}.table"
        if not isinstance(module, PositionTable | RelativePositionTable) or key not in state:
            continue
        if state[key].shape != module.table.shape and (table := module.fit(state[key])) is not None:
            resized[key] = table
    return resized


def read_pretrained(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A file's state dict in the model's own keys, its position tables of the model's size: for timm's loader."""
    names: OfficialNames = model.official_names  # type: ignore[assignment]
    translated = names.translate(state, model)
    return translated | fit_position_tables(translated, model)
