"""Everything about a file in numbers.

Counted from the slots where the index can be used and these are enough, which reads no record; else
from the records, one after the other.
"""

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from math import inf
from typing import Final

from kvstore.format.layout import (
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    BUCKET_COUNT,
    BUCKET_SHIFT,
    BUCKET_SIZE,
    DIRECTORY_ENTRIES,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    KIND_FIXED,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    MAX_EXTENTS,
    MAX_KEY_SIZE,
    MAX_VALUE_SIZE,
    MIN_VALUE_SIZE,
    NEVER,
    RECORD_HEADER_SIZE,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SIZE_CLASSES,
    SLAB_ENTRY,
    key_hash,
)

from .contents import Contents
from .file_view import FileView
from .records import DamagedRecord, Progress, Record, Records
from .table import bucket_counts, slots_of, unpack_slot
from .versions import Retired, retired_blocks

# Seconds: none, a minute, an hour, a day, a week, 30 days, a year, any number.
LIFETIMES: Final = (0, 60, 3_600, 86_400, 7 * 86_400, 30 * 86_400, 365 * 86_400, inf)
NO_TTL: Final = -1.0  # in the place of a lifetime
DAMAGED_KIND: Final = -1
_MOST_NAMED: Final = 100


@dataclass(frozen=True)
class Extent:
    """What the extent map says of an extent; `fill` is the share of it that is live, 0 to 1."""

    kind: int
    fill: float


@dataclass
class SizeClass:
    """The records of one size class. Sizes in bytes."""

    size_class: int
    records: int = 0
    record_size: int = 0
    """Headers, keys and values."""
    expired: int = 0
    """Records that have expired and whose blocks were not yet taken back."""
    retired: int = 0
    """Records that were superseded, or deleted and marked, and whose blocks are not yet free."""
    extents: int = 0

    @property
    def block_size(self) -> int:
        """A block of the class."""
        return BLOCK_SIZES[self.size_class]

    @property
    def live_size(self) -> int:
        """Blocks that hold records, padding included."""
        return self.records * self.block_size

    @property
    def expired_size(self) -> int:
        """Blocks of what has expired."""
        return self.expired * self.block_size

    @property
    def retired_size(self) -> int:
        """Blocks of what is retired or marked."""
        return self.retired * self.block_size

    @property
    def padding_size(self) -> int:
        """What the records leave of their blocks."""
        return self.live_size - self.record_size

    @property
    def free_blocks(self) -> int:
        """Blocks of its extents without a record."""
        blocks = self.extents * BLOCKS_PER_EXTENT[self.size_class]
        return max(0, blocks - self.records - self.expired - self.retired)

    @property
    def free_size(self) -> int:
        """What of its extents is in no block that holds a record."""
        used = self.live_size + self.expired_size + self.retired_size
        return max(0, self.extents * EXTENT_SIZE - used)


