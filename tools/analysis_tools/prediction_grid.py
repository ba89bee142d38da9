"""Draw test images of a classifier with what it predicted.

RESULTS is what ``tools/test.py CONFIG CHECKPOINT --out results.pkl`` wrote. The images come from
the config's test data set, cut to a square and resized to one size.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from groupmamba_mm.analysis.arguments import png_path, positive_int
from groupmamba_mm.analysis.results import build_test_data, read_results
from groupmamba_mm.datasets.loading import CheckedLoadImageFromFile
from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import ConfigError, DataError
from groupmamba_mm.visualization import readable_names

#: Share of wrong predictions in a grid, if there are as many; ``--wrong-first`` makes it 1.
WRONG_SHARE = 1 / 3

DPI = 100
TILE = 200  # pixels of an image's side
GAP = 24
CAPTION = 58  # below an image
TITLE = 96
MARGIN = 32
MIN_COLUMNS, MAX_COLUMNS = 4, 6  # the title needs four
NAME_LENGTH = 21  # characters of a class name that fit below an image

RIGHT, WRONG, TEXT, MUTED = '#1a7f37', '#cf222e', '#1f2328', '#656d76'


@dataclass(frozen=True)
class Prediction:
    """One test image and what was predicted for it.

    Attributes:
        index: Number of the image in the test data set.
        label: The predicted class.
        score: Its score, from 0 to 1.
        truth: The true class.
    """

    index: int
    label: int
    score: float
    truth: int

    @property
    def is_right(self) -> bool:
        """Whether the prediction is the truth."""
        return self.label == self.truth


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', metavar='CONFIG', help='classification config')
    parser.add_argument('results', metavar='RESULTS', help='pickle of tools/test.py --out')
    parser.add_argument('--out', required=True, type=png_path, help='PNG file to write')
    parser.add_argument(
        '--num', type=positive_int, default=24, help='number of images (default: %(default)s)'
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='which images are chosen (default: %(default)s)'
    )
    parser.add_argument(
        '--wrong-first',
        action='store_true',
        help='wrong predictions as far as there are any, then right ones; '
        'otherwise one wrong of three at most',
    )
    add_cfg_options(parser, 'change the config, as in tools/test.py')
    return parser.parse_args(argv)


def read_predictions(path: str) -> list[Prediction]:
    """Read what mmengine's ``DumpResults`` wrote of a single-label classifier.

    Args:
        path: The pickle; see :func:`groupmamba_mm.analysis.results.read_results`.

    Returns:
        The predictions.

    Raises:
        DataError: The file is missing, is no pickle, has no predictions or holds something else.
    """
    return [_read_sample(sample, number, path) for number, sample in enumerate(read_results(path))]


def _read_sample(sample: Any, number: int, path: str) -> Prediction:
    remedy = 'make it with tools/test.py CONFIG CHECKPOINT --out results.pkl'
    needed = ('sample_idx', 'pred_label', 'pred_score', 'gt_label')
    missing = [key for key in needed if not isinstance(sample, dict) or key not in sample]
    if missing:
        raise DataError(
            f'results {path}: prediction {number} has no {", ".join(missing)}, so it '
            f'is not one of a classifier with known labels; {remedy}'
        )
    if len(sample['pred_label']) != 1 or len(sample['gt_label']) != 1:
        raise DataError(
            f'results {path}: prediction {number} has several labels, and only '
            f'single-label classifiers can be drawn; {remedy}'
        )
    label = int(sample['pred_label'][0])
    return Prediction(
        index=int(sample['sample_idx']),
        label=label,
        score=float(sample['pred_score'][label]),
        truth=int(sample['gt_label'][0]),
    )


def look_up(predictions: Sequence[Prediction], dataset: Any, path: str) -> list[dict[str, Any]]:
    """Find the data set's entries of predictions.

    Args:
        predictions: The predictions.
        dataset: The test data set.
        path: The results file, for the error.

    Returns:
        The entries, with ``img_path``.

    Raises:
        DataError: The predictions were made on other data.
    """
    entries = []
    for prediction in predictions:
        entry = dataset.get_data_info(prediction.index) if prediction.index < len(dataset) else {}
        if entry.get('gt_label') != prediction.truth:
            raise DataError(
                f'results {path}: image {prediction.index} has the label '
                f'{prediction.truth} there and {entry.get("gt_label")} in the test '
                f'data of {len(dataset)} images; give the config and the data that '
                'the results are from'
            )
        entries.append(entry)
    return entries


def choose(
    predictions: Sequence[Prediction], num: int, seed: int, wrong_first: bool
) -> list[Prediction]:
    """Choose predictions to draw.

    Args:
        predictions: All of them.
        num: How many to choose; fewer if there are fewer.
        seed: Of the choice.
        wrong_first: Choose wrong ones as far as there are any, instead of one in three, and put
            them first.

    Returns:
        The chosen ones; in random order without ``wrong_first``.
    """
    random = np.random.default_rng(seed)
    order = [predictions[i] for i in random.permutation(len(predictions))]
    right = [prediction for prediction in order if prediction.is_right]
    wrong = [prediction for prediction in order if not prediction.is_right]
    num = min(num, len(order))
    num_wrong = num if wrong_first else round(num * WRONG_SHARE)
    num_wrong = max(min(num_wrong, len(wrong)), num - len(right))
    chosen = wrong[:num_wrong] + right[: num - num_wrong]
    return chosen if wrong_first else [chosen[i] for i in random.permutation(num)]


def read_tile(path: str) -> np.ndarray:
    """Read the central square of an image, resized to the size of a tile.

    Args:
        path: The image file.

    Returns:
        (TILE, TILE, 3), uint8, RGB.

    Raises:
        DataError: The file is missing or is no image.
    """
    image = Image.fromarray(CheckedLoadImageFromFile()(dict(img_path=path))['img'][..., ::-1])
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((TILE, TILE), Image.Resampling.LANCZOS))


def short_name(classes: Sequence[str] | None, label: int) -> str:
    """A class's name as it fits below an image: without synonyms, cut if need be."""
    name = str(label) if classes is None else classes[label].split(',')[0]
    return name if len(name) <= NAME_LENGTH else f'{name[: NAME_LENGTH - 1].rstrip()}…'


