"""The write path: every change of an open data file goes through one of these three.

Each has `write`, of bytes to an offset, `write_word`, of the aligned 64-bit word with an index, and
`write_all`, of changes that were planned: offset, bytes, and what is there so far.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from functools import partial
from operator import setitem
from typing import TYPE_CHECKING, Final, NoReturn

from kvstore.errors import KVStoreError
from kvstore.format.layout import U64

from .held import HeldFile
from .platform import raise_if_full

if TYPE_CHECKING:
    from kvstore.compiled.interface import Change


class ThroughMap:
    """Stores through the map, which is never refused where files are overwritten in place.

    Attributes:
        is_direct: nothing else is done, so compiled code may store right there by itself.
    """

    is_direct = True

    def __init__(self, mapped: mmap.mmap, words: "memoryview[int]") -> None:
        self.write = _store_bytes_in(mapped)
        # No function of ours: a word costs a fifth of what its eight bytes would.
        self.write_word: Callable[[int, int], None] = partial(setitem, words)

    def write_all(self, changes: "Sequence[Change]") -> None:
        """As `write`, of each."""
        for offset, data, _ in changes:
            self.write(offset, data)


def _store_bytes_in(mapped: mmap.mmap) -> Callable[[int, bytes], None]:
    # A closure: one call and one slice assignment are all that most of a change costs.
    def write(offset: int, data: bytes) -> None:
        mapped[offset : offset + len(data)] = data

    return write


class ByPwrite:
    """Writes by calls of the operating system, which report a full disk.

    Attributes:
        has_failed: one was refused or cut short, and may have leaked a block or an extent.
        refusing: what refuses all changes by now, for an operation that began before.
    """

    is_direct: Final = False

    def __init__(self, held: HeldFile) -> None:
        self._held = held
        self.has_failed = False
        self.refusing: Refusing | None = None

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data`.

        Raises:
            StoreFullError: the disk has no room for it.
            OSError: what else the operating system said.
        """
        if self.refusing is not None:
            self.refusing.write(offset, data)
        try:
            written = os.pwrite(self._held.fd, data, offset)
            while written < len(data):
                written += os.pwrite(self._held.fd, data[written:], offset + written)
        except OSError as error:
            self._explain(error, len(data))
            raise

    def _explain(self, error: OSError, size: int) -> None:
        """Note that a write failed; raise StoreFullError where the disk had no room for it."""
        self.has_failed = True
        raise_if_full(error, self._held.path, f"write {size:,} bytes")

    def write_word(self, index: int, word: int) -> None:
        """As `write`, of one word."""
        self.write(index << 3, U64.pack(word))

    def write_all(self, changes: "Sequence[Change]") -> None:
        """Write these one after the other, up to one that fails. Raises as `write`."""
        fd, pwrite = self._held.fd, os.pwrite
        try:
            for offset, data, _ in changes:
                if self.refusing is not None or pwrite(fd, data, offset) != len(data):
                    self.write(offset, data)
        except OSError as error:
            self._explain(error, sum(len(data) for _, data, _ in changes))
            raise


class Refusing:
    """Refuses every change by an error of that kind, each time a new one."""

    is_direct: Final = False

    def __init__(
        self, kind: type[KVStoreError], message: str, cause: BaseException | None = None
    ) -> None:
        self._kind = kind
        self._message = message
        self._cause = cause

    def write(self, _place: int, _content: object) -> NoReturn:
        """Raise the error."""
        raise self._kind(self._message) from self._cause

    write_word = write

    def write_all(self, _changes: object) -> NoReturn:
        """Raise the error."""
        raise self._kind(self._message) from self._cause
