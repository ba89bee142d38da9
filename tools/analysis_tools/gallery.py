"""Set ground truth and prediction of a detector or segmenter side by side, with their scores.

RESULTS is what ``tools/test.py CONFIG CHECKPOINT --out RESULTS`` wrote: a pickle of a detector, a
folder of label images of a segmenter. Images and ground truth come from the config's test data.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import cv2
import matplotlib
import matplotlib.pyplot as plt
import mmcv
import numpy as np

from groupmamba_mm.analysis.arguments import png_path, positive_int
from groupmamba_mm.analysis.results import build_test_data, read_results
from groupmamba_mm.datasets.loading import CheckedLoadImageFromFile
from groupmamba_mm.engine.cli import CfgOptions, run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.engine.hooks import image_roots, relative_name
from groupmamba_mm.errors import ConfigError, DataError
from groupmamba_mm.visualization import readable_names

#: IoU from which a prediction of the right class counts as found.
FOUND_IOU = 0.5
#: Share of the image that a segment needs for its name to be written into it.
MIN_NAMED_SHARE = 0.01
#: Classes that are not drawn.
UNPAINTED = ('background',)

DPI = 100
TILE = 230  # pixels of the longer side of an image
PAIR_GAP, GAP, CAPTION, TITLE, MARGIN = 6, 28, 30, 96, 32
PAIRS = 3  # in a row
OPACITY = 0.55
TEXT, MUTED = '#1f2328', '#656d76'


@dataclass(frozen=True, eq=False)
class Segment:
    """Something in an image.

    Attributes:
        label: Its class.
        mask: Bool (H, W), None if there is only a box.
        box: (x1, y1, x2, y2) in pixels, None if there is only a mask.
        score: Of a detection, from 0 to 1.
    """

    label: int
    mask: np.ndarray | None = None
    box: tuple[float, ...] | None = None
    score: float | None = None


@dataclass(frozen=True)
class Example:
    """An image with its ground truth and prediction.

    Attributes:
        image: Uint8 (H, W, 3), RGB.
        truth: What is there.
        prediction: What was predicted.
        caption: The score, in words.
    """

    image: np.ndarray
    truth: Sequence[Segment]
    prediction: Sequence[Segment]
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
        '--score-thr',
        type=float,
        default=0.3,
        help='detections below this score are left out (default: %(default)s)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        default={},
        metavar='KEY=VALUE',
        help='change the config, as in tools/test.py',
    )
    return parser.parse_args(argv)


def detections(dataset: Any, results: str, num: int, seed: int, score_thr: float) -> list[Example]:
    """Choose images of a detector.

    Args:
        dataset: The test data set.
        results: The pickle; see :func:`groupmamba_mm.analysis.results.read_results`.
        num: How many; fewer if there are fewer.
        seed: Of the choice.
        score_thr: Least score of a detection.

    Returns:
        The examples, in the order of the data set.

    Raises:
        DataError: The pickle is missing or holds something else.
    """
    samples = read_results(results)
    if not all(isinstance(sample, dict) and 'pred_instances' in sample for sample in samples):
        raise DataError(
            f"results {results} hold no list of a detector's predictions; make it with "
            'tools/test.py CONFIG CHECKPOINT --out results.pkl'
        )
    infos = {info['img_id']: info for info in map(dataset.get_data_info, range(len(dataset)))}
    examples = []
    for index in choose(len(samples), num, seed):
        sample = samples[index]
        info = infos.get(sample['img_id'])
        if info is None:
            raise DataError(
                f'results {results}: image {sample["img_id"]} is not in the test data '
                'of the config; give the config that the results are from'
            )
        shape = (info['height'], info['width'])
        truth = [
            Segment(i['bbox_label'], mask=decode_mask(i.get('mask'), shape), box=tuple(i['bbox']))
            for i in info['instances']
            if not i['ignore_flag']
        ]
        found = sample['pred_instances']
        kept = [k for k, score in enumerate(found['scores'].tolist()) if score >= score_thr]
        masks = found.get('masks', [None] * len(found['scores']))
        prediction = [
            Segment(
                int(found['labels'][k]),
                mask=decode_mask(masks[k], shape),
                box=tuple(found['bboxes'][k].tolist()),
                score=float(found['scores'][k]),
            )
            for k in kept
        ]
        right = count_found(truth, prediction)
        caption = f'{right} of {len(truth)} found, {len(prediction) - right} wrong'
        examples.append(Example(read_image(info['img_path']), truth, prediction, caption))
    return examples


def segmentations(dataset: Any, results: str, num: int, seed: int) -> list[Example]:
    """Choose images of a segmenter.

    Args:
        dataset: The test data set.
        results: The folder of label images.
        num: How many; fewer if there are fewer.
        seed: Of the choice.

    Returns:
        The examples, in the order of the data set.

    Raises:
        DataError: A label image is missing or of another size.
    """
    examples, roots = [], image_roots(dataset)
    load = [
        step for step in dataset.pipeline.transforms if 'LoadAnnotations' in type(step).__name__
    ]
    for index in choose(len(dataset), num, seed):
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
        truth = load[0](dict(info))['gt_seg_map'].astype(int)
        found = mmcv.imread(str(file), flag='unchanged').astype(int)
        if truth.shape != found.shape:
            raise DataError(
                f'results {file} are {found.shape[0]}x{found.shape[1]} (H x W), the '
                f'label map is {truth.shape[0]}x{truth.shape[1]}; give the config and '
                'the data that the results are from'
            )
        if info['reduce_zero_label']:
            found = found - 1  # written as the data set's files are
        valid = truth != dataset.ignore_index
        labels = np.union1d(truth[valid], found[valid])
        iou = [
            (valid & (truth == k) & (found == k)).sum()
            / (valid & ((truth == k) | (found == k))).sum()
            for k in labels
        ]
        examples.append(
            Example(
                read_image(info['img_path']),
                [Segment(int(k), mask=truth == k) for k in np.unique(truth[valid])],
                [Segment(int(k), mask=found == k) for k in np.unique(found)],
                f'mean IoU {np.mean(iou):.0%}',
            )
        )
    return examples


def palette_of(meta: dict[str, Any]) -> Sequence[Sequence[int]]:
    """A data set's colours, or some if it has none."""
    palette = meta.get('palette')
    if isinstance(palette, (list, tuple)) and len(palette) >= len(meta['classes']):
        return palette
    colours = plt.get_cmap('hsv')(np.linspace(0, 1, len(meta['classes']), endpoint=False))
    return (colours[:, :3] * 255).astype(int).tolist()


