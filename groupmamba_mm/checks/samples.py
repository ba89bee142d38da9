"""What do images, labels and batches look like when a pipeline has loaded them?"""

import copy
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from PIL import Image
from tqdm import tqdm

from groupmamba_mm.datasets.benchmark_data import default_threads
from groupmamba_mm.engine.config_checks import type_name
from groupmamba_mm.errors import DataError

from .findings import Finding, config_error, shown
from .parts import Part, labels_of, processes, spread

#: The quick form reads images of a data set for so many seconds of a core, and this many at least.
SECONDS, LEAST = 2.0, 8
#: Threads that read images, most of whose work is decoding, which Python lets run side by side.
THREADS = 8
#: Images that go through the whole pipeline.
WHOLE = 8
#: Boxes that overlap their masks by less (intersection over union) are not theirs.
LEAST_OVERLAP = 0.5
#: Images of values up to 255 that have none above this show nothing.
NEARLY_BLACK = 32


@dataclass
class Loaded:
    """What was seen of images and label maps, read as the pipeline reads them.

    Args:
        part: The data set.
        findings: What is wrong with single files.
        counts: Number of pixels of each label in label maps.
        ignored: Number of pixels without a label.
        read: Number of images that were looked at.
        labelled: Whether there were label maps.
        sizes: An image of each size.
        ignored_masks: Images of which the pipeline ignores annotations that the file does not.
        apart: Images of which most masks lie elsewhere than their boxes.
    """

    part: Part
    findings: list[Finding] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    ignored: int = 0
    read: int = 0
    labelled: bool = False
    sizes: dict[tuple[int, ...], int] = field(default_factory=dict)
    ignored_masks: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)

    def add(self, *finding: str) -> None:
        """Take a finding in."""
        self.findings.append(Finding(*finding))

    def look_at(self, index: int, info: dict[str, Any], read: 'Read') -> None:
        """Examine an image with its labels, of which the data set says ``info``."""
        self.read += 1
        results, error = read.results, read.error
        if results and 'img' in results:
            self.sizes.setdefault(results['img'].shape, index)
        if isinstance(error, DataError):
            self.add(str(error), '')
            return
        if error is not None:
            what = ' '.join(str(error).split()) or type(error).__name__
            self.add(
                f'{info.get("seg_map_path") or info.get("img_path")} of {self.part}',
                f'cannot be read ({what})',
                'cut it into tiles, or read it with dict(type='
                "'LoadAnnotations', imdecode_backend='cv2')"
                if 'decompression bomb' in what
                else 'replace it, or remove it from the data',
            )
            return
        if read.has_another_size:
            said = (info['height'], info['width'])
            self._differs(info['img_path'], results['img'], said, 'the annotation file says')
            return
        labels = results.get('gt_seg_map')
        if labels is not None:
            self.labelled = True
            self._look_at_labels(labels, results['img'], info)
        if 'gt_ignore_flags' in results:
            self._look_at_instances(results, info, read.known)

    def _look_at_instances(self, results: dict[str, Any], info: dict[str, Any], known: int) -> None:
        """Compare instances as they are loaded with those of the file, and boxes with masks."""
        ignored = np.asarray(results['gt_ignore_flags'], bool)
        if (~ignored).sum() < known:
            self.ignored_masks.append(info['img_path'])
        boxes, masks = results['gt_bboxes'], results.get('gt_masks')
        if masks is not None and hasattr(boxes, 'overlaps') and not ignored.all():
            of_masks = boxes.from_instance_masks(masks)
            overlaps = boxes.overlaps(boxes, of_masks, is_aligned=True).numpy()
            if np.median(overlaps[~ignored]) < LEAST_OVERLAP:
                self.apart.append(info['img_path'])

    def finish(self) -> None:
        """Report what concerns many images, once."""
        for paths, what, remedy in (
            (
                self.ignored_masks,
                'have annotations that the pipeline ignores: their masks have fewer than 3 points',
                'mend the masks, or remove these annotations',
            ),
            (
                self.apart,
                'have boxes most of which overlap their own masks by less than half',
                'check that a bbox is [x, y, width, height] in pixels, and masks are of this image',
            ),
        ):
            if paths:
                where = f'{len(paths)} of {self.read} images of {self.part}'
                self.findings.append(
                    Finding(where, f'{what}: {shown(paths, 3)}', remedy, len(paths), 'warning')
                )

    def _differs(self, path: str, image: np.ndarray, other: tuple[int, ...], says: str) -> None:
        turned = other[::-1] == image.shape[:2]
        why = ' (turned by its EXIF orientation, or labelled before that)' if turned else ''
        self.add(
            f'image {path} of {self.part}',
            f'is loaded as {_size(image.shape)} (H x W), and {says} {_size(other)}{why}',
            'label the image as it is loaded, or save it without the orientation tag'
            if turned
            else 'mend the one that is wrong',
        )

    def _look_at_labels(self, labels: np.ndarray, image: np.ndarray, info: dict[str, Any]) -> None:
        where, dataset = f'label map {info["seg_map_path"]} of {self.part}', self.part.dataset
        if labels.ndim != 2:
            self.add(
                where,
                f'has {labels.shape[2]} channels (colours)',
                'write one channel with the number of the class',
            )
            return
        with Image.open(info['seg_map_path']) as raw:
            if raw.mode.startswith('I') and np.asarray(raw).max() > 255:
                self.add(
                    where,
                    f'has the value {np.asarray(raw).max()}, of whose 16 bits the pipeline keeps 8',
                    'write numbers up to 255 in 8 bits',
                )
        if labels.shape != image.shape[:2]:
            self._differs(info['img_path'], image, labels.shape, 'its label map is')
        found = dict(zip(*(part.tolist() for part in np.unique(labels, return_counts=True))))
        self.ignored += found.pop(dataset.ignore_index, 0)
        self.counts.update(found)
        number, reduced = len(self.part.classes or ()), bool(dataset.reduce_zero_label)
        wrong = [value + reduced for value in found if value >= number > 0]
        if wrong:
            ignored = self.part.ignored
            remedy = (
                f"if 0 stands for 'other' and 1 to {number} for the classes, set "
                'reduce_zero_label=True in the data sets'
                if not reduced and wrong == [number]
                else 'correct the label maps, metainfo or reduce_zero_label'
            )
            self.add(
                where,
                f'has the value {shown(wrong)}',
                f'with {number} classes and '
                f'reduce_zero_label={reduced}, 0 to {number - 1 + reduced} and {ignored} '
                f'(ignored) are right; {remedy}',
            )


