"""Draw the architecture of a size from its modules, beside pictures of predictions."""

import argparse
import math
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import matplotlib

matplotlib.use('Agg')  # before pyplot: no window

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from groupmamba_mm import GroupMamba
from groupmamba_mm.backbones.archs import ARCHS
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.errors import UserError
from groupmamba_mm.ops.selective_scan.directions import to_scan_order

SIZE = 224
#: What follows the groups in a layer of each family.
TAILS = {
    'paper': ('LayerNorm', 'FFN', '+ input'),
    'official': ('linear', '+ input', 'LayerNorm', 'FFN', '+ its input'),
}
STAGE, GROUP, OTHER = '#cfe3f7', ('#f6c5a5', '#cfe8b9', '#f3e3a1', '#d9cdf0'), '#eeeeee'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('arch', choices=tuple(ARCHS), help='the size')
    parser.add_argument('--out', required=True, metavar='FILE', help='the picture, .png or .svg')
    parser.add_argument(
        '--predictions',
        nargs='+',
        default=[],
        metavar='TITLE=FILE',
        help='pictures to put below, such as those that the quickstart draws',
    )
    return parser.parse_args(argv)


def stages_of(backbone: GroupMamba) -> list[tuple[str, str]]:
    """Run an image through a backbone and describe what it passes.

    Args:
        backbone: A classifier's backbone.

    Returns:
        Title and description of image, stem, stages and summary.
    """
    found = [('image', f'3 x {SIZE} x {SIZE}')]

    def describe(title, name):
        def hook(module, inputs, output):
            tokens = output[0] if isinstance(output, tuple) else output
            side = math.isqrt(tokens.shape[1])
            found.append((title, f'{name}\n{tokens.shape[2]} x {side} x {side}'))

        return hook

    hooks = [backbone.stem.register_forward_hook(describe('stem', type(backbone.stem).__name__))]
    for number, stage in enumerate(backbone.stages, 1):
        name = f'{len(stage)} layers'
        hooks.append(stage[-1].register_forward_hook(describe(f'stage {number}', name)))
    with torch.no_grad():
        (vector,) = backbone.eval()(torch.zeros(1, 3, SIZE, SIZE))
    for hook in hooks:
        hook.remove()
    found.append(('summary', f'{type(backbone.summary).__name__}\n{vector.shape[1]}'))
    return found


def directions_of(backbone: GroupMamba) -> tuple[str, ...]:
    """The direction of each group in the backbone's first layer."""
    plans = [module.plan for module in backbone.stages[0][0].modules() if hasattr(module, 'plan')]
    return plans[0][0]


def _box(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle='round,pad=0,rounding_size=0.08',
            facecolor=color, edgecolor='#555555', linewidth=0.8,
        )
    )  # fmt: skip


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style) -> None:
    options = dict(arrowstyle='-|>', color='#555555', linewidth=1, shrinkA=0, shrinkB=0) | style
    axes.annotate('', end, start, arrowprops=options)


def draw_stages(axes: Axes, stages: list[tuple[str, str]]) -> None:
    """Draw the row of image, stem, stages and summary.

    Args:
        axes: Where.
        stages: See :func:`stages_of`.
    """
    for index, (title, text) in enumerate(stages):
        color = STAGE if title.startswith('stage') else OTHER
        _box(axes, 2 * index, 0, 1.7, 1.15, color)
        axes.text(2 * index + 0.85, 0.92, title, ha='center', va='center', weight='bold')
        axes.text(2 * index + 0.85, 0.42, text, ha='center', va='center', fontsize=6.2)
        if index:
            _arrow(axes, (2 * index - 0.3, 0.58), (2 * index, 0.58))
    axes.set(xlim=(-0.1, 2 * len(stages) - 0.2), ylim=(-0.1, 1.25))
    axes.set_aspect('equal')
    axes.axis('off')


