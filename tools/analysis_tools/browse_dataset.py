"""Look at the training images of a config as a model gets them, by the library's own command.

Arguments go to ``browse_dataset.py`` of mmpretrain, mmdet or mmseg, whichever the config is for:
--output-dir FOLDER writes pictures, --not-show opens no window, --cfg-options changes the config;
mmpretrain's also has --phase, --mode and --show-number. --help after a config shows them all.
"""

import importlib
import runpy
import sys
import tempfile
from pathlib import Path

import groupmamba_mm.engine  # noqa: F401, registers what configs name
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.errors import ConfigError
from groupmamba_mm.inference import find_config


def main() -> None:
    """Find the library's command, and run it.

    Raises:
        ConfigError: No config is named, or the library brought no such command.
    """
    if len(sys.argv) < 2 or sys.argv[1].startswith('-'):
        sys.exit(f'usage: {sys.argv[0]} CONFIG [OPTIONS]\n\n{__doc__}')
    cfg = find_config(sys.argv[1])
    library = importlib.import_module(cfg.default_scope)
    tools = Path(library.__file__).parent / '.mim' / 'tools'
    found = sorted(tools.rglob('browse_dataset.py'), key=lambda path: len(path.parts))
    if not found:
        raise ConfigError(
            f'{cfg.default_scope} {library.__version__} has no browse_dataset.py below {tools}; '
            'install its wheel with tools/install.sh'
        )
    # inherited from a library; mmpretrain's command hands it to a class that does not know it
    (cfg.get('visualizer') or {}).pop('_scope_', None)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / Path(cfg.filename).name
        cfg.dump(str(whole))
        sys.argv[:2] = [str(found[0]), str(whole)]
        runpy.run_path(str(found[0]), run_name='__main__')


if __name__ == '__main__':
    run_command(main)
