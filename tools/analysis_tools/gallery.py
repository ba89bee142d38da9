"""Draw ground truth, above, and prediction, below, of a detector or segmenter, with their scores.

The form of the paper's Figures 6 and 7. RESULTS is what ``tools/test.py CONFIG CHECKPOINT --out
RESULTS`` wrote: a pickle of a detector, a folder of label images of a segmenter. Images and ground
truth come from the config's test data; mmdet's and mmseg's visualizers paint.
"""

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import matplotlib
import mmcv
import numpy as np
import torch
from mmengine.registry import VISUALIZERS, DefaultScope
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from groupmamba_mm.analysis.arguments import png_path, positive_int
from groupmamba_mm.analysis.results import build_test_data, read_results
from groupmamba_mm.datasets.loading import CheckedLoadImageFromFile
from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.engine.hooks import image_roots, relative_name
from groupmamba_mm.errors import ConfigError, DataError
from groupmamba_mm.visualization import readable_names

matplotlib.use('Agg')  # without a display
from matplotlib import pyplot as plt

#: IoU from which a prediction of the right class counts as found.
FOUND_IOU = 0.5
#: Images beside each other, and the least length in pixels of a painted one's longer side.
COLUMNS, LEAST_SIDE = 4, 320


class Example(NamedTuple):
    """An image with its ground truth and prediction, as the libraries' visualizers take them.

    Attributes:
        image: Uint8 (H, W, 3), RGB.
        sample: With ``gt_...`` and ``pred_...``.
        caption: The score, in words.
    """

    image: np.ndarray
    sample: BaseDataElement
    caption: str


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', metavar='CONFIG', help='detection or segmentation config')
    parser.add_argument('results', metavar='RESULTS', help='what tools/test.py --out wrote')
    parser.add_argument('--out', required=True, type=png_path, help='PNG file to write')
    parser.add_argument(
        '--num', type=positive_int, default=12, help='number of images (default: %(default)s)'
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='which images are chosen (default: %(default)s)'
    )
    parser.add_argument(
        '--images', nargs='+', metavar='NAME', help='file names of test images, instead of a choice'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='detections below this score are left out (default: %(default)s)',
    )
    add_cfg_options(parser, 'change the config, as in tools/test.py')
    return parser.parse_args(argv)


def choose(infos: Sequence[dict], names: Sequence[str] | None, num: int, seed: int) -> list[int]:
    """Choose images of a data set.

    Args:
        infos: Its entries.
        names: Of the files that are wanted, None to draw lots.
        num: How many lots; fewer if there are fewer.
        seed: Of the lots.

    Returns:
        Numbers of entries, in rising order for lots.

    Raises:
        DataError: A name is not there.
    """
    if names is None:
        order = np.random.default_rng(seed).permutation(len(infos))
        return sorted(order[:num].tolist())
    by_name = {Path(info['img_path']).name: index for index, info in enumerate(infos)}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise DataError(
            f'--images {", ".join(missing)}: not in the test data; there are {len(by_name)} '
            f'images such as {next(iter(by_name))}'
        )
    return [by_name[name] for name in names]


def read_image(path: str) -> np.ndarray:
    """Read an image as RGB."""
    return np.ascontiguousarray(CheckedLoadImageFromFile()(dict(img_path=path))['img'][..., ::-1])


