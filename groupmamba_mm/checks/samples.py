"""What do the images and labels look like when a pipeline has loaded them?"""
import copy
import math
import time
from collections import Counter
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from tqdm import tqdm

from groupmamba_mm.engine.config_checks import type_name
from groupmamba_mm.errors import DataError
from .findings import Finding, config_error, shown
from .parts import Part, processes, spread

#: The quick form reads images of a data set for so many seconds, and this many at least.
SECONDS, LEAST = 2., 8
#: Images that go through the whole pipeline.
WHOLE = 8


class Loaded:
    """Images and labels of a data set, read as its pipeline reads them.

    Args:
        part: A data set that was built.
        full: Whether to read all of it.

    Attributes:
        findings: What is wrong with single files.
        counts: Number of pixels of each label of label maps.
        ignored: Number of pixels without a label.
        read: Number of images that were looked at.
        labelled: Whether there were label maps.
        extremes: Numbers of images of different sizes, as far as there are several.
    """

    def __init__(self, part: Part, full: bool) -> None:
        self.part, self.findings = part, []
        self.counts: Counter = Counter()
        self.ignored = self.read = 0
        self.labelled = False
        self.sizes: Dict[Tuple[int, ...], int] = {}
        steps = part.loading_steps()
        end = math.inf if full else time.monotonic() + SECONDS
        order = range(len(part.dataset)) if full else spread(len(part.dataset))
        for index in tqdm(order, desc=f'{part.split} images', mininterval=1, disable=not full):
            if self.read >= LEAST and time.monotonic() > end:
                break
            self.read += 1
            self._look_at(index, steps)

    @property
    def extremes(self) -> List[int]:
        """An image of each size, the smallest and the largest first."""
        sizes = sorted(self.sizes, key=lambda size: (math.prod(size[:2]), size))
        order = sizes[:1] + sizes[-1:] + sizes[1:-1]
        return list(dict.fromkeys(self.sizes[size] for size in order))

    def _look_at(self, index: int, steps: List[Any]) -> None:
        info = self.part.dataset.get_data_info(index)
        path, results = info.get('img_path'), dict(info)
        try:
            for step in steps:
                results = step(results)
                if 'img' in results and self._has_another_size(info, results['img'], index):
                    return  # masks of a wrong size cannot be read
        except DataError as error:
            self.findings.append(Finding(str(error), ''))
            return
        except Exception as error:
            # Whatever a library raises while it reads a file is the file's fault, told with it.
            file = info.get('seg_map_path') or path
            what = ' '.join(str(error).split()) or type(error).__name__
            self.findings.append(Finding(f'{file} of {self.part}', f'cannot be read ({what})',
                                         self._remedy(what)))
            return
        labels = results.get('gt_seg_map')
        self.labelled |= labels is not None
        if labels is not None and self._is_label_map(labels, info):
            if labels.shape != results['img'].shape[:2]:
                self._differs(path, results['img'], labels.shape, 'its label map is')
            self._count(labels, info['seg_map_path'])

    def _has_another_size(self, info: Dict[str, Any], image: np.ndarray, index: int) -> bool:
        self.sizes.setdefault(image.shape, index)
        said = (info.get('height'), info.get('width'))
        if 'height' not in info or said == image.shape[:2]:
            return False
        self._differs(info['img_path'], image, said, 'the annotation file says')
        return True

    @staticmethod
    def _remedy(what: str) -> str:
        if 'decompression bomb' in what:
            return ("cut it into tiles, or read it with dict(type='LoadAnnotations', "
                    "imdecode_backend='cv2')")
        return 'replace it, or remove it from the data'

    def _differs(self, path: str, image: np.ndarray, other: Tuple[int, ...], says: str) -> None:
        turned = other[::-1] == image.shape[:2]
        why = ' (turned by its EXIF orientation, or labelled before it was turned)' if turned else ''
        self.findings.append(Finding(
            f'image {path} of {self.part}', f'is loaded as {_size(image.shape)} (H x W), and {says} '
            f'{_size(other)}{why}', 'label the image as it is loaded, or save it without the '
            'orientation tag' if turned else 'mend the one that is wrong'))

    def _is_label_map(self, labels: np.ndarray, info: Dict[str, Any]) -> bool:
        if labels.ndim == 2:
            return True
        self.findings.append(Finding(
            f"label map {info['seg_map_path']} of {self.part}", f'has {labels.shape[2]} channels '
            '(colours)', 'write one channel with the number of the class'))
        return False

    def _count(self, labels: np.ndarray, file: str) -> None:
        dataset = self.part.dataset
        values, counts = np.unique(labels, return_counts=True)
        found = dict(zip(values.tolist(), counts.tolist()))
        self.ignored += found.pop(dataset.ignore_index, 0)
        if self.part.classes is not None:
            number = len(self.part.classes)
            reduced = int(bool(dataset.reduce_zero_label))
            wrong = [value + reduced for value in found if value >= number]
            if wrong:
                ignored = 255 if reduced else dataset.ignore_index
                text = (f'with {number} classes and reduce_zero_label={bool(reduced)}, 0 to '
                        f'{number - 1 + reduced} and {ignored} (ignored) are right')
                hint = ('if 0 stands for \'other\' and 1 to '
                        f'{number} for the classes, set reduce_zero_label=True in the data sets'
                        if not reduced and wrong == [number] else
                        'correct the label maps, metainfo or reduce_zero_label')
                self.findings.append(Finding(f'label map {file} of {self.part}',
                                             f'has the value {shown(wrong)}', f'{text}; {hint}'))
        self.counts.update(found)


