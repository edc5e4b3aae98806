"""Whether two thumbnails show the same picture: one is laid over the other as well as it goes, and details compared.

The overlay scales and shifts height and width (4 parameters), found by Gauss-Newton steps on the squared difference,
from blurred to sharp: Lucas and Kanade, "An iterative image registration technique", 1981; Baker and Matthews,
"Lucas-Kanade 20 years on", IJCV 2004. Shapes: `B` pairs, `S` side of a thumbnail.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, pad

LEVELS = ((3.0, 4), (1.5, 4), (0.7, 4))
"""Blur in pixels, and steps at that blur."""
DETAIL = 2.0
"""Blur in pixels, of which what is left is detail."""
MAX_SCALE, MAX_SHIFT = 1.4, 0.4
"""Largest overlay that is tried; the shift in units of half a side."""


def likeness(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of details where two pictures overlap, the better of either laid over the other.

    Args:
        first: float (B, 1, S, S), gray.
        second: the same shape.

    Returns:
        float (B,), up to 1 for the same picture.
    """
    return torch.maximum(overlay(first, second), overlay(second, first))


def overlay(moving: Tensor, fixed: Tensor) -> Tensor:
    """Correlation of details, float (B,), once `moving` is laid over `fixed`."""
    placement = align(moving, fixed)
    details = moving - blur(moving, DETAIL), fixed - blur(fixed, DETAIL)
    warped, inside = warp(details[0], placement)
    first, second = (centre(image, inside) for image in (warped, details[1]))
    lengths = first.square().sum((1, 2, 3)) * second.square().sum((1, 2, 3))
    return (first * second).sum((1, 2, 3)) / lengths.sqrt().clamp(min=1e-6)


def align(moving: Tensor, fixed: Tensor) -> Tensor:
    """The placement (B, 4) that lays `moving` over `fixed`: scale and shift of x, then of y, as `warp` takes them."""
    placement = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(len(moving), 1)
    low = torch.tensor([1 / MAX_SCALE, -MAX_SHIFT] * 2)
    high = torch.tensor([MAX_SCALE, MAX_SHIFT] * 2)
    for width, steps in LEVELS:
        image, target = blur(moving, width), blur(fixed, width)
        image = torch.cat([image, *slopes(image)], 1)
        for _ in range(steps):
            placement = torch.clamp(placement + gauss_newton(image, target, placement), low, high)
    return placement


def gauss_newton(image: Tensor, target: Tensor, placement: Tensor) -> Tensor:
    """The change of placement (B, 4) that a linear model of the difference asks for, damped.

    Args:
        image: (B, 3, S, S), values and their slopes along x and y.
        target: (B, 1, S, S).
        placement: (B, 4).
    """
    warped, inside = warp(image, placement)
    values, along_x, along_y = (warped[:, k : k + 1] for k in range(3))
    u = places(image.shape[-1])
    difference = centre(target - values, inside).flatten(1)[..., None]  # (B, S², 1)
    jacobian = torch.cat([along_x * u, along_x, along_y * u[:, None], along_y], 1)
    jacobian = centre(jacobian, inside).flatten(2)  # (B, 4, S²)
    hessian = jacobian @ jacobian.mT
    damping = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * 0.01 + 1e-3
    step = torch.linalg.solve(hessian + damping * torch.eye(4), jacobian @ difference)
    return step[..., 0].clamp(-0.15, 0.15)


def warp(images: Tensor, placement: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, C, S, S) sampled at scale × place + shift, and whether that is inside of them, float (B, 1, S, S)."""
    u = places(images.shape[-1])
    x, y = (placement[:, k : k + 1] * u + placement[:, k + 1 : k + 2] for k in (0, 2))  # (B, S)
    side = images.shape[-1]
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    inside = (grid.abs() <= 1).all(-1)[:, None].float()
    return grid_sample(images, grid, padding_mode="border", align_corners=False), inside


def centre(images: Tensor, inside: Tensor) -> Tensor:
    """Images less their mean inside, and 0 outside."""
    mean = (images * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True).clamp(min=1)
    return (images - mean) * inside


def places(side: int) -> Tensor:
    """Centres of pixels, from -1 to 1."""
    return (2 * torch.arange(side) + 1) / side - 1


def slopes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes of (B, 1, S, S) along x and along y, per unit of `places`; 0 at the border."""
    unit = images.shape[-1] / 4  # two pixels apart, each 2 / S wide
    along_x = (images[..., 2:] - images[..., :-2]) * unit
    along_y = (images[..., 2:, :] - images[..., :-2, :]) * unit
    return pad(along_x, (1, 1)), pad(along_y, (0, 0, 1, 1))


def blur(images: Tensor, width: float) -> Tensor:
    """Gaussian blur of (B, 1, S, S), its width in pixels."""
    radius = int(3 * width)
    kernel = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2 * width**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    images = pad(images, (radius,) * 4, mode="replicate")
    return conv2d(conv2d(images, kernel), kernel.mT)