def detections(
    dataset: Any, results: str, chosen: Sequence[int], score_thr: float
) -> Iterator[Example]:
    """Images of a detector.

    Args:
        dataset: The test data set.
        results: The pickle; see :func:`groupmamba_mm.analysis.results.read_results`.
        chosen: Which images.
        score_thr: Least score of a detection.

    Yields:
        The examples.

    Raises:
        DataError: The pickle is missing, holds something else or is of other images.
    """
    from mmdet.datasets.transforms import LoadAnnotations
    from mmdet.structures import DetDataSample
    from pycocotools import mask as coco_mask

    samples = read_results(results)
    if not all(isinstance(sample, dict) and 'pred_instances' in sample for sample in samples):
        raise DataError(
            f"results {results} hold no list of a detector's predictions; make it with "
            'tools/test.py CONFIG CHECKPOINT --out results.pkl'
        )
    by_id = {sample['img_id']: sample['pred_instances'] for sample in samples}
    for index in chosen:
        info = dataset.get_data_info(index)
        if info['img_id'] not in by_id:
            raise DataError(
                f'results {results} have nothing of image {info["img_id"]} of the test data; give '
                'the config that the results are from'
            )
        found = by_id[info['img_id']]
        keep = found['scores'] >= score_thr
        has_masks = 'masks' in found
        info['instances'] = [i for i in info['instances'] if not i['ignore_flag']]
        shape = (info['height'], info['width'])
        loaded = LoadAnnotations(with_bbox=True, with_mask=has_masks)(
            dict(info, img_shape=shape, ori_shape=shape)
        )
        truth = InstanceData(bboxes=loaded['gt_bboxes'].tensor, labels=loaded['gt_bboxes_labels'])
        pred = InstanceData(
            bboxes=found['bboxes'][keep],
            labels=found['labels'][keep].numpy(),
            scores=found['scores'][keep],
        )
        if has_masks:
            masks = [mask for mask, is_kept in zip(found['masks'], keep.tolist()) if is_kept]
            pred.masks = np.array([coco_mask.decode(mask) for mask in masks], dtype=bool).reshape(
                -1, *shape
            )
            truth.masks = loaded['gt_masks'].masks.astype(bool)
        right = count_found(truth, pred)
        sample = DetDataSample(gt_instances=truth, pred_instances=pred)
        caption = f'{right} of {len(truth)} found, {len(pred) - right} wrong'
        yield Example(read_image(info['img_path']), sample, caption)


def count_found(truth: InstanceData, pred: InstanceData) -> int:
    """Count what was found with the right class, each thing once, the surest first.

    Args:
        truth: With ``labels``, and ``masks`` (N, H, W) or ``bboxes`` (N, 4).
        pred: The same and ``scores``.

    Returns:
        How many of the truth.
    """
    from torchvision.ops import box_iou

    if 'masks' in truth:
        one, other = (torch.as_tensor(part.masks).flatten(1).float() for part in (pred, truth))
        both = one @ other.T
        iou = both / (one.sum(1)[:, None] + other.sum(1) - both).clamp(min=1)
    else:
        iou = box_iou(torch.as_tensor(pred.bboxes), torch.as_tensor(truth.bboxes))
    iou[torch.as_tensor(pred.labels)[:, None] != torch.as_tensor(truth.labels)] = 0
    count = 0
    for i in pred.scores.argsort(descending=True).tolist() if len(truth) else []:
        best, match = iou[i].max(0)
        if best >= FOUND_IOU:
            count += 1
            iou[:, match] = 0
    return count


def segmentations(dataset: Any, results: str, chosen: Sequence[int]) -> Iterator[Example]:
    """Images of a segmenter.

    Args:
        dataset: The test data set.
        results: The folder of label images.
        chosen: Which images.

    Yields:
        The examples.

    Raises:
        DataError: A label image is missing or of another size.
    """
    from mmseg.evaluation import IoUMetric
    from mmseg.structures import SegDataSample

    roots = image_roots(dataset)
    load = [
        step for step in dataset.pipeline.transforms if 'LoadAnnotations' in type(step).__name__
    ]
    for index in chosen:
        info = dataset.get_data_info(index)
        file = (Path(results) / relative_name(info['img_path'], roots)).with_suffix('.png')
        if not file.is_file():
            raise DataError(
                f'results {results} have no {file.relative_to(results)}; make the '
                'folder with tools/test.py CONFIG CHECKPOINT --out FOLDER'
            )
        if not load or 'seg_map_path' not in info:
            raise DataError(
                f'image {info["img_path"]} has no label map in the test data, so there '
                'is nothing to compare with; give a config whose test data have some'
            )
        truth = torch.from_numpy(load[0](dict(info))['gt_seg_map'].astype(np.int64))
        found = torch.from_numpy(mmcv.imread(str(file), flag='unchanged').astype(np.int64))
        if truth.shape != found.shape:
            raise DataError(
                f'results {file} are {found.shape[0]}x{found.shape[1]} (H x W), the '
                f'label map is {truth.shape[0]}x{truth.shape[1]}; give the config and '
                'the data that the results are from'
            )
        if info['reduce_zero_label']:
            found = found - 1  # written as the data set's files are
        both, either, *_ = IoUMetric.intersect_and_union(
            found, truth, len(dataset.metainfo['classes']), dataset.ignore_index
        )
        iou = (both / either)[either > 0].mean().item()
        sample = SegDataSample(
            gt_sem_seg=PixelData(data=truth[None]), pred_sem_seg=PixelData(data=found[None])
        )
        yield Example(read_image(info['img_path']), sample, f'mean IoU {iou:.0%}')


