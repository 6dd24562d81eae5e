"""What differs by operating system: all of it is behind `system`.

Nothing else in the package asks which system this is, or whether it has some function. Loaded is
only what this one needs.
"""

import sys
from typing import Final

from .interface import System, is_full, raise_if_full

if sys.platform == "win32":
    from .windows import Windows as _ThisSystem
elif sys.platform == "linux":
    from .linux import Linux as _ThisSystem
else:
    from .macos import MacOS as _ThisSystem

__all__ = ["System", "is_full", "raise_if_full", "system"]

system: Final[System] = _ThisSystem()
