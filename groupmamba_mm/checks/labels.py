"""Do labels mean the same to the files, to every split and to the model, and is there any?

Every check yields what it finds; the data sets of a :class:`Part` are built.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config

from groupmamba_mm.engine.config_checks import type_name

from .findings import Finding, config_error, doubles, shown
from .parts import Part, labels_of

#: Parts of a model that predict the data's classes. Others, such as a semantic head beside a
#: detector's, may have classes of their own.
HEADS = (
    'head',
    'heads',
    'bbox_head',
    'mask_head',
    'decode_head',
    'auxiliary_head',
    'data_preprocessor',
)


def names_of_labels(part: Part) -> Iterator[Finding]:
    """Compare the class names that the model is told with those in the files."""
    classes = part.classes or ()
    same = doubles(classes) if (part.cfg.get('metainfo') or {}).get('classes') else []
    if same:  # ImageNet's own list has two cranes
        yield config_error(
            f'metainfo of {part}',
            f'has the class {shown(same)} several times',
            'give each class a name of its own',
        )
    hidden = [name for name in part.folders if name.startswith('.')]
    if hidden:
        yield Finding(
            str(part),
            f'have the hidden folder {shown(hidden)} for a class, which '
            'numbers all classes behind it',
            f'remove it from {part.dataset.img_prefix}',
        )
    if part.content is not None:
        where = f'the annotation file of {part}'
        there = [str(category['name']) for category in part.content['categories']]
        absent, twice = [name for name in classes if name not in there], doubles(there)
        if absent:
            yield Finding(
                where,
                f'has the categories {shown(there)}, and not {shown(absent)}',
                'set metainfo=dict(classes=...) in train, val and test to names out of the file',
            )
        elif twice:
            yield Finding(
                where,
                f'has several categories called {shown(twice)}',
                'give each a name of its own, or join them',
            )
        if absent or twice:
            return
    wrong = [
        f'{name} is number {label} in the files and {classes.index(name)} in classes'
        for name, label in part.numbers.items()
        if name in classes and classes.index(name) != label
    ]
    if wrong:
        right = sorted(part.numbers, key=part.numbers.get)
        yield config_error(
            f'the classes of {part}',
            f'are in another order than in the files: {shown(wrong, 3)}',
            'every name would be wrong; set metainfo='
            'dict(classes=...) in train, val and test to the order of the files: '
            f'{tuple(right) if len(right) <= 30 else shown(right, 30)}',
        )


def same_in_splits(parts: Sequence[Part], trained: tuple[str, ...] | None) -> Iterator[Finding]:
    """Compare the classes of the splits with each other, or with those of a checkpoint."""
    named = [part for part in parts if part.classes is not None]
    first = trained or (named[0].classes if named else ())
    source = 'the checkpoint was trained with' if trained else f'{named[0]} have' if named else ''
    for part in named:
        here, text = part.classes, f'have the classes {shown(part.classes)}, and {source} '
        if here == first:
            continue
        moved = [name for name in here if name in first and first.index(name) != here.index(name)]
        foreign = [name for name in here if name not in first]
        text += shown(first) + (
            f': {moved[0]} is number {here.index(moved[0])} here and {first.index(moved[0])} there'
            if moved
            else ''
        )
        # Wholly other names may be those of folders; a split may lack the last classes.
        wrong = moved or 0 < len(foreign) < len(here) or not (part.folders or trained)
        yield Finding(
            str(part),
            text,
            'give all splits the same class folders, empty ones where a split has no image'
            if part.folders
            else 'set the same metainfo=dict(classes=...) in train, val and test',
            len(moved or foreign) or 1,
            'error' if wrong else 'warning',
        )
    numbers: dict[str, tuple[int, Part]] = {}
    for part in parts:
        for name, label in part.numbers.items():
            other, before = numbers.setdefault(name, (label, part))
            if other != label:
                yield Finding(
                    str(part),
                    f'call {name} number {label}, and {before} call it {other}',
                    'number the classes of all folders and annotation files alike',
                )
                return


def colours(part: Part) -> Iterator[Finding]:
    """Whether each class has a colour: painting ends where one has none."""
    palette, classes = part.dataset.metainfo.get('palette'), part.classes or ()
    if isinstance(palette, list | tuple) and len(palette) < len(classes):
        yield Finding(
            f'metainfo.palette of {part}',
            f'has {len(palette)} colours for {len(classes)} classes',
            f'give one for each in {part.key}.metainfo, or predictions cannot be painted',
            severity='warning',
        )


def numbered_alike(parts: Sequence[Part]) -> Iterator[Finding]:
    """Whether all splits take 0 for a class, or none."""
    known = [part for part in parts if hasattr(part.dataset, 'reduce_zero_label')]
    for part in known[1:]:
        own, first = (bool(one.dataset.reduce_zero_label) for one in (part, known[0]))
        if own != first:
            yield config_error(
                str(part),
                f'have reduce_zero_label={own}, and {known[0]} {first}, so that every class is '
                'another number',
                'set the same in train, val and test',
            )


def ignored_alike(part: Part, metrics: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Whether the metrics of label maps leave out what the data ignore."""
    ignored = getattr(part.dataset, 'ignore_index', None)
    for metric in metrics if ignored is not None and part.split != 'train' else ():
        own = metric.get('ignore_index', 255)
        if 'IoU' in type_name(metric) and own != ignored:
            yield config_error(
                f'{part.split}_evaluator.ignore_index',
                f'is {own}, and {part} ignore {ignored}',
                f'set it to {ignored}',
            )


