"""What in a config cannot have been meant, found before anything is built."""

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import WEIGHT_INITIALIZERS

from groupmamba_mm.engine.config_checks import known_keys, type_name

from .findings import Finding, config_error, shown
from .parts import Part

#: Constructors for layer-wise decay that know the backbones of their own library only.
_FOREIGN_LAYER_DECAY = (
    'LearningRateDecayOptimizerConstructor',
    'LayerDecayOptimizerConstructor',
    'LearningRateDecayOptimWrapperConstructor',
)


def check_config(cfg: Config, parts: Sequence[Part]) -> Iterator[Finding]:
    """Check what needs no data."""
    if any(part.split == 'train' for part in parts):
        yield from _weights(cfg.get('model'), 'model')
        yield from _loops(cfg)
    yield from _unread_variables(cfg, parts)
    yield from _layer_decay(cfg)
    yield from _augmented_twice(cfg, parts)
    for part in parts:
        classes = (part.cfg.get('metainfo') or {}).get('classes')
        if isinstance(classes, str) and not os.path.isfile(classes):
            yield config_error(
                f'{part.key}.metainfo.classes',
                f'is the text {classes!r}',
                f'write a tuple, for a single class with its comma: ({classes!r}, )',
            )
        if sum(other.split == part.split for other in parts) == 1:
            yield from _evaluators(cfg, part)
    for split in dict.fromkeys(part.split for part in parts):
        yield from _joined(cfg, split, [part for part in parts if part.split == split])


def metrics_of(cfg: Config, split: str) -> list[Mapping[str, Any]]:
    """List the metrics of a split's evaluator."""
    evaluator = cfg.get(f'{split}_evaluator') or []
    return list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]


def _weights(part: Any, where: str) -> Iterator[Finding]:
    """Look for the weights that a model is to start from, and for initialisers that are none."""
    if isinstance(part, Mapping):
        file = part.get('checkpoint', part.get('pretrained'))
        if isinstance(file, str) and '://' not in file and not Path(file).expanduser().is_file():
            key = f'{where}.{"checkpoint" if "checkpoint" in part else "pretrained"}'
            without = where if '.init_cfg' in where else key
            yield config_error(
                f'{key}: {file}',
                'does not exist',
                'put the weights there, or name '
                f'others with --cfg-options {key}=FILE; to start without: '
                f'--cfg-options {without}=None',
            )
        for key, value in part.items():
            if key == 'init_cfg':
                yield from _initialisers(value, f'{where}.init_cfg')
            yield from _weights(value, f'{where}.{key}')
    elif isinstance(part, (list, tuple)):
        for index, value in enumerate(part):
            yield from _weights(value, f'{where}.{index}')


def _initialisers(value: Any, where: str) -> Iterator[Finding]:
    remedy = "give None, a dict such as dict(type='Pretrained', checkpoint=FILE), or a list of them"
    several = isinstance(value, (list, tuple))
    for index, part in enumerate(value if several else [] if value is None else [value]):
        place = f'{where}.{index}' if several else where
        if not isinstance(part, Mapping) or 'type' not in part:
            yield config_error(place, f'is {part!r}, which is no initialiser', remedy)
            continue
        arguments = {key: item for key, item in part.items() if key != 'override'}
        try:
            WEIGHT_INITIALIZERS.build(arguments)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            reason = ' '.join(str(error).split()) or type(error).__name__
            yield config_error(
                place, f'is {dict(part)}, of which no initialiser can be made ({reason})', remedy
            )
        override = part.get('override')
        for inner in [override] if isinstance(override, Mapping) else override or []:
            if not isinstance(inner, Mapping) or 'name' not in inner:
                yield config_error(
                    f'{place}.override',
                    f'is {inner!r}, without a name',
                    'name the part of the module that it is for',
                )


def _unread_variables(cfg: Config, parts: Sequence[Part]) -> Iterator[Finding]:
    """Variables of a base that the config sets anew, which the base has used already.

    A base's ``dict(data_root=data_root)`` took the old value when the base was read.
    """
    for name, place in _assigned_anew(cfg).items():
        value = cfg.get(name)
        if value is None or any(_holds(other, value) for key, other in cfg.items() if key != name):
            continue
        where = f'{parts[0].key}.{name}' if name == 'data_root' and parts else f'...{name}'
        now = f' (it is {parts[0].root!r} there)' if name == 'data_root' and parts else ''
        yield config_error(
            f'{place}: {name} = {value!r}'[:200],
            'is read by nothing: the base '
            f'that has a variable of this name used its own value{now}',
            f'set the key itself, such as {where}, in each split',
        )


