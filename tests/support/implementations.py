"""The implementations that are there: the plain one, and the compiled one where it was built."""

from typing import Final

from kvstore.compiled import COMPILED, PLAIN, Implementation

IMPLEMENTATIONS: Final[tuple[Implementation, ...]] = tuple(filter(None, (PLAIN, COMPILED)))
