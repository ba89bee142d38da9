"""Look for the data before the model is built."""
import os
import sys
from pathlib import Path
from typing import Dict, Tuple

from mmengine.config import Config

from groupmamba_mm.errors import ConfigError, DataError
from .coco_checks import check_coco
from .data_facts import (check_head_classes, check_same_classes, classes_of, dataset_class,
                         plain_datasets)
from .seg_checks import LabelMaps, sampled

# mmpretrain's data sets that fetch themselves.
_DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')
# mmpretrain's data sets whose classes are folders when there is no annotation file.
_CLASS_FOLDERS = ('CustomDataset', 'ImageNet', 'ImageNet21k')
_IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')


def check_data(cfg: Config, splits: Tuple[str, ...]) -> None:
    """Check that the data sets are there and fit the model, as far as that is quick.

    Folders and annotation files must exist. Of COCO files the content is checked and that all
    images exist; of label maps that all exist, and the values of some.

    Args:
        cfg (Config): The config.
        splits (tuple[str]): Which of 'train', 'val' and 'test'; one without a loader is left out.

    Raises:
        ConfigError: If the classes of splits or heads differ.
        DataError: If something is missing, or annotations do not fit the classes.
    """
    scope = cfg.get('default_scope')
    if scope in ('mmdet', 'mmseg'):
        check_same_classes(cfg, scope)
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        for dataset in plain_datasets(loader['dataset']):
            _check_dataset(dataset, split)
            if scope in ('mmdet', 'mmseg') and _is_local(dataset) and _is_first_here():
                _check_annotations(cfg, dataset, split)


def _is_first_here() -> bool:
    # One process a machine reads annotations: those of COCO take gigabytes while they are read.
    return int(os.environ.get('LOCAL_RANK', os.environ.get('SLURM_LOCALID', 0))) == 0


def _is_local(dataset: Dict) -> bool:
    return not dataset.get('backend_args') and '://' not in (dataset.get('data_root') or '')


def _check_annotations(cfg: Config, dataset: Dict, split: str) -> None:
    scope = cfg.default_scope
    owner = dataset_class(dataset, scope)
    classes = classes_of(dataset, owner, split)
    if classes is not None and (is_coco(owner) or has_label_maps(owner)):
        check_head_classes(cfg.get('model'), len(classes))
    if is_coco(owner):
        _check_evaluator(cfg, dataset, split)
        check_coco(dataset, classes, split)
    elif has_label_maps(owner) and dataset.get('data_prefix', {}).get('seg_map_path'):
        maps = LabelMaps(dataset, owner, classes, split)
        for file in sampled(maps.check_pairs()):
            maps.check_labels(file)


def _check_evaluator(cfg: Config, dataset: Dict, split: str) -> None:
    """Refuse an evaluator that reads another annotation file than the data set."""
    evaluator = cfg.get(f'{split}_evaluator') or []
    own = os.path.join(dataset.get('data_root') or '', dataset['ann_file'])
    whole = cfg[f'{split}_dataloader']['dataset'] is dataset
    for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]:
        file = metric.get('ann_file')
        if whole and file and os.path.realpath(file) != os.path.realpath(own):
            raise ConfigError(f'{split}_evaluator.ann_file is {file}, and the {split} data are '
                              f'read from {own}; set both to the same file')


def is_coco(owner: type) -> bool:
    """Tell whether a data set reads COCO instances, and not another form of file."""
    return _reads_as(owner, 'mmdet.datasets', 'CocoDataset')


def has_label_maps(owner: type) -> bool:
    """Tell whether a data set pairs images with label maps by their names."""
    return _reads_as(owner, 'mmseg.datasets', 'BaseSegDataset')


def _reads_as(owner: type, module: str, name: str) -> bool:
    # A library that was not imported to find the class need not be installed.
    base = getattr(sys.modules.get(module), name, None)
    return base is not None and getattr(owner, 'load_data_list', None) is base.load_data_list


def _check_dataset(dataset: Dict, split: str) -> None:
    # A type may be a class in a pure Python config, or have its scope before it.
    kind = dataset.get('type')
    kind = (kind if isinstance(kind, str) else kind.__name__).split('.')[-1]
    root = dataset.get('data_root') or ''
    if kind in _DOWNLOADED or not _is_local(dataset):
        return
    if root and not os.path.isdir(root):
        raise DataError(_missing(f'data folder {root}', split, f'{split}_dataloader.dataset.'
                                 'data_root'))
    ann_file = dataset.get('ann_file') or ''
    if ann_file and not os.path.exists(os.path.join(root, ann_file)):
        raise DataError(_missing(f'annotation file {os.path.join(root, ann_file)}', split,
                                 f'{split}_dataloader.dataset.ann_file'))
    prefixes = dataset.get('data_prefix') or {}
    prefixes = dict(img_path=prefixes) if isinstance(prefixes, str) else dict(prefixes)
    if not prefixes and kind in _CLASS_FOLDERS:
        prefixes = dict(img_path=dataset.get('split') or '')
    for prefix in prefixes.values():
        # Without both, the annotation file has whole paths.
        folder = os.path.join(root, prefix)
        if folder and not os.path.isdir(folder):
            raise DataError(_missing(f'data folder {folder}', split,
                                     f'{split}_dataloader.dataset.data_prefix'))
    named_by_split = dataset.get('split') and (
        Path(root) / 'meta' / f"{dataset['split']}.txt").is_file()
    if (kind in _CLASS_FOLDERS and not ann_file and not named_by_split
            and dataset.get('with_label', True) and dataset.get('split') != 'test'):
        suffixes = tuple(dataset.get('extensions') or _IMAGE_SUFFIXES)
        _check_class_folders(Path(root) / prefixes.get('img_path', ''), split, suffixes)


def _missing(what: str, split: str, key: str) -> str:
    return (f'{what} of the {split} data does not exist (looked from {os.getcwd()}); prepare the '
            f'data as the README says, or point {key} at it')


def _check_class_folders(folder: Path, split: str, suffixes: Tuple[str, ...]) -> None:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise DataError(f'data folder {folder} of the {split} data has no class folders; put the '
                        'images of each class into a folder named after it')
    for class_folder in classes:
        if not _has_image(class_folder, suffixes):
            raise DataError(f'class {class_folder.name} of the {split} data has no images in '
                            f'{class_folder} (looked for {", ".join(suffixes)}); add some or '
                            'remove the folder')


def _has_image(folder: Path, suffixes: Tuple[str, ...]) -> bool:
    # os.walk would list the folder to its end, and ImageNet has more than a million images
    with os.scandir(folder) as entries:
        folders = []
        for entry in entries:
            if entry.name.lower().endswith(suffixes) and not entry.is_dir():
                return True
            if entry.is_dir():
                folders.append(Path(entry.path))
    return any(_has_image(inner, suffixes) for inner in folders)
