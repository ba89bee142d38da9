"""Operations on uint8 batches with parameters of each image's own, as mmcv's on single images.

Images are (N, 3, H, W) in the order red, green, blue. Parameters are tensors on the images' device,
so that nothing waits for it. What changes a value by itself alone makes a table of the new values,
for :func:`look_up`, which serves all images at once.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Weights of red, green and blue in grey, OpenCV's and Pillow's
_GREY_WEIGHTS = (0.299, 0.587, 0.114)


def warp(images: Tensor, parameters: Tensor, interpolation: str) -> Tensor:
    """Resample along affine maps, ``cv2.warpAffine`` with a constant border.

    Args:
        images (Tensor): (N, 3, H, W), uint8.
        parameters (Tensor): (N, 9), float32. First the rows of M (2, 3), which says where in the
            image a pixel (x', y') of the result comes from: ``(x, y) = M @ (x', y', 1)``; x and y
            are -1 and 1 at the image's outer edges, x' and y' count pixels from 0. Then the colour
            of what lies outside.
        interpolation (str): 'nearest', 'bilinear' or 'bicubic'.

    Returns:
        Tensor: (N, 3, H, W), uint8.
    """
    height, width = images.shape[-2:]
    matrices, fill = parameters[:, :6].view(-1, 2, 3), parameters[:, 6:, None, None]
    x = torch.arange(width, device=images.device, dtype=torch.float32)[:, None]
    y = torch.arange(height, device=images.device, dtype=torch.float32)[:, None]
    # no matrix product, which TF32 or autocast would round to parts of a pixel
    by_row = y * matrices[:, None, :, 1] + matrices[:, None, :, 2]  # (N, H, 2)
    grid = x * matrices[:, None, None, :, 0] + by_row[:, :, None]  # (N, H, W, 2)
    # grid_sample finds zeros outside, so the colour there is made zero
    warped = F.grid_sample(
        images - fill, grid, mode=interpolation, padding_mode='zeros', align_corners=False
    )
    return _rounded(warped.add_(fill))


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Look each value up in a table.

    Args:
        images (Tensor): (N, 3, H, W), uint8.
        tables (Tensor): (N, 3, 256), uint8, the new values of each channel.

    Returns:
        Tensor: (N, 3, H, W), uint8.
    """
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def given_tables(images: Tensor, tables: Tensor) -> Tensor:
    """Tables that do not depend on the images.

    Args:
        images (Tensor): (N, 3, H, W), unused.
        tables (Tensor): (N, 256), the new values; fractions are cut off.

    Returns:
        Tensor: (N, 3, 256), uint8.
    """
    return tables.to(torch.uint8)[:, None].expand(-1, 3, -1)


def auto_contrast_tables(images: Tensor) -> Tensor:
    """Stretch each channel's values to 0 to 255, ``mmcv.auto_contrast``.

    Args:
        images (Tensor): (N, 3, H, W), uint8.

    Returns:
        Tensor: (N, 3, 256), uint8.
    """
    low, high = (extreme.double()[..., None] for extreme in images.flatten(2).aminmax(dim=2))
    levels = torch.arange(256, device=images.device, dtype=torch.float64)
    # mmcv's order of operations and precision, as fractions are cut off
    scale = 255 / (high - low)
    stretched = (levels * scale - low * scale).clamp_(0, 255)
    return torch.where(high > low, stretched, levels).to(torch.uint8)


def equalize_tables(images: Tensor) -> Tensor:
    """Flatten each channel's histogram, ``mmcv.imequalize``.

    Args:
        images (Tensor): (N, 3, H, W), uint8.

    Returns:
        Tensor: (N, 3, 256), uint8.
    """
    values = images.flatten(2).long()
    counts = values.new_zeros(*values.shape[:2], 256)
    counts.scatter_add_(2, values, torch.ones_like(values))
    highest = values.amax(dim=2, keepdim=True)
    # the pixels of the highest value do not count
    step = (values.shape[2] - counts.gather(2, highest)) // 255
    below = counts.cumsum(dim=2) - counts
    spread = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    levels = torch.arange(256, device=images.device)
    return torch.where(step > 0, spread, levels).to(torch.uint8)


def contrast_tables(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean grey of each image, ``mmcv.adjust_contrast``.

    Args:
        images (Tensor): (N, 3, H, W), uint8.
        factors (Tensor): (N, 1), 1 leaves an image as it is.

    Returns:
        Tensor: (N, 3, 256), uint8.
    """
    # of the channels' means, not of each pixel's rounded grey, which differ by next to nothing
    mean = grey(images.flatten(2).float().mean(dim=2, keepdim=True)).round_()  # (N, 1, 1)
    levels = torch.arange(256, device=images.device, dtype=torch.float32)
    blended = torch.lerp(mean, levels, factors[..., None])
    return blended.clamp_(0, 255).to(torch.uint8).expand(-1, 3, -1)


def adjust_color(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image, ``mmcv.adjust_color``.

    Args:
        images (Tensor): (N, 3, H, W), uint8.
        factors (Tensor): (N, 1), 1 leaves an image as it is, 0 makes it grey.

    Returns:
        Tensor: (N, 3, H, W), uint8.
    """
    values = images.float()
    return _rounded(torch.lerp(grey(values).round_(), values, factors[..., None, None]))


def adjust_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with a smoothed image, ``mmcv.adjust_sharpness``.

    Args:
        images (Tensor): (N, 3, H, W), uint8.
        factors (Tensor): (N, 1), 1 leaves an image as it is, 0 smooths it.

    Returns:
        Tensor: (N, 3, H, W), uint8.
    """
    values = images.float()
    # the kernel is 5 in the middle and 1 around it, in 1/13: a box and four times the middle
    box = F.avg_pool2d(F.pad(values, (1, 1, 1, 1), mode='reflect'), 3, 1, divisor_override=1)
    smooth = box.add_(values, alpha=4).div_(13).round_()
    # as mmcv, which rounds the smoothed image and cuts off fractions of the blended one
    blended = torch.lerp(smooth, values, factors[..., None, None])
    return blended.clamp_(0, 255).to(torch.uint8)


def grey(values: Tensor) -> Tensor:
    """Grey of red, green and blue.

    Args:
        values (Tensor): (N, 3, ...), float32.

    Returns:
        Tensor: (N, 1, ...).
    """
    red, green, blue = values.split(1, dim=1)
    weighted = torch.add(red * _GREY_WEIGHTS[0], green, alpha=_GREY_WEIGHTS[1])
    return weighted.add_(blue, alpha=_GREY_WEIGHTS[2])


def _rounded(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)
