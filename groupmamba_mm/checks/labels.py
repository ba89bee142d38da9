"""Do labels mean the same to the files, to every split and to the model, and is there any?"""
from collections import Counter
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from mmengine.config import Config

from .findings import Finding, config_error, shown
from .parts import Part

#: Parts of a model that predict the data's classes. Others, such as a semantic head beside a
#: detector's, may have classes of their own.
HEADS = ('head', 'heads', 'bbox_head', 'mask_head', 'decode_head', 'auxiliary_head',
         'data_preprocessor')


def labels_of(info: Mapping[str, Any]) -> List[int]:
    """The labels of an image that its data set knows without reading a label map.

    Args:
        info: An entry of a data set.

    Returns:
        Of a classifier its label or labels, of a detector those of what can be learnt.
    """
    if 'instances' in info:
        return [int(i['bbox_label']) for i in info['instances'] if not i.get('ignore_flag')]
    return np.atleast_1d(info.get('gt_label', [])).astype(int).tolist()


def names_of_labels(part: Part) -> Iterator[Finding]:
    """Compare the class names that the model is told with those in the files.

    Args:
        part: A data set that was built.

    Yields:
        Errors.
    """
    classes = part.classes or ()
    doubles = [name for name, count in Counter(classes).items() if count > 1]
    if doubles:
        yield config_error(f'metainfo of {part}', f'has the class {shown(doubles)} several times',
                           'give each class a name of its own')
    hidden = [name for name in part.folders if name.startswith('.')]
    if hidden:
        yield Finding(str(part), f'have the hidden folder {shown(hidden)} for a class, which '
                      'numbers all classes behind it', f'remove it from {part.dataset.img_prefix}')
    if part.content is not None:
        there = [str(category['name']) for category in part.content['categories']]
        absent = [name for name in classes if name not in there]
        if absent:
            yield Finding(f'the annotation file of {part}', f'has the categories {shown(there)}, '
                          f'and not {shown(absent)}', 'set metainfo=dict(classes=...) in train, '
                          'val and test to names out of the file')
            return
        twice = [name for name, count in Counter(there).items() if count > 1]
        if twice:
            yield Finding(f'the annotation file of {part}', f'has several categories called '
                          f'{shown(twice)}', 'give each a name of its own, or join them')
            return
    wrong = [f'{part.names[label]} is number {label} in the files and {classes.index(name)} in '
             'classes' for label, name in part.names.items()
             if name in classes and classes.index(name) != label]
    if wrong:
        right = [name for _, name in sorted(part.names.items())]
        yield config_error(f'the classes of {part}', f'are in another order than in the files: '
                           f'{shown(wrong, 3)}', 'every name would be wrong; set metainfo='
                           f'dict(classes=...) in train, val and test to the order of the files: '
                           f'{tuple(right) if len(right) <= 30 else shown(right, 30)}')


def same_in_splits(parts: Sequence[Part], trained: Optional[Tuple[str, ...]]) -> Iterator[Finding]:
    """Compare the classes of the splits with those that were or will be trained.

    Args:
        parts: All data sets that were built.
        trained: The classes of a checkpoint that is tested, None in training.

    Yields:
        Errors where a class has another number, warnings where a split lacks some.
    """
    first, source = trained, 'the checkpoint was trained with'
    for part in parts:
        here = part.classes
        if here is None:
            continue
        if first is None:
            first, source = here, f'{part} have'
            continue
        if here == first:
            continue
        moved = [name for name in here if name in first and first.index(name) != here.index(name)]
        foreign = [name for name in here if name not in first]
        folders = bool(part.folders)
        remedy = ('give train, val and test the same class folders, empty ones where a split has '
                  'no image' if folders else
                  'set the same metainfo=dict(classes=...) in train, val and test')
        text = f'have the classes {shown(here)}, and {source} {shown(first)}'
        if moved or (foreign and len(foreign) < len(here)) or not folders and trained is None:
            number = f': {moved[0]} is number {here.index(moved[0])} here and ' \
                f'{first.index(moved[0])} there' if moved else ''
            yield Finding(str(part), f'{text}{number}', remedy, how_many=len(moved or foreign))
        else:
            yield Finding(str(part), text, remedy, severity='warning')
    numbers: Dict[str, Tuple[int, Part]] = {}
    for part in parts:  # an annotation file of a classifier names its folders by the way
        for name, label in _folders_in_file(part).items():
            label_before, before = numbers.setdefault(name, (label, part))
            if label_before != label:
                yield Finding(str(part), f'give images of the folder {name} the label {label}, and '
                              f'{before} give them {label_before}', 'number the classes of all '
                              'annotation files alike')
                return


def _folders_in_file(part: Part) -> Dict[str, int]:
    """Folders of an annotation file of a classifier whose images all have one label."""
    if not part.cfg.get('ann_file') or part.scope != 'mmpretrain':
        return {}
    found: Dict[str, set] = {}
    for info in part.infos():
        found.setdefault(info['img_path'].split('/')[-2], set()).update(labels_of(info))
    return {name: labels.pop() for name, labels in found.items() if len(labels) == 1}


def heads_of(part: Any, where: str) -> Iterator[Tuple[str, int]]:
    """Find what predicts classes in a model's config.

    Args:
        part: The config, or a part of it.
        where: Its place.

    Yields:
        The place of a ``num_classes`` and its value.
    """
    if isinstance(part, Mapping):
        name = where.split('.')[-1].split('[')[0]
        if isinstance(part.get('num_classes'), int) and name in HEADS:
            yield f'{where}.num_classes', part['num_classes']
        for key, value in part.items():
            if key != 'teacher':
                yield from heads_of(value, f'{where}.{key}')
    elif isinstance(part, (list, tuple)):
        for index, value in enumerate(part):
            yield from heads_of(value, f'{where}[{index}]')


