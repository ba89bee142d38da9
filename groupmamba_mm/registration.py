"""Register with the libraries that know models by name, each when it is there.

Importing this package must not import them: mmpretrain and timm take seconds, and most users have
only one of them. What is imported already is served at once, the rest right after its import.

Some libraries import another that is installed, seconds in every process of a run, for a rare class
of theirs. They do without it here, and the class comes when somebody asks for it.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: A library's module, and ours which registers, or amends it, when it is imported.
REGISTRATIONS = {
    'mmengine.registry': 'groupmamba_mm.backbones.registration',
    'mmengine.runner.checkpoint': 'groupmamba_mm.library_loading.checkpoints',
    'mmengine.infer.infer': 'groupmamba_mm.library_loading.inferencers',
    'mmpretrain.apis.base': 'groupmamba_mm.library_loading.mmpretrain_inferencers',
    'mmpretrain': 'groupmamba_mm.mmpretrain_models',
    'mmdet.models': 'groupmamba_mm.library_loading.mmdet_models',
    'timm': 'groupmamba_mm.models.timm_models',
    'mmengine.optim.optimizer.builder': 'groupmamba_mm.library_loading.adafactor',
}

#: A library's module, and what it is imported without: transformers would come for the optimizer
#: Adafactor, mmdet's models for mmpretrain's ``ResLayerExtraNorm``.
WITHOUT = {'mmengine.optim.optimizer.builder': 'transformers', 'mmpretrain.models': 'mmdet.models'}


def register_with_libraries() -> None:
    """Register now where the library is imported already, and after its import where not."""
    waiting = _AfterImport()
    for library, ours in REGISTRATIONS.items():
        if library in sys.modules:
            importlib.import_module(ours)
        else:
            waiting.modules[library] = ours
    for library in WITHOUT:
        if library not in sys.modules:
            waiting.modules.setdefault(library, None)
    sys.meta_path.insert(0, waiting)


@contextlib.contextmanager
def _without(module: str | None) -> Iterator[None]:
    """Inside, importing a module fails as if it were not installed, unless it was before."""
    if module is None or module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # as Python documents it
    try:
        yield
    finally:
        del sys.modules[module]


class _AfterImport:
    """A finder that finds nothing itself, but has modules of libraries imported without another
    (:data:`WITHOUT`), and a module of ours after them (:data:`REGISTRATIONS`).
    """

    def __init__(self) -> None:
        self.modules = {}
        self._looked_for = set()  # by this finder itself, through the others

    def find_spec(
        self, name: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module as the other finders do; see :class:`importlib.abc.MetaPathFinder`.

        What is found need not be imported: many libraries only ask whether another is there.

        Args:
            name: Full name of the module.
            path: The parent's search path.
            target: Unused.

        Returns:
            None for every module but the awaited ones.
        """
        if name not in self.modules or name in self._looked_for:
            return None
        ours = self.modules[name]
        self._looked_for.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looked_for.remove(name)
        if spec is None:
            return None  # it may be installed later
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            with _without(WITHOUT.get(name)):
                execute(module)
            self.modules.pop(name, None)
            if ours is not None:
                importlib.import_module(ours)

        spec.loader.exec_module = execute_and_register
        return spec
