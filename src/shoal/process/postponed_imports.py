"""Modules that are loaded when something in them is used, and not when they are imported.

`import torch` loads parts of PyTorch that a rank does not use, which takes a third of its time. A process that has
called `postpone_parts_of_torch` imports them as empty modules, which load themselves when somebody asks for something
in them. They are also loaded before any part of PyTorch that `import torch` does not load, since other parts of PyTorch
depend on the order in which they are loaded.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

META_FUNCTIONS = "torch._meta_registrations"  # the functions of the device "meta" that are written in Python
_PARTS_OF_TORCH = (META_FUNCTIONS, "torch.export")  # the modules that `import torch` imports last


def postpone_parts_of_torch() -> None:
    """Postpone parts of PyTorch in this process, if it has not loaded PyTorch yet.

    A process of this project calls this at its start. Library functions do not: other code of the caller may rely on
    what a module does when it is loaded.
    """
    postpone(_PARTS_OF_TORCH)


def postpone(names: Sequence[str]) -> None:
    """Postpone the modules of a package with these names, unless they have been imported already."""
    sys.meta_path.insert(0, _Finder(names))


def load_now(name: str) -> None:
    """Load a module that was postponed. Nothing happens if it was not."""
    module = sys.modules.get(name)
    if isinstance(module, _PostponedModule):
        module._load()


class _Finder(MetaPathFinder):
    """Finds postponed modules, and sees each import of another module before it is looked for."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._package = names[0].partition(".")[0]

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in self._names:
            return _postponed(importlib.machinery.PathFinder.find_spec(name, path, target))
        if name.startswith(f"{self._package}.") and not self._package_is_loading:
            self._load_all()
        return None

    @property
    def _package_is_loading(self) -> bool:
        spec = getattr(sys.modules.get(self._package), "__spec__", None)
        return bool(getattr(spec, "_initializing", False))

    def _load_all(self) -> None:
        names, self._names = self._names, ()
        for name in names:
            load_now(name)


def _postponed(spec: ModuleSpec | None) -> ModuleSpec | None:
    if spec is not None and spec.loader is not None:
        spec.loader = _PostponingLoader(spec.loader)
    return spec


class _PostponingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _PostponedModule
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader


class _PostponedModule(ModuleType):
    """A module that has been imported, and is loaded when an attribute is missing."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__all__":  # code that lists modules looks for these in each of them
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self._load()
        return getattr(self, name)

    def _load(self) -> None:
        self.__class__ = ModuleType  # type: ignore[assignment]  # first: the module's own code may use it
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
