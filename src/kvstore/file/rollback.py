"""Changes of several writes that happen whole or not at all."""

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from .datafile import DataFile


class Rollback:
    """A change of several writes that happens whole or not at all, as far as this process lives.

    Use as a context manager around writes that no one else can interleave with: all under one held
    lock. Where the block raises, its writes are taken back, newest first, and the error goes on.
    """

    def __init__(self, file: "DataFile") -> None:
        self._file = file
        self._old: list[tuple[int, bytes]] = []

    def write(self, offset: int, data: bytes) -> None:
        """As `DataFile.write`, remembering what was there."""
        self._old.append((offset, self._file.map[offset : offset + len(data)]))
        self._file.write(offset, data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        for offset, old in reversed(self._old):
            self._file.restore(offset, old)
