"""Make the demo data sets: real scanned digits on real photographs.

The pictures need no download, see ``groupmamba_mm/datasets/demo_scenes.py``. Each task has a folder
of its own. Classification, one digit a picture, in the ImageNet folder layout::

    OUT/cls/
        train/0_zero/000000.png ... train/9_nine/...
        val/0_zero/000000.png ... val/9_nine/...
        preview.png     some training pictures, one row per class
        meta.json       the arguments, and the accuracy of logistic regression on raw pixels

The accuracy of logistic regression tells how far plain pixels get without a network. It is the
best of several variants, chosen on the validation pictures themselves, hence rather too high than
too low.

Detection and segmentation, one to six digits a picture, of which later ones cover earlier ones. The
pictures of both are the same; what is annotated are the visible pixels::

    OUT/det/
        train/000000.png ...  val/...
        annotations/instances_train.json, annotations/instances_val.json    in COCO's format
        preview.png, meta.json
    OUT/seg/
        images/train/000000.png ...  images/val/...
        annotations/train/000000.png ...  annotations/val/...    labels 0 (background) to 10
        preview.png, meta.json
"""

import argparse
import functools
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import cv2
import numpy as np
from tqdm import tqdm

from groupmamba_mm.datasets.demo_annotations import SEG_PALETTE, coco_categories, label_map
from groupmamba_mm.datasets.demo_pictures import (
    CLASS_FOLDERS,
    compose_digit,
    compose_digits,
    ignore_interrupts,
    picture_name,
    write_detection_picture,
    write_digit,
    write_picture,
    write_segmentation_picture,
)
from groupmamba_mm.datasets.demo_scenes import CLASSES, MIN_IMAGE_SIZE, SPLITS
from groupmamba_mm.errors import DataError

# What the pictures of a task are, if the command line does not say.
TASKS = {
    'cls': {'num_train': 8000, 'num_val': 600, 'image_size': 64},
    'det': {'num_train': 2000, 'num_val': 240, 'image_size': 128},
    'seg': {'num_train': 2000, 'num_val': 240, 'image_size': 128},
}
# Raise it with every change to the pictures, so that an older data set is not taken for this one.
VERSION = 1
# What a process takes at a time.
PICTURES_PER_TASK = 25

# What logistic regression is tried on: colour or grey, side in pixels, C.
BASELINE_VARIANTS = (('grey', 16, 0.01), ('grey', 32, 0.001), ('colour', 16, 0.01))
BASELINE_ITERATIONS = 100

PREVIEW_COLUMNS = 12
PREVIEW_TILE = 64
PREVIEW_GAP = 4
PREVIEW_LABEL_WIDTH = 88
SCENE_PREVIEW_ROWS, SCENE_PREVIEW_COLUMNS, SCENE_PREVIEW_TILE = 5, 4, 128


def make_cls(
    out,
    seed=0,
    num_train=8000,
    num_val=600,
    image_size=64,
    overwrite=False,
    skip_baseline=False,
    workers=1,
):
    """Write the classification data set, unless it is there already.

    Args:
        out (Path): Folder in which the folder ``cls`` is made.
        seed (int): Seed of all pictures.
        num_train (int): Number of training pictures.
        num_val (int): Number of validation pictures.
        image_size (int): Side of a picture in pixels.
        overwrite (bool): Whether to replace a data set made with other arguments.
        skip_baseline (bool): Whether to leave out the logistic regression.
        workers (int): Number of processes that make the pictures; the pictures are the same.

    Returns:
        dict: The content of ``meta.json``.

    Raises:
        DataError: If the target holds something else, or the baseline has a single class.
    """
    out = Path(out)
    if num_train < 2 and not skip_baseline:
        raise DataError(
            f'num_train is {num_train}, but logistic regression needs two classes: '
            'use 2 or more, or pass --skip-baseline'
        )
    target = _make_task(out, 'cls', seed, num_train, num_val, image_size, overwrite, workers)
    meta = _read_meta(target)
    if meta['baseline'] is None and not skip_baseline:
        meta['baseline'] = measure_baseline(target)
        _write_meta(target, meta)
    if meta['baseline'] is not None:
        best = meta['baseline']['best']
        print(
            'Logistic regression on raw pixels, best of '
            f'{len(meta["baseline"]["variants"])} variants ({_describe(best)}): '
            f'{best["accuracy"]:.1%} of the validation pictures'
        )
    return meta


