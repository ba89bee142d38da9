"""The data sets of a config, as its loaders are given them."""

import copy
import gc
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, DefaultScope

from groupmamba_mm.datasets.loading import CheckedLoadImageFromFile

#: Entries of a data set that the quick form of the checks looks at, spread over all of it.
MAX_ENTRIES = 20_000


@dataclass
class Part:
    """A data set that has files; a split has several if its config joins some.

    Args:
        split: 'train', 'val' or 'test'.
        key: Its place in the config.
        cfg: Its config.
        scope: The library that runs it.
        dataset: What was built from the config, None before.
        content: What its annotation file of COCO holds, None for other data.
    """

    split: str
    key: str
    cfg: dict[str, Any]
    scope: str
    dataset: BaseDataset | None = None
    content: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f'the {self.split} data'

    @property
    def root(self) -> str:
        """Its ``data_root``, '' without one."""
        return self.cfg.get('data_root') or ''

    @property
    def is_local(self) -> bool:
        """Whether its files are on this machine."""
        return not self.cfg.get('backend_args') and '://' not in self.root

    @property
    def ignored(self) -> int:
        """The number of the pixels without a class in its label maps, as they are loaded."""
        return 255 if self.dataset.reduce_zero_label else self.dataset.ignore_index

    @property
    def loads_labels(self) -> bool:
        """Whether its pipeline reads label maps; that of a test for a server does not."""
        return any(
            'LoadAnnotations' in str(step.get('type')) + str(step.get('transforms'))
            for step in self.cfg.get('pipeline') or ()
        )

    @cached_property
    def owner(self) -> type | None:
        """Its class, None if there is none of its name."""
        kind = self.cfg.get('type')
        if not isinstance(kind, str):
            return kind
        importlib.import_module(f'{self.scope}.datasets')
        return DATASETS.get(kind if '.' in kind else f'{self.scope}.{kind}') or DATASETS.get(kind)

    def reads_as(self, library: str, name: str) -> bool:
        """Whether it reads its files as a class of a library does, or is derived from it."""
        if self.scope != library or not isinstance(self.owner, type):
            return False
        base = getattr(importlib.import_module(f'{library}.datasets'), name)
        return issubclass(self.owner, base) and self.owner.load_data_list is base.load_data_list

    @property
    def is_coco(self) -> bool:
        """Whether its annotations are a file of COCO instances."""
        return self.reads_as('mmdet', 'CocoDataset')

    @cached_property
    def classes(self) -> tuple[str, ...] | None:
        """The class names that the model is told, None if there are none."""
        names = self.dataset.metainfo.get('classes')
        return None if names is None else tuple(map(str, names))

    @property
    def folders(self) -> dict[str, int]:
        """Label of each class folder, where folders are the classes."""
        return getattr(self.dataset, 'folder_to_idx', None) or {}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The label of each name in the files, as far as they name any.

        Names are those of categories, class folders, or folders whose images all have one label.
        """
        if self.content is not None:
            named = {c['id']: str(c['name']) for c in self.content['categories']}
            return {named[key]: label for key, label in self.dataset.cat2label.items()}
        found = {folder: {label} for folder, label in self.folders.items()}
        if not found and self.scope == 'mmpretrain':
            for info in self.infos():
                folder = os.path.basename(os.path.dirname(info['img_path']))
                found.setdefault(folder, set()).update(labels_of(info))
        return {name: labels.pop() for name, labels in found.items() if len(labels) == 1}

    def infos(self, most: int | None = MAX_ENTRIES) -> Iterator[dict[str, Any]]:
        """Read entries, spread over the data set."""
        total = len(self.dataset)
        step = 1 if most is None else max(1, -(-total // most))
        return map(self.dataset.get_data_info, range(0, total, step))

    def loading_steps(self) -> list[Any]:
        """The pipeline's first steps, which read files, with whole images asked for."""
        steps = [
            step
            for step in getattr(self.dataset.pipeline, 'transforms', [])
            if 'Load' in type(step).__name__
        ]
        return [
            CheckedLoadImageFromFile(
                step.to_float32,
                step.color_type,
                step.imdecode_backend,
                backend_args=step.backend_args,
            )
            if type(step).__name__ == 'LoadImageFromFile'
            else copy.deepcopy(step)  # for a thread of its own
            for step in steps
        ]


def labels_of(info: Mapping[str, Any]) -> list[int]:
    """The labels of an image that its data set knows: its own, or those of what can be learnt."""
    if 'instances' in info:
        return [int(i['bbox_label']) for i in info['instances'] if not i.get('ignore_flag')]
    return np.atleast_1d(info.get('gt_label', [])).astype(int).tolist()


def parts_of(cfg: Config, split: str) -> list[Part]:
    """Look into RepeatDataset, ConcatDataset and their like."""
    loader = cfg.get(f'{split}_dataloader')
    if loader is None:
        return []
    return [
        Part(split, key, part, cfg.default_scope)
        for key, part in _leaves(loader['dataset'], f'{split}_dataloader.dataset')
    ]


def _leaves(part: Any, key: str) -> Iterator[tuple[str, dict]]:
    if 'datasets' in part:
        for index, inner in enumerate(part['datasets']):
            yield from _leaves(inner, f'{key}.datasets.{index}')
    elif 'dataset' in part:
        yield from _leaves(part['dataset'], f'{key}.dataset')
    else:
        yield key, part


def build(cfg: Config, parts: list[Part]) -> Any:
    """Build what a loader is given."""
    gc.disable()  # it would look through millions of entries again and again
    try:
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            whole = DATASETS.build(cfg[f'{parts[0].split}_dataloader']['dataset'])
        if hasattr(whole, 'full_init'):
            whole.full_init()
    finally:
        gc.enable()
    for part, dataset in zip(parts, leaves(whole), strict=True):
        part.dataset = dataset
    return whole


def leaves(whole: Any) -> Iterator[Any]:
    """Look into RepeatDataset, ConcatDataset and their like, as they are built."""
    if hasattr(whole, 'datasets'):
        for inner in whole.datasets:
            yield from leaves(inner)
    elif hasattr(whole, 'dataset'):
        yield from leaves(whole.dataset)
    else:
        yield whole


def spread(total: int) -> Iterator[int]:
    """All of 0 to ``total`` - 1, each once, such that any first few lie all over the range."""
    step = next((k for k in range(round(0.618 * total), total) if _coprime(k, total)), 1)
    return ((index * step) % total for index in range(total))


def _coprime(first: int, second: int) -> bool:
    while second:
        first, second = second, first % second
    return first == 1


def processes() -> int:
    """Number of processes of this launch."""
    return int(os.environ.get('WORLD_SIZE') or os.environ.get('SLURM_NTASKS') or 1)
