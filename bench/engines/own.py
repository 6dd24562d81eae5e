"""kvstore itself, each of its implementations an engine of its own.

Which one a process has is decided when it imports kvstore, by its environment. No figure of the one
may come under the name of the other: opening the one that the process does not have is an error.
"""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvstore import KVStore

COMPILED: Final = "kvstore"
PLAIN: Final = "kvstore-plain"
# The implementation of each engine, as kvstore names it, and what has a process take that one.
IMPLEMENTATIONS: Final = MappingProxyType({COMPILED: "compiled", PLAIN: "plain"})
ENVIRONMENTS: Final = MappingProxyType(
    {
        COMPILED: MappingProxyType({"KVSTORE_PURE": "0"}),
        PLAIN: MappingProxyType({"KVSTORE_PURE": "1"}),
    }
)

_TELL: Final = """
import json
from kvstore import __version__
from kvstore.compiled import IMPLEMENTATION
print(json.dumps([IMPLEMENTATION, __version__]))
"""


def open_compiled(directory: Path, *, durable: bool = False) -> "KVStore":
    """Open a store with the compiled hot path."""
    return _open(COMPILED, directory, durable)


def open_plain(directory: Path, *, durable: bool = False) -> "KVStore":
    """Open a store with the hot path in Python."""
    return _open(PLAIN, directory, durable)


def _open(engine: str, directory: Path, durable: bool) -> "KVStore":
    check_implementation(engine)
    from kvstore import KVStore

    return KVStore(directory / "store.kvs", durable=durable)


def check_implementation(engine: str) -> None:
    """See that this process has the implementation that the name of an engine stands for.

    Raises:
        RuntimeError: it has the other one.
    """
    from kvstore.compiled import IMPLEMENTATION

    if IMPLEMENTATIONS[engine] != IMPLEMENTATION:
        raise RuntimeError(
            f"{engine} is the {IMPLEMENTATIONS[engine]} kvstore, this process has the "
            f"{IMPLEMENTATION} one"
        )


def find_compiled(name: str) -> ModuleSpec | None:
    """Find kvstore where its compiled hot path is built."""
    found = find_spec(name)
    return found if found is not None and _ask(COMPILED)[0] == "compiled" else None


def version_of_compiled() -> str:
    """Return version and implementation, as a process with the environment of the engine has it."""
    return _version(COMPILED)


def version_of_plain() -> str:
    """Return the same for the plain one."""
    return _version(PLAIN)


def _version(engine: str) -> str:
    implementation, version = _ask(engine)
    return f"kvstore {version} ({implementation})"


@cache
def _ask(engine: str) -> tuple[str, str]:
    """Return the implementation and the version that a process of this engine has."""
    done = subprocess.run(
        [sys.executable, "-c", _TELL],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **ENVIRONMENTS[engine]},
    )
    implementation, version = json.loads(done.stdout)
    return implementation, version