def make_scenes(
    out, task, seed=0, num_train=2000, num_val=240, image_size=128, overwrite=False, workers=1
):
    """Write the detection or the segmentation data set, unless it is there already.

    Args:
        out (Path): Folder in which the folder ``det`` or ``seg`` is made.
        task (str): 'det' or 'seg'.
        seed (int): Seed of all pictures.
        num_train (int): Number of training pictures.
        num_val (int): Number of validation pictures.
        image_size (int): Side of a picture in pixels.
        overwrite (bool): Whether to replace a data set made with other arguments.
        workers (int): Number of processes that make the pictures; the pictures are the same.

    Returns:
        dict: The content of ``meta.json``.

    Raises:
        DataError: If the target holds something else.
    """
    return _read_meta(
        _make_task(Path(out), task, seed, num_train, num_val, image_size, overwrite, workers)
    )


def _make_task(out, task, seed, num_train, num_val, image_size, overwrite, workers):
    """Write one task's data set if it is not in place, and return its folder."""
    if out.exists() and not out.is_dir():
        raise DataError(f'{out} is not a folder: choose another OUT')
    target = out / task
    wanted = {
        'generator': f'make_demo_data/{task}',
        'version': VERSION,
        'arguments': {
            'seed': seed,
            'num_train': num_train,
            'num_val': num_val,
            'image_size': image_size,
        },
    }
    if _is_made(target, task, wanted, overwrite):
        print(f'{target} is already there, made with the same arguments: left as it is')
    else:
        _write_data_set(target, task, wanted, workers)
        print(f'Wrote {num_train} training and {num_val} validation pictures to {target}')
    return target


def measure_baseline(target):
    """Fit logistic regression to the raw pixels.

    Args:
        target (Path): Folder of the data set.

    Returns:
        dict: ``variants`` with the validation accuracy of each one, and the ``best`` of them.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    train_images, train_labels = _read_split(target / 'train')
    val_images, val_labels = _read_split(target / 'val')
    variants = []
    variants_left = _progress(BASELINE_VARIANTS, len(BASELINE_VARIANTS), 'logistic regression')
    for colour, side, c in variants_left:
        train, val = (
            np.stack([_features(image, colour, side) for image in images])
            for images in (train_images, val_images)
        )
        mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
        model = LogisticRegression(C=c, max_iter=BASELINE_ITERATIONS)
        with warnings.catch_warnings():
            # Stopping after BASELINE_ITERATIONS is intended: it bounds the time.
            warnings.simplefilter('ignore', ConvergenceWarning)
            model.fit((train - mean) / std, train_labels)
        accuracy = model.score((val - mean) / std, val_labels)
        variants.append(
            {'pixels': colour, 'side': side, 'C': c, 'accuracy': round(float(accuracy), 4)}
        )
    return {'variants': variants, 'best': max(variants, key=lambda item: item['accuracy'])}


def _is_made(target, task, wanted, overwrite):
    """Tell whether the wanted data set is in place; raise if anything else is in the way."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    meta = _read_meta(target)
    if meta is None or meta.get('generator') != wanted['generator']:
        raise DataError(
            f'{target} exists and was not made by this tool: choose another OUT, or '
            'move it away (--overwrite replaces only what this tool made)'
        )
    if all(meta.get(key) == value for key, value in wanted.items()):
        problem = _count_problem(target, task, wanted['arguments'])
        if problem is None:
            return True
    else:
        problem = f'was made with {_arguments(meta)}, but asked for is {_arguments(wanted)}'
    if not overwrite:
        raise DataError(
            f'{target} {problem}: choose another OUT, or pass --overwrite to replace it'
        )
    return False


