"""Look at a config's images as a model gets them: after the pipeline, with their ground truth.

mmpretrain, mmdet and mmseg have commands of this name with other options each, and mmpretrain's
ends in an error with matplotlib 3.11. This one is the same for the three tasks. What a model's
preprocessor adds on its device (the augmentations of the ImageNet configs) comes later.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import cv2
import numpy as np
from mmengine.registry import DATASETS, VISUALIZERS, DefaultScope

import groupmamba_mm.engine  # noqa: F401, registers what configs name
from groupmamba_mm.analysis.arguments import positive_int
from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.errors import ConfigError
from groupmamba_mm.inference import find_config
from groupmamba_mm.inference.tasks import TASKS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', metavar='CONFIG', help='config file, or the name of one of ours')
    parser.add_argument(
        '--phase', choices=('train', 'val', 'test'), default='train', help='(default: %(default)s)'
    )
    parser.add_argument(
        '--number',
        type=positive_int,
        default=20,
        help='images, evenly spread over the data set (default: %(default)s)',
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/browse'),
        help='folder to write (default: %(default)s)',
    )
    add_cfg_options(parser, 'change the config, as in tools/train.py')
    return parser.parse_args(argv)


def paint(visualizer: Any, item: dict, classes: Any) -> np.ndarray:
    """Draw an image's ground truth.

    Args:
        visualizer: The library's.
        item: An entry of the data set, after its pipeline.
        classes: Names of the classes.

    Returns:
        (H, W, 3), uint8, BGR.

    Raises:
        ConfigError: It has not three channels.
    """
    image = item['inputs']
    if len(image) != 3:
        raise ConfigError(f'an image has {len(image)} channels, and three can be drawn')
    rgb = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1].astype(np.uint8))
    sample = item['data_samples']
    if hasattr(visualizer, 'visualize_cls'):
        visualizer.visualize_cls(rgb, sample, classes=classes, draw_pred=False)
    else:
        boxes = sample.get('gt_instances', {}).get('bboxes')
        if hasattr(boxes, 'tensor'):  # of mmdet, whose visualizer takes plain ones
            sample.gt_instances.bboxes = boxes.tensor
        visualizer.add_datasample('image', rgb, sample, draw_pred=False)
    return visualizer.get_image()[..., ::-1]


def main(argv: list[str] | None = None) -> None:
    """Build the data set, and paint.

    Args:
        argv: The arguments, None for the process's own.

    Raises:
        ConfigError: The config has no such data.
    """
    args = parse_args(argv)
    cfg = find_config(args.config, args.cfg_options)
    loader = cfg.get(f'{args.phase}_dataloader')
    if loader is None:
        raise ConfigError(
            f'config {cfg.filename} has no {args.phase}_dataloader; give another --phase'
        )
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(loader.dataset)
        visualizer = VISUALIZERS.build(
            dict(type=TASKS[cfg.default_scope].visualizer, name='browse_dataset')
        )
        visualizer.dataset_meta = dict(dataset.metainfo)
        args.out.mkdir(parents=True, exist_ok=True)
        indices = np.unique(np.linspace(0, len(dataset) - 1, args.number).round().astype(int))
        for index in indices:
            painted = paint(visualizer, dataset[int(index)], dataset.metainfo.get('classes'))
            cv2.imwrite(str(args.out / f'{index:06d}.png'), painted)
    print(f'{len(indices)} of {len(dataset)} images: {args.out}')


if __name__ == '__main__':
    run_command(main)
