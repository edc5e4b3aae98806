"""Whether two thumbnails show the same picture: one is laid over the other as well as it goes, and details compared.

The overlay scales and shifts width and height, x' = a x + b and y' = c y + d, and is found by Gauss-Newton steps on the
squared difference, from blurred to sharp: Lucas and Kanade, "An iterative image registration technique", 1981; Baker
and Matthews, "Lucas-Kanade 20 years on", IJCV 2004. Phase correlation, which libraries have, finds shifts alone, and
copies are cropped too. Shapes: `B` pairs, `S` side of a thumbnail.
"""

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms.v2.functional import gaussian_blur

LEVELS = ((3.0, 4), (1.5, 4), (0.7, 4))
"""Blur in pixels, and steps at that blur."""
DETAIL = 2.0
"""Blur in pixels; what it takes away is detail."""
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
    return torch.maximum(overlaid(first, second), overlaid(second, first))


def overlaid(moving: Tensor, fixed: Tensor) -> Tensor:
    """Correlation of details, float (B,), once `moving` is laid over `fixed`."""
    warped, inside = warp(details(moving), align(moving, fixed))
    first, second = centred(warped, inside), centred(details(fixed), inside)
    lengths = first.square().sum((1, 2, 3)) * second.square().sum((1, 2, 3))
    return (first * second).sum((1, 2, 3)) / lengths.sqrt().clamp(min=1e-6)


def align(moving: Tensor, fixed: Tensor) -> Tensor:
    """The warp (B, 4) that lays `moving` over `fixed`: a, b, c and d of the equations above."""
    parameters = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(len(moving), 1)
    low, high = torch.tensor([[1 / MAX_SCALE, -MAX_SHIFT], [MAX_SCALE, MAX_SHIFT]]).repeat(1, 2)
    for width, steps in LEVELS:
        image, target = blur(moving, width), blur(fixed, width)
        image = torch.cat([image, *slopes(image)], 1)
        for _ in range(steps):
            parameters = torch.clamp(parameters + gauss_newton(image, target, parameters), low, high)
    return parameters


def gauss_newton(image: Tensor, target: Tensor, parameters: Tensor) -> Tensor:
    """The step (JᵀJ + λI)⁻¹ Jᵀ (target - warped image), (B, 4), where J holds the warped image's slopes by parameter.

    Args:
        image: (B, 3, S, S), values and their slopes along x and y.
        target: (B, 1, S, S).
        parameters: (B, 4).
    """
    warped, inside = warp(image, parameters)
    values, along_x, along_y = warped[:, :1], warped[:, 1:2], warped[:, 2:]
    side = image.shape[-1]
    x = torch.linspace(1 / side - 1, 1 - 1 / side, side)
    jacobian = torch.cat([along_x * x, along_x, along_y * x[:, None], along_y], 1)
    jacobian = centred(jacobian, inside).flatten(2)  # (B, 4, S²)
    difference = centred(target - values, inside).flatten(1)[..., None]  # (B, S², 1)
    hessian = jacobian @ jacobian.mT
    damping = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * 0.01 + 1e-3
    step = torch.linalg.solve(hessian + damping * torch.eye(4), jacobian @ difference)
    return step[..., 0].clamp(-0.15, 0.15)


def warp(images: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, C, S, S) as the parameters (B, 4) lay them, and whether that is inside of them, float (B, 1, S, S)."""
    a, b, c, d = parameters.unbind(1)
    zero = torch.zeros_like(a)
    matrices = torch.stack([a, zero, b, zero, c, d], 1).view(-1, 2, 3)
    grid = affine_grid(matrices, list(images.shape), align_corners=False)
    inside = (grid.abs() <= 1).all(-1)[:, None].float()
    return grid_sample(images, grid, padding_mode="border", align_corners=False), inside


def centred(images: Tensor, inside: Tensor) -> Tensor:
    """Images less their mean inside, and 0 outside."""
    mean = (images * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True).clamp(min=1)
    return (images - mean) * inside


def slopes(images: Tensor) -> tuple[Tensor, ...]:
    """Slopes of (B, 1, S, S) along x and along y, where each side is 2 long."""
    return torch.gradient(images, spacing=2 / images.shape[-1], dim=(3, 2))


def details(images: Tensor) -> Tensor:
    """What blurring takes away."""
    return images - blur(images, DETAIL)


def blur(images: Tensor, width: float) -> Tensor:
    """Gaussian blur of (B, 1, S, S), its standard deviation in pixels."""
    return gaussian_blur(images, [2 * int(3 * width) + 1] * 2, [width, width])