def _arguments(meta):
    listed = ', '.join(f'{key}={value}' for key, value in meta.get('arguments', {}).items())
    return f'{listed} (version {meta.get("version")})'


# What to count of each task: a pattern with the split's name, and what it finds.
_COUNTED = {
    'cls': (('{}/*/*.png', 'pictures'),),
    'det': (('{}/*.png', 'pictures'),),
    'seg': (('images/{}/*.png', 'pictures'), ('annotations/{}/*.png', 'label maps')),
}


def _count_problem(target, task, arguments):
    for split in SPLITS:
        expected = arguments[f'num_{split}']
        for pattern, what in _COUNTED[task]:
            found = len(list(target.glob(pattern.format(split))))
            if found != expected:
                return f'has {found} {what} in {split}, but should have {expected}'
        if task == 'det' and not _coco_file(target, split).is_file():
            return f'has no {_coco_file(target, split).name}'
    return None


def _write_data_set(target, task, wanted, workers):
    target.parent.mkdir(parents=True, exist_ok=True)
    write = {'cls': _write_images, 'det': _write_detection, 'seg': _write_segmentation}[task]
    # Renamed into place when all of it is written, so that an interrupted run leaves no half of a
    # data set; the folder is a sibling because a rename cannot cross file systems.
    with tempfile.TemporaryDirectory(prefix=f'.{task}-', dir=target.parent) as scratch:
        fresh = Path(scratch) / 'new'
        preview = write(fresh, wanted['arguments'], workers)
        write_picture(fresh / 'preview.png', preview)
        made_with = {
            'numpy': np.__version__,
            'opencv': cv2.__version__,
            'scikit-learn': importlib.metadata.version('scikit-learn'),
        }
        meta = {**wanted, 'made_with': made_with}
        _write_meta(fresh, {**meta, 'baseline': None} if task == 'cls' else meta)
        if target.exists():
            target.rename(Path(scratch) / 'old')
        fresh.rename(target)


def _write_images(folder, arguments, workers):
    """Write all pictures and return the preview."""
    for split in SPLITS:
        for name in CLASS_FOLDERS:
            (folder / split / name).mkdir(parents=True)
        for _ in _written(write_digit, folder, split, arguments, workers):
            pass
    rows = [[] for _ in CLASSES]
    for index in range(min(arguments['num_train'], PREVIEW_COLUMNS * len(CLASSES))):
        rows[index % len(CLASSES)].append(
            compose_digit(arguments['seed'], 'train', index, arguments['image_size']).image
        )
    return _draw_preview(rows)


