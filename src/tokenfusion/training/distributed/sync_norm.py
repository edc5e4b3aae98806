"""BatchNorm over the images of all processes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tokenfusion.hardware import default_device


def globalize_norms(model: nn.Module) -> None:
    """Let every BatchNorm of a model see the images of all processes: its names and tensors stay what they are."""
    if default_device().type == "cuda":
        convert_sync_batchnorm(model)  # torch's refuses tensors on a CPU
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, GlobalBatchNorm(child))


class GlobalBatchNorm(_BatchNorm):
    """A BatchNorm whose statistics while training are those of all processes, each of which has as many values.

    Args:
        norm: the BatchNorm, or timm's BatchNorm with activation, that it takes the place and the tensors of.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()
        if isinstance(norm, BatchNormAct2d):
            self.drop, self.act = norm.drop, norm.act
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or dist.get_world_size() == 1:
            return self.act(self.drop(super().forward(input)))
        normed, mean, var = GlobalMoments.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self.track(mean, var, dist.get_world_size() * input.numel() // self.num_features)
        return self.act(self.drop(normed))

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics as BatchNorm does, by a batch's mean and biased variance (C,)."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (count / (count - 1)), momentum)


class GlobalMoments(torch.autograd.Function):
    """Normalise by the mean and variance of all processes, and send gradients back to all of them.

    With x̂ the normalised input and g the gradient of its affine image, averages being over all processes:
    ∂L/∂x = weight / σ · (g - mean(g) - x̂ · mean(g x̂)).
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, images: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, ...) to normed images, and the mean and biased variance (C,)."""
        own = torch.stack(torch.var_mean(images.float(), values_of(images), correction=0))  # (2, C)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        variances, means = torch.stack(everyone, dim=1)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(images, weight, mean, torch.rsqrt(var + eps))  # type: ignore[arg-type]  # takes None
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(images, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        images, weight, mean, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        normed = (images.float() - by_channel(mean, images)) * by_channel(inverse, images)
        own = torch.stack([grad.float().sum(values_of(grad)), (grad * normed).sum(values_of(grad))])  # (2, C)
        total = own.clone()
        dist.all_reduce(total)
        offset, slope = total / (dist.get_world_size() * grad.numel() / grad.shape[1])
        scale = inverse if weight is None else inverse * weight
        grad_images = by_channel(scale, grad) * (grad - by_channel(offset, grad) - normed * by_channel(slope, grad))
        if weight is None:
            return grad_images.to(images.dtype), None, None, None
        return grad_images.to(images.dtype), own[1], own[0], None


def values_of(images: Tensor) -> list[int]:
    """All dimensions of (B, C, ...) but the channels'."""
    return [0, *range(2, images.dim())]


def by_channel(vector: Tensor, images: Tensor) -> Tensor:
    """(C,) so that it goes with (B, C, ...)."""
    return vector.view(-1, *[1] * (images.dim() - 2))
