"""Which twin of the hot path runs: the compiled one, or the plain one in Python (as in PEP 399).

The compiled twin, `_hot`, is there where it could be built. It replaces `Slab`, `Slots` and
`Operations`, each at the end of the module that has the plain one, and works on the same bytes of
the same file under the same locks. With ``KVSTORE_PURE=1`` in the environment the plain twin runs.
"""

import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Final


def _load() -> ModuleType | None:
    if os.environ.get("KVSTORE_PURE", "0") not in ("", "0"):
        return None
    try:
        from . import _hot  # type: ignore[attr-defined, unused-ignore]  # built where it can be
    except ImportError as error:
        # Not built. One that was built and does not fit the rest is an error, and says so.
        if error.name is None and "_hot" not in str(error):
            raise
        return None
    module: ModuleType = _hot
    return module


compiled: Final = _load()
Lock: Final[Callable[[], threading.Lock]] = threading.Lock if compiled is None else compiled.Lock
IMPLEMENTATION: Final = "plain" if compiled is None else "compiled"
