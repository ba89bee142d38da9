"""What every command imports first: without the environment, it ends with one line that says so."""

import gc
import sys
from pathlib import Path
from types import TracebackType

_default_hook = sys.excepthook


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if kind is ModuleNotFoundError:
        sys.stderr.write(
            f'error: {sys.executable} has no {error.name}; activate the environment that '
            'tools/install.sh made (source .venv/bin/activate), or run bash tools/install.sh\n'
        )
    elif issubclass(kind, ModuleNotFoundError):  # it says which extra has the module
        sys.stderr.write(f'error: {error}\n')
    else:
        _default_hook(kind, error, trace)


sys.excepthook = _explain
# a checkout that is not installed works, too
sys.path.append(str(Path(__file__).resolve().parents[1]))
# Imports make half a million objects and hardly any garbage, which the collector looks for again
# and again: half a second of three. ``run_command`` lets it look as often as it does by default.
gc.set_threshold(1_000_000)
