"""Other operating systems, imitated on Linux: KVSTORE_TEST_PLATFORM=windows (or macos) pytest.

A fake changes `os` and `mmap` of the process: what the system refuses is refused, what it has not
is not there. The store's own code for that system runs over it, as it does on the system itself. A
child that a test starts is given the same one: see `startup/sitecustomize.py`.

It stands for what that system is documented to do, and the fake says where; it is no proof that the
system does so.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Final

VARIABLE: Final = "KVSTORE_TEST_PLATFORM"
# By name, what `sys.platform` is there.
_PLATFORMS: Final = {"windows": "win32", "macos": "darwin"}
_STARTUP: Final = str(Path(__file__).parent / "startup")
_CHOSEN: Final = "kvstore.file.platform"


def platform() -> str:
    """Return what `sys.platform` is, or would be on the system that is imitated."""
    wanted = os.environ.get(VARIABLE)
    return _PLATFORMS[wanted] if wanted else sys.platform


def install() -> None:
    """Imitate the system that the environment names, here and in what this process starts.

    Before kvstore is imported, which then chooses its code for that system. Idempotent.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if sys.platform != "linux" or _CHOSEN in sys.modules:
        raise RuntimeError(f"{VARIABLE}: {wanted} is imitated on Linux, and before kvstore is used")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if _STARTUP not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_STARTUP, *paths]))
    sys.meta_path.insert(0, _Finder(_PLATFORMS[wanted]))
    importlib.import_module(f"{__name__}.{wanted}").install()


class _Finder(MetaPathFinder):
    """Finds the module that chooses by `sys.platform`, and has it see another one."""

    def __init__(self, platform: str) -> None:
        self._platform = platform

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _CHOSEN:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(self._platform, name, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, platform: str, name: str, path: str) -> None:
        super().__init__(name, path)
        self._platform = platform

    def exec_module(self, module: ModuleType) -> None:
        real = sys.platform
        setattr(sys, "platform", self._platform)  # noqa: B010 - a plain one is no valid typing
        try:
            super().exec_module(module)
        finally:
            setattr(sys, "platform", real)  # noqa: B010 - likewise
