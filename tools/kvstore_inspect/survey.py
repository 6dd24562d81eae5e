"""Everything about a file in numbers, from one walk over it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Final

from kvstore.format.layout import (
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BUCKET_COUNT,
    BUCKET_HEADER,
    BUCKET_SHIFT,
    EXTENT_SIZE,
    KIND_FIXED,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    MAX_FILE_SIZE,
    RECORD_HEADER_SIZE,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SIZE_CLASSES,
    SLAB_ENTRY,
    key_hash,
)

from .file_view import FileView
from .opening import Opening
from .records import DamagedRecord, Progress, Record, Records
from .terminal import size as in_bytes

# Seconds: none, a minute, an hour, a day, a week, 30 days, a year, any number.
LIFETIMES: Final = (0, 60, 3_600, 86_400, 7 * 86_400, 30 * 86_400, 365 * 86_400, inf)
NEVER: Final = -1.0  # in the place of a lifetime
_MOST_DAMAGE_KEPT: Final = 100
_DAMAGED_KIND: Final = 4


@dataclass(frozen=True)
class Extent:
    """What the extent map says of an extent; `fill` is the share of it that is live, 0 to 1."""

    kind: int
    fill: float
    size_class: int = 0
    live: int = 0


@dataclass
class SizeClass:
    """The slab extents of one size class, and the records in them. Sizes in bytes."""

    block_size: int
    extents: int = 0
    records: int = 0
    record_bytes: int = 0
    expired: int = 0

    @property
    def padding(self) -> int:
        """What the blocks of its records are larger than these."""
        return self.records * self.block_size - self.record_bytes

    @property
    def free(self) -> int:
        """What its extents have that is in no record's block, of none that has expired either."""
        return self.extents * EXTENT_SIZE - (self.records + self.expired) * self.block_size


@dataclass
class Survey:
    """Counts over all of a file: of what can be read now.

    What has expired and was not yet taken back is in `expired`, and else only in the lifetimes, by
    itself, and in the fill of the extents.
    """

    now_ms: int
    by_index: bool
    extents: list[Extent] = field(default_factory=list)
    depths: Counter[int] = field(default_factory=Counter)
    probes: Counter[int] = field(default_factory=Counter)
    """Records by the pages of the table that finding them takes."""
    classes: list[SizeClass] = field(default_factory=list)
    value_sizes: Counter[int] = field(default_factory=Counter)
    lifetimes: Counter[float] = field(default_factory=Counter)
    """Records by the first of `LIFETIMES` that is more than the seconds they have left."""
    records: int = 0
    expired: int = 0
    orphans: int = 0
    damage: list[DamagedRecord] = field(default_factory=list)
    damage_count: int = 0

    def count(self, kind: int) -> int:
        """Return how many extents are of a kind."""
        return sum(extent.kind == kind for extent in self.extents)

    @property
    def loads(self) -> list[float]:
        """The load of each segment, 0 to 1."""
        return [extent.fill for extent in self.extents if extent.kind == KIND_SEGMENT]

    @property
    def free_bytes(self) -> int:
        """What is reserved and unused: free extents, and blocks that hold no record."""
        return self.count(KIND_FREE) * EXTENT_SIZE + sum(each.free for each in self.classes)

    @property
    def expired_bytes(self) -> int:
        """The blocks of what has expired."""
        return sum(each.expired * each.block_size for each in self.classes)

    @property
    def padding(self) -> int:
        """What the blocks of all records are larger than these, in bytes."""
        return sum(each.padding for each in self.classes)


def survey(view: FileView, now_ms: int, progress: Progress) -> Survey:
    """Walk over a file and count."""
    records = Records(view, now_ms, progress)
    result = Survey(now_ms, records.by_index)
    result.classes = [SizeClass(size) for size in BLOCK_SIZES]
    result.extents = [_extent(view, number) for number in range(view.extent_count)]
    for extent in result.extents:
        if extent.kind == KIND_SLAB:
            result.classes[extent.size_class].extents += 1
    for found in records:
        if isinstance(found, Record):
            _count(result, view, found)
        else:
            result.damage_count += 1
            if len(result.damage) < _MOST_DAMAGE_KEPT:
                result.damage.append(found)
    if records.by_index:
        for _, _, contents, damage in records.segments():
            if damage is None:
                result.depths[BUCKET_HEADER.unpack_from(contents)[2]] += 1
    return result


