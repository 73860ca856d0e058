"""Single modules of an installed package, run without the package: their other imports are stand-ins."""

import sys
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

from .registry import Unavailable


class _StandIn(ModuleType):
    """A module that has every name."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder(MetaPathFinder, Loader):
    def __init__(self, packages, files, names):
        self.packages, self.files, self.names = packages, files, names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in self.packages:
            return None
        return spec_from_file_location(name, self.files[name]) if name in self.files else ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = _StandIn(spec.name)
        vars(module).update(self.names.get(spec.name, {}))
        return module

    def exec_module(self, module):
        """A stand-in has nothing to run."""


@contextmanager
def _alone(finder):
    def mine():
        return [name for name in sys.modules if name.split(".")[0] in finder.packages]

    before = {name: sys.modules.pop(name) for name in mine()}
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in mine():
            del sys.modules[name]
        sys.modules.update(before)


def load(package, modules, names=None, others=()):
    """The given submodules of `package`, in order. Raises Unavailable.

    names: {module: {name: value}} of the stand-ins. others: further packages whose modules are all stand-ins.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    files = {f"{package}.{name}": root / f"{name.replace('.', '/')}.py" for name in modules}
    missing = [str(path.relative_to(root)) for path in files.values() if not path.is_file()]
    if missing:
        raise Unavailable(f"{package} {_version(package)} has no {missing[0]}")
    with _alone(_Finder((package, *others), files, names or {})):
        return [import_module(name) for name in files]


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