def paint(visualizer: Any, example: Example, **options: Any) -> list[np.ndarray]:
    """Paint an image twice: with what is there, and with what was predicted.

    Args:
        visualizer: The library's.
        example: The image.
        **options: Of its ``add_datasample``.

    Returns:
        Two pictures (H, W, 3), uint8, RGB.
    """
    pictures = []
    for is_truth in (True, False):
        visualizer.add_datasample(
            'image',
            example.image,
            example.sample,
            draw_gt=is_truth,
            draw_pred=not is_truth,
            **options,
        )
        pictures.append(visualizer.get_image())
    return pictures


def enlarged(example: Example) -> Example:
    """A small image with all that belongs to it at twice, three times... the size.

    Visualizers write names in letters of one size: on a small image they would hide it.
    """
    factor = -(-LEAST_SIDE // max(example.image.shape[:2]))
    if factor == 1:
        return example
    sample = example.sample.clone()
    for name, part in example.sample.items():
        if isinstance(part, PixelData):
            data = part.data.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            sample.set_data({name: PixelData(data=data)})
        else:
            part = part.clone()
            part.bboxes = part.bboxes * factor
            if 'masks' in part:
                part.masks = part.masks.repeat(factor, 1).repeat(factor, 2)
            sample.set_data({name: part})
    image = mmcv.imrescale(example.image, factor, interpolation='bicubic')
    return Example(image, sample, example.caption)


def main(argv: list[str] | None = None) -> None:
    """Choose, draw and write.

    Args:
        argv: The arguments, None for the process's own.

    Raises:
        ConfigError: The config is neither a detector's nor a segmenter's.
    """
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    if cfg.default_scope not in ('mmdet', 'mmseg'):
        raise ConfigError(
            f'config {cfg.filename} is for {cfg.default_scope}; of a classifier, '
            'tools/analysis_tools/prediction_grid.py draws the predictions'
        )
    dataset = build_test_data(cfg)
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    chosen = choose(infos, args.images, args.num, args.seed)
    if cfg.default_scope == 'mmdet':
        examples = detections(dataset, args.results, chosen, args.score_thr)
        options = dict(pred_score_thr=args.score_thr)
        how = (
            f'detections from a score of {args.score_thr:g}; found: right class and an IoU of '
            f'{FOUND_IOU:g} or more'
        )
    else:
        examples, options = segmentations(dataset, args.results, chosen), {}
        how = 'the mean is over the classes in the ground truth or the prediction of an image'
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        visualizer = VISUALIZERS.build(
            dict(cfg.visualizer, name=f'gallery-{id(dataset)}', vis_backends=None)
        )
    meta = dataset.metainfo
    visualizer.dataset_meta = dict(
        meta, classes=readable_names(meta['classes']), palette=meta.get('palette') or 'random'
    )

    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, panels = plt.subplots(
        2 * rows, columns, figsize=(2.6 * columns, 4.9 * rows + 0.6), squeeze=False
    )
    for axes in panels.flat:
        axes.axis('off')
    for number, example in enumerate(examples):
        row, column = divmod(number, columns)
        for axes, picture in zip(
            panels[2 * row : 2 * row + 2, column], paint(visualizer, enlarged(example), **options)
        ):
            axes.imshow(picture)
        panels[2 * row, column].set_title('ground truth', fontsize=8, color='dimgray')
        panels[2 * row + 1, column].set_title(example.caption, fontsize=8, weight='bold')
    title = f'{Path(args.config).stem}: {len(chosen)} of {len(dataset):,} test images; {how}'
    figure.suptitle(textwrap.fill(title, 38 * columns), fontsize=9)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    plt.close(figure)
    print(f'Wrote {args.out}: {len(chosen)} images')


if __name__ == '__main__':
    run_command(main)