def _size(shape: Tuple[int, ...]) -> str:
    return 'x'.join(map(str, shape[:2]))


def given(cfg: Config, part: Part, loaded: Loaded) -> Iterator[Finding]:
    """Put a few images through the whole pipeline and compare what comes out.

    Args:
        cfg: The config.
        part: A data set that was built.
        loaded: Its images; those of different sizes are taken first.

    Yields:
        Errors.
    """
    # random transforms may keep something of the images they saw
    pipeline = Compose(copy.deepcopy(part.dataset.pipeline.transforms))
    chosen = list(dict.fromkeys(loaded.extremes[:WHOLE] + list(
        index for index, _ in zip(spread(len(part.dataset)), range(WHOLE)))))
    shapes: Dict[Tuple[int, ...], str] = {}
    for index in chosen:
        info = part.dataset.get_data_info(index)
        path = info.get('img_path')
        try:
            results = pipeline(info)
        except DataError as error:
            if not cfg.get('max_bad_images', 0):
                yield Finding(str(error), '')
        except Exception as error:
            # A transform may raise anything; training would end with it, without the image's name.
            what = ' '.join(str(error).split())
            yield config_error(f'{part.key}.pipeline', f'fails with image {path} '
                               f'({type(error).__name__}: {what})', 'mend the pipeline or the image')
            return
        else:
            inputs = results.get('inputs') if isinstance(results, dict) else None
            if hasattr(inputs, 'shape'):
                shapes.setdefault(tuple(inputs.shape), path)
    channels = {shape[0] for shape in shapes}
    if len(channels) > 1:
        yield Finding(str(part), f'have images of {shown(sorted(channels))} channels after loading',
                      "load all alike, for example with color_type='color'")
    yield from _stacked(cfg, part, shapes)


def _stacked(cfg: Config, part: Part, shapes: Dict[Tuple[int, ...], str]) -> Iterator[Finding]:
    """Images that are stacked to a batch must have one size."""
    loader = cfg[f'{part.split}_dataloader']
    usual = 'default_collate' if part.scope == 'mmpretrain' else 'pseudo_collate'
    collate = loader.get('collate_fn') or {}
    collate = type_name(collate.get('collate', collate), usual)
    pads = collate == 'pseudo_collate' and (part.scope != 'mmseg' or part.split == 'train')
    if len(shapes) < 2 or pads or loader.get('batch_size', 1) == 1:
        return
    listed = [f'{"x".join(map(str, shape[1:]))} ({path})' for shape, path in shapes.items()]
    yield config_error(f'{part.key}.pipeline', f'gives images of several sizes (H x W), {shown(listed, 3)}'
                       f', and {part.split}_dataloader.batch_size={loader["batch_size"]} stacks '
                       'them', 'add a transform that gives them one size (Resize, CenterCrop), or '
                       'set batch_size=1')


def batches(cfg: Config, split: str, total: int) -> Iterator[Finding]:
    """Compare the batch size with the number of images and with BatchNorm.

    Args:
        cfg: The config.
        split: 'train', 'val' or 'test'.
        total: Number of images.

    Yields:
        An error about epochs without a batch, a warning about a last batch of one image.
    """
    loader = cfg[f'{split}_dataloader']
    size, here = loader.get('batch_size', 1), math.ceil(total / processes())
    if split != 'train' or 'Infinite' in type_name(loader.get('sampler') or {}):
        return
    key = f'{split}_dataloader.batch_size'
    if here < size and loader.get('drop_last'):
        yield config_error(key, f'is {size}, each process has {here} images, and drop_last=True '
                           'leaves no batch', 'lower it, or set drop_last=False')
    elif size > 1 and here % size == 1 and not loader.get('drop_last') and 'BN' in _norms(
            cfg.get('model')):
        yield Finding(key, f'is {size}, and each process has {here} images: the last batch has one '
                      'image, of which BatchNorm can take no statistics', 'set '
                      f'{split}_dataloader.drop_last=True, or another batch size',
                      severity='warning')


def _norms(part: Any) -> Set[Optional[str]]:
    """Kinds of norms that a model's config names: 'BN' also for SyncBN."""
    if isinstance(part, dict):
        own = {'BN'} if 'BN' in type_name(part) or 'BatchNorm' in type_name(part) else set()
        return own.union(*map(_norms, part.values()))
    return set().union(*map(_norms, part)) if isinstance(part, (list, tuple)) else set()
