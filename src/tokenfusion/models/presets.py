"""The presets of Token Fusion: a plain CNN (`models/convnet.py`) and a plain ViT, fused in three ways and four sizes.

`benchmarks/parts.py` times timm's parts beside ours; `docs/results` compares the operators.
"""

from collections.abc import Sequence
from typing import Any

from tokenfusion.models.base import at_least, choose
from tokenfusion.models.convnet import ConvTrunk
from tokenfusion.models.fused_model import FusedModel
from tokenfusion.models.operators import OPERATORS
from tokenfusion.models.registration import register_variants
from tokenfusion.models.token_fusion import STRATEGIES, strategy_class
from tokenfusion.models.transformer import ViT


def build_preset(
    *,
    strategy: str,
    operator: str,
    dim: int,
    heads: int,
    depth: int,
    mlp_ratio: float,
    patch_size: int,
    stem: int,
    conv_strides: Sequence[int],
    conv_dims: Sequence[int],
    conv_depths: Sequence[int],
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    **fusion: Any,
) -> FusedModel:
    """A plain CNN and a plain ViT, fused.

    Args:
        strategy, operator: names from `STRATEGIES` and `OPERATORS`.
        dim, heads, depth, mlp_ratio, patch_size, drop_rate, drop_path_rate: the transformer, as in `ViT`.
        stem, conv_strides, conv_dims, conv_depths: the CNN, as in `ConvTrunk`.
        img_size, in_chans, num_classes: as in `create_model`.
        **fusion: further arguments of the strategy's class: `gate`, `fusion_depth`.
    """
    at_least(1, in_chans=in_chans, stem=stem, conv_strides=conv_strides, conv_dims=conv_dims)
    vit = ViT(
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        img_size=img_size,
        in_chans=in_chans,
        num_classes=num_classes,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
    )
    cnn = ConvTrunk(in_chans, stem, conv_strides, conv_dims, conv_depths)
    meet = choose(OPERATORS, operator, "operator")
    model_cls = strategy_class(choose(STRATEGIES, strategy, "strategy"), meet)
    return model_cls(cnn, vit, meet, img_size=img_size, in_chans=in_chans, mlp_ratio=mlp_ratio, **fusion)


SIZES: dict[str, dict[str, Any]] = {
    "micro": {"img_size": 32, "num_classes": 10, "patch_size": 8, "dim": 64, "heads": 2, "mlp_ratio": 2.0}
    | {"stem": 16, "conv_strides": (1, 2, 2, 2), "conv_dims": (48, 96, 112), "conv_depths": (1, 1, 1)},
    "tiny": {"img_size": 224, "patch_size": 16, "dim": 128, "heads": 2, "mlp_ratio": 4.0}
    | {"stem": 32, "conv_strides": (2, 2, 2, 2), "conv_dims": (48, 112, 256), "conv_depths": (1, 3, 3)},
    "small": {"img_size": 224, "patch_size": 16, "dim": 256, "heads": 4, "mlp_ratio": 4.0}
    | {"stem": 32, "conv_strides": (2, 2, 2, 2), "conv_dims": (80, 224, 448), "conv_depths": (1, 3, 3)},
    "base": {"img_size": 224, "patch_size": 16, "dim": 512, "heads": 8, "mlp_ratio": 4.0}
    | {"stem": 64, "conv_strides": (2, 2, 2, 2), "conv_dims": (192, 384, 768), "conv_depths": (2, 3, 3)},
}
# Most of the cost is the CNN's, which learns the faster of the two (docs/results).
DEPTHS: dict[str, dict[str, int]] = {
    "early": {"depth": 2},
    "late": {"depth": 2, "fusion_depth": 1},
    "layerwise": {"depth": 3},
}
OPERATOR = {"late": "joint", "early": "joint", "layerwise": "add"}
"""The operator of each strategy's presets; docs/results compares them."""
VARIANTS = {
    f"tokenfusion_{strategy}_{size}": (
        build_preset,
        # from random weights there is nothing to protect: the gates start open
        {"strategy": strategy, "operator": OPERATOR[strategy], "gate": 1.0} | config | DEPTHS[strategy],
    )
    for strategy in STRATEGIES
    for size, config in SIZES.items()
}
CONFIG = {"first_conv": ("cnn.stem.conv", "vit.embed.patches"), "classifier": "vit.head"}
register_variants(__name__, VARIANTS, configs=dict.fromkeys(VARIANTS, CONFIG))