@dataclass
class Read:
    """An image as the pipeline's first steps read it.

    Args:
        results: What they made.
        known: Number of its labels, of which the steps may have others ignored.
        error: What one of them raised.
        has_another_size: Whether the image is not of the size that its annotations name; they are
            not read then.
    """

    results: dict[str, Any]
    known: int
    error: Exception | None = None
    has_another_size: bool = False


def _read(info: dict[str, Any], steps: list[Any]) -> Read:
    results, known = dict(info), len(labels_of(info))
    try:
        for step in steps:
            results = step(results)
            said = (info.get('height'), info.get('width'))
            if 'img' in results and 'height' in info and said != results['img'].shape[:2]:
                return Read(results, known, has_another_size=True)
    # whatever a library raises while it reads a file is the file's fault, told with it
    except Exception as error:
        return Read(results, known, error)
    return Read(results, known)


def load(part: Part, full: bool) -> Loaded:
    """Read all images of a data set, or for some seconds images spread over it."""
    loaded, local = Loaded(part), threading.local()
    threads = min(THREADS, default_threads())
    end = math.inf if full else time.monotonic() + SECONDS / threads

    def read(info: dict[str, Any]) -> Read:
        if not hasattr(local, 'steps'):
            local.steps = part.loading_steps()  # some keep a file's client
        return _read(info, local.steps)

    order = range(len(part.dataset)) if full else spread(len(part.dataset))
    waiting: deque[tuple] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for index in tqdm(order, desc=f'{part.split} images', mininterval=1, disable=not full):
            if loaded.read + len(waiting) >= LEAST and time.monotonic() > end:
                break
            info = part.dataset.get_data_info(index)
            waiting.append((index, info, pool.submit(read, info)))
            if len(waiting) > threads:
                index, info, done = waiting.popleft()
                loaded.look_at(index, info, done.result())
        for index, info, done in waiting:
            loaded.look_at(index, info, done.result())
    loaded.finish()
    return loaded


def _size(shape: tuple[int, ...]) -> str:
    return 'x'.join(map(str, shape[:2]))


