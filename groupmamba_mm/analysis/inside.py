"""What a model looks at: effective receptive fields, and the maps of each group's scan."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groupmamba_mm.layers import GroupedSSM
from groupmamba_mm.ops import selective_scan
from groupmamba_mm.ops.selective_scan import from_scan_order


def effective_receptive_field(
    features: Callable[[Tensor], Tensor], batches: Iterable[Tensor]
) -> Tensor:
    """How much each pixel moves the centre of the last feature map (Luo et al., 2016).

    The gradient of the centre's positive activations, its positive part summed over channels and
    images, as in the pictures of RepLKNet.

    Args:
        features: Takes images (B, 3, H, W), and returns the map (B, C, h, w).
        batches: Images of one size.

    Returns:
        (H, W), its largest value 1.

    Raises:
        ValueError: There is no image, or no pixel reaches the centre.
    """
    total = None
    for images in batches:
        images = images.detach().requires_grad_()
        maps = features(images)
        centre = maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2]
        (gradient,) = torch.autograd.grad(centre.relu().sum(), images)
        share = gradient.relu().sum((0, 1))
        total = share if total is None else total + share
    if total is None or not total.max() > 0:
        raise ValueError('the centre of the feature map depends on no pixel of these images')
    return total / total.max()


def area_of_share(field: Tensor, share: float) -> float:
    """The part of the image that the smallest centred square with a share of the field covers.

    Args:
        field: (H, W), not negative.
        share: Between 0 and 1.

    Returns:
        Between 0 and 1; small: the model looks at little.
    """
    height, width = field.shape
    wanted = share * field.sum()
    for reach in range(max(height, width) + 1):
        top, left = max(0, height // 2 - reach), max(0, width // 2 - reach)
        square = field[top : height // 2 + reach + 1, left : width // 2 + reach + 1]
        if square.sum() >= wanted:
            break
    return square.numel() / field.numel()


@dataclass(frozen=True)
class GroupMaps:
    """What one group's scan does with an image.

    Attributes:
        direction: Of its scan.
        gradient: (H, W), how much each token moves, by way of the state, the output at the centre.
        state: (H, W), the norm of the state at each token.
    """

    direction: str
    gradient: Tensor
    state: Tensor


def maps_of_groups(backbone: nn.Module, image: Tensor, stage: int, block: int) -> list[GroupMaps]:
    """The maps of all groups of a block, for one image.

    Args:
        backbone: A ``GroupMamba``.
        image: (1, C, H, W), normalised.
        stage: Number of the stage, from 0.
        block: Number of its block, from 0; -1: the last.

    Returns:
        For each group, in the order of the channels; with shared directions for the first scan.
    """
    layer = backbone.stages[stage][block]
    ssm = next(module for module in layer.modules() if isinstance(module, GroupedSSM))
    owner = next(module for module in layer.modules() if hasattr(module, 'plan'))
    seen = []

    def keep(module: nn.Module, args: tuple) -> tuple:
        seen.append((args[0].detach(), args[1]))
        return args

    # a hook makes a block run module by module
    handle = ssm.register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            backbone(image)
    finally:
        handle.remove()
    x, grid = seen[0]
    directions = owner.plan[0]
    # the paper's blocks bring tokens into the order of the scan first
    is_ordered = hasattr(owner, 'conv1d')
    ahead = ('left-right',) * len(directions) if is_ordered else directions
    dt, A, B, C = ssm.discretise(x)
    x = x.requires_grad_()
    width = x.shape[-1] // len(directions)
    maps = []
    for g, direction in enumerate(directions):
        own = slice(g * width, (g + 1) * width)

        def scan(C: Tensor, D: Tensor, g: int = g, own: slice = own) -> Tensor:
            group = slice(g, g + 1)
            return selective_scan(
                x[..., own], dt[..., own], A[own], B[:, :, group], C, D,
                grid=grid, directions=ahead[g : g + 1], backend='torch',
            )  # fmt: skip

        def as_map(values: Tensor, direction: str = direction) -> Tensor:
            if is_ordered:
                values = from_scan_order(values, grid, direction)
            return values.detach().reshape(grid)

        no_skip = torch.zeros_like(
            ssm.D[own]
        )  # what a token does to itself would outshine the rest
        y = scan(C[:, :, g : g + 1], no_skip)
        centre = grid[0] // 2 * grid[1] + grid[1] // 2
        if is_ordered:
            positions = torch.arange(grid[0] * grid[1]).view(1, -1)
            centre = from_scan_order(positions, grid, direction)[0, centre]
        (gradient,) = torch.autograd.grad(y[0, centre].sum(), x)
        state = torch.stack(
            [
                scan(
                    nn.functional.one_hot(torch.full(B.shape[:2], n), ssm.d_state).to(x)[
                        :, :, None
                    ],
                    no_skip,
                )
                for n in range(ssm.d_state)
            ]
        )
        maps.append(
            GroupMaps(
                direction,
                as_map(gradient[..., own].abs().sum(-1)),
                as_map(state.square().sum((0, -1)).sqrt()),
            )
        )
    return maps