def grid_shape(num: int) -> tuple[int, int]:
    """Rows and columns of a grid that is a little wider than high."""
    columns = int(np.clip(np.ceil(np.sqrt(1.5 * num)), MIN_COLUMNS, MAX_COLUMNS))
    return -(-num // columns), columns


def grid_size(num: int) -> tuple[int, int]:
    """Width and height in pixels of the PNG with ``num`` images."""
    rows, columns = grid_shape(num)
    width = 2 * MARGIN + columns * TILE + (columns - 1) * GAP
    return width, TITLE + rows * (TILE + CAPTION) + (rows - 1) * GAP + MARGIN


def draw_grid(
    chosen: Sequence[Prediction],
    tiles: Sequence[np.ndarray],
    classes: Sequence[str] | None,
    title: str,
    subtitle: str,
) -> plt.Figure:
    """Draw the images with their captions.

    Args:
        chosen: The predictions.
        tiles: Their images, (TILE, TILE, 3).
        classes: Names of the classes, or None to write numbers.
        title: First line.
        subtitle: Second line.

    Returns:
        The figure, of :func:`grid_size` at :data:`DPI`.
    """
    columns = grid_shape(len(chosen))[1]
    width, height = grid_size(len(chosen))
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor='white')

    def write(x: float, y: float, text: str, **style: Any) -> None:
        # pixels from the top left corner
        figure.text(x / width, 1 - y / height, text, va='top', **style)

    write(MARGIN, 22, title, size=17, weight='bold', color=TEXT)
    write(MARGIN, 54, subtitle, size=11, color=MUTED)
    for number, (prediction, tile) in enumerate(zip(chosen, tiles)):
        row, column = divmod(number, columns)
        left = MARGIN + column * (TILE + GAP)
        top = TITLE + row * (TILE + CAPTION + GAP)
        axes = figure.add_axes(
            (left / width, 1 - (top + TILE) / height, TILE / width, TILE / height)
        )
        axes.imshow(tile)
        axes.set(xticks=[], yticks=[])
        colour = RIGHT if prediction.is_right else WRONG
        for spine in axes.spines.values():
            spine.set(edgecolor=colour, linewidth=3)
        name = short_name(classes, prediction.label)
        write(left, top + TILE + 9, name, size=11, weight='bold', color=colour)
        write(
            left + TILE,
            top + TILE + 9,
            f'{prediction.score:.0%}',
            size=11,
            ha='right',
            color=colour,
        )
        write(
            left,
            top + TILE + 33,
            f'truth: {short_name(classes, prediction.truth)}',
            size=10,
            color=MUTED,
        )
    return figure


def main(argv: list[str] | None = None) -> None:
    """Choose, draw and write.

    Args:
        argv: The arguments, None for the process's own.

    Raises:
        ConfigError: The config is not a classifier's.
    """
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    if cfg.default_scope != 'mmpretrain':
        raise ConfigError(
            f'config {cfg.filename} is for {cfg.default_scope}; give a '
            'classification config, or draw with tools/analysis_tools/gallery.py'
        )
    predictions = read_predictions(args.results)
    dataset = build_test_data(cfg)
    chosen = choose(predictions, args.num, args.seed, args.wrong_first)
    tiles = [read_tile(entry['img_path']) for entry in look_up(chosen, dataset, args.results)]

    num_right = sum(prediction.is_right for prediction in predictions)
    num_wrong = len(predictions) - num_right
    shown_right = sum(prediction.is_right for prediction in chosen)
    title = (
        f'Top-1 accuracy {num_right / len(predictions):.1%} '
        f'({num_right:,} of {len(predictions):,} test images)'
    )
    subtitle = (
        f'{Path(args.config).stem}  ·  shown: {shown_right} of {num_right:,} right and '
        f'{len(chosen) - shown_right} of {num_wrong:,} wrong predictions'
    )
    matplotlib.use('Agg')  # without a display
    classes = dataset.metainfo.get('classes')
    figure = draw_grid(chosen, tiles, classes and readable_names(classes), title, subtitle)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    plt.close(figure)
    print(f'Wrote {args.out}: {title}, {subtitle}')


if __name__ == '__main__':
    run_command(main)