def given(cfg: Config, part: Part, loaded: Loaded) -> Iterator[Finding]:
    """Put images through the whole pipeline, one of each size first, and compare what comes out."""
    # a copy: random transforms may keep something of the images they saw
    pipeline = Compose(copy.deepcopy(part.dataset.pipeline.transforms))
    sizes = sorted(loaded.sizes, key=lambda size: (math.prod(size[:2]), size))
    chosen = [loaded.sizes[size] for size in (sizes[:1] + sizes[-1:] + sizes)[:WHOLE]]
    chosen += [index for index, _ in zip(spread(len(part.dataset)), range(WHOLE))]
    shapes: dict[tuple[int, ...], str] = {}
    highest = 0.0
    for index in dict.fromkeys(chosen):
        info = part.dataset.get_data_info(index)
        path = info.get('img_path')
        try:
            results = pipeline(info)
        except DataError as error:
            if not cfg.get('max_bad_images', 0):
                yield Finding(str(error), '')
            continue
        except Exception as error:
            # A transform may raise anything; training would end with it, without the image's name.
            what = f'{type(error).__name__}: {" ".join(str(error).split())}'
            yield config_error(
                f'{part.key}.pipeline',
                f'fails with image {path} ({what})',
                'mend the pipeline or the image',
            )
            return
        inputs = results.get('inputs') if isinstance(results, dict) else None
        if hasattr(inputs, 'shape'):
            shapes.setdefault(tuple(inputs.shape), path)
            highest = max(highest, float(inputs.max()))
    yield from _normalised(cfg, part, highest)
    channels = sorted({shape[0] for shape in shapes})
    if len(channels) > 1:
        yield Finding(
            str(part),
            f'have images of {shown(channels)} channels after loading',
            "load all alike, for example with color_type='color'",
        )
    # Images that are stacked to a batch must have one size.
    loader = cfg[f'{part.split}_dataloader']
    collate = loader.get('collate_fn') or {}
    collate = type_name(
        collate.get('collate', collate),
        'default_collate' if part.scope == 'mmpretrain' else 'pseudo_collate',
    )
    pads = collate == 'pseudo_collate' and (part.scope != 'mmseg' or part.split == 'train')
    if len(shapes) > 1 and not pads and loader.get('batch_size', 1) > 1:
        listed = [f'{"x".join(map(str, shape[1:]))} ({path})' for shape, path in shapes.items()]
        yield config_error(
            f'{part.key}.pipeline',
            f'gives images of several sizes (H x W), '
            f'{shown(listed, 3)}, and {part.split}_dataloader.batch_size='
            f'{loader["batch_size"]} stacks them',
            'add a transform that gives them one size (Resize, CenterCrop), or set batch_size=1',
        )


def _normalised(cfg: Config, part: Part, highest: float) -> Iterator[Finding]:
    """Compare mean and std with the values of images, and with the pipeline's own."""
    own = (cfg.get('model') or {}).get('data_preprocessor')
    where = 'model.data_preprocessor' if own else 'data_preprocessor'
    std = (own or cfg.get('data_preprocessor') or {}).get('std')
    if not std:
        return
    if any(type_name(step) == 'Normalize' for step in part.cfg.get('pipeline') or ()):
        yield config_error(
            f'{where}.std',
            f'is {list(std)}, and {part.key}.pipeline has Normalize, so images would be '
            'normalised twice',
            'take it out of the pipeline, or set mean=None and std=None there',
        )
    elif max(std) < 1 and highest > 2:
        yield Finding(
            f'{where}.std',
            f'is {list(std)}, for values from 0 to 1, and {part} have values up to {highest:g}',
            'multiply mean and std by 255',
            severity='warning',
        )
    elif min(std) > 2 and 0 < highest < NEARLY_BLACK:
        yield Finding(
            str(part),
            f'have values up to {highest:g} as the pipeline gives them, and {where}.std, {list(std)}, '
            'is for values up to 255: they are nearly black',
            "load files of 10 to 14 bits in 16 with color_type='unchanged', and set mean and std of "
            'their values; of values from 0 to 1, divide both by 255',
            severity='warning',
        )


def batches(cfg: Config, split: str, total: int) -> Iterator[Finding]:
    """Compare the batch size with the number of images and with BatchNorm."""
    loader = cfg[f'{split}_dataloader']
    size, here = loader.get('batch_size', 1), math.ceil(total / processes())
    if split != 'train' and loader.get('drop_last') and here % size:
        yield config_error(
            f'{split}_dataloader.drop_last',
            f'is True, and of {here} images in each process {here % size} would get no score',
            'set it to False',
        )
    if split != 'train' or 'Infinite' in type_name(loader.get('sampler') or {}):
        return
    key = f'{split}_dataloader.batch_size'
    if here < size and loader.get('drop_last'):
        yield config_error(
            key,
            f'is {size}, each process has {here} images, and drop_last=True leaves no batch',
            'lower it, or set drop_last=False',
        )
    elif (
        here % size == 1 < size
        and not loader.get('drop_last')
        and any('BN' in kind or 'BatchNorm' in kind for kind in _types(cfg.get('model')))
    ):
        yield Finding(
            key,
            f'is {size}, and each process has {here} images: the last batch has one '
            'image, of which BatchNorm can take no statistics',
            f'set {split}_dataloader.drop_last=True, or another batch size',
            severity='warning',
        )


def _types(part: Any) -> set[str]:
    """All types that a config names."""
    own = {type_name(part)} if isinstance(part, dict) else set()
    values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return own.union(*map(_types, values))
