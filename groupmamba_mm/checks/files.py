"""Are the files there, are they what they should be, and which were passed over?"""
import json
import math
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from groupmamba_mm.engine.config_checks import type_name
from .findings import Finding, shown
from .parts import Part

# mmpretrain's data sets that fetch themselves.
_DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')
#: Above this number of images, the quick form does not look for files that were passed over.
MAX_LISTED = 200_000


def missing_paths(part: Part) -> Iterator[Finding]:
    """Look for the folders and annotation files of a config, before a library does.

    Args:
        part: A data set, not built yet.

    Yields:
        Errors.
    """
    if type_name(part.cfg) in _DOWNLOADED or not part.is_local:
        return
    prefixes = part.cfg.get('data_prefix') or {}
    prefixes = dict(img_path=prefixes) if isinstance(prefixes, str) else dict(prefixes)
    if not prefixes and part.reads_as('mmpretrain', 'CustomDataset'):
        prefixes = dict(img_path=part.cfg.get('split') or '')
    wanted = [('data folder', '', 'data_root')] if part.root else []
    wanted += [('annotation file', part.cfg['ann_file'], 'ann_file')] if part.cfg.get(
        'ann_file') else []
    wanted += [('data folder', prefix or '', 'data_prefix') for prefix in prefixes.values()]
    for kind, name, key in wanted:
        path = os.path.join(part.root, name) if name else part.root
        there = os.path.exists(path) if kind == 'annotation file' else os.path.isdir(path)
        if path and not there:
            yield Finding(f'{kind} {path} of {part}', f'does not exist (looked from {os.getcwd()})',
                          f'prepare the data as the README says, or point {part.key}.{key} at it')
            return


def read_coco(part: Part, needs: Tuple[str, ...]) -> Iterator[Finding]:
    """Read a COCO file and check its form; what it holds goes to ``part.content``.

    Args:
        part: A data set whose paths exist.
        needs: Keys that its annotations need beside those that every data set reads, () if it is
            used without annotations.

    Yields:
        Errors, and a warning about twice the same file name.
    """
    path = os.path.join(part.root, part.cfg['ann_file'])
    where = f'annotation file {path} of {part}'
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as error:
        yield Finding(where, f'is not valid JSON ({error})', 'get it again')
        return
    kinds = dict(images=('id', 'file_name', 'height', 'width'), categories=('id', 'name'),
                 annotations=('id', 'image_id', 'category_id', 'bbox', 'area', *needs))
    if needs == () and isinstance(content, dict):
        content.setdefault('annotations', [])
    lacking = [kind for kind in kinds if not isinstance(content, dict) or kind not in content]
    if lacking:
        yield Finding(where, f'has no {", ".join(lacking)}, so it is no COCO file of instances',
                      'give another one, such as instances_train2017.json')
        return
    if not content['images']:
        yield Finding(where, 'lists no images', 'give a file with images')
        return
    problems: Dict[str, List[Any]] = defaultdict(list)
    for kind, keys in kinds.items():
        for number, entry in enumerate(content[kind]):
            for key in keys:
                if key not in entry or key == 'segmentation' and not entry[key]:
                    problems[f'of its {kind} have no {key}'].append(f'number {number}')
    problems = problems or _dangling(content)
    for what, found in problems.items():
        yield Finding(where, f'is wrong: {len(found)} {what}: {shown(found)}',
                      'mend or remove them', how_many=len(found))
    if not problems:
        part.content = content
        yield from _missing_images(content['images'], part, where)


def _dangling(content: Dict[str, Any]) -> Dict[str, List[Any]]:
    """Ids that stand twice or refer to nothing, and boxes that are none."""
    problems: Dict[str, List[Any]] = defaultdict(list)
    for kind in ('images', 'annotations', 'categories'):
        counts = Counter(entry['id'] for entry in content[kind])
        for key, count in counts.items():
            if count > 1:
                problems[f'ids stand at several {kind}'].append(key)
    images = {image['id'] for image in content['images']}
    categories = {category['id'] for category in content['categories']}
    for annotation in content['annotations']:
        key, box = annotation['id'], annotation['bbox']
        if annotation['image_id'] not in images:
            problems['annotations are of images that it does not list'].append(
                f"{key} of the image {annotation['image_id']}")
        if annotation['category_id'] not in categories:
            problems[f'annotations have a category that is none of {shown(sorted(categories))}'
                     ].append(f"{key} has {annotation['category_id']}")
        if not (isinstance(box, list) and len(box) == 4 and all(
                isinstance(value, (int, float)) and math.isfinite(value) for value in box)):
            problems['annotations have a bbox that is not [x, y, width, height]'].append(
                f'{key} has {box}')
    return problems


