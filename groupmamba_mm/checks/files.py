"""Are the files there, are they what they should be, and which were passed over?

Every check takes a data set of a loader, a :class:`Part`, and yields what it finds.
"""

import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmengine.fileio import list_from_file

from groupmamba_mm.engine.config_checks import type_name

from .findings import Finding, doubles, shown
from .parts import MAX_ENTRIES, Part, labels_of

# mmpretrain's data sets that fetch themselves.
_DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')
#: Above this number of images, the quick form does not look for files that were passed over.
MAX_LISTED = 200_000
_IMAGE_SUFFIXES = {
    '.jpg',
    '.jpeg',
    '.jfif',
    '.png',
    '.bmp',
    '.tif',
    '.tiff',
    '.webp',
    '.gif',
    '.ppm',
    '.pgm',
    '.jp2',
    '.heic',
    '.avif',
}


def missing_paths(part: Part) -> Iterator[Finding]:
    """Look for the folders and annotation files of a config, before a library does."""
    if type_name(part.cfg) in _DOWNLOADED or not part.is_local:
        return
    prefixes = part.cfg.get('data_prefix') or {}
    prefixes = dict(img_path=prefixes) if isinstance(prefixes, str) else dict(prefixes)
    if not prefixes and part.reads_as('mmpretrain', 'CustomDataset'):
        prefixes = dict(img_path=part.cfg.get('split') or '')
    wanted = [
        ('data folder', '', 'data_root'),
        ('annotation file', part.cfg.get('ann_file'), 'ann_file'),
    ]
    wanted += [
        ('data folder', prefix, 'data_prefix')
        for name, prefix in prefixes.items()
        if name != 'seg_map_path' or part.loads_labels
    ]
    for kind, name, key in wanted:
        path = os.path.join(part.root, name) if name else part.root
        if (kind == 'annotation file' and not name) or not path:
            continue
        if not (os.path.exists(path) if kind == 'annotation file' else os.path.isdir(path)):
            yield Finding(
                f'{kind} {path} of {part}',
                f'does not exist (looked from {os.getcwd()})',
                f'prepare the data as the README says, or point {part.key}.{key} at it',
            )
            return