def heads(cfg: Config, part: Part) -> Iterator[Finding]:
    """Compare the classes with the outputs of the model's heads.

    Args:
        cfg: The config.
        part: The training data, or what is tested.

    Yields:
        Errors.
    """
    found = dict(heads_of(cfg.get('model'), 'model'))
    found.update(heads_of(cfg.get('data_preprocessor'), 'data_preprocessor'))
    if part.classes is not None:
        kind = f'{len(part.folders)} class folders' if part.folders else \
            f'{len(part.classes)} classes'
        for where, number in found.items():
            if number != len(part.classes):
                yield config_error(where, f'is {number}, and {part} have {kind} '
                                   f'({shown(part.classes, 12)})', 'set it to that number, or '
                                   'mend the classes of the data')
    highest = max((max(labels_of(info), default=-1) for info in part.infos()), default=-1)
    fewest = min(found.values(), default=highest + 1)
    if highest >= fewest:
        yield Finding(str(part), f'have the label {highest}, and the model has {fewest} classes, '
                      f'0 to {fewest - 1}', 'number the classes from 0, or raise num_classes')


def learnable(part: Part, counts: Counter, read: int, ignored: int = 0,
              full: bool = False) -> Iterator[Finding]:
    """Is anything left to learn after all filters?

    Args:
        part: A data set that was built.
        counts: How often each label was found: images, annotations or pixels.
        read: Number of images that were looked at.
        ignored: Number of pixels without a label.
        full: Whether to report the numbers too.

    Yields:
        Errors, warnings and facts.
    """
    total = len(part.dataset)
    everything = read >= total
    if not total:
        yield Finding(str(part), 'have no image left after all filters', 'check filter_cfg, '
                      'indices and the sizes in the annotation file')
        return
    things = {'mmdet': 'annotations', 'mmseg': 'pixels'}.get(part.scope, 'images')
    severity = 'error' if part.split == 'train' and everything else 'warning'
    if part.content is not None and everything and part.content['annotations']:
        yield from _lost(part, sum(counts.values()), severity)
    elif not counts:
        yield Finding(str(part), f'have no labelled {things} in {read} images', 'a model learns '
                      'nothing from them; check labels, ignore_index and reduce_zero_label',
                      severity=severity)
    names = part.classes or [str(label) for label in range(max(counts, default=0) + 1)]
    never = [name for label, name in enumerate(names) if not counts[label]]
    if counts and part.scope != 'mmdet' and len(counts) == 1 and len(names) > 1:
        only = names[min(next(iter(counts)), len(names) - 1)]
        extra = f', and {ignored} pixels are ignored (255)' if ignored else ''
        yield Finding(str(part), f'have {things} of the class {only} only in {read} images'
                      f'{extra}, and none of {shown(never)}', 'there is nothing to tell apart; '
                      'write the number of each class into the labels', severity=severity)
    elif never and counts and (everything or ignored):
        extra = f', while {ignored} pixels are ignored (255)' if ignored else ''
        yield Finding(str(part), f'have no {things} of {len(never)} of {len(names)} classes in '
                      f'{read} images{extra}: {shown(never)}', 'check that the labels are numbered '
                      'as classes says', len(never), 'warning')
    if full and counts:
        share = sum(counts.values()) if things == 'pixels' else None
        listed = ', '.join(
            f'{name} ' + (f'{counts[label] / share:.2%}' if share else str(counts[label]))
            for label, name in enumerate(names[:40]))
        yield Finding(str(part), f'have {total} images; {things} of each class: {listed}',
                      severity='fact')


def _lost(part: Part, left: int, severity: str) -> Iterator[Finding]:
    """Compare the annotations in the file with those that the data set gives."""
    annotations = part.content['annotations']
    used = set(part.dataset.cat_ids)
    sizes = {image['id']: (image['width'], image['height']) for image in part.content['images']}
    reasons: Counter = Counter()
    for annotation in annotations:
        x, y, width, height = annotation['bbox']
        image_width, image_height = sizes[annotation['image_id']]
        if annotation['category_id'] not in used:
            reasons['of other classes'] += 1
        elif annotation.get('iscrowd') or annotation.get('ignore'):
            reasons['crowds or ignored'] += 1
        elif image_width <= 0 or image_height <= 0:
            reasons['in images of width or height 0 or less'] += 1
        elif annotation['area'] <= 0 or width < 1 or height < 1:
            reasons['smaller than a pixel, or of area 0 (boxes are in pixels, not in shares of the '
                    'image)'] += 1
        elif x >= image_width or y >= image_height or x + width <= 0 or y + height <= 0:
            reasons['outside of their image'] += 1
    listed = ', '.join(f'{count} {reason}' for reason, count in reasons.most_common())
    if not left:
        yield Finding(f'the annotation file of {part}', f'has {len(annotations)} annotations, and '
                      f'none can be learnt: {listed or "all filtered out"}',
                      'mend the file, the classes or filter_cfg', severity=severity)
    elif left < len(annotations):
        yield Finding(str(part), f'give {left} of {len(annotations)} annotations to the model; '
                      f'left out: {listed or "by filter_cfg"}',
                      'check that this is meant' if left < len(annotations) / 2 else '',
                      len(annotations) - left, 'warning' if left < len(annotations) / 2 else 'fact')
