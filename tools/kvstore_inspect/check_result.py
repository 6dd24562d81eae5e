"""What the checker finds in a file, with the keys it is about, and the records counted.

Memory does not grow with the number of problems: beside what the checker and `records` take, a bit
for each block of 32 bytes, and what is lost up to `MOST_NAMED`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_64_intdigest

from kvstore.format.layout import (
    EXTENT_SIZE,
    MARKED_MAGIC,
    MAX_EXTENTS,
    MAX_KEY_SIZE,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    SLOT_KEY_SIZE,
    SLOT_SIZE,
)
from kvstore.recovery.check import check_image
from kvstore.recovery.evidence import find_shift, gather
from kvstore.recovery.problems import Breach, Problem

from .file_view import FileView
from .records import DamagedRecord, Progress, Record, Records, records_at_close
from .survey import Survey
from .table import slot_key, unpack_slot
from .versions import BlockSet, Retired, retired_blocks

MOST_NAMED: Final = 100_000
_PAUSE_SECONDS: Final = 0.02  # for several changes to be completed
_COMPARED_SIZE: Final = 64

_UNSLOTTED: Final = frozenset(
    {Breach.RECORD_UNSLOTTED, Breach.RECORD_OUTSIDE, Breach.RECORD_MISPLACED}
)
_UNREACHED: Final = frozenset({Breach.SLOT_UNREACHED, Breach.SLOT_SEGMENT, Breach.SLOT_FINGERPRINT})
_NO_RECORD: Final = frozenset(
    {Breach.SLOT_RECORD, Breach.RECORD_HEADER, Breach.RECORD_KEY, Breach.RECORD_CHECKSUM}
)
_OF_RECORDS: Final = frozenset(
    _NO_RECORD - {Breach.SLOT_RECORD}
    | _UNSLOTTED
    | {Breach.RECORD_CLASS, Breach.RECORD_STAMP, Breach.RECORD_RETIRED, Breach.RECORD_LATEST}
)
_OF_SLOTS: Final = frozenset(
    _UNREACHED
    | {Breach.SLOT_RECORD, Breach.SLOT_SHARED, Breach.SLOT_SAME_KEY, Breach.SLOT_EXPIRY}
    | {Breach.SLOT_FLAGS, Breach.SLOT_RETIRED}
)


@dataclass
class Counts:
    """The records of a file, each counted once but for `expiring` and `orphaned`.

    keys: those that can be read, or can be as soon as the index is rebuilt.
    expiring: of them, those with a TTL.
    orphaned: of them, those that no slot leads to.
    expired: those past their TTL.
    outdated: those that a newer record of the same key has replaced.
    marked: those that are marked as deleted, and kept to outrank older ones.
    damaged: those that are not whole, as far as a trace of them is left.
    """

    keys: int = 0
    expiring: int = 0
    orphaned: int = 0
    expired: int = 0
    outdated: int = 0
    marked: int = 0
    damaged: int = 0


class CheckResult:
    """The problems of a file, then its records.

    Args:
        view: an open file.
        now_ms: what has expired by then.

    Attributes:
        breaches: how often each was found.
        gone: how many problems of a file in use were changes under way.
        lost: the offset of each record that is not whole, or of the slot that has none, and its key
            where that is legible. Complete once `count` was called.
        certain: the number of damaged records is exact, as the file says how many there were.
    """

    def __init__(self, view: FileView, now_ms: int) -> None:
        self.view = view
        self._now_ms = now_ms
        self.breaches: Counter[Breach] = Counter()
        self.gone = 0
        self.lost: dict[int, str | None] = {}
        self._more_lost = 0
        self.certain = False
        # By what a slot has of a key, and the size of it: the places where that is lost.
        self._waiting: dict[tuple[bytes, int], list[int]] = {}
        self._orphans = BlockSet(MAX_EXTENTS + 1)

    def problems(self, progress: Progress) -> Iterator[Problem]:
        """Yield what the checker finds; in a file in use, what it finds again and again."""
        found = self._lasting if self.view.in_use else check_image
        for problem in found(self.view, progress):
            self._note(problem)
            yield problem

    def _lasting(self, view: FileView, progress: Progress) -> Iterator[Problem]:
        """Check a file in use several times, and yield what stays wrong.

        A problem stays where it is found each time while the bytes at its place are the same. That
        the file is not marked closed is none as long as the process that has it open lives. Of more
        than `MOST_NAMED` problems the rest is left out.
        """
        lasting: dict[int, Problem] | None = None
        for _ in view.looks(_PAUSE_SECONDS):
            found: dict[int, Problem] = {}
            for problem in check_image(view, progress):
                if problem.breach is Breach.NOT_CLOSED and view.holder_lives():
                    continue
                mark = _mark(view, problem)
                if len(found) < MOST_NAMED if lasting is None else mark in lasting:
                    found[mark] = problem
            self.gone += 0 if lasting is None else len(lasting) - len(found)
            lasting = found
            if not lasting:
                break
        yield from (lasting or {}).values()

    def _note(self, problem: Problem) -> None:
        self.breaches[problem.breach] += 1
        if problem.breach in _UNSLOTTED or problem.breach is Breach.RECORD_KEY:
            self._orphans.add(problem.offset)
        elif problem.breach in _UNREACHED:
            self._orphans.add(unpack_slot(self._slot(problem.offset)).record)
        if problem.breach in _NO_RECORD and self.view.state.clean:
            self._note_lost(problem)

    def _slot(self, offset: int) -> bytes:
        return self.view.exactly(offset, SLOT_SIZE)

    def _note_lost(self, problem: Problem) -> None:
        """Remember a slot whose record is not whole, until the key turns up elsewhere."""
        if problem.offset in self.lost:
            return
        if len(self.lost) >= MOST_NAMED:
            self._more_lost += 1
            return
        self.lost[problem.offset] = key_of(self.view, problem)
        start, _, _, _, size = unpack_slot(self._slot(problem.slot or problem.offset))
        self._waiting.setdefault((start, size), []).append(problem.offset)

    # --- records -------------------------------------------------------------------------------

    def count(self, progress: Progress) -> Counts:
        """Count the records. The problems must have been asked for."""
        if self.view.in_use or (self.view.trusted and not self.breaches):
            return self._count_slots()
        counts = Counts()
        records = Records(self.view, progress)
        records.by_index = False
        for found in records:
            if isinstance(found, Record):
                self._count_record(found, counts)
            elif found.offset:
                self._count_damage(found)
        _count_retired(records.retired, counts)
        counts.outdated += records.strays
        counts.damaged = len(self.lost) + self._more_lost + self._count_astray()
        at_close = records_at_close(self.view)
        if at_close is not None:
            whole = counts.keys + counts.expired + counts.outdated + counts.marked
            missing = max(0, at_close - whole)
            # What was not said at closing, but by the extent map alone, may be too few.
            counts.damaged = max(missing, 0 if self.view.state.clean else counts.damaged)
            if not missing:  # what looks lost are slots, whose records are all there
                counts.damaged = 0
                self.lost.clear()
            self._forget_unknown(len(self.lost) - counts.damaged)
            self.certain = True
        return counts

    def _count_record(self, record: Record, counts: Counts) -> None:
        if record.has_expired(self._now_ms):
            counts.expired += 1
        else:
            counts.keys += 1
            counts.expiring += record.expires_at > 0
            counts.orphaned += record.offset in self._orphans
        if self.lost:
            self.lost.pop(record.offset, None)
            key = record.key.encode()
            waiting = self._waiting_for(key)
            # Of long keys several may begin alike: each that no slot leads to stands for one.
            while waiting and (len(key) <= SLOT_KEY_SIZE or record.offset in self._orphans):
                self.lost.pop(waiting.pop(), None)
                if len(key) > SLOT_KEY_SIZE:
                    break

    def _count_damage(self, damage: DamagedRecord) -> None:
        if damage.offset in self.lost:
            return
        key = damage.key or _key_in_record(self.view, damage.offset)
        if key is not None and self._is_waited_for(key.encode()):
            return
        if len(self.lost) >= MOST_NAMED:
            self._more_lost += 1
        else:
            self.lost[damage.offset] = key

    def _is_waited_for(self, key: bytes) -> bool:
        """Return whether a slot whose record is not in its place stands for that of this key."""
        waiting = self._waiting_for(key)
        if not waiting:
            return False
        if len(key) > SLOT_KEY_SIZE:  # of several that begin alike, each stands for one
            self.lost[waiting.pop()] = key.decode()
        return True

    def _waiting_for(self, key: bytes) -> list[int]:
        return self._waiting.get((slot_key(key), len(key)), [])

    def _forget_unknown(self, too_many: int) -> None:
        """Of what is named as lost, leave out so much without a key: other entries name it."""
        unknown = [offset for offset, key in self.lost.items() if key is None]
        for offset in unknown[: max(0, too_many)]:
            del self.lost[offset]

    def _count_astray(self) -> int:
        """Count records that bytes inserted or removed have moved to where none can begin."""
        view = self.view
        if view.state.clean:
            return 0  # which says how many there were

        read = view.padded_extent
        if find_shift(read, view.extent_count, len(view), view.seed) is None:
            return 0
        past = view[view.extent_count * EXTENT_SIZE : len(view)].count(RECORD_MAGIC_BYTES)
        return gather(read, view.extent_count, view.seed).astray + past

    def _count_slots(self) -> Counts:
        """Count the slots: all of them have records, or nobody can tell while the file changes."""
        slots = Survey(self.view, self._now_ms)
        for _, extent, contents, damage in Records(self.view).segments():
            if damage is None:
                slots.add_slots(extent, contents)
        counts = Counts(
            keys=slots.records,
            expiring=slots.expiring,
            expired=slots.expired,
            orphaned=sum(self.breaches[breach] for breach in _UNSLOTTED),
            damaged=sum(self.breaches[breach] for breach in _NO_RECORD),
        )
        _count_retired(retired_blocks(self.view), counts)
        return counts


def _count_retired(retired: Iterable[Retired], counts: Counts) -> None:
    for each in retired:
        counts.outdated += each.blocks - each.marked
        counts.marked += each.marked


def _mark(view: FileView, problem: Problem) -> int:
    """Return a number that tells a problem, and the bytes at its place, from others."""
    seen = view[problem.offset : problem.offset + _COMPARED_SIZE]
    return xxh3_64_intdigest(f"{problem.breach} {problem.offset} {problem.slot}".encode() + seen)


def key_of(view: FileView, problem: Problem) -> str | None:
    """Return the key that a problem is about, as far as that is legible."""
    if problem.breach in _OF_SLOTS:
        return _key_in_slot(view, problem.offset)
    if problem.breach not in _OF_RECORDS:
        return None
    in_record = _key_in_record(view, problem.offset)
    in_slot = _key_in_slot(view, problem.slot) if problem.slot else None
    if in_slot is None or (in_record or "").startswith(in_slot.removesuffix("…")):
        return in_record
    return in_slot


def _key_in_slot(view: FileView, offset: int) -> str | None:
    """Return the key in a slot; of a long one what the slot has of it, and an ellipsis."""
    start, _, _, _, size = unpack_slot(view.exactly(offset, SLOT_SIZE))
    if size > SLOT_KEY_SIZE:
        return f"{start.decode(errors='ignore')}…"
    return _text(start[:size])


def _key_in_record(view: FileView, offset: int) -> str | None:
    size = RECORD_HEADER_SIZE + MAX_KEY_SIZE
    contents = view.exactly(offset, size)
    magic, _, size, *_ = RECORD.unpack_from(contents)
    if magic not in (RECORD_MAGIC, MARKED_MAGIC) or size > MAX_KEY_SIZE:
        return None
    return _text(contents[RECORD_HEADER_SIZE : RECORD_HEADER_SIZE + size])


def _text(key: bytes) -> str | None:
    try:
        return key.decode() or None
    except UnicodeDecodeError:
        return None
