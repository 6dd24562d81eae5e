"""kvstore itself, each of its implementations an engine of its own.

Which one a process has is decided when it imports kvstore, by its environment. No figure of the one
may come under the name of the other: opening the one that the process does not have is an error.
"""

import json
import os
import subprocess
import sys
from functools import cache, partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvstore import KVStore

COMPILED: Final = "kvstore"
PLAIN: Final = "kvstore-plain"
# The implementation of each engine, as kvstore names it, and what has a process take that one.
IMPLEMENTATIONS: Final = {COMPILED: "compiled", PLAIN: "plain"}
ENVIRONMENTS: Final = {COMPILED: {"KVSTORE_PURE": "0"}, PLAIN: {"KVSTORE_PURE": "1"}}

_PROGRAM: Final = """
import json, kvstore
print(json.dumps([kvstore.IMPLEMENTATION, kvstore.__version__]))
"""


def _open(engine: str, directory: Path, *, durable: bool = False) -> "KVStore":
    """Open a store with the implementation that the name of an engine stands for.

    Raises:
        RuntimeError: this process has the other one.
    """
    from kvstore import IMPLEMENTATION, KVStore

    if IMPLEMENTATIONS[engine] != IMPLEMENTATION:
        raise RuntimeError(
            f"{engine} is the {IMPLEMENTATIONS[engine]} kvstore, this process has the "
            f"{IMPLEMENTATION} one"
        )
    return KVStore(directory / "store.kvs", durable=durable)


open_compiled = partial(_open, COMPILED)
open_plain = partial(_open, PLAIN)


def find_compiled(name: str) -> ModuleSpec | None:
    """Find kvstore where its hot path is compiled."""
    found = find_spec(name)
    return found if found is not None and ask(COMPILED)[0] == "compiled" else None


def version_of(engine: str, python: str = sys.executable) -> str:
    """Return version and implementation, as a process of this engine has them."""
    implementation, version = ask(engine, python)
    return f"kvstore {version} ({implementation})"


@cache
def ask(engine: str, python: str = sys.executable) -> tuple[str, str]:
    """Return the implementation and the version of kvstore that a process of this engine has."""
    path = {"PYTHONPATH": os.pathsep.join(sys.path)} if python == sys.executable else {}
    done = subprocess.run(
        [python, "-P", "-c", _PROGRAM],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, **path, **ENVIRONMENTS[engine]},
    )
    implementation, version = json.loads(done.stdout)
    return implementation, version
