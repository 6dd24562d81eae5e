"""What the headers of the table's segments and buckets say, checked before anyone acts on it.

A page that was overwritten is found by its marker, one that is of another segment, or of the same
one at another moment, by its shape: see `layout`, "Segment". The caller of each function holds the
stripe of the segment.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from kvstore.errors import CorruptStoreError
from kvstore.format.layout import (
    BUCKET_SIZE,
    DIRECTORY_ENTRIES,
    DIRECTORY_SHIFT,
    EXTENT_SHIFT,
    MAX_DEPTH,
    MIN_DEPTH,
    REBUILDS_OFFSET,
    SHAPE_DEPTH_MASK,
    SHAPE_OFFSET,
    SHAPE_PREFIX_SHIFT,
    SHAPE_REBUILDS_SHIFT,
    SHAPE_REWRITES_SHIFT,
    bucket_marker,
    segment_run,
)

if TYPE_CHECKING:
    from kvstore.file.datafile import DataFile

_U16_MASK: Final = 0xFFFF


def _shape_mask(depth: int) -> int:
    """Return which bits of a shape that says this depth are to be those of `wanted_shape`."""
    if not MIN_DEPTH <= depth <= MAX_DEPTH:
        return 0xFF  # the depth itself, which is another
    uppermost = -segment_run(depth) & _U16_MASK
    return (
        _U16_MASK << SHAPE_REBUILDS_SHIFT
        | uppermost << SHAPE_PREFIX_SHIFT
        | SHAPE_DEPTH_MASK - 0xFF
    )


# A shape fits a hash where `(shape ^ wanted) & SHAPE_MASKS[shape & 0xFF]` is 0.
SHAPE_MASKS: Final = tuple(map(_shape_mask, range(256)))


def wanted_shape(file: "DataFile") -> int:
    """Return what the shapes of this file's buckets have in common.

    For one that fits a hash, put the index in the directory in the place of the prefix.
    """
    return file.shorts[REBUILDS_OFFSET >> 1] << SHAPE_REBUILDS_SHIFT | MIN_DEPTH


def depth_and_prefix(file: "DataFile", extent: int, position: int) -> tuple[int, int]:
    """Return what bucket 0 says of the segment that directory entry `position` names.

    Raises:
        CorruptStoreError: it is no bucket, or the directory disagrees.
    """
    bucket = extent << EXTENT_SHIFT
    shape = file.words[bucket + SHAPE_OFFSET >> 3]
    depth = shape & SHAPE_DEPTH_MASK
    prefix = shape >> SHAPE_PREFIX_SHIFT & _U16_MASK
    if (
        file.words[bucket >> 3] != bucket_marker(bucket)
        or not MIN_DEPTH <= depth <= MAX_DEPTH
        or prefix != position & -segment_run(depth)
        or (shape ^ wanted_shape(file)) >> SHAPE_REBUILDS_SHIFT & _U16_MASK
        or not _is_run(file, extent, prefix, segment_run(depth))
    ):
        raise wrong_bucket_error(file, bucket, position << DIRECTORY_SHIFT)
    return depth, prefix


def _is_run(file: "DataFile", extent: int, start: int, run: int) -> bool:
    """Return whether the directory's entries that name `extent` begin and end there."""
    # A depth one too low would take the next segment's entries for this one's. That is how a split
    # or a merge looks that could be neither ended nor undone: then it still holds all their slots.
    directory, end = file.directory, start + run
    return file.read_only or (
        directory[end - 1] == extent
        and (end == DIRECTORY_ENTRIES or directory[end] != extent)
        and (not start or directory[start - 1] != extent)
    )


def buckets(file: "DataFile", extent: int) -> Iterator[int]:
    """Yield the offsets of a segment's buckets; raise CorruptStoreError at one that is none.

    Likewise at one that is not of the same moment as the first.
    """
    first = extent << EXTENT_SHIFT
    shape = file.words[first + SHAPE_OFFSET >> 3]
    for bucket in range(first, first + (1 << EXTENT_SHIFT), BUCKET_SIZE):
        if is_torn(file, bucket, shape):
            raise torn_bucket_error(file, bucket, shape)
        yield bucket


def check_buckets(file: "DataFile", extent: int) -> None:
    """Raise CorruptStoreError unless all pages of a segment are buckets of one moment."""
    for _ in buckets(file, extent):
        pass


def is_torn(file: "DataFile", bucket: int, shape: int) -> bool:
    """Return whether the page at offset `bucket` is not one of the buckets that have this shape."""
    words = file.words
    return words[bucket >> 3] != bucket_marker(bucket) or words[bucket + SHAPE_OFFSET >> 3] != shape


def rewrites_after(file: "DataFile", extent: int, undone: int) -> int:
    """Return the number of rewrites for the next one of a segment: none that any page of it had.

    `undone` is how many were taken back since the file was opened. Pages may show these in a copy.
    """
    return (file.words[(extent << EXTENT_SHIFT) + SHAPE_OFFSET >> 3] >> SHAPE_REWRITES_SHIFT) + (
        1 + undone
    )


# --- what is said of it ---------------------------------------------------------------------------


def wrong_bucket_error(file: "DataFile", bucket: int, key_hash: int) -> CorruptStoreError:
    """Return the error for a page that the directory names for a hash, and that does not fit it."""
    shape = file.words[bucket + SHAPE_OFFSET >> 3]
    position = key_hash >> DIRECTORY_SHIFT
    rebuilds = file.shorts[REBUILDS_OFFSET >> 1]
    return _marker_error(file, bucket) or CorruptStoreError(
        f"{file.path}: the bucket at byte {bucket:,} is of {_describe(shape)}, but the directory's "
        f"entry {position} leads to it, in an index of {rebuilds} rebuilds; {advice(file)}"
    )


def torn_bucket_error(file: "DataFile", bucket: int, shape: int) -> CorruptStoreError:
    """Return the error for a page that goes not with one of this shape, in the same segment."""
    found = file.words[bucket + SHAPE_OFFSET >> 3]
    return _marker_error(file, bucket) or CorruptStoreError(
        f"{file.path}: the bucket at byte {bucket:,} is of {_describe(found)}, expected one of "
        f"{_describe(shape)}, as another of its segment; {advice(file)}"
    )


def _marker_error(file: "DataFile", bucket: int) -> CorruptStoreError | None:
    if file.words[bucket >> 3] == bucket_marker(bucket):
        return None
    return CorruptStoreError(
        f"{file.path}: the page at byte {bucket:,} is no bucket of the table: it begins "
        f"with {file.words[bucket >> 3]:#018x}, expected {bucket_marker(bucket):#018x}; "
        f"{advice(file)}"
    )


def _describe(shape: int) -> str:
    return (
        f"depth {shape & SHAPE_DEPTH_MASK}, prefix {shape >> SHAPE_PREFIX_SHIFT & _U16_MASK}, "
        f"{shape >> SHAPE_REBUILDS_SHIFT & _U16_MASK} rebuilds and "
        f"{shape >> SHAPE_REWRITES_SHIFT} rewrites"
    )


def advice(file: "DataFile") -> str:
    """Return what is said, of any structure that is not as it should be, at the end."""
    return (
        "the file is damaged, or is a copy that was torn while it was made: close the store, then "
        f"kvstore-inspect repair {file.path} rebuilds the index from the records"
    )
