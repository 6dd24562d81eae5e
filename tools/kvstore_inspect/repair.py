"""How a damaged file is repaired: a copy kept first, then its superblock, then the index.

Invariants:
1. Before the copy is whole and flushed, not a byte of the file is changed.
2. No record is written. Whenever this ends, it can be done again, and brings back the same records.
"""

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from kvstore.file.platform import system
from kvstore.format.layout import (
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIRST_FILE_SIZE,
    IDENTITY,
    IDENTITY_OFFSETS,
    MAX_EXTENTS,
    MAX_FILE_SIZE,
    STATE,
    STATE_OFFSET,
)
from kvstore.format.superblock import Identity, State, unpack_identity, unpack_state
from kvstore.index.extents import Extents
from kvstore.recovery.evidence import gather
from kvstore.recovery.opening import open_file
from kvstore.recovery.rebuild import rebuild

from .file_view import FileView
from .versions import void_stamp

_COPIED_SIZE: Final = 16 * EXTENT_SIZE
_FEWEST_EXTENTS: Final = FIRST_FILE_SIZE >> EXTENT_SHIFT


# --- a copy of the file ------------------------------------------------------------------------


def back_up(path: Path, fd: int) -> Path:
    """Copy the open file at `path` beside it, flushed, sharing its blocks where the disk can.

    Raises:
        OSError: there is no room for it, or the folder takes no file. Nothing is left behind then.
    """
    backup = _free_name(path)
    partial = Path(f"{backup}.partial")
    copy = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | system.flags, 0o600)
    try:
        try:
            if not _share_blocks(fd, copy):
                _copy(fd, copy)
            if hasattr(os, "fchmod"):
                os.fchmod(copy, stat.S_IMODE(os.fstat(fd).st_mode))
            system.flush_file(copy)
        finally:
            os.close(copy)
        partial.rename(backup)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    system.flush_folder(str(backup))
    return backup


def _free_name(path: Path) -> Path:
    """Return a name beside the file, with the time in it, that is not taken."""
    base = f"{os.path.realpath(path)}.backup-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    name, number = Path(base), 1
    while name.exists():
        number += 1
        name = Path(f"{base}-{number}")
    return name


def _share_blocks(fd: int, copy: int) -> bool:
    return system.share_blocks(fd, copy)


def _copy(fd: int, copy: int) -> None:
    size = os.fstat(fd).st_size
    system.reserve(copy, 0, size)  # so that a full disk is known before anything is copied
    for offset in range(0, size, _COPIED_SIZE):
        system.write_at(copy, offset, system.read_at(fd, min(_COPIED_SIZE, size - offset), offset))


# --- the superblock ----------------------------------------------------------------------------


def settle_identity(view: FileView, fd: int) -> None:
    """Of two valid identities, write the one that the file's contents fit in both places."""
    copies = (view[offset : offset + IDENTITY.size] for offset in IDENTITY_OFFSETS)
    found = {copy: identity for copy in copies if (identity := unpack_identity(copy))}
    best = max(found, key=lambda copy: _fit(view, found[copy]))
    for offset in IDENTITY_OFFSETS:
        system.write_at(fd, offset, best)
    system.flush_file(fd)


def _fit(view: FileView, identity: Identity) -> tuple[bool, int, bool]:
    """Return how well an identity fits: its format, whole records with its seed, the state."""
    count = min(-(-len(view) // EXTENT_SIZE), MAX_EXTENTS)
    whole = gather(view.padded_extent, count, identity.hash_seed).whole
    state = unpack_state(view.exactly(STATE_OFFSET, STATE.size), identity.hash_seed)
    return identity.is_known_format, whole, state.intact


def prepare(view: FileView, fd: int) -> None:
    """Give the file a whole number of extents, and a state that has its index rebuilt.

    All that is left of one that was cut off stays; zeros fill its last extent. What was void stays
    so: records that were all removed before they were cleared.

    Raises:
        OSError: the disk has no room for these zeros; the file is then as it was.
    """
    count = _extents_to_keep(view)
    size = len(view)
    if size < count * EXTENT_SIZE:
        try:
            system.reserve(fd, size, count * EXTENT_SIZE)
        except OSError:
            os.ftruncate(fd, size)
            raise
    # Zeros first: a crash between the two leaves lost records that the checker finds.
    state = State(False, count, count, 0, 0, void_stamp(view.state))
    system.write_at(fd, STATE_OFFSET, state.pack(view.seed))
    system.flush_file(fd)


def _extents_to_keep(view: FileView) -> int:
    if view.counts_extents:
        return max(view.extent_count, _FEWEST_EXTENTS)
    # The file may be as long as it may ever become, if a process died while it opened it.
    count = view.extent_count
    while count > _FEWEST_EXTENTS and not view.extent(count - 1).strip(b"\0"):
        count -= 1
    return max(count, _FEWEST_EXTENTS)


# --- the index ---------------------------------------------------------------------------------


def rebuild_index(path: Path, wait: float, now_ms: int) -> None:
    """Build the index anew from the records, dropping those that have expired by `now_ms`.

    Raises:
        StoreFullError: no room for the table.
        StoreLockedError: another process has taken the file meanwhile.
        OSError: the operating system refused a write or a flush.
    """
    with _silence():
        file = open_file(os.path.abspath(path), MAX_FILE_SIZE, wait, now_ms, mending=True)
        try:
            extents = Extents(file)
            rebuild(file, extents, now_ms)
        except BaseException:
            file.require_rebuild()
            raise
        finally:
            file.close()


@contextmanager
def _silence() -> Iterator[None]:
    """Keep from standard error what recovery logs: the command reports it."""
    logger, handler = logging.getLogger("kvstore"), logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
