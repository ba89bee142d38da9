"""Load a config, and refuse one that cannot be read."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.model import PretrainedInit
from mmengine.runner import Runner

from groupmamba_mm.errors import ConfigError

# The libraries whose tasks the tools run, by the scope that a config names.
SCOPES = ('mmpretrain', 'mmdet', 'mmseg')

CONFIG_SUFFIXES = ('.py', '.yaml', '.yml', '.json')

# Keys that the Runner, its hooks or the tools read from a config beside the Runner's arguments.
_CONFIG_KEYS = {
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'default_scope',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'max_bad_images',
    'model_wrapper_cfg',
    'runner_type',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
    'work_dir',
}
# Variables that the libraries' configs use for themselves, which look like misspelt keys.
_VARIABLES = {'models', 'test_pipeline', 'train_pipeline', 'val_pipeline'}

# Above this likeness a key of a config file is taken for a misspelt one.
_TYPO_RATIO = 0.85


def load_config(path: str, cfg_options: dict[str, Any] | None = None) -> Config:
    """Load a config file with the command line's changes, checked.

    Args:
        path (str): The config file.
        cfg_options (dict, optional): Values by dotted keys, as ``--cfg-options`` gives them.

    Returns:
        Config: The config.

    Raises:
        ConfigError: If the file or one of its bases is missing or broken, if a top-level key looks
            misspelt, if an option's top-level key is unknown or read by nothing, or if no supported
            library is named.
    """
    cfg = _read(Path(path))
    _check_keys(cfg, path)
    if cfg_options:
        _check_options(cfg, cfg_options)
        try:
            cfg.merge_from_dict(cfg_options)
        except (KeyError, TypeError) as error:
            raise ConfigError(f'--cfg-options {_as_typed(cfg_options)}: {error.args[0]}') from error
    if cfg.get('default_scope') not in SCOPES:
        raise ConfigError(
            f'{path}: default_scope is {cfg.get("default_scope")!r}; set it to the '
            f'library that runs the task, one of {", ".join(SCOPES)}'
        )
    _name_initialisers(cfg.get('model'))
    return cfg


def _name_initialisers(part: Any) -> None:
    """Name mmengine's ``Pretrained`` where a pure Python config has its class.

    By its name, the checked one of :mod:`groupmamba_mm.checkpoint` takes its place.
    """
    if isinstance(part, dict) and part.get('type') is PretrainedInit:
        part['type'] = 'Pretrained'
    for value in (
        part.values()
        if isinstance(part, dict)
        else (part if isinstance(part, (list, tuple)) else ())
    ):
        _name_initialisers(value)


def type_name(part: Mapping[str, Any], default: str = '') -> str:
    """Read the type that a part of a config names.

    Args:
        part: A part of a config; its type is a class in a config of mmengine's pure Python style.
        default: What it is without a type.

    Returns:
        str: The name of the class, without a library's scope.
    """
    kind = part.get('type', default)
    return (kind if isinstance(kind, str) else kind.__name__).split('.')[-1]


def close_to(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Suggest known names for an unknown one.

    Args:
        name (str): The unknown name.
        known (Iterable[str]): The names there are.
        cutoff (float): Least likeness from 0 to 1. Defaults to 0.6.

    Returns:
        str: 'did you mean a or b?', or '' when none is like it.
    """
    close = difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=cutoff)
    return f'did you mean {" or ".join(close)}?' if close else ''


def _read(path: Path) -> Config:
    if not path.is_file():
        folder = path.parent
        siblings = (
            [entry.name for entry in folder.iterdir() if entry.suffix in CONFIG_SUFFIXES]
            if folder.is_dir()
            else []
        )
        hint = close_to(path.name, siblings, cutoff=0.5) or 'give the path of a config file'
        raise ConfigError(f'config {path} does not exist; {hint}')
    if path.suffix not in CONFIG_SUFFIXES:
        raise ConfigError(
            f'config {path} is no config file; give one that ends in {", ".join(CONFIG_SUFFIXES)}'
        )
    try:
        return Config.fromfile(str(path))
    except SyntaxError as error:
        raise ConfigError(
            f'config {_file_being_read(error, path)} has a syntax error: {error}; correct that line'
        ) from error
    except FileNotFoundError as error:
        missing = error.filename or error
        raise ConfigError(
            f'config {path}: its base {missing} does not exist; a path in _base_ is '
            'relative to the file that names it'
        ) from error
    except ImportError as error:
        cause = error.__cause__ or error.__context__ or error
        raise ConfigError(
            f'config {path}: an import fails ({cause}); install the package (bash '
            'tools/install.sh for mmdet and mmseg) or correct custom_imports'
        ) from error
    except Exception as error:
        # A config is code: whatever it raises is the config's mistake, reported with its place.
        raise ConfigError(
            f'config {_file_being_read(error, path)} fails with {type(error).__name__}: {error}'
        ) from error


def _file_being_read(error: Exception, path: Path) -> str:
    """Find the config or base that an error comes from: mmengine's messages may not name it."""
    found, trace = str(path), error.__traceback__
    while trace is not None:
        # Python's own parser has a variable of that name too, with '<unknown>' in it.
        name = str(trace.tb_frame.f_locals.get('filename', ''))
        found = name if name.endswith(CONFIG_SUFFIXES) and Path(name).is_file() else found
        trace = trace.tb_next
    return found


def known_keys() -> set:
    """List the top-level keys that something reads."""
    arguments = set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}
    return arguments | _CONFIG_KEYS


def _check_keys(cfg: Config, path: str) -> None:
    known = known_keys()
    for key in cfg:
        # A longer name is a variable made for a key: val_evaluator_abs.
        if key in known or key in _VARIABLES or key.startswith(tuple(f'{k}_' for k in known)):
            continue
        hint = close_to(key, known, _TYPO_RATIO)
        if hint:
            raise ConfigError(f'config {path}: nothing reads the key {key!r}; {hint}')


def _check_options(cfg: Config, cfg_options: dict[str, Any]) -> None:
    known = known_keys()
    for option in cfg_options:
        key = option.split('.')[0]
        if key not in known | set(cfg):
            hint = close_to(key, known) or f'the config has {", ".join(sorted(cfg))}'
            raise ConfigError(f'--cfg-options {option}: the config has no key {key!r}; {hint}')
        if key not in known and isinstance(cfg[key], (str, int, float)):
            raise ConfigError(
                f'--cfg-options {option}: nothing reads the variable {key!r} any '
                'more, the config has used it; set the keys that it stands in, such '
                f'as train_dataloader.dataset.{key}'
            )


def _as_typed(cfg_options: dict[str, Any]) -> str:
    return ' '.join(f'{key}={value}' for key, value in cfg_options.items())
