"""BatchNorm over the images of all processes."""

import torch
import torch.distributed as dist
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

    With the mean mᵣ and the variance vᵣ of process r, and averages over the processes:
    m = mean(mᵣ);  v = mean(vᵣ + (mᵣ - m)²);  y = (x - m) / √(v + eps) · weight + bias.
    Gradients go back to all processes.

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
        """Images (B, C, ...) to normed images."""
        processes = dist.get_world_size()
        if not self.training or processes == 1:
            return self.act(self.drop(super().forward(input)))
        images = input.float()
        variances, means = torch.var_mean(images, [0, *range(2, images.dim())], correction=0)
        mean = SumOverProcesses.apply(means) / processes
        var = SumOverProcesses.apply(variances + (means - mean).square()) / processes
        if self.track_running_stats:
            self.track(mean, var, processes * images.numel() // self.num_features)
        channel = (-1, *[1] * (images.dim() - 2))
        normed = (images - mean.view(channel)) * torch.rsqrt(var + self.eps).view(channel)
        if self.affine:
            normed = normed * self.weight.view(channel) + self.bias.view(channel)
        return self.act(self.drop(normed.to(input.dtype)))

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


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; the gradient goes back to all of them, and is summed too."""

    @staticmethod
    def forward(_ctx: torch.autograd.function.FunctionCtx, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return SumOverProcesses.forward(_ctx, grad)
