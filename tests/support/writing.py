"""Data files that tell of each change as it is made."""

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

import kvstore.file.writers
from kvstore.compiled.interface import Change as Planned
from kvstore.file.writers import ByPwrite, ThroughMap
from kvstore.format.layout import U64

Change = Callable[[int, bytes], object]


def _ignore(_offset: int, _data: bytes) -> None:
    pass


@contextmanager
def telling_of_changes(before: Change = _ignore, after: Change = _ignore) -> Iterator[None]:
    """Have files that are opened meanwhile call these at each change: where it is, and its bytes.

    What is written before a file is mapped does not go that way.
    """
    pwrite = ByPwrite.write

    class TellingMap(ThroughMap):
        is_direct = False

        def __init__(self, mapped: mmap.mmap, words: "memoryview[int]") -> None:
            super().__init__(mapped, words)
            store, store_word = self.write, self.write_word

            def write(offset: int, data: bytes) -> None:
                before(offset, data)
                store(offset, data)
                after(offset, data)

            def write_word(index: int, word: int) -> None:
                before(index << 3, U64.pack(word))
                store_word(index, word)
                after(index << 3, U64.pack(word))

            self.write, self.write_word = write, write_word

    def write_telling(self: ByPwrite, offset: int, data: bytes) -> None:
        before(offset, data)
        pwrite(self, offset, data)
        after(offset, data)

    def write_all(self: ByPwrite, changes: Sequence[Planned]) -> None:
        for offset, data, _ in changes:
            self.write(offset, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvstore.file.writers, "ThroughMap", TellingMap)
        patch.setattr(ByPwrite, "write_all", write_all)
        patch.setattr(ByPwrite, "write", write_telling)
        yield
