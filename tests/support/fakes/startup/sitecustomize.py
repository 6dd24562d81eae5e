"""Imported by each Python that starts with this folder on its path: imitates a system there."""

import sys
from pathlib import Path

_TESTS = str(Path(__file__).resolve().parents[3])

sys.path.append(_TESTS)
try:
    import support  # noqa: F401 - which does it
finally:
    sys.path.remove(_TESTS)