def _heads_of(part: Any, where: str) -> Iterator[tuple[str, int]]:
    """The places of ``num_classes`` in a model's config, and their values."""
    if isinstance(part, Mapping):
        if isinstance(part.get('num_classes'), int) and HEADS.count(
            where.split('.')[-1].split('[')[0]
        ):
            yield f'{where}.num_classes', part['num_classes']
        for key, value in part.items():
            if key != 'teacher':
                yield from _heads_of(value, f'{where}.{key}')
    elif isinstance(part, (list, tuple)):
        for index, value in enumerate(part):
            yield from _heads_of(value, f'{where}[{index}]')


def heads(cfg: Config, part: Part) -> Iterator[Finding]:
    """Compare the classes and labels of what is trained, or tested, with the model's outputs."""
    found = dict(_heads_of(cfg.get('model'), 'model'))
    found.update(_heads_of(cfg.get('data_preprocessor'), 'data_preprocessor'))
    kind = 'class folders' if part.folders else 'classes'
    for where, number in found.items():
        if part.classes is not None and number != len(part.classes):
            yield config_error(
                where,
                f'is {number}, and {part} have {len(part.classes)} {kind} '
                f'({shown(part.classes, 12)})',
                'set it to that number, or mend the classes of the data',
            )
    there = {label for info in part.infos() for label in labels_of(info)}
    fewest = min(found.values(), default=max(there, default=0) + 1)
    outside = sorted(label for label in there if not 0 <= label < fewest)
    if outside:
        yield Finding(
            str(part),
            f'have the label {shown(outside)}, and the model has {fewest} classes, '
            f'0 to {fewest - 1}',
            'number the classes from 0, or raise num_classes',
        )


def learnable(
    part: Part, counts: Counter, read: int, ignored: int, full: bool
) -> Iterator[Finding]:
    """Is anything left to learn after all filters?

    ``counts`` are of the labels in ``read`` images, of pixels beside those ``ignored``.
    """
    total, everything = len(part.dataset), read >= len(part.dataset)
    things = {'mmdet': 'annotations', 'mmseg': 'pixels'}.get(part.scope, 'images')
    severity = 'error' if part.split == 'train' and everything else 'warning'
    names = part.classes or [str(label) for label in range(max(counts, default=0) + 1)]
    never = [name for label, name in enumerate(names) if not counts[label]]
    extra = f', and {ignored} pixels are ignored ({part.ignored})' if ignored else ''
    if part.content is not None and everything and part.content['annotations']:
        yield from _lost(part, sum(counts.values()), severity)
    elif not counts:
        worth = 'a model learns nothing from them' if part.split == 'train' else 'no score can tell'
        yield Finding(
            str(part),
            f'have no labelled {things} in {read} images',
            f'{worth}; check labels, ignore_index and reduce_zero_label',
            severity=severity,
        )
    if len(counts) == 1 < len(names) and part.scope != 'mmdet':
        only = names[min(next(iter(counts)), len(names) - 1)]
        yield Finding(
            str(part),
            f'have {things} of the class {only} only in {read} images{extra}, '
            f'and none of {shown(never)}',
            'there is nothing to tell apart; write the number of each class into the labels',
            severity=severity,
        )
    elif never and counts and (everything or ignored):
        yield Finding(
            str(part),
            f'have no {things} of {len(never)} of {len(names)} classes in '
            f'{read} images{extra}: {shown(never)}',
            'check that the labels are numbered as classes says',
            len(never),
            'warning',
        )
    if full and counts:
        share = sum(counts.values())
        listed = ', '.join(
            f'{name} '
            + (f'{counts[label] / share:.2%}' if things == 'pixels' else str(counts[label]))
            for label, name in enumerate(names[:40])
        )
        yield Finding(
            str(part), f'have {total} images; {things} of each class: {listed}', severity='fact'
        )


def _lost(part: Part, left: int, severity: str) -> Iterator[Finding]:
    """Compare the annotations in the file with those that the data set gives."""
    annotations, used = part.content['annotations'], set(part.dataset.cat_ids)
    sizes = {image['id']: (image['width'], image['height']) for image in part.content['images']}
    reasons: Counter = Counter()
    beyond = 0
    for annotation in annotations:
        x, y, width, height = annotation['bbox']
        columns, rows = sizes[annotation['image_id']]
        reasons[
            'of other classes'
            if annotation['category_id'] not in used
            else 'crowds or ignored'
            if annotation.get('iscrowd') or annotation.get('ignore')
            else 'in images of width or height 0 or less'
            if min(columns, rows) <= 0
            else 'smaller than a pixel, or of area 0 (boxes are in pixels, not in shares of the '
            'image)'
            if annotation['area'] <= 0 or min(width, height) < 1
            else 'outside of their image'
            if x >= columns or y >= rows or x + width <= 0 or y + height <= 0
            else ''
        ] += 1
        beyond += x + width > columns + 1 or y + height > rows + 1
    if beyond > len(annotations) / 10:
        yield Finding(
            str(part),
            f'have {beyond} of {len(annotations)} boxes that reach beyond their image',
            'check that a bbox is [x, y, width, height] in pixels',
            beyond,
            'warning',
        )
    listed = ', '.join(f'{count} {reason}' for reason, count in reasons.most_common() if reason)
    if not left:
        yield Finding(
            f'the annotation file of {part}',
            f'has {len(annotations)} annotations, and '
            f'none can be learnt: {listed or "all filtered out"}',
            'mend the file, the classes or filter_cfg',
            severity=severity,
        )
    elif left < len(annotations):
        most = left < len(annotations) / 2
        yield Finding(
            str(part),
            f'give {left} of {len(annotations)} annotations to the model; '
            f'left out: {listed or "by filter_cfg"}',
            'check that this is meant' if most else '',
            len(annotations) - left,
            'warning' if most else 'fact',
        )
