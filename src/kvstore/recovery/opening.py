"""A file opened: whether its index can be used as it is, or made anew, decided before any change.

A crash leaves a file that is not clean, in which a record may be torn; rebuilding drops it, and
nothing is lost that was promised. Whatever else takes an index for wrong is damage, of which nobody
knows how far it goes: then the records must be as many as they were, and whole: see `evidence`.
"""

from kvstore.errors import CorruptStoreError, UnsupportedFormatError
from kvstore.file.datafile import DataFile
from kvstore.file.held import HeldFile
from kvstore.file.opening import FoundFile, create_store
from kvstore.file.platform import system
from kvstore.format.layout import (
    EXTENT_MAP_ENTRIES,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    HOLDER,
    HOLDER_OFFSET,
    MAX_EXTENTS,
    RECORD_MAGIC_BYTES,
)
from kvstore.format.quick_check import count_by_map, index_is_consistent
from kvstore.format.superblock import index_checksum, unpack_holder


def open_file(
    path: str,
    max_bytes: int,
    timeout: float,
    now_ms: int,
    *,
    durable: bool = False,
    create: bool = True,
    mending: bool = False,
) -> DataFile:
    """Lock, open and map the file at `path`. A missing, empty or all-zero one is created anew.

    Args:
        path: absolute path.
        max_bytes: the file does not grow past this; a larger one opens and does not grow.
        timeout: seconds to wait for another process.
        now_ms: the time of creation of a new file.
        create: create one; else nothing is changed, and a file without a store is an error.
        durable: operations will flush single records.
        mending: open whatever can be opened: what would be lost by that was copied before.

    Raises:
        StoreLockedError: another process has the file after `timeout`, or this one has it already.
        UnsupportedFormatError: the file is no store, or of another format. It is unchanged.
        CorruptStoreError: both identities are damaged, the file is shorter than its contents, or
            its index is damaged and to rebuild it would lose records. It is unchanged.
        StoreFullError: the disk has no room for the blocks that the file needs.
        OSError: what the operating system said.
    """
    held = HeldFile(path, timeout, create=create)
    try:
        held.open()
        found = FoundFile(path, held.fd)
        if found.is_blank:
            if not create:
                raise UnsupportedFormatError(
                    f"{path}: no store is in the file: it is empty, or holds nothing but "
                    f"zeros; it was left as it is"
                )
            found = create_store(held, now_ms)
            distrust, extent_count = "is new", found.state.extent_count
        elif mending:
            distrust, extent_count = "is being repaired", found.state.extent_count
        else:
            distrust, extent_count = decide(found)
        return DataFile(
            held,
            found,
            max_bytes,
            durable=durable,
            distrust=distrust,
            extent_count=extent_count,
        )
    except BaseException as error:
        held.has_failed = True
        held.close()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path
        raise


def decide(found: FoundFile) -> tuple[str, int]:
    """Return what is to be done with the index of a file that is not blank; change nothing.

    Reads all of a file that it does not trust.

    Returns:
        Why the index cannot be used and is to be rebuilt, in words, empty where it is used as it
        is; and how many extents of the file are in use.

    Raises:
        CorruptStoreError: a rebuild would lose records that a repair could use.
        OSError: the file cannot be read.
    """
    count = found.state.extent_count
    distrust = _find_distrust(found)
    if not distrust:
        return "", count
    beyond = system.find_last(found.fd, RECORD_MAGIC_BYTES, count << EXTENT_SHIFT, found.length)
    if found.state.clean or not found.state.intact:
        loss = _find_loss(found, beyond)
    else:
        loss = _find_shift(found)
        if beyond >= 0:  # power loss took back the new length in the state, and not this
            count = min(beyond + EXTENT_SIZE >> EXTENT_SHIFT, MAX_EXTENTS)
    if loss:
        raise CorruptStoreError(
            f"{found.path}: {distrust}, and to rebuild the index would lose records: "
            f"{loss}. The file was not changed; kvstore-inspect repair {found.path} rebuilds "
            f"the index from those records that are whole, and keeps a copy of the file"
        )
    return distrust, count


def _find_distrust(found: FoundFile) -> str:
    """Return why the index cannot be used as it is, in words; none where it can."""
    state = found.state
    if not found.state.intact:
        return "its state is damaged"
    if not state.clean:
        if unpack_holder(system.read_at(found.fd, HOLDER.size, HOLDER_OFFSET)):
            return "was not closed"
        return "was closed after a change that was cut short, or that met damage"
    start = found.read_start(state.extent_count)
    if index_checksum(start, state.extent_count, found.hash_seed) != state.index_checksum:
        return "was closed, but its index is damaged"
    if not index_is_consistent(start, state.extent_count):
        return "was closed, but its index contradicts itself"
    # A process that dies while it opens a file may leave zeros, of whole extents.
    size, length = state.extent_count << EXTENT_SHIFT, found.length
    if length > size and (
        length % EXTENT_SIZE or system.find_last(found.fd, b"", size, length) >= 0
    ):
        return "was closed, but is longer than its contents"
    return ""


def _find_loss(found: FoundFile, beyond: int) -> str:
    """Return what records a rebuild would lose of a file that is damaged; none if it loses none.

    `beyond` is the offset of the last one past the end of the file; -1 where there is none.
    """
    from .evidence import gather  # after a crash only

    evidence = gather(found.read_extent, found.state.extent_count, found.hash_seed)
    expected = _expected_records(found)
    if not (evidence.damaged or evidence.astray or beyond >= 0 or evidence.whole != expected):
        return ""
    loss = f"found were {evidence}"
    if expected < 0:
        loss += ", and the extent map, which tells of how many, is damaged too"
    elif evidence.whole != expected:
        loss += f", where there should be {expected:,}"
    if beyond >= 0:
        loss += f"; one that begins past the end, at byte {beyond:,}"
    return loss


def _find_shift(found: FoundFile) -> str:
    """Return which record of a file that was in use is not in its place, in words; none if none."""
    from .evidence import find_shift  # after a crash only

    shift = find_shift(found.read_extent, found.state.extent_count, found.length, found.hash_seed)
    if shift is None:
        return ""
    return (
        f"the record at byte {shift:,} is not in its place, as if bytes had been inserted or "
        f"removed before it"
    )


def _expected_records(found: FoundFile) -> int:
    """Return how many records there should be; -1 where the file cannot tell.

    Where the state is damaged, those past the end of the file count: it may have been cut off.
    """
    if found.state.clean:
        return found.state.records
    start = found.read_start(EXTENT_MAP_ENTRIES)
    # A new file, whose index was not made yet: it has no records.
    return count_by_map(start, EXTENT_MAP_ENTRIES) if any(start[EXTENT_MAP_OFFSET:]) else 0
