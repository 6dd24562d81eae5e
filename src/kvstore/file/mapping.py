"""The mapping of a data file, and its limit: as long as the file may ever become."""

import mmap
from contextlib import suppress
from errno import EAGAIN, ENODEV, ENOMEM

from kvstore.format.layout import DIRECTORY_OFFSET, DIRECTORY_SIZE, EXTENT_SHIFT

from .held import HeldFile
from .platform import is_full, raise_if_full, system


class FileMap:
    """A mapped data file, with every block up to its size reserved, and the views on it.

    None of them changes before `close`. Pages past the end of the file are not to be touched.

    Args:
        held: the file. It is cut to `size`, and its holes are filled.
        length: how long it is, in bytes.
        size: of its extents that are in use, in bytes.
        max_bytes: it is mapped no further than that, but for a file that is larger.

    Attributes:
        mapped, words, shorts, directory: as in `DataFile`.
        is_private: it is private memory wherever it is stored to.
        max_extents: how many extents were mapped.
        limit: why no more, in words.

    Raises:
        StoreFullError: the disk has no room for the holes of the file.
        OSError: the file cannot be cut, extended or mapped.
    """

    def __init__(self, held: HeldFile, length: int, size: int, max_bytes: int) -> None:
        if length > size:
            system.cut(held.fd, size, length)
        _reserve_all(held, size)
        self.max_extents = max(max_bytes, size) >> EXTENT_SHIFT
        self.limit = f"max_bytes is {max_bytes:,}"
        self._fd = held.fd
        try:
            self.mapped, self.is_private = self._map(size, held.may_be_private)
        except OSError as error:
            mapped_size = self.max_extents << EXTENT_SHIFT
            raise _not_mapped(error, held.path, mapped_size, max_bytes) from error
        self._views: list[memoryview[int]] = []
        try:
            system.read_ahead(self.mapped, False)
            everything = self._keep(memoryview(self.mapped))
            self.words = self._keep(everything.cast("Q"))
            self.shorts = self._keep(everything.cast("H"))
            directory = slice(DIRECTORY_OFFSET, DIRECTORY_OFFSET + DIRECTORY_SIZE)
            self.directory = self._keep(self._keep(everything[directory]).cast("H"))
        except BaseException:
            self.close()
            raise

    def _keep(self, view: "memoryview[int]") -> "memoryview[int]":
        """Remember a view, which `close` releases."""
        self._views.append(view)
        return view

    def _map(self, size: int, private: bool) -> tuple[mmap.mmap, bool]:
        """Map the file as long as it is to be mapped, or as the system lets it become."""
        try:
            return system.map_file(self._fd, size, self.max_extents << EXTENT_SHIFT, private)
        except OSError as error:
            if not is_full(error):
                raise
        most = system.limit_of_file_size()
        extent_count = size >> EXTENT_SHIFT
        self.max_extents = max(min(self.max_extents, (most or 0) >> EXTENT_SHIFT), extent_count)
        self.limit = "the file system takes no longer one"
        if most is not None:
            self.limit = f"this process may make files of {most:,} bytes (RLIMIT_FSIZE, ulimit -f)"
        return system.map_file(self._fd, size, self.max_extents << EXTENT_SHIFT, private)

    def close(self) -> None:
        """Unmap the file. Idempotent."""
        for view in reversed(self._views):
            view.release()
        # The traceback of an operation that was interrupted may have a view of a part of it yet:
        # then all of it is unmapped with that.
        with suppress(BufferError):
            self.mapped.close()


def _reserve_all(held: HeldFile, size: int) -> None:
    """Reserve the blocks of the whole file: a sparse restore leaves holes."""
    try:
        system.fill_holes(held.fd, size)
    except OSError as error:
        if held.in_place:
            raise_if_full(error, held.path, "fill the holes of the file")
        # Elsewhere writes report a full disk themselves: it is no danger to go on.
        if not is_full(error):
            raise


def _not_mapped(error: OSError, path: str, size: int, max_bytes: int) -> OSError:
    """Say what to do where the system does not map the file."""
    why = str(error.strerror)
    if error.errno in (ENOMEM, EAGAIN):
        limits = system.limits_of_memory()
        why += (
            f": the file is mapped as long as it may become, {size:,} bytes of address space; "
            f"give a smaller max_bytes than {max_bytes:,}, or raise the limits of this process"
            f"{limits and f' ({limits})'}"
        )
    elif error.errno == ENODEV:
        why += ": the file system cannot map files into memory; keep the store on a local one"
    return OSError(error.errno, why, path)
