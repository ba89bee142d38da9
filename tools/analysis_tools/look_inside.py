"""Pictures of what a model sees: receptive field, groups and directions, Grad-CAM, scan paths.

look_inside.py field  CONFIG [--checkpoint FILE] [--peers TIMM_MODEL ...]
look_inside.py groups CONFIG CHECKPOINT IMAGE
look_inside.py cam    CONFIG CHECKPOINT IMAGE
look_inside.py scans  IMAGE
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import matplotlib
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from PIL import Image
from torch import Tensor, nn

from groupmamba_mm.analysis.arguments import png_path, positive_int
from groupmamba_mm.analysis.building import build_model
from groupmamba_mm.analysis.inside import area_of_share, effective_receptive_field, maps_of_groups
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import ConfigError
from groupmamba_mm.extras import explain_missing
from groupmamba_mm.inference import Predictor
from groupmamba_mm.inference.building import build_with_weights
from groupmamba_mm.layers.initialization import init_parameters
from groupmamba_mm.ops import DIRECTIONS, MIRRORED_DIRECTIONS
from groupmamba_mm.ops.selective_scan import to_scan_order

matplotlib.use('Agg')
from matplotlib import pyplot as plt

#: Shares of the receptive field whose areas are printed, as RepLKNet does.
SHARES = (0.2, 0.5, 0.99)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    field = commands.add_parser(
        'field', help='effective receptive field, before and after training, beside peers'
    )
    field.add_argument('config', help='config of a classifier')
    field.add_argument('--checkpoint', help='its trained weights; without: untrained alone')
    field.add_argument(
        '--peers', nargs='*', default=[], metavar='TIMM_MODEL',
        help='untrained models of timm, such as swin_tiny_patch4_window7_224 convnext_tiny',
    )  # fmt: skip
    field.add_argument('--size', type=positive_int, default=224, help='side of the images')
    field.add_argument('--images', type=positive_int, default=16, help='number of noise images')
    groups = commands.add_parser('groups', help="gradient and state of each group's scan")
    groups.add_argument('--stage', type=int, default=2, help='from 0 (default: %(default)s)')
    groups.add_argument('--block', type=int, default=-1, help='from 0; -1: the last')
    cam = commands.add_parser('cam', help='Grad-CAM of the best class (extra `analysis`)')
    for command in (groups, cam):
        command.add_argument('config', help='config of a classifier')
        command.add_argument('checkpoint', help='its trained weights')
    scans = commands.add_parser('scans', help="an image's way through the scans")
    scans.add_argument('--grid', type=positive_int, default=6, help='tokens of a side')
    scans.add_argument('--all', action='store_true', help='all eight directions, not the four')
    for command in (groups, cam, scans):
        command.add_argument('image', help='an image file')
    for command, name in ((field, 'field'), (groups, 'groups'), (cam, 'cam'), (scans, 'scans')):
        command.add_argument(
            '--out', type=png_path, default=f'{name}.png', help='default: %(default)s'
        )
    return parser.parse_args(argv)


def show_field(args: argparse.Namespace) -> None:
    """Draw effective receptive fields beside each other, and print how large they are."""
    torch.manual_seed(0)
    name = Path(args.config).stem
    cfg = load_config(args.config)
    untrained = build_model(cfg)
    if not hasattr(untrained, 'backbone') or untrained.backbone.out_indices is not None:
        raise ConfigError(f'{args.config} is no classifier of ours; take one of configs/groupmamba')
    init_parameters(untrained.backbone)
    subjects = {f'{name}, untrained': _last_map(untrained.backbone)}
    if args.checkpoint:
        trained = build_with_weights(cfg, args.checkpoint)
        subjects[f'{name}, trained'] = _last_map(trained.backbone)
    for peer in args.peers:
        subjects[f'{peer}, untrained'] = _peer(peer, args.size)
    images = torch.randn(args.images, 1, 3, args.size, args.size)
    fields = {}
    print(f'| model | {" | ".join(f"area of {share:.0%}" for share in SHARES)} |')
    print('|---|' + '---:|' * len(SHARES))
    for title, features in subjects.items():
        fields[title] = effective_receptive_field(features, images)
        areas = [f'{area_of_share(fields[title], share):.1%}' for share in SHARES]
        print(f'| {title} | {" | ".join(areas)} |', flush=True)
    figure, panels = plt.subplots(1, len(fields), figsize=(3.2 * len(fields), 3.6), squeeze=False)
    for axes, (title, field) in zip(panels[0], fields.items()):
        axes.imshow(np.log10(field.numpy() + 1e-4), cmap='viridis', vmin=-4, vmax=0)
        axes.set_title(title.replace(', ', ',\n'), fontsize=8)
        axes.axis('off')
    _save(figure, args.out)


def _last_map(backbone: nn.Module) -> Callable[[Tensor], Tensor]:
    """A classifier's last stage as a map (B, C, h, w)."""
    backbone.eval()

    def features(images: Tensor) -> Tensor:
        x, grid = backbone.stem(images)
        for stage in range(len(backbone.stages)):
            x, grid = backbone.run_stage(stage, x, grid)
        return x.transpose(1, 2).unflatten(2, grid)

    return features


def _peer(name: str, size: int) -> Callable[[Tensor], Tensor]:
    with explain_missing('--peers'):
        import timm
    if not timm.is_model(name):
        raise ConfigError(f'timm {timm.__version__} has no model {name!r}; see timm.list_models()')
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    model = timm.create_model(name, **(dict(img_size=size) if fixed else {})).eval()
    return lambda images: model.forward_intermediates(
        images, indices=1, output_fmt='NCHW', intermediates_only=True
    )[0]