def _assigned_anew(cfg: Config) -> dict:
    """Names that the config file sets and does not read itself, though it has a base."""
    known, found = known_keys(), {}
    path = Path(cfg.filename or '')
    if path.suffix == '.py' and path.is_file():
        tree = ast.parse(path.read_text(encoding='utf-8'))
        read = {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        set_here = {
            node.id
            for statement in tree.body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            for node in ast.walk(target)
            if isinstance(node, ast.Name)
        }
        has_base = '_base_' in set_here or 'read_base' in read
        found.update({name: str(path) for name in set_here - read if has_base})
    return {
        name: place
        for name, place in found.items()
        if name not in known
        and not name.startswith('_')
        and name in cfg
        and not isinstance(cfg[name], (Mapping, list, tuple))
    }


def _holds(part: Any, value: Any) -> bool:
    """Whether a value stands anywhere in a part of a config."""
    if isinstance(part, Mapping):
        return any(_holds(inner, value) for inner in part.values())
    if isinstance(part, (list, tuple)) and part != value:
        return any(_holds(inner, value) for inner in part)
    return part == value or (isinstance(part, str) and isinstance(value, str) and value in part)


def _loops(cfg: Config) -> Iterator[Finding]:
    for split, others in (
        ('train', ('train_cfg', 'optim_wrapper')),
        ('val', ('val_cfg', 'val_evaluator')),
        ('test', ('test_cfg', 'test_evaluator')),
    ):
        keys = (f'{split}_dataloader', *others)
        absent = [key for key in keys if cfg.get(key) is None]
        if absent and len(absent) < len(keys):
            yield config_error(
                ', '.join(absent),
                f'of the config: missing, and it has '
                f'{shown(key for key in keys if key not in absent)}',
                'set all of them, or none',
            )


def _layer_decay(cfg: Config) -> Iterator[Finding]:
    constructor = type_name(dict(type=(cfg.get('optim_wrapper') or {}).get('constructor', '')))
    backbone = type_name((cfg.get('model') or {}).get('backbone') or {})
    knows = cfg.default_scope == 'mmpretrain' and constructor.endswith('WrapperConstructor')
    if backbone == 'GroupMamba' and constructor in _FOREIGN_LAYER_DECAY and not knows:
        yield config_error(
            'optim_wrapper.constructor',
            f'is {constructor}, which does not know the layers of {backbone} in this task',
            'set it to '
            "'LayerDecayOptimWrapperConstructor' with "
            'paramwise_cfg=dict(layer_decay_rate=0.8)',
        )


def _augmented_twice(cfg: Config, parts: Sequence[Part]) -> Iterator[Finding]:
    """Transforms of single images that also run on the batch."""
    single = {
        type_name(step)
        for part in parts
        if part.split == 'train'
        for step in part.cfg.get('pipeline') or ()
    }
    for augment in (cfg.get('data_preprocessor') or {}).get('augments') or ():
        name = type_name(augment)
        if name.removeprefix('Batch') in single:
            yield config_error(
                name.removeprefix('Batch'),
                'is in train_dataloader.dataset.pipeline '
                f'and {name} in data_preprocessor.augments, so images would be '
                'augmented twice',
                'take it out of the pipeline, or set data_preprocessor.augments=[]',
            )


def _joined(cfg: Config, split: str, parts: Sequence[Part]) -> Iterator[Finding]:
    """Metrics with the annotations of one of several data sets that are joined."""
    own = {os.path.realpath(os.path.join(p.root, p.cfg.get('ann_file') or '')) for p in parts}
    for metric in metrics_of(cfg, split) if len(own) > 1 else ():
        file = metric.get('ann_file')
        if file and os.path.realpath(file) in own:
            yield config_error(
                f'{split}_evaluator.ann_file',
                f'is {file}, the annotations of one of the {len(parts)} data sets that '
                f'{split}_dataloader joins, whose images are numbered apart',
                'write one file of all of them, or evaluate one data set',
            )


def _evaluators(cfg: Config, part: Part) -> Iterator[Finding]:
    """Metrics that read another annotation file than the data set, or none."""
    own = os.path.join(part.root, part.cfg.get('ann_file') or '')
    for metric in metrics_of(cfg, part.split) if part.is_local else ():
        file: str | None = metric.get('ann_file')
        key = f'{part.split}_evaluator.ann_file'
        if file and part.cfg.get('ann_file') and (os.path.realpath(file) != os.path.realpath(own)):
            yield config_error(
                key, f'is {file}, and {part} are read from {own}', 'set both to the same file'
            )
