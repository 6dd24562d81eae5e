"""What the headers of the table's segments and buckets say, checked before anyone acts on it.

The caller of each function holds the stripe of the segment.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import CorruptStoreError
from .layout import (
    BUCKET_HEADER,
    BUCKET_SIZE,
    DIRECTORY_ENTRIES,
    EXTENT_SHIFT,
    MAX_DEPTH,
    MIN_DEPTH,
    bucket_marker,
    segment_run,
)

if TYPE_CHECKING:
    from .datafile import DataFile


def depth_and_prefix(file: "DataFile", extent: int, position: int) -> tuple[int, int]:
    """Return what bucket 0 says of the segment that directory entry `position` names.

    Raises:
        CorruptStoreError: it is no bucket, or the directory disagrees.
    """
    bucket = extent << EXTENT_SHIFT
    if file.words[bucket >> 3] != bucket_marker(bucket):
        raise no_bucket(file, bucket)
    _, _, depth, prefix, _ = BUCKET_HEADER.unpack_from(file.map, bucket)
    if (
        not MIN_DEPTH <= depth <= MAX_DEPTH
        or prefix != position & -segment_run(depth)
        or not _is_run(file, extent, prefix, segment_run(depth))
    ):
        raise CorruptStoreError(
            f"{file.path}: the segment at byte {bucket:,} says depth {depth} and prefix "
            f"{prefix}, but the directory's entry {position} leads to it"
        )
    return depth, prefix


def _is_run(file: "DataFile", extent: int, start: int, run: int) -> bool:
    """Tell whether the directory's entries that name `extent` begin and end there."""
    # A depth one too low would take the next segment's entries for this one's. That is how a
    # split looks that could be neither ended nor undone: then it still holds all their slots.
    directory, end = file.directory, start + run
    return file.refuses or (
        directory[end - 1] == extent
        and (end == DIRECTORY_ENTRIES or directory[end] != extent)
        and (not start or directory[start - 1] != extent)
    )


def buckets(file: "DataFile", extent: int) -> Iterator[int]:
    """Yield the offsets of a segment's buckets; raise CorruptStoreError at one that is none."""
    for bucket in range(extent << EXTENT_SHIFT, (extent + 1) << EXTENT_SHIFT, BUCKET_SIZE):
        if file.words[bucket >> 3] != bucket_marker(bucket):
            raise no_bucket(file, bucket)
        yield bucket


def no_bucket(file: "DataFile", bucket: int) -> CorruptStoreError:
    """Return the error for a page at file offset `bucket` that begins with no bucket's marker."""
    return CorruptStoreError(
        f"{file.path}: the page at byte {bucket:,} is no bucket of the table: it begins "
        f"with {file.words[bucket >> 3]:#018x}, expected {bucket_marker(bucket):#018x}"
    )