@dataclass
class Survey:
    """Counts over all of a file: of what can be read at `now_ms`. Sizes in bytes.

    What has expired and was not yet taken back is in `expired` and `expired_size`, and else only in
    the lifetimes, by itself, in the load of the table and the fill of the extents. What was
    superseded or deleted, and not yet reclaimed, is in `retired` and `retired_size` only, and in
    that fill.
    """

    view: FileView
    now_ms: int
    by_index: bool = True
    segments: int = 0
    tombstones: int = 0
    key_size: int = 0
    classes: list[SizeClass] = field(
        default_factory=lambda: [SizeClass(number) for number in range(len(BLOCK_SIZES))]
    )
    value_sizes: Counter[int] = field(default_factory=Counter)
    lifetimes: Counter[float] = field(default_factory=Counter)
    """Records by the first of `LIFETIMES` that is more than the seconds they have left."""
    probes: Counter[int] = field(default_factory=Counter)
    """Records by the pages of the table that finding them takes, where they were read."""
    orphans: int = 0
    """Records that no slot leads to, where they were read by the index."""
    marked: int = 0
    """Of the retired records, those that are marked as deleted."""
    contents: Contents = field(init=False)
    """What the records are, where they were read."""
    damages: list[DamagedRecord] = field(default_factory=list)
    """The first hundred of what is damaged."""
    damaged: int = 0
    _classes_of_extents: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.contents = Contents(self.now_ms)

    # --- counting ------------------------------------------------------------------------------

    def add_damage(self, damage: DamagedRecord) -> None:
        """Count what is damaged."""
        self.damaged += 1
        if len(self.damages) < _MOST_NAMED:
            self.damages.append(damage)

    def add_slots(self, extent: int, contents: bytes) -> None:
        """Count the records that the slots of a segment point to."""
        for _, packed in slots_of(extent, contents):
            _, expires_at, offset, value_size, key_size = unpack_slot(packed)
            self._add(offset, key_size, value_size, expires_at)

    def add_record(self, record: Record) -> None:
        """Count a record, and how it is found."""
        key = record.key.encode()
        block_size = self._add(record.offset, len(key), len(record.value), record.expires_at)
        if block_size:
            self.contents.add(record, block_size)
        self.orphans += self.by_index and not record.slot
        if block_size and record.slot:
            home = key_hash(key, self.view.seed) & BUCKET_COUNT - 1
            bucket = record.slot >> BUCKET_SHIFT & BUCKET_COUNT - 1
            self.probes[(bucket - home) % BUCKET_COUNT + 1] += 1

    def _add(self, offset: int, key_size: int, value_size: int, expires_at: int) -> int:
        """Count a record; return the bytes that its block takes, 0 where it cannot be read."""
        extent = offset >> EXTENT_SHIFT
        if (
            not 0 < key_size <= MAX_KEY_SIZE
            or not MIN_VALUE_SIZE <= value_size <= MAX_VALUE_SIZE
            or extent < FIXED_EXTENTS
        ):
            message = "a slot tells of a record that cannot be"
            self.add_damage(DamagedRecord(offset, None, message))
            return 0
        size = RECORD_HEADER_SIZE + key_size + value_size
        size_class = SIZE_CLASSES[(size + BLOCK_ALIGNMENT - 1) // BLOCK_ALIGNMENT]
        of_class = self.classes[size_class]
        if extent < MAX_EXTENTS and self._classes_of_extents.get(extent) != size_class:
            self._move_extent(extent, size_class)
        lifetime = NO_TTL if expires_at == NEVER else _lifetime(expires_at - self.now_ms)
        self.lifetimes[lifetime] += 1
        if not lifetime:
            of_class.expired += 1
            return 0
        of_class.records += 1
        of_class.record_size += size
        self.key_size += key_size
        self.value_sizes[value_size] += 1
        return of_class.block_size

    def add_retired(self, retired: Retired) -> None:
        """Count records of an extent that are retired or marked."""
        self.classes[retired.size_class].retired += retired.blocks
        self.marked += retired.marked
        if retired.extent not in self._classes_of_extents:
            self._move_extent(retired.extent, retired.size_class)

    def _move_extent(self, extent: int, size_class: int) -> None:
        """Count an extent for the class of the record in it that was seen last."""
        former = self._classes_of_extents.get(extent)
        if former is not None:
            self.classes[former].extents -= 1
        self._classes_of_extents[extent] = size_class
        self.classes[size_class].extents += 1

    # --- sums ----------------------------------------------------------------------------------

    @property
    def records(self) -> int:
        """Records that can be read."""
        return sum(each.records for each in self.classes)

    @property
    def expired(self) -> int:
        """Records that have expired and were not yet taken back."""
        return self.lifetimes[0]

    @property
    def retired(self) -> int:
        """Records that were superseded, or deleted and marked, and were not yet reclaimed."""
        return sum(each.retired for each in self.classes)

    @property
    def expiring(self) -> int:
        """Records with a TTL that can be read."""
        return self.records - self.lifetimes[NO_TTL]

    @property
    def value_size(self) -> int:
        """The values."""
        return sum(size * count for size, count in self.value_sizes.items())

    @property
    def largest_value(self) -> int:
        """The largest of them."""
        return max(self.value_sizes, default=0)

    @property
    def used_classes(self) -> list[SizeClass]:
        """The size classes that have records."""
        return [each for each in self.classes if each.records or each.expired or each.retired]

    @property
    def slabs(self) -> int:
        """Extents that hold records."""
        return len(self._classes_of_extents)

    @property
    def free_extents(self) -> int:
        """Extents that hold nothing."""
        used = FIXED_EXTENTS + self.segments + self.slabs
        return max(0, self.view.extent_count - used)

    @property
    def live_size(self) -> int:
        """Blocks that hold records, padding included."""
        return sum(each.live_size for each in self.classes)

    @property
    def expired_size(self) -> int:
        """Blocks of what has expired."""
        return sum(each.expired_size for each in self.classes)

    @property
    def retired_size(self) -> int:
        """Blocks of what is retired or marked."""
        return sum(each.retired_size for each in self.classes)

    @property
    def padding_size(self) -> int:
        """What the records leave of their blocks."""
        return sum(each.padding_size for each in self.classes)

    @property
    def free_size(self) -> int:
        """Free extents, and what is in no block that holds a record."""
        return self.free_extents * EXTENT_SIZE + sum(each.free_size for each in self.classes)

    @property
    def load(self) -> float:
        """Records, expired ones too, by slots of the table, 0 to 1."""
        slots = self.segments * SEGMENT_SLOTS
        return (self.records + self.expired) / slots if slots else 0.0


def survey(
    view: FileView, now_ms: int, progress: Progress, *, every_record: bool = False
) -> Survey:
    """Count what is in a file; read every record where that is wanted, or the index is no use."""
    records = Records(view, progress)
    result = Survey(view, now_ms, records.by_index)
    by_slots = records.by_index and not every_record
    if by_slots:
        for problem in view.problems:
            result.add_damage(DamagedRecord(0, None, problem))
    for position, extent, contents, damage in records.segments():
        if damage is None:
            result.segments += 1
            if by_slots:
                progress(position, DIRECTORY_ENTRIES)
                pages = range(0, EXTENT_SIZE, BUCKET_SIZE)
                result.tombstones += sum(bucket_counts(contents, page).dead for page in pages)
                result.add_slots(extent, contents)
        elif by_slots:
            result.add_damage(damage)
    for found in () if by_slots else records:
        if isinstance(found, Record):
            result.add_record(found)
        else:
            result.add_damage(found)
    for retired in retired_blocks(view) if records.by_index else records.retired:
        result.add_retired(retired)
    return result


def extents(view: FileView) -> list[Extent]:
    """Return what the extent map says of each extent."""
    return [_extent(view.map_entry(number)) for number in range(view.extent_count)]


def _extent(entry: bytes) -> Extent:
    kind, size_class, live, *_ = SLAB_ENTRY.unpack(entry)
    if kind == KIND_SEGMENT:
        return Extent(kind, min(1.0, SEGMENT_ENTRY.unpack(entry)[2] / SEGMENT_SLOTS))
    if kind == KIND_SLAB and size_class < len(BLOCK_SIZES):
        return Extent(kind, min(1.0, live * BLOCK_SIZES[size_class] / EXTENT_SIZE))
    if kind in (KIND_FREE, KIND_FIXED):
        return Extent(kind, 0.0 if kind == KIND_FREE else 1.0)
    return Extent(DAMAGED_KIND, 1.0)


def _lifetime(left_ms: int) -> float:
    return LIFETIMES[bisect_right(LIFETIMES, left_ms / 1000)] if left_ms > 0 else LIFETIMES[0]