def _missing_images(images: List[Dict], part: Part, where: str) -> Iterator[Finding]:
    folder = Path(os.path.join(part.root, (part.cfg.get('data_prefix') or {}).get('img') or ''))
    files = [folder / image['file_name'] for image in images]
    yield from missing_files(files, f'images that {where} lists', 'correct data_prefix')


def missing_files(files: List[Path], kind: str, remedy: str) -> Iterator[Finding]:
    """Look for files, folder by folder: asking for each one takes long on a network.

    Args:
        files: The files.
        kind: What they are.
        remedy: What to do if they are all there, but elsewhere.

    Yields:
        One error if some are missing.
    """
    there: Dict[Path, set] = {}
    missing = []
    for file in files:
        if file.parent not in there:
            there[file.parent] = {entry.name for entry in os.scandir(file.parent)
                                  if entry.is_file()} if file.parent.is_dir() else set()
        if file.name not in there[file.parent]:
            missing.append(file)
    if missing:
        broken = ' (links to nothing)' if all(file.is_symlink() for file in missing) else ''
        yield Finding(f'{len(missing)} of the {len(files)} {kind}',
                      f'are missing{broken}: {shown(missing, 3)}', f'restore them, or {remedy}',
                      how_many=len(missing))


def missing_label_maps(part: Part) -> Iterator[Finding]:
    """Look for the label maps that the images of a segmentation data set need."""
    infos = list(part.infos(None))
    for key, kind, remedy in (('img_path', 'images', 'correct data_prefix or img_suffix'),
                              ('seg_map_path', 'label maps', 'correct data_prefix or '
                               f'seg_map_suffix ({part.dataset.seg_map_suffix!r})')):
        files = [Path(info[key]) for info in infos if key in info]
        yield from missing_files(files, f'{kind} of {part}', remedy)


def image_folder(part: Part) -> str:
    """The folder that a data set's image paths begin with."""
    prefix = part.dataset.data_prefix
    return (prefix.get('img_path') or prefix.get('img') or '') if isinstance(prefix, dict) else ''


def passed_over(part: Part, full: bool) -> Iterator[Finding]:
    """Compare the image folder with the images that were taken.

    Args:
        part: A data set that was built.
        full: Whether to list folders of any size.

    Yields:
        A warning about files that were left out and look like images, a fact about others.
    """
    folder = image_folder(part)
    if not part.is_local or not os.path.isdir(folder) or (
            len(part.dataset) > MAX_LISTED and not full):
        return
    taken = {os.path.normpath(info['img_path']) for info in part.infos(None)}
    reasons: Dict[Tuple[str, bool], List[str]] = defaultdict(list)
    for parent, folders, names in os.walk(folder, followlinks=True):
        for name in names + [name for name in folders if name.startswith('.')]:
            path = os.path.join(parent, name)
            if os.path.normpath(path) in taken or os.path.isdir(path) and any(
                    file.startswith(os.path.normpath(path) + os.sep) for file in taken):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if os.path.islink(path) and not os.path.exists(path):
                reasons['links to nothing', True].append(path)
            elif name.startswith('.'):
                reasons['hidden', False].append(path)
            elif part.content is not None:
                reasons['not in the annotation file', False].append(path)
            elif suffix in _IMAGE_SUFFIXES:
                reasons[f'end in {os.path.splitext(name)[1]}', True].append(path)
            else:
                reasons[f'end in {suffix or "nothing"}', False].append(path)
    for (reason, is_image), paths in reasons.items():
        yield Finding(str(part), f'leave out {len(paths)} files of {folder} that are {reason}'
                      .replace('are end', 'end') + f': {shown(paths, 3)}',
                      'rename them, or set img_suffix or extensions of the data set, if they belong '
                      'to it' if is_image else '', len(paths), 'warning' if is_image else 'fact')


_IMAGE_SUFFIXES = {'.jpg', '.jpeg', '.jfif', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif',
                   '.ppm', '.pgm', '.jp2', '.heic', '.avif'}


def shared_files(parts: List[Part]) -> Iterator[Finding]:
    """Compare the files of train with those of val and test, links followed.

    Args:
        parts: All data sets that were built.

    Yields:
        A warning for each split that shares images with training.
    """
    train = {os.path.realpath(info['img_path']) for part in parts if part.split == 'train'
             for info in part.infos()}
    if not train:
        return
    for split in ('val', 'test'):
        files = {os.path.realpath(info['img_path']) for part in parts if part.split == split
                 for info in part.infos()}
        both = sorted(files & train)
        if both:
            yield Finding(f'the {split} data', f'share {len(both)} of {len(files)} images with the '
                          f'train data: {shown(both, 3)}', 'take images that training has not seen,'
                          ' or the scores say nothing about new ones', len(both), 'warning')