def choose(total: int, num: int, seed: int) -> list[int]:
    """Choose some of ``total`` images, in rising order."""
    order = np.random.default_rng(seed).permutation(total)
    return sorted(order[:num].tolist())


def read_image(path: str) -> np.ndarray:
    """Read an image as RGB."""
    return CheckedLoadImageFromFile()(dict(img_path=path))['img'][..., ::-1]


def decode_mask(mask: Any, shape: tuple[int, int]) -> np.ndarray | None:
    """Read a mask of COCO: polygons, run lengths, or none."""
    from pycocotools import mask as coco_mask

    if mask is None:
        return None
    if isinstance(mask, list):
        mask = coco_mask.merge(coco_mask.frPyObjects(mask, *shape))
    elif isinstance(mask['counts'], list):
        mask = coco_mask.frPyObjects(mask, *shape)
    return coco_mask.decode(mask).astype(bool)


def overlap(first: Segment, second: Segment) -> float:
    """IoU of two masks, of the boxes where there are no masks."""
    if first.mask is not None and second.mask is not None:
        union = (first.mask | second.mask).sum()
        return float((first.mask & second.mask).sum() / union) if union else 0.0
    (a, b, c, d), (e, f, g, h) = first.box, second.box
    common = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    union = (c - a) * (d - b) + (g - e) * (h - f) - common
    return common / union if union else 0.0


def count_found(truth: Sequence[Segment], prediction: Sequence[Segment]) -> int:
    """Count what was found with the right class, each thing once, the surest first."""
    left = list(truth)
    for guess in sorted(prediction, key=lambda guess: -guess.score):
        match = max(
            (t for t in left if t.label == guess.label),
            key=lambda t: overlap(t, guess),
            default=None,
        )
        if match is not None and overlap(match, guess) >= FOUND_IOU:
            left.remove(match)
    return len(truth) - len(left)


