"""The line of the program that called this package, for a message or a warning."""

import sys
from typing import Final

_PACKAGE: Final = f"{__name__.partition('.')[0]}."


def levels_to_caller() -> int:
    """Return how many levels up the line is that called this package, as `stacklevel` has it.

    1 is the function that calls this one.
    """
    levels, frame = 1, sys._getframe(1)
    # Text that is executed need not have a package.
    while frame.f_back is not None and (
        f"{frame.f_globals.get('__package__') or ''}.".startswith(_PACKAGE)
    ):
        levels, frame = levels + 1, frame.f_back
    return levels