def show_groups(args: argparse.Namespace) -> None:
    """Draw what each group's scan does with an image."""
    predictor, image, inputs = _prepare(args)
    backbone = predictor.model.backbone
    if not -len(backbone.stages) <= args.stage < len(backbone.stages):
        raise ConfigError(f'--stage {args.stage}: there are stages 0 to {len(backbone.stages) - 1}')
    maps = maps_of_groups(backbone, inputs, args.stage, args.block)
    figure, panels = plt.subplots(len(maps), 3, figsize=(7.5, 2.5 * len(maps)), squeeze=False)
    for row, found in zip(panels, maps):
        row[0].imshow(image)
        row[0].set_ylabel(found.direction, fontsize=9)
        row[1].imshow(
            np.log10((found.gradient / found.gradient.max()).numpy() + 1e-4), cmap='viridis'
        )
        row[2].imshow(found.state, cmap='magma')
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, title in zip(panels[0], ('image', 'gradient of the centre', 'state')):
        axes.set_title(title, fontsize=10)
    _save(figure, args.out)


def show_cam(args: argparse.Namespace) -> None:
    """Draw Grad-CAM of the best class over the image."""
    with explain_missing('look_inside.py cam'):
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.image import show_cam_on_image
    predictor, image, inputs = _prepare(args)
    found = predictor(args.image)
    backbone = predictor.model.backbone
    grids = []
    handle = backbone.stages[-1][-1].register_forward_pre_hook(
        lambda module, arguments: grids.append(arguments[1])
    )
    with GradCAM(
        model=_Scores(predictor.model),
        target_layers=[backbone.stages[-1][-1]],
        reshape_transform=lambda tokens: tokens.transpose(1, 2).unflatten(2, grids[0]),
    ) as cam:
        shown = cam(input_tensor=inputs, targets=None)[0]  # None: the best class
    handle.remove()
    picture = show_cam_on_image(image / np.float32(255), shown, use_rgb=True)
    figure, panels = plt.subplots(1, 2, figsize=(7, 3.8))
    for axes, array in zip(panels, (image, picture)):
        axes.imshow(array)
        axes.axis('off')
    figure.suptitle(f'{found["label"]}, score {found["score"]:.2f}', fontsize=11)
    _save(figure, args.out)


class _Scores(nn.Module):
    """A classifier as a function of images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.head(self.model.backbone(images))


def show_scans(args: argparse.Namespace) -> None:
    """Draw the way over the grid that each direction takes, and what comes of the image."""
    directions = (*DIRECTIONS, *MIRRORED_DIRECTIONS) if args.all else DIRECTIONS
    cell, n = 32, args.grid
    with Image.open(args.image) as opened:
        image = np.asarray(opened.convert('RGB').resize((n * cell, n * cell)))
    patches = (
        image.reshape(n, cell, n, cell, 3).transpose(0, 2, 1, 3, 4).reshape(n * n, cell, cell, 3)
    )
    figure, panels = plt.subplots(
        len(directions), 2, figsize=(9, 2.1 * len(directions)), squeeze=False,
        width_ratios=(1, 3.2),
    )  # fmt: skip
    for (way, sequence), direction in zip(panels, directions):
        order = to_scan_order(torch.arange(n * n)[None], (n, n), direction)[0].numpy()
        rows, columns = order // n, order % n
        way.imshow(image)
        centres = (columns + 0.5) * cell, (rows + 0.5) * cell
        way.plot(*centres, color='white', linewidth=1.2, alpha=0.8)
        way.scatter(*centres, c=np.arange(n * n), cmap='plasma', s=14, zorder=3)
        way.set_title(direction, fontsize=9)
        # the sequence in lines of a grid's row and a half, as it is read
        per_line = 2 * n
        lines = [order[i : i + per_line] for i in range(0, n * n, per_line)]
        strip = np.full((len(lines) * (cell + 6), per_line * (cell + 2), 3), 255, np.uint8)
        for i, line in enumerate(lines):
            for j, position in enumerate(line):
                strip[
                    i * (cell + 6) : i * (cell + 6) + cell, j * (cell + 2) : j * (cell + 2) + cell
                ] = patches[position]
        sequence.imshow(strip)
        way.axis('off')
        sequence.axis('off')
    panels[0][1].set_title('as the scan reads it', fontsize=9)
    _save(figure, args.out)


def _prepare(args: argparse.Namespace) -> tuple[Predictor, np.ndarray, Tensor]:
    """The model, the image as the model's pipeline cuts it, (H, W, 3) in RGB, and its input."""
    predictor = Predictor(args.config, args.checkpoint, top=1)
    if predictor.cfg.default_scope != 'mmpretrain':
        raise ConfigError(f'{args.config} is no classifier; take one of configs/groupmamba')
    prepared = predictor.prepare(args.image)
    data = predictor.model.data_preprocessor(pseudo_collate([prepared]), training=False)
    image = prepared['inputs'].permute(1, 2, 0).numpy()
    return predictor, np.ascontiguousarray(image[..., ::-1]), data['inputs']


def _save(figure: plt.Figure, out: str) -> None:
    figure.tight_layout()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    print(f'Wrote {out}')


COMMANDS = dict(field=show_field, groups=show_groups, cam=show_cam, scans=show_scans)


def main(argv: list[str] | None = None) -> None:
    """Draw what was asked for.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    COMMANDS[args.command](args)


if __name__ == '__main__':
    run_command(main)
