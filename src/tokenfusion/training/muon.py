"""Muon: a matrix moves by its momentum made orthogonal; what is no matrix moves by NAdamW.

Sources: Muon, Jordan 2024, https://kellerjordan.github.io/posts/muon/, with the coefficients of modded-nanogpt; the
scale that makes its updates as long as AdamW's, arXiv 2502.16982. The numbers, and what is kept of a parameter, are
those of timm's `Muon(nesterov=True)`, whose NAdamW is called. But timm iterates in bfloat16 always, and a CPU without
such products only emulates them: there the iteration is in float32, some ten times faster (`benchmarks/steps.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.optim.nadamw import nadamw
from torch import Tensor, nn

from tokenfusion.hardware import has_bf16

MOMENTUM, BETAS, EPS = 0.95, (0.9, 0.95), 1e-7
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""a, b and c of each iteration X <- a X + (b X Xᵀ + c (X Xᵀ)²) X, which bring all singular values near 1."""


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of its groups; NAdamW for the rest, and for groups with `use_fallback`.

    Args:
        groups: of parameters.
        lr: learning rate of all, until a group's is set.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "use_fallback": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            others = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["use_fallback"] or not is_matrix(parameter):
                    others.append(parameter)
                else:
                    self.move_matrix(parameter, group["lr"], group["weight_decay"])
            if others:
                self.move_others(others, group["lr"], group["weight_decay"])

    def move_matrix(self, matrix: nn.Parameter, lr: float, weight_decay: float) -> None:
        """B <- μ B + (1 - μ) G,  W <- (1 - λ η) W - 0.2 η √max(M, N) orthogonal(μ B + (1 - μ) G)."""
        gradient, momentum = matrix.grad, self.kept(matrix, "momentum_buffer")
        assert gradient is not None
        matrix.mul_(1 - lr * weight_decay)
        momentum.lerp_(gradient, 1 - MOMENTUM)
        rows = gradient.lerp(momentum, MOMENTUM).flatten(1)
        matrix.add_(orthogonal(rows).reshape(matrix.shape), alpha=-lr * 0.2 * max(rows.shape) ** 0.5)

    def move_others(self, others: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        """NAdamW."""
        for parameter in others:
            self.state[parameter].setdefault("step", torch.zeros(()))
        nadamw(
            list(others),
            [parameter.grad for parameter in others],
            [self.kept(parameter, "exp_avg") for parameter in others],
            [self.kept(parameter, "exp_avg_sq") for parameter in others],
            [self.state[parameter]["step"] for parameter in others],
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=EPS,
            caution=False,
            maximize=False,
            max_lr=None,
        )

    def kept(self, parameter: nn.Parameter, name: str) -> Tensor:
        """What is kept of a parameter by a name: zeros at first, laid out as it is."""
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state[name]


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter, its kernel flattened, is a matrix worth making orthogonal.

    Depthwise kernels and the like are none, nor what has fewer than 4 rows or columns, or more than 128 times as many
    of the one as of the other.
    """
    if parameter.ndim < 2 or 1 in parameter.shape[:2]:
        return False
    rows, columns = len(parameter), parameter[0].numel()
    return min(rows, columns) >= 4 and max(rows, columns) <= 128 * min(rows, columns)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix (M, N) with all its singular values brought near 1, by a Newton-Schulz iteration."""
    x = matrix.to(torch.bfloat16 if has_bf16(matrix.device) else torch.float32)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = (x / x.norm().clamp_(min=EPS)).contiguous()
    for a, b, c in COEFFICIENTS:
        squared = x @ x.T
        x = torch.addmm(x, torch.addmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
