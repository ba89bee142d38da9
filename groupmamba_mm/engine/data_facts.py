"""What a config says about its data, looked up without building anything."""
import importlib
import os
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

from mmengine.config import Config
from mmengine.registry import DATASETS

from groupmamba_mm.errors import ConfigError


#: Parts of a model that predict the data's classes. Others, such as a semantic head beside a
#: detector's, may have classes of their own.
HEADS = ('bbox_head', 'mask_head', 'decode_head', 'auxiliary_head')


def plain_datasets(dataset: Dict) -> Iterator[Dict]:
    """Look into RepeatDataset, ConcatDataset and their like.

    Args:
        dataset: Config of a data set.

    Yields:
        The configs of the data sets in it that have files.
    """
    if 'datasets' in dataset:
        for part in dataset['datasets']:
            yield from plain_datasets(part)
    elif 'dataset' in dataset:
        yield from plain_datasets(dataset['dataset'])
    else:
        yield dataset


def dataset_class(dataset: Dict, scope: str) -> Optional[type]:
    """Find the class of a data set.

    Args:
        dataset: Its config.
        scope: The library that runs it.

    Returns:
        The class, None if there is none of this name.
    """
    kind = dataset.get('type')
    if not isinstance(kind, str):
        return kind
    importlib.import_module(f'{scope}.datasets')
    return DATASETS.get(kind if '.' in kind else f'{scope}.{kind}') or DATASETS.get(kind)


def classes_of(dataset: Dict, owner: Optional[type], split: str) -> Optional[Tuple[str, ...]]:
    """Find the class names that a data set is used with.

    Args:
        dataset: Its config.
        owner: Its class.
        split: 'train', 'val' or 'test', for the message.

    Returns:
        The names, those of the data set's own class if the config has none; None if neither has
        any.

    Raises:
        ConfigError: The config has a text instead of a tuple of names.
    """
    classes = (dataset.get('metainfo') or {}).get('classes')
    if isinstance(classes, str):
        if not os.path.isfile(classes):
            raise ConfigError(f'{split}_dataloader.dataset.metainfo.classes is the text '
                              f'{classes!r}; write a tuple, for a single class with its comma: '
                              f'({classes!r}, )')
        return None
    if classes is None:
        classes = getattr(owner, 'METAINFO', {}).get('classes')
    return None if classes is None else tuple(classes)


def check_same_classes(cfg: Config, scope: str) -> None:
    """Refuse a config whose splits are used with different classes.

    Args:
        cfg: The config.
        scope: The library that runs it.

    Raises:
        ConfigError: The class names of two splits differ.
    """
    found = {}
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        for dataset in plain_datasets(loader['dataset']) if loader else ():
            classes = classes_of(dataset, dataset_class(dataset, scope), split)
            if classes is not None:
                found.setdefault(classes, split)
    if len(found) > 1:
        (first, split), (second, other) = list(found.items())[:2]
        raise ConfigError(f'the {split} data have the classes {shown(first)}, the {other} data '
                          f'{shown(second)}; set the same metainfo=dict(classes=...) in train, val '
                          'and test')


def check_head_classes(model: Any, number: int, where: str = 'model') -> None:
    """Refuse heads that are built for another number of classes than the data have.

    Args:
        model: The model's config, or a part of it.
        number: Number of the data's classes.
        where: The part's name.

    Raises:
        ConfigError: A head's ``num_classes`` is another number.
    """
    if isinstance(model, dict):
        found = model.get('num_classes')
        name = where.split('.')[-1].split('[')[0]
        if found is not None and name in HEADS and found != number:
            raise ConfigError(f'{where}.num_classes is {found}, and the data have {number} '
                              'classes; set it to that, or the metainfo=dict(classes=...) of the '
                              'data sets to the right names')
        for key, value in model.items():
            check_head_classes(value, number, f'{where}.{key}')
    elif isinstance(model, (list, tuple)):
        for index, value in enumerate(model):
            check_head_classes(value, number, f'{where}[{index}]')


def folder_of(dataset: Dict, key: str) -> str:
    """Join a data set's root with one of its prefixes."""
    prefix = (dataset.get('data_prefix') or {}).get(key) or ''
    return os.path.join(dataset.get('data_root') or '', prefix)


def shown(names: Union[List, Tuple], most: int = 5) -> str:
    """List some names and how many more there are."""
    names = list(names)
    listed = ', '.join(str(name) for name in names[:most])
    return listed + (f' and {len(names) - most} more' if len(names) > most else '')
