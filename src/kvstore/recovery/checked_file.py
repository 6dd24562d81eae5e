"""What the checker knows of a file so far."""

from collections.abc import Callable
from typing import Protocol

from kvstore.format.layout import EXTENT_SIZE, SLAB_ENTRY, U16, map_entry_offset

from .problems import Breach, Problem


class Image(Protocol):
    """The bytes of a file: `bytes`, or a read-only map."""

    def __len__(self) -> int: ...
    def __getitem__(self, where: slice, /) -> bytes: ...


class CheckedFile:
    """The bytes of a file, none of which are trusted, and what later checks need of earlier ones.

    Attributes:
        progress: called now and then with how much of the way is done, and the whole of it.
        extent_count: how many extents there are to check; 0 where the superblock tells of none.
        hash_seed: of the identity.
        least_live: how many live blocks a slab has at least.
        is_clean: the state says that the index can be trusted.
        latest_stamp: where it does, that of the state.
        latest_found: the latest of all records that were checked, and its offset.
        kinds: of each extent; -1 for a slab whose entry is impossible.
        size_classes: of each extent, as its entry says.
    """

    def __init__(self, image: Image, progress: Callable[[int, int], object]) -> None:
        self._image = image
        self.progress = progress
        self.extent_count = 0
        self.hash_seed = 0
        # While a file is open, one extent that is empty may stay with its class.
        self.least_live = 0
        self.is_clean = False
        self.latest_stamp = 0
        self.latest_found = (0, 0)
        self.kinds: list[int] = []
        self.size_classes: list[int] = []
        # A bit for each 32 bytes of the file.
        self._pointed_to = bytearray()

    def __len__(self) -> int:
        return len(self._image)

    def read(self, offset: int, size: int) -> bytes:
        """Return so many bytes; zeros where the file ends, or is cut off meanwhile."""
        return self._image[offset : offset + size].ljust(size, b"\0")

    def u16(self, offset: int) -> int:
        """Return the 16-bit number at an offset."""
        number: int = U16.unpack(self.read(offset, U16.size))[0]
        return number

    def entry(self, extent: int) -> tuple[int, ...]:
        """Return the extent map's entry of an extent, as that of a slab."""
        return SLAB_ENTRY.unpack(self.read(map_entry_offset(extent), SLAB_ENTRY.size))

    def expect_slots(self) -> None:
        """Get ready to remember which records a slot points to."""
        self._pointed_to = bytearray(self.extent_count * EXTENT_SIZE // 32 // 8 + 1)

    def is_pointed_to(self, record: int) -> bool:
        """Return whether a slot points to the record at that offset."""
        return bool(self._pointed_to[record >> 8] & 1 << (record >> 5 & 7))

    def point_to(self, record: int) -> None:
        """Remember that a slot points to the record at that offset."""
        self._pointed_to[record >> 8] |= 1 << (record >> 5 & 7)


def entry_problem(extent: int, breach: Breach, message: str) -> Problem:
    """Return what is wrong with an extent, or with its entry in the extent map."""
    return Problem(map_entry_offset(extent), f"extent {extent}", message, breach)