def read_coco(part: Part, needs: tuple[str, ...]) -> Iterator[Finding]:
    """Read a COCO file into ``part.content`` and check its form.

    ``needs`` are keys of annotations beside those that every data set reads, () if it is used
    without annotations.
    """
    path = os.path.join(part.root, part.cfg['ann_file'])
    where = f'annotation file {path} of {part}'
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as error:
        yield Finding(where, f'is not valid JSON ({error})', 'write it as UTF-8, or get it again')
        return
    if needs == () and isinstance(content, dict):
        content.setdefault('annotations', [])
    lacking = [
        kind
        for kind in _COCO
        if not isinstance(content, dict) or not isinstance(content.get(kind), list)
    ]
    if lacking or not content['images']:
        yield Finding(
            where,
            f'has no {", ".join(lacking)}, so it is no COCO file of instances'
            if lacking
            else 'lists no images',
            'give another one, such as instances_train2017.json',
        )
        return
    problems: dict[str, list[Any]] = defaultdict(list)
    for kind, keys in _COCO.items():
        for number, entry in enumerate(content[kind]):
            for key in keys if kind != 'annotations' else [*keys, *needs]:
                what, is_right = keys.get(key, _ANYTHING)
                value = entry.get(key)
                if value is None or value == []:
                    problems[f'of its {kind} have no {key}'].append(f'number {number}')
                elif not is_right(value):
                    problems[f'of its {kind} have a {key} that is not {what}'].append(
                        f'number {number} has {value!r}'[:80]
                    )
    problems = problems or _dangling(content, part.split != 'train')
    for what, found in problems.items():
        yield Finding(
            where,
            f'is wrong: {len(found)} {what}: {shown(found)}',
            'mend or remove them',
            how_many=len(found),
        )
    if not problems:
        part.content = content
        folder = Path(part.root, (part.cfg.get('data_prefix') or {}).get('img') or '')
        yield from _missing(
            [folder / image['file_name'] for image in content['images']],
            f'images that {where} lists',
            'correct data_prefix',
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


_ANYTHING = ('anything', lambda value: True)
_ID = ('a number or a text', lambda value: isinstance(value, (int, str)))
_NUMBER = ('a number', _is_number)
_TEXT = ('a text', lambda value: isinstance(value, str))
#: What every data set reads of a COCO file.
_COCO = dict(
    images=dict(id=_ID, file_name=_TEXT, height=_NUMBER, width=_NUMBER),
    categories=dict(id=_ID, name=_ANYTHING),
    annotations=dict(
        id=_ID, image_id=_ID, category_id=_ID, bbox=('[x, y, width, height]', _is_box), area=_NUMBER
    ),
)


def _dangling(content: dict[str, Any], is_scored: bool) -> dict[str, list[Any]]:
    """Ids that stand twice, refer to nothing, or mean nothing to the metric."""
    problems: dict[str, list[Any]] = defaultdict(list)
    ids = {kind: [entry['id'] for entry in content[kind]] for kind in _COCO}
    for kind, found in ids.items():
        for key in doubles(found):
            problems[f'ids stand at several {kind}'].append(key)
    images, categories = set(ids['images']), set(ids['categories'])
    if is_scored and 0 in ids['annotations']:
        problems[
            'annotations have the id 0, which the metric takes for not found, so number them from 1'
        ].append(0)
    for annotation in content['annotations']:
        key, category = annotation['id'], annotation['category_id']
        if annotation['image_id'] not in images:
            problems['annotations are of images that it does not list'].append(
                f'{key} of the image {annotation["image_id"]!r}'
            )
        if category not in categories:
            problems[
                f'annotations have a category that is none of {shown(sorted(categories, key=lambda one: (str(type(one)), one)))}'
            ].append(f'{key} has {category!r}')
    return problems


def _missing(files: list[Path], kind: str, remedy: str) -> Iterator[Finding]:
    """Look for files, folder by folder: asking for each one takes long on a network."""
    there: dict[Path, set] = {}
    for folder in {file.parent for file in files}:
        there[folder] = (
            {entry.name for entry in os.scandir(folder) if entry.is_file()}
            if folder.is_dir()
            else set()
        )
    missing = [file for file in files if file.name not in there[file.parent]]
    if missing:
        broken = ' (links to nothing)' if all(file.is_symlink() for file in missing) else ''
        yield Finding(
            f'{len(missing)} of the {len(files)} {kind}',
            f'are missing{broken}: {shown(missing, 3)}',
            f'restore them, or {remedy}',
            how_many=len(missing),
        )


def odd_line(part: Part) -> Finding | None:
    """The first line of a classifier's list that is no path with the number of a class behind it."""
    file = part.cfg.get('ann_file') or ''
    if part.scope != 'mmpretrain' or not part.is_local or not file.endswith('.txt'):
        return None
    lines = list_from_file(os.path.join(part.root or '', file))
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(r'\S.* -?\d+', line.strip()):
            return Finding(
                f'line {number} of {file} of {part}',
                f'is {line!r}, and each must be a path, a space and the number of a class',
                'mend it; without any numbers, set with_label=False',
            )
    return None


def missing_images(part: Part) -> Iterator[Finding]:
    """Look for the images that a classifier's annotation file lists, of a large one for some."""
    infos = part.infos(*[None] * (len(part.dataset) <= MAX_LISTED))
    yield from _missing(
        [Path(info['img_path']) for info in infos if 'img_path' in info],
        f'images that {part.cfg["ann_file"]} of {part} lists',
        'correct data_prefix',
    )


def missing_label_maps(part: Part) -> Iterator[Finding]:
    """Look for the images and label maps of a segmentation data set."""
    infos = list(part.infos(None))
    for key, kind, suffix in (
        ('img_path', 'images', 'img_suffix'),
        ('seg_map_path', 'label maps', 'seg_map_suffix'),
    ):
        if key == 'seg_map_path' and not part.loads_labels:
            continue
        yield from _missing(
            [Path(info[key]) for info in infos if key in info],
            f'{kind} of {part}',
            f'correct data_prefix or {suffix}',
        )


def passed_over(part: Part, full: bool) -> Iterator[Finding]:
    """Compare the image folder with the images that were taken; large ones in full only."""
    prefix = part.dataset.data_prefix
    folder = (prefix.get('img_path') or prefix.get('img') or '') if prefix else ''
    large = len(part.dataset) > MAX_LISTED and not full
    if not part.is_local or not os.path.isdir(folder) or large:
        return
    taken = {os.path.normpath(info['img_path']) for info in part.infos(None)}
    left: dict[str, list[str]] = defaultdict(list)
    for parent, _, names in os.walk(folder, followlinks=True):
        for path in (os.path.join(parent, name) for name in names):
            if os.path.normpath(path) not in taken:
                broken = os.path.islink(path) and not os.path.exists(path)
                hidden = os.path.basename(path).startswith('.')
                left[
                    'are links to nothing'
                    if broken
                    else 'are hidden'
                    if hidden
                    else f'end in {os.path.splitext(path)[1] or "nothing"}'
                ].append(path)
    for how, paths in left.items():
        looks = how.startswith('are links') or (
            part.content is None and how.split()[-1].lower() in _IMAGE_SUFFIXES
        )
        yield Finding(
            str(part),
            f'leave out {len(paths)} files of {folder} that {how}: {shown(paths, 3)}',
            'rename them, or set img_suffix or extensions of the data set, if they belong to it'
            if looks
            else '',
            len(paths),
            'warning' if looks else 'fact',
        )


def shared_files(parts: list[Part], full: bool) -> Iterator[Finding]:
    """Compare the images of each data set, and of train with val and test: by links and content.

    The contents of large data sets are compared in full only.
    """
    listed = [
        (part, [(_real(info['img_path']), labels_of(info)) for info in part.infos(*[None] * full)])
        for part in parts
    ]
    same: dict[str, str] = {}
    if full or sum(len(images) for _, images in listed) < MAX_ENTRIES:
        same = _same_content(
            {path for part, images in listed if part.is_local for path, _ in images}
        )
    files: dict[str, set] = defaultdict(set)
    for part, images in listed:
        found: dict[str, list] = defaultdict(list)
        for path, labels in images:
            found[same.get(path, path)].append((path, labels))
        files[part.split].update(found)
        twice = [several for several in found.values() if len(several) > 1]
        if twice:
            apart = sum(any(labels != several[0][1] for _, labels in several) for several in twice)
            yield Finding(
                str(part),
                f'have {len(twice)} images several times, {apart} of them with different labels: '
                f'{shown([" = ".join(path for path, _ in several[:2]) for several in twice], 3)}',
                'keep one of each, or the loss counts them more often',
                len(twice),
                'warning',
            )
    for split in ('val', 'test'):
        both = sorted(files[split] & files['train'])
        if both:
            yield Finding(
                f'the {split} data',
                f'share {len(both)} of {len(files[split])} images '
                f'with the train data: {shown(both, 3)}',
                'take images that training has not seen, or the scores say nothing about new ones',
                len(both),
                'warning',
            )


@lru_cache
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _real(path: str) -> str:
    """Follow links, those of a folder once for all of its files."""
    folder, name = os.path.split(path)
    whole = os.path.join(_real_folder(folder), name)
    if not os.path.islink(whole):
        return whole
    target = os.path.join(_real_folder(folder), os.readlink(whole))
    if os.path.islink(target):
        return os.path.realpath(target)
    return os.path.join(_real_folder(os.path.dirname(target)), os.path.basename(target))


def _same_content(paths: Iterable[str]) -> dict[str, str]:
    """Name one of the files with the same content for each of them, where there are several.

    Files are read only if others have their size, and wholly only if these have the same ends.
    """
    groups = [[path for path in sorted(paths) if os.path.isfile(path)]]
    for key in (os.path.getsize, _ends, _digest):
        split = []
        for group in groups:
            parted: dict[Any, list[str]] = defaultdict(list)
            for path in group:
                parted[key(path)].append(path)
            split += [part for part in parted.values() if len(part) > 1]
        groups = split
    return {path: group[0] for group in groups for path in group}


def _ends(path: str) -> bytes:
    with open(path, 'rb') as file:
        first = file.read(4096)
        file.seek(-min(4096, os.path.getsize(path)), os.SEEK_END)
        return first + file.read()


def _digest(path: str) -> bytes:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').digest()
