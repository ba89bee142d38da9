"""Operations on uint8 batches with parameters of each image's own, as mmcv's on single images.

All take and return (N, 3, H, W) in the order red, green, blue. Parameters are tensors on the
images' device, so that nothing waits for it. They need no gradient.
"""
import torch
from torch import Tensor
from torch.nn import functional as F

# OpenCV's weights of red, green and blue in grey, in 1 / 2^14
_GREY_WEIGHTS = (4899, 9617, 1868)


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
    warped = F.grid_sample(images - fill, grid, mode=interpolation, padding_mode='zeros',
                           align_corners=False)
    return warped.add_(fill).round_().clamp_(0, 255).to(torch.uint8)


def map_values(images: Tensor, tables: Tensor) -> Tensor:
    """Look each value up in a table.

    Args:
        images (Tensor): (N, 3, H, W), uint8.
        tables (Tensor): (N, 256) or of each channel (N, 3, 256), the new values from 0 to 255.
            Fractions are cut off.

    Returns:
        Tensor: (N, 3, H, W), uint8.
    """
    tables = tables.to(torch.uint8)
    if tables.dim() == 2:
        tables = tables[:, None].expand(-1, 3, -1)
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel's values to 0 to 255, ``mmcv.auto_contrast``.

    Args:
        images (Tensor): (N, 3, H, W), uint8.

    Returns:
        Tensor: (N, 3, H, W), uint8.
    """
    low, high = (extreme.double()[..., None] for extreme in images.flatten(2).aminmax(dim=2))
    levels = torch.arange(256, device=images.device, dtype=torch.float64)
    # mmcv's order of operations and precision, as fractions are cut off
    scale = 255 / (high - low)
    stretched = (levels * scale - low * scale).clamp(0, 255)
    return map_values(images, torch.where(high > low, stretched, levels))


def equalize(images: Tensor) -> Tensor:
    """Flatten each channel's histogram, ``mmcv.imequalize``.

    Args:
        images (Tensor): (N, 3, H, W), uint8.

    Returns:
        Tensor: (N, 3, H, W), uint8.
    """
    values = images.flatten(2).long()
    counts = values.new_zeros(*values.shape[:2], 256)
    counts.scatter_add_(2, values, torch.ones_like(values))
    highest = values.amax(dim=2, keepdim=True)
    # the pixels of the highest value do not count
    step = (values.shape[2] - counts.gather(2, highest)) // 255
    below = counts.cumsum(dim=2) - counts
    spread = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    levels = torch.arange(256, device=images.device)
    return map_values(images, torch.where(step > 0, spread, levels))


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean grey of each image, ``mmcv.adjust_contrast``.

    Args:
        images (Tensor): (N, 3, H, W), uint8.
        factors (Tensor): (N, 1), 1 leaves an image as it is.

    Returns:
        Tensor: (N, 3, H, W), uint8.
    """
    mean = grey(images).flatten(1).float().mean(dim=1, keepdim=True).round()
    levels = torch.arange(256, device=images.device, dtype=torch.float32)
    return map_values(images, (levels * factors + mean * (1 - factors)).clamp(0, 255))


def adjust_color(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image, ``mmcv.adjust_color``.

    Args:
        images (Tensor): (N, 3, H, W), uint8.
        factors (Tensor): (N, 1), 1 leaves an image as it is, 0 makes it grey.

    Returns:
        Tensor: (N, 3, H, W), uint8.
    """
    factors = factors[:, :, None, None]
    blended = images * factors + grey(images)[:, None] * (1 - factors)
    return blended.round_().clamp_(0, 255).to(torch.uint8)


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
    box = F.avg_pool2d(F.pad(values, (1, 1, 1, 1), mode='reflect'), 3, stride=1)
    smooth = (box.mul_(9).add_(values, alpha=4)).div_(13).round_()
    blended = torch.lerp(smooth, values, factors[:, :, None, None])
    return blended.clamp_(0, 255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """OpenCV's grey of each pixel.

    Args:
        images (Tensor): (N, 3, H, W), uint8.

    Returns:
        Tensor: (N, H, W), int32, from 0 to 255.
    """
    red, green, blue = images.to(torch.int32).unbind(1)
    weighted = red * _GREY_WEIGHTS[0] + green * _GREY_WEIGHTS[1] + blue * _GREY_WEIGHTS[2]
    return (weighted + 2**13) >> 14