def draw_layer(axes: Axes, backbone: GroupMamba) -> None:
    """Draw how one layer splits its channels into groups and scans each.

    Args:
        axes: Where.
        backbone: The backbone.
    """
    directions, side = directions_of(backbone), 4
    layer = backbone.stages[0][0]
    width = backbone.arch.embed_dims[0] // len(directions)
    cells = torch.arange(side * side).view(1, -1, 1)
    height = 1.5 * len(directions)
    _box(axes, 0, 0, 1.5, height, STAGE)
    axes.text(
        0.75, height / 2, f'tokens\nof stage 1\n\n{width * len(directions)}\nchannels',
        ha='center', va='center',
    )  # fmt: skip
    for group, name in enumerate(directions):
        bottom = 1.5 * (len(directions) - 1 - group)
        color = GROUP[group % len(GROUP)]
        _box(axes, 2.6, bottom + 0.05, 4.6, 1.4, color)
        _arrow(axes, (1.5, bottom + 0.75), (2.6, bottom + 0.75))
        axes.text(4.35, bottom + 0.98, f'group {group + 1}: {name}', va='center')
        axes.text(4.35, bottom + 0.52, f'{width} channels', va='center', fontsize=6.2)
        # the scan's own order of the cells, walked through
        order = to_scan_order(cells, (side, side), name).flatten().tolist()
        points = [(3.0 + 0.3 * (c % side), bottom + 1.2 - 0.3 * (c // side)) for c in order]
        axes.plot(*zip(*points[:-1]), color='#333333', linewidth=0.8)
        axes.plot(*zip(*points), 'o', color='#333333', markersize=1.6)
        _arrow(axes, points[-2], points[-1], linewidth=0.8, color='#333333')
        axes.plot(*points[0], 'o', color='#c0392b', markersize=3)
        _arrow(axes, (7.2, bottom + 0.75), (8.3, bottom + 0.75))
    _box(axes, 8.3, 0, 1.7, height, OTHER)
    text = 'all groups\nside by side\n\ntimes\n\nchannel\naffinity\n(Eq. 7-9)'
    axes.text(9.15, height / 2, text, ha='center', va='center')
    _arrow(axes, (10, height / 2), (10.6, height / 2))
    _box(axes, 10.6, 0, 1.7, height, OTHER)
    tail = TAILS[backbone.arch.family]
    axes.text(11.45, height / 2, '\n\n'.join(tail), ha='center', va='center')
    axes.set_title(f'one {type(layer).__name__}: each group scans in its own direction', fontsize=8)
    axes.set(xlim=(-0.1, 12.4), ylim=(-0.1, height + 0.1))
    axes.set_aspect('equal')
    axes.axis('off')


def read_predictions(arguments: list[str]) -> list[tuple[str, Path]]:
    """Split TITLE=FILE.

    Args:
        arguments: As on the command line.

    Returns:
        Titles and files.

    Raises:
        UserError: If one has no title, or its file is not there.
    """
    found = []
    for argument in arguments:
        title, _, file = argument.partition('=')
        if not file or not Path(file).is_file():
            raise UserError(f'--predictions {argument}: give TITLE=FILE with a picture that exists')
        found.append((title, Path(file)))
    return found


def main() -> None:
    """Draw and write the picture."""
    args = parse_args()
    predictions = read_predictions(args.predictions)
    backbone = GroupMamba(args.arch)
    plt.rcParams.update({'font.size': 7.5, 'font.family': 'DejaVu Sans'})
    rows = [0.75, 2.9] + ([3.1] if predictions else [])
    figure = plt.figure(figsize=(8.4, 1.15 * sum(rows)), layout='constrained')
    grid = figure.add_gridspec(len(rows), max(1, len(predictions)), height_ratios=rows)
    draw_stages(figure.add_subplot(grid[0, :]), stages_of(backbone))
    draw_layer(figure.add_subplot(grid[1, :]), backbone)
    for column, (title, file) in enumerate(predictions):
        axes = figure.add_subplot(grid[2, column])
        axes.imshow(plt.imread(file))
        axes.set_title(title, fontsize=8)
        axes.axis('off')
    figure.savefig(args.out, dpi=110)
    print(f'Wrote {args.out}')


if __name__ == '__main__':
    run_command(main)
