"""The configs and metafiles that are installed with the package, by name."""

from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from groupmamba_mm.errors import ConfigError
from groupmamba_mm.extras import explain_missing

if TYPE_CHECKING:
    from mmengine.config import Config

#: Where the wheel has ``configs/`` and ``model-index.yml``, as OpenMMLab's own packages do.
MIM_FOLDER = Path(__file__).parent / '.mim'


@cache
def _paths() -> dict[str, Path]:
    found = sorted((MIM_FOLDER / 'configs').glob('*/**/*.py'))
    return {path.stem: path for path in found if '_base_' not in path.relative_to(MIM_FOLDER).parts}


def list_configs(pattern: str = '*') -> list[str]:
    """List the configs by name.

    Args:
        pattern: A shell pattern, such as ``'mask-rcnn*'``.

    Returns:
        The names that match, sorted.
    """
    return sorted(name for name in _paths() if fnmatch(name, pattern))


def config_path(name: str) -> Path:
    """Find a config's file.

    Args:
        name: Its file name without ``.py``, such as ``'groupmamba-tiny_8xb128_in1k'``.

    Returns:
        The file in the installed package.

    Raises:
        ConfigError: There is no such config.
    """
    if name not in _paths():
        near = get_close_matches(name, _paths(), cutoff=0.5)
        raise ConfigError(
            f'there is no config {name!r}; '
            + (
                f'the nearest are {", ".join(near)}'
                if near
                else 'groupmamba_mm.list_configs() lists them'
            )
        )
    return _paths()[name]


def get_config(name: str) -> 'Config':
    """Load a config by name.

    Args:
        name: See :func:`config_path`.

    Returns:
        mmengine's config, which builders, runners and inferencers take.

    Raises:
        ConfigError: There is no such config.
        MissingExtraError: mmengine is not installed.
    """
    path = config_path(name)
    with explain_missing('get_config'):
        from mmengine.config import Config
    return Config.fromfile(str(path))