def _draw_preview(rows):
    step = PREVIEW_TILE + PREVIEW_GAP
    sheet = np.full(
        (
            len(rows) * step + PREVIEW_GAP,
            PREVIEW_LABEL_WIDTH + PREVIEW_COLUMNS * step + PREVIEW_GAP,
            3,
        ),
        255,
        dtype=np.uint8,
    )
    for label, images in enumerate(rows):
        y = PREVIEW_GAP + label * step
        cv2.putText(
            sheet,
            CLASS_FOLDERS[label],
            (PREVIEW_GAP, y + PREVIEW_TILE // 2 + 5),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.5,
            (0, 0, 0),
            1,
            cv2.LINE_AA,
        )
        for column, image in enumerate(images):
            x = PREVIEW_LABEL_WIDTH + PREVIEW_GAP + column * step
            sheet[y : y + PREVIEW_TILE, x : x + PREVIEW_TILE] = cv2.resize(
                image, (PREVIEW_TILE, PREVIEW_TILE), interpolation=cv2.INTER_AREA
            )
    return sheet


def _written(write, folder, split, arguments, workers):
    """Write the pictures of a split and yield, in their order, what ``write`` returns of each.

    A picture depends on its number alone, so any number of processes makes the same ones.
    """
    write = functools.partial(
        write,
        folder=folder,
        split=split,
        seed=arguments['seed'],
        image_size=arguments['image_size'],
    )
    count = arguments[f'num_{split}']
    workers = min(workers, -(-count // PICTURES_PER_TASK))
    if workers == 1:
        yield from _progress(map(write, range(count)), count, f'{split} pictures')
        return
    # Ends OpenCV's threads, of which a forked process has no copy and waits for them for ever.
    cv2.setNumThreads(1)
    context = multiprocessing.get_context('fork')
    with ProcessPoolExecutor(workers, context, initializer=ignore_interrupts) as pool:
        results = pool.map(write, range(count), chunksize=PICTURES_PER_TASK)
        yield from _progress(results, count, f'{split} pictures')


def _preview_scenes(arguments):
    """The first training pictures of several digits, once more."""
    shown = min(arguments['num_train'], SCENE_PREVIEW_ROWS * SCENE_PREVIEW_COLUMNS)
    return [
        compose_digits(arguments['seed'], 'train', index, arguments['image_size'])
        for index in range(shown)
    ]


def _write_detection(folder, arguments, workers):
    """Write pictures and COCO files, and return the preview."""
    (folder / 'annotations').mkdir(parents=True)
    side = arguments['image_size']
    for split in SPLITS:
        (folder / split).mkdir()
        images, annotations = [], []
        pictures = _written(write_detection_picture, folder, split, arguments, workers)
        for index, found in enumerate(pictures):
            # Ids count from 1: evaluators take 0 for none.
            images.append(
                {'id': index + 1, 'file_name': picture_name(index), 'height': side, 'width': side}
            )
            for annotation in found:
                annotation['id'] = len(annotations) + 1
                annotations.append(annotation)
        content = {
            'info': {'description': f'demo digits, {split}'},
            'images': images,
            'annotations': annotations,
            'categories': coco_categories(),
        }
        _coco_file(folder, split).write_text(json.dumps(content), encoding='utf-8')
    return _draw_scene_preview(
        [(scene.image, _draw_instances(scene)) for scene in _preview_scenes(arguments)]
    )


def _coco_file(folder, split):
    return folder / 'annotations' / f'instances_{split}.json'


def _write_segmentation(folder, arguments, workers):
    """Write pictures and label maps, and return the preview."""
    for split in SPLITS:
        (folder / 'images' / split).mkdir(parents=True)
        (folder / 'annotations' / split).mkdir(parents=True)
        for _ in _written(write_segmentation_picture, folder, split, arguments, workers):
            pass
    palette = np.array(SEG_PALETTE, dtype=np.uint8)
    return _draw_scene_preview(
        [(scene.image, palette[label_map(scene)]) for scene in _preview_scenes(arguments)]
    )


def _draw_instances(scene):
    """Paint each digit's mask over the picture and its box around it."""
    picture = scene.image.copy()
    for digit in scene.instances:
        colour = np.array(SEG_PALETTE[digit.label + 1])
        picture[digit.mask] = (picture[digit.mask] * 0.3 + colour * 0.7).astype(np.uint8)
        x1, y1, x2, y2 = digit.bbox
        cv2.rectangle(picture, (x1, y1), (x2 - 1, y2 - 1), colour.tolist(), 1)
    return picture


def _draw_scene_preview(pairs):
    """Set pictures and their annotations side by side."""
    tile, gap = SCENE_PREVIEW_TILE, PREVIEW_GAP
    width = SCENE_PREVIEW_COLUMNS * 2 * (tile + gap) + gap
    rows = -(-len(pairs) // SCENE_PREVIEW_COLUMNS)
    sheet = np.full((rows * (tile + gap) + gap, width, 3), 255, dtype=np.uint8)
    for number, image in enumerate(image for pair in pairs for image in pair):
        row, column = divmod(number, 2 * SCENE_PREVIEW_COLUMNS)
        y, x = gap + row * (tile + gap), gap + column * (tile + gap)
        sheet[y : y + tile, x : x + tile] = cv2.resize(
            image, (tile, tile), interpolation=cv2.INTER_AREA
        )
    return sheet


def _read_split(folder):
    images, labels = [], []
    for label, name in enumerate(CLASS_FOLDERS):
        for path in sorted((folder / name).glob('*.png')):
            images.append(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB))
            labels.append(label)
    return images, np.array(labels)


def _features(image, colour, side):
    if colour == 'grey':
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32).ravel() / 255


def _describe(variant):
    return f'{variant["pixels"]}, {variant["side"]} px, C={variant["C"]}'


def _progress(items, total, what):
    # A log file gets a line now and then instead of a stream of redrawn bars.
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(items, total=total, desc=what, mininterval=interval, maxinterval=interval)


def _read_meta(target):
    path = target / 'meta.json'
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise DataError(
            f'{path} is not valid JSON ({error}): remove {target} and run again'
        ) from error
    return meta if isinstance(meta, dict) else None


def _write_meta(folder, meta):
    path = folder / 'meta.json'
    path.write_text(json.dumps(meta, indent=2) + '\n', encoding='utf-8')


def _whole_number(least):
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f'{text!r} is not a whole number: use {least} or more'
            ) from None
        if value < least:
            raise argparse.ArgumentTypeError(f'{value} is too small: use {least} or more')
        return value

    return parse


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description='Make the demo data sets: real scanned digits on real photographs, without a '
        'download.'
    )
    parser.add_argument(
        'out', metavar='OUT', type=Path, help='folder in which a folder for each task is made'
    )
    parser.add_argument(
        '--task',
        choices=[*TASKS, 'all'],
        default='cls',
        help='what to make: classification, detection, segmentation or all three '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--seed',
        type=_whole_number(0),
        default=0,
        help='seed of all pictures (default: %(default)s)',
    )
    parser.add_argument(
        '--num-train',
        type=_whole_number(1),
        help=f'number of training pictures (default: {_defaults("num_train")})',
    )
    parser.add_argument(
        '--num-val',
        type=_whole_number(1),
        help=f'number of validation pictures (default: {_defaults("num_val")})',
    )
    parser.add_argument(
        '--image-size',
        type=_whole_number(MIN_IMAGE_SIZE),
        help=f'side of a picture in pixels (default: {_defaults("image_size")})',
    )
    parser.add_argument(
        '--workers',
        type=_whole_number(1),
        default=_usable_cores(),
        help='number of processes that make the pictures, which are the same for '
        'any number (default: one a core, here %(default)s)',
    )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace a data set that was made with other arguments',
    )
    parser.add_argument(
        '--skip-baseline',
        action='store_true',
        help='do not measure logistic regression on the raw pixels (cls)',
    )
    return parser.parse_args(argv)


def _usable_cores():
    # A container or a batch system may grant fewer cores than there are; macOS cannot say.
    usable = getattr(os, 'sched_getaffinity', None)
    return len(usable(0)) if usable else os.cpu_count()


def _defaults(key):
    return ', '.join(f'{task} {values[key]}' for task, values in TASKS.items())


def main(argv=None):
    args = parse_args(argv)
    given = {
        key: value
        for key, value in vars(args).items()
        if key in ('num_train', 'num_val', 'image_size') and value is not None
    }
    try:
        for task in TASKS if args.task == 'all' else [args.task]:
            options = {
                **TASKS[task],
                **given,
                'seed': args.seed,
                'overwrite': args.overwrite,
                'workers': args.workers,
            }
            if task == 'cls':
                make_cls(args.out, skip_baseline=args.skip_baseline, **options)
            else:
                make_scenes(args.out, task, **options)
    except (DataError, ImportError, OSError, RuntimeError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
