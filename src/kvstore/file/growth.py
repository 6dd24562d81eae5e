"""How a data file grows: by how much, and what of it the disk has room for."""

from collections.abc import Callable
from typing import Final

from kvstore.errors import StoreFullError
from kvstore.format.layout import EXTENT_SHIFT, EXTENT_SIZE

from .held import HeldFile
from .platform import is_full, raise_if_full, system

_SMALLEST_STEP: Final = 16  # extents: 1 MiB
_LARGEST_STEP: Final = 1024  # extents: 64 MiB


class Growth:
    """Reserves extents at the end of a file, never more than `max_extents` in all.

    Args:
        held: the file.
        max_extents: how many it may have.
        limit: why no more, in words.
    """

    def __init__(self, held: HeldFile, max_extents: int, limit: str) -> None:
        self._held = held
        self.max_extents = max_extents
        self._limit = limit
        self._cautious = False  # the disk was full a moment ago

    def grow(self, count: int, set_count: Callable[[int], None]) -> int:
        """Reserve extents after the first `count`, tell `set_count` of the sum; return how many.

        By an eighth of the file, between 1 and 64 MiB; by less where the disk has no more.

        Raises:
            StoreFullError: the file is at its limit, or the disk has not room for one extent.
            OSError: what else the operating system said. The file is as long as before.
        """
        wanted = min(max(_SMALLEST_STEP, count // 8), _LARGEST_STEP, self.max_extents - count)
        if wanted <= 0:
            raise StoreFullError(
                f"{self._held.path}: the file is {count << EXTENT_SHIFT:,} bytes, grows by whole "
                f"extents of {EXTENT_SIZE:,}, and {self._limit}; delete something first"
            )
        if self._cautious:  # ask for little, so that asking is cheap
            wanted = 1
        step = wanted
        while not self._is_granted(count, step):
            self._cautious = True
            step //= 2
        set_count(count + step)
        self._cautious = step < wanted
        return step

    def _is_granted(self, count: int, step: int) -> bool:
        """Reserve `step` extents after the first `count`. False: the disk has room for less."""
        end = count << EXTENT_SHIFT
        try:
            system.reserve(self._held.fd, end, end + (step << EXTENT_SHIFT))
        except OSError as error:
            system.unreserve(self._held.fd, end)
            if not is_full(error):
                raise
            if step == 1:
                self._cautious = True
                raise_if_full(error, self._held.path, "grow the file by 65,536 bytes")
            return False
        return True
