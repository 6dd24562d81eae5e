"""Where the bytes of a file are: records counted, by size class, with what blocks have too many.

Counted from the slots where the index can be used, which reads no record; else from the records.
"""

from array import array
from dataclasses import dataclass, field
from typing import Final

from kvstore.format.layout import (
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    BUCKET_COUNT,
    BUCKET_HEADER,
    BUCKET_HEADER_SIZE,
    BUCKET_SIZE,
    CONTROL_TOMBSTONE,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    MAX_EXTENTS,
    MAX_KEY_SIZE,
    MAX_VALUE_SIZE,
    MIN_VALUE_SIZE,
    NEVER,
    RECORD_HEADER_SIZE,
    SEGMENT_SLOTS,
    SIZE_CLASSES,
    SLOT,
)

from .file_view import FileView
from .records import DamagedRecord, Progress, Records


@dataclass
class ClassSpace:
    """The records of one size class."""

    size_class: int
    records: int = 0
    record_size: int = 0
    """Bytes of headers, keys and values."""
    expired: int = 0
    """Records that have expired and whose blocks were not yet taken back."""
    extents: int = 0

    @property
    def block_size(self) -> int:
        """Bytes of a block of the class."""
        return BLOCK_SIZES[self.size_class]

    @property
    def padding_size(self) -> int:
        """Bytes of their blocks that the records do not fill."""
        return self.records * self.block_size - self.record_size

    @property
    def free_blocks(self) -> int:
        """Blocks of its extents without a record."""
        return max(0, self._blocks - self.records - self.expired)

    @property
    def _blocks(self) -> int:
        return self.extents * BLOCKS_PER_EXTENT[self.size_class]


@dataclass
class Space:
    """What `survey` counted. Sizes in bytes.

    What has expired and was not yet taken back is in `expired` and `expired_size`, and else only in
    the load of the table.
    """

    extent_count: int
    by_index: bool
    records: int = 0
    expiring: int = 0
    expired: int = 0
    key_size: int = 0
    value_size: int = 0
    largest_value: int = 0
    segments: int = 0
    tombstones: int = 0
    classes: list[ClassSpace] = field(
        default_factory=lambda: [ClassSpace(number) for number in range(len(BLOCK_SIZES))]
    )
    damages: list[DamagedRecord] = field(default_factory=list)
    """The first `MOST_DAMAGES` of what is damaged."""
    damaged: int = 0

    @property
    def slabs(self) -> int:
        """Extents that hold records."""
        return sum(each.extents for each in self.classes)

    @property
    def free_extents(self) -> int:
        """Extents that hold nothing."""
        return max(0, self.extent_count - FIXED_EXTENTS - self.segments - self.slabs)

    @property
    def live_size(self) -> int:
        """Blocks that hold records, padding included."""
        return sum(each.records * each.block_size for each in self.classes)

    @property
    def expired_size(self) -> int:
        """Blocks of what has expired."""
        return sum(each.expired * each.block_size for each in self.classes)

    @property
    def padding_size(self) -> int:
        """What the records leave of their blocks."""
        return sum(each.padding_size for each in self.classes)

    @property
    def free_size(self) -> int:
        """Free extents, and what is in no block that holds a record."""
        reserved = (self.free_extents + self.slabs) * EXTENT_SIZE
        return reserved - self.live_size - self.expired_size

    @property
    def load(self) -> float:
        """Records, expired ones too, by slots of the table, 0 to 1."""
        return (
            (self.records + self.expired) / (self.segments * SEGMENT_SLOTS)
            if self.segments
            else 0.0
        )


MOST_DAMAGES: Final = 100


def survey(view: FileView, now_ms: int, progress: Progress) -> Space:
    """Count what is in a file."""
    records = Records(view, now_ms, progress)
    counting = _Counting(Space(view.extent_count, records.by_index), now_ms)
    for problem in view.problems:
        counting.damage(DamagedRecord(0, None, problem))
    for position, _, contents, damage in records.segments():
        if damage is None:
            counting.space.segments += 1
        if records.by_index:
            progress(position, 1 << 15)
            if damage is not None:
                counting.damage(damage)
            else:
                counting.segment(contents)
    if not records.by_index:
        for found in records:
            if not isinstance(found, DamagedRecord):
                counting.record(
                    found.offset, len(found.key.encode()), len(found.value), found.expires_at
                )
            elif found.message not in view.problems:
                counting.damage(found)
    counting.space.extent_count = view.extent_count  # one in use may have grown
    return counting.finished()


class _Counting:
    def __init__(self, space: Space, now_ms: int) -> None:
        self.space = space
        self._now_ms = now_ms
        # The size class of each extent and one, by the extent; 0 where no record was seen.
        self._class_of_extent = array("B", bytes(MAX_EXTENTS))

    def damage(self, damage: DamagedRecord) -> None:
        self.space.damaged += 1
        if len(self.space.damages) < MOST_DAMAGES:
            self.space.damages.append(damage)

    def segment(self, contents: bytes) -> None:
        for start in range(0, BUCKET_COUNT * BUCKET_SIZE, BUCKET_SIZE):
            control = BUCKET_HEADER.unpack_from(contents, start)[-1]
            self.space.tombstones += control.count(CONTROL_TOMBSTONE)
            slots = SLOT.iter_unpack(contents[start + BUCKET_HEADER_SIZE : start + BUCKET_SIZE])
            for mark, (_, expires_at, offset, value_size, key_size) in zip(
                control, slots, strict=True
            ):
                if mark > CONTROL_TOMBSTONE:
                    self.record(offset, key_size, value_size, expires_at)

    def record(self, offset: int, key_size: int, value_size: int, expires_at: int) -> None:
        space = self.space
        if (
            not 0 < key_size <= MAX_KEY_SIZE
            or not MIN_VALUE_SIZE <= value_size <= MAX_VALUE_SIZE
            or offset >> EXTENT_SHIFT < FIXED_EXTENTS
        ):
            self.damage(DamagedRecord(offset, None, "a slot tells of a record that cannot be"))
            return
        size = RECORD_HEADER_SIZE + key_size + value_size
        size_class = SIZE_CLASSES[(size + BLOCK_ALIGNMENT - 1) // BLOCK_ALIGNMENT]
        of_class = space.classes[size_class]
        extent = offset >> EXTENT_SHIFT
        if extent < len(self._class_of_extent):
            self._class_of_extent[extent] = size_class + 1
        if NEVER < expires_at <= self._now_ms:
            of_class.expired += 1
            space.expired += 1
            return
        of_class.records += 1
        of_class.record_size += size
        space.key_size += key_size
        space.value_size += value_size
        space.largest_value = max(space.largest_value, value_size)
        space.expiring += expires_at != NEVER

    def finished(self) -> Space:
        space = self.space
        for code in self._class_of_extent:
            if code:
                space.classes[code - 1].extents += 1
        space.records = sum(each.records for each in space.classes)
        return space
