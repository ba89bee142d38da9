"""Checks of COCO annotation files and their images."""
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from groupmamba_mm.errors import DataError
from .data_facts import folder_of, shown


def check_coco(dataset: Dict, classes: Optional[Tuple[str, ...]], split: str) -> Dict[str, Any]:
    """Check an annotation file, and that its images are there.

    Args:
        dataset: Config of a ``CocoDataset`` whose folders and files are there.
        classes: The class names it is used with.
        split: 'train', 'val' or 'test', for messages.

    Returns:
        The annotation file's content.

    Raises:
        DataError: The file is no COCO file, lacks a class, refers to what it does not have, has
            no annotation of the classes, or images are missing.
    """
    path = os.path.join(dataset.get('data_root') or '', dataset['ann_file'])
    where = f'annotation file {path} of the {split} data'
    content = _read(path, where)
    images = {image['id']: image for image in content['images']}
    categories = {category['id']: category['name'] for category in content['categories']}
    if not images:
        raise DataError(f'{where} lists no images; give a file with images')
    for kind in ('images', 'annotations', 'categories'):
        twice = [key for key, count in Counter(e['id'] for e in content[kind]).items() if count > 1]
        if twice:
            raise DataError(f'{where}: the id {twice[0]} stands at several {kind}; give each an '
                            'id of its own')
    absent = [name for name in classes or () if name not in categories.values()]
    if absent:
        raise DataError(
            f'{where} has the categories {shown(list(categories.values()))}, and not '
            f'{shown(absent)}; set metainfo=dict(classes=...) in train, val and test to names out '
            'of the file')
    _check_annotations(content['annotations'], images, categories, classes, where,
                       _needs_masks(dataset))
    _check_images_exist(content['images'], Path(folder_of(dataset, 'img')), where)
    return content


def coco_facts(content: Dict[str, Any]) -> List[str]:
    """Count what an annotation file holds.

    Args:
        content: The file's content.

    Returns:
        Lines for a report.
    """
    names = {category['id']: category['name'] for category in content['categories']}
    counts = Counter(names[a['category_id']] for a in content['annotations'])
    annotated = {a['image_id'] for a in content['annotations']}
    empty = len(content['images']) - len(annotated)
    degenerate = sum(_is_degenerate(a) for a in content['annotations'])
    crowds = sum(bool(a.get('iscrowd')) for a in content['annotations'])
    lines = [f"{len(content['images'])} images ({empty} without annotations), "
             f"{len(content['annotations'])} annotations ({crowds} crowds, {degenerate} of less "
             'than a pixel, which are skipped)']
    lines.append('annotations of a class: ' + ', '.join(
        f'{name} {counts[name]}' for name in names.values()))
    return lines


def check_coco_sizes(content: Dict[str, Any], sizes: Dict[str, Tuple[int, int]]) -> List[str]:
    """Compare the sizes in an annotation file with those of the images.

    Args:
        content: The file's content.
        sizes: (H, W) of the images that could be read, by their file names.

    Returns:
        What is wrong.
    """
    problems = []
    for image in content['images']:
        found = sizes.get(image['file_name'])
        if found is not None and found != (image['height'], image['width']):
            problems.append(f"image {image['file_name']} is {found[0]}x{found[1]} (H x W), and the "
                            f"annotation file says {image['height']}x{image['width']}")
    return problems


def _read(path: str, where: str) -> Dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as error:
        raise DataError(f'{where} is not valid JSON ({error}); get it again') from None
    keys = ('images', 'annotations', 'categories')
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise DataError(f'{where} has no {", ".join(missing)}, so it is no COCO file of instances; '
                        'give another one, such as instances_train2017.json')
    needed = dict(images=('id', 'file_name', 'height', 'width'), categories=('id', 'name'),
                  annotations=('id', 'image_id', 'category_id', 'bbox', 'area'))
    for kind, names in needed.items():
        for number, entry in enumerate(content[kind]):
            lacking = [name for name in names if name not in entry]
            if lacking:
                raise DataError(f'{where}: number {number} of its {kind} has no '
                                f'{", ".join(lacking)}; add what is missing')
    return content


def _needs_masks(dataset: Dict) -> bool:
    return any(step.get('with_mask') for step in dataset.get('pipeline') or ())


def _is_degenerate(annotation: Dict) -> bool:
    """Tell whether mmdet skips an annotation for its size."""
    _, _, width, height = annotation['bbox']
    return annotation['area'] <= 0 or width < 1 or height < 1


def _check_annotations(annotations: List[Dict], images: Dict, categories: Dict,
                       classes: Optional[Tuple[str, ...]], where: str, with_mask: bool) -> None:
    used = 0
    for annotation in annotations:
        name = f"{where}: annotation {annotation['id']}"
        if annotation['image_id'] not in images:
            raise DataError(f"{name} is of the image {annotation['image_id']}, which the file does "
                            'not list; remove it or add the image')
        if annotation['category_id'] not in categories:
            raise DataError(f"{name} has the category {annotation['category_id']}, and the file "
                            f'lists {shown(sorted(categories))}; mend it')
        if with_mask and not annotation.get('segmentation'):
            raise DataError(f'{name} has no segmentation, and the model learns masks; add it, or '
                            'take a model without a mask head')
        used += classes is None or categories[annotation['category_id']] in classes
    if not used:
        raise DataError(f'{where} has no annotation of the classes {shown(classes or ())}; give '
                        'another file or other classes')


def _check_images_exist(images: List[Dict], folder: Path, where: str) -> None:
    """Look for all images, folder by folder: asking for each file takes long on a network."""
    wanted = defaultdict(list)
    for image in images:
        path = folder / image['file_name']
        wanted[path.parent].append(path.name)
    missing = []
    for parent, names in wanted.items():
        there = set(os.listdir(parent)) if parent.is_dir() else set()
        missing += [str(parent / name) for name in names if name not in there]
    if missing:
        raise DataError(f'{len(missing)} of the {len(images)} images that {where} lists are '
                        f'missing: {shown(missing, 3)}; restore them, or correct data_prefix')