def paint(
    image: np.ndarray,
    segments: Sequence[Segment],
    palette: Sequence[Sequence[int]],
    classes: Sequence[str],
) -> np.ndarray:
    """Paint masks over an image and enlarge or shrink it to a tile.

    Args:
        image: (H, W, 3), uint8.
        segments: What to paint.
        palette: Colours of the classes.
        classes: Names of the classes.

    Returns:
        (h, w, 3), uint8, the longer side :data:`TILE`.
    """
    factor = TILE / max(image.shape[:2])
    size = tuple(max(1, round(side * factor)) for side in image.shape[1::-1])
    picture = cv2.resize(
        image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    ).astype(np.float32)
    for segment in segments:
        if segment.mask is not None and classes[segment.label] not in UNPAINTED:
            mask = (
                cv2.resize(segment.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
            )
            colour = np.asarray(palette[segment.label], dtype=np.float32)
            picture[mask] = picture[mask] * (1 - OPACITY) + colour * OPACITY
    return picture.astype(np.uint8)


def draw_names(
    axes: plt.Axes,
    example: Example,
    segments: Sequence[Segment],
    palette: Sequence[Sequence[int]],
    classes: Sequence[str],
) -> None:
    """Write the classes, and draw the boxes of detections."""
    height, width = example.image.shape[:2]
    factor = TILE / max(height, width)
    for segment in segments:
        name = classes[segment.label]
        colour = np.asarray(palette[segment.label]) / 255
        dark = colour @ (0.299, 0.587, 0.114) < 0.55
        style = dict(
            size=7.5,
            color='white' if dark else 'black',
            clip_on=True,
            bbox=dict(facecolor=colour, edgecolor='none', pad=1.2),
        )
        if segment.box is not None:
            x1, y1, x2, y2 = (value * factor for value in segment.box)
            axes.add_patch(
                plt.Rectangle(
                    (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5
                )
            )
            score = '' if segment.score is None else f' {segment.score:.0%}'
            axes.text(
                max(2, x1), max(9, y1), name + score, va='bottom' if y1 > 12 else 'top', **style
            )
        elif name not in UNPAINTED and segment.mask.mean() >= MIN_NAMED_SHARE:
            rows, columns = np.nonzero(segment.mask)
            # a pixel of the segment near its middle: the middle itself may lie in a hole
            nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
            axes.text(
                columns[nearest] * factor,
                rows[nearest] * factor,
                name,
                ha='center',
                va='center',
                **style,
            )


def gallery_size(num: int) -> tuple[int, int]:
    """Width and height in pixels of the PNG with ``num`` examples."""
    pairs, rows = min(num, PAIRS), -(-num // PAIRS)
    width = 2 * MARGIN + pairs * (2 * TILE + PAIR_GAP) + (pairs - 1) * GAP
    return max(width, 2 * MARGIN + 2 * TILE + PAIR_GAP), TITLE + rows * (TILE + CAPTION + GAP)


def draw_gallery(
    examples: Sequence[Example],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    title: str,
    subtitle: str,
) -> plt.Figure:
    """Draw pairs of ground truth, left, and prediction, right.

    Args:
        examples: What to draw.
        classes: Names of the classes.
        palette: Their colours.
        title: First line.
        subtitle: Second line.

    Returns:
        The figure, of :func:`gallery_size` at :data:`DPI`.
    """
    width, height = gallery_size(len(examples))
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor='white')
    figure.text(
        MARGIN / width, 1 - 22 / height, title, va='top', size=15, weight='bold', color=TEXT
    )
    figure.text(MARGIN / width, 1 - 54 / height, subtitle, va='top', size=10, color=MUTED)
    for number, example in enumerate(examples):
        row, column = divmod(number, PAIRS)
        left = MARGIN + column * (2 * TILE + PAIR_GAP + GAP)
        top = TITLE + row * (TILE + CAPTION + GAP)
        for side, segments in enumerate((example.truth, example.prediction)):
            tile = paint(example.image, segments, palette, classes)
            axes = figure.add_axes(
                (
                    (left + side * (TILE + PAIR_GAP)) / width,
                    1 - (top + tile.shape[0]) / height,
                    tile.shape[1] / width,
                    tile.shape[0] / height,
                )
            )
            axes.imshow(tile)
            draw_names(axes, example, segments, palette, classes)
            axes.set(
                xticks=[],
                yticks=[],
                xlim=(-0.5, tile.shape[1] - 0.5),
                ylim=(tile.shape[0] - 0.5, -0.5),
            )
            for spine in axes.spines.values():
                spine.set_visible(False)
        caption = 1 - (top + TILE + 8) / height
        figure.text(left / width, caption, 'ground truth', va='top', size=9, color=MUTED)
        figure.text(
            (left + TILE + PAIR_GAP) / width,
            caption,
            example.caption,
            va='top',
            size=9,
            weight='bold',
            color=TEXT,
        )
    return figure


def main(argv: list[str] | None = None) -> None:
    """Choose, draw and write.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    if cfg.default_scope not in ('mmdet', 'mmseg'):
        raise ConfigError(
            f'config {cfg.filename} is for {cfg.default_scope}; of a classifier, '
            'tools/analysis_tools/prediction_grid.py draws the predictions'
        )
    dataset = build_test_data(cfg)
    meta: dict[str, Any] = dataset.metainfo
    if cfg.default_scope == 'mmdet':
        examples = detections(dataset, args.results, args.num, args.seed, args.score_thr)
        how = (
            f'detections from a score of {args.score_thr:g}; found: right class and an IoU of '
            f'{FOUND_IOU:g} or more'
        )
    else:
        examples = segmentations(dataset, args.results, args.num, args.seed)
        how = 'the mean is over the classes in the ground truth or the prediction of an image'
    matplotlib.use('Agg')  # without a display
    figure = draw_gallery(
        examples,
        readable_names(meta['classes']),
        palette_of(meta),
        Path(args.config).stem,
        f'{len(examples)} of {len(dataset):,} test images; {how}',
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    plt.close(figure)
    print(f'Wrote {args.out}: {len(examples)} images')


if __name__ == '__main__':
    run_command(main)