def _extent(view: FileView, number: int) -> Extent:
    entry = view.map_entry(number)
    kind, size_class, live, *_ = SLAB_ENTRY.unpack(entry)
    if kind == KIND_SEGMENT:
        live = SEGMENT_ENTRY.unpack(entry)[2]
        return Extent(kind, min(1.0, live / SEGMENT_SLOTS), 0, live)
    if kind == KIND_SLAB and size_class < len(BLOCK_SIZES):
        return Extent(
            kind, min(1.0, live * BLOCK_SIZES[size_class] / EXTENT_SIZE), size_class, live
        )
    if kind in (KIND_FREE, KIND_FIXED):
        return Extent(kind, 0.0 if kind == KIND_FREE else 1.0)
    return Extent(_DAMAGED_KIND, 1.0)


def _count(result: Survey, view: FileView, record: Record) -> None:
    key = record.key.encode()
    size = RECORD_HEADER_SIZE + len(key) + len(record.value)
    size_class = SIZE_CLASSES[size + BLOCK_ALIGNMENT - 1 >> 5]
    lifetime = NEVER
    if record.expires_at:
        left = (record.expires_at - result.now_ms) / 1000
        lifetime = next(limit for limit in LIFETIMES if left <= 0 or left < limit)
    result.lifetimes[lifetime] += 1
    result.orphans += result.by_index and not record.slot
    if not lifetime:
        result.classes[size_class].expired += 1
        result.expired += 1
        return
    result.classes[size_class].records += 1
    result.classes[size_class].record_bytes += size
    result.records += 1
    result.value_sizes[len(record.value)] += 1
    if record.slot:
        home = key_hash(key, view.seed) & BUCKET_COUNT - 1
        bucket = record.slot >> BUCKET_SHIFT & BUCKET_COUNT - 1
        result.probes[(bucket - home) % BUCKET_COUNT + 1] += 1


def advice(result: Survey, view: FileView) -> list[str]:
    """Return what is unusual about the file, and what to do about it, a sentence or two each."""
    found = list(_on_opening(view))
    if result.damage_count:
        found.append(
            f"Damaged places: {result.damage_count:,}. kvstore-inspect verify names them and says "
            f"what each means; kvstore-inspect repair mends what can be mended."
        )
    if result.orphans:
        found.append(
            f"Whole records in no slot of the table: {result.orphans:,}. No key leads there; "
            f"kvstore-inspect repair brings them back."
        )
    if result.expired * 4 > result.records:
        found.append(
            f"Records that have expired: {result.expired:,}, beside {result.records:,} that have "
            f"not. Their {in_bytes(result.expired_bytes)} come back when room is needed, or at "
            f"once by purge_expired()."
        )
    size = len(view)
    if size > 0.9 * MAX_FILE_SIZE and result.free_bytes < 0.05 * size:
        found.append(
            f"The file is {size:,} bytes of at most {MAX_FILE_SIZE:,} and nearly full. Delete "
            f"something, or move on: kvstore-inspect dump --format resp feeds a Redis server."
        )
    elif size > 16 * 1024 * 1024 and result.free_bytes > size // 2:
        found.append(
            f"{result.free_bytes * 100 // size}% of the file is free. A file never shrinks; "
            f"kvstore-inspect copy writes a smaller one."
        )
    if result.padding * 3 > size:
        found.append(
            "More than a third of the file pads records to the size of their blocks: many small "
            "values. Several of them in one value would take less."
        )
    if sum(count for pages, count in result.probes.items() if pages > 2) * 100 > result.records:
        found.append(
            "Finding one record in a hundred takes more than two pages of the table. The table "
            "had no room to grow; after deleting, kvstore-inspect copy spreads it anew."
        )
    return found


def _on_opening(view: FileView) -> Iterator[str]:
    """Yield what is to be known of the file before it is opened the next time."""
    if view.in_use:
        yield "The file is in use: the numbers are of no one moment."
    elif view.next_opening() is Opening.REFUSES:
        yield (
            "The store does not open as it is: the index is not to be trusted, and to rebuild it "
            "would lose records, or the file was cut off. kvstore-inspect repair rebuilds it from "
            "those records that are whole, and keeps a copy of the file."
        )
    elif not view.state.intact:
        yield "The state is damaged. The next opening rebuilds the index from the records."
    elif not view.state.clean:
        yield (
            "The file was not closed. Nothing acknowledged is lost by that: the next opening "
            "rebuilds the index from the records."
        )
    elif not view.trusted:
        yield (
            "The index fails its checksum. The next opening rebuilds it from the records, which "
            "are all there and whole."
        )
