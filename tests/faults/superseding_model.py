"""A model of how records follow each other, without files: what does each of its rules prevent?

Random operations on a few keys of two stripes; a crash at any step, also of recovery; a disk that
takes or loses each block by itself, whatever was written to it since it was flushed; flushes that
are under way while operations go on. Each run leads a store through a row of lives. After each of
them every key must be what was promised last, or anything later.

The rules, in plain words; `RULES` says of each what goes wrong without it:

- A record carries a **stamp**: the time, or later, and later than all before it in its stripe. Of
  two records of a key the one with the later stamp counts.
- Whoever puts writes the new record, switches the slot, then looks at the old record. It is
  **fresh** if nobody was promised it: no flush of everything began since it was written, and the
  store is not durable. What is fresh is cleared at once. All else is **retired**: it stays whole.
- Whoever deletes a record of which an older one may still be on the disk **marks** it, instead of
  clearing it: so it goes on outranking the older ones.
- **Reclaiming** begins a new generation, flushes, clears what was retired in earlier ones, flushes,
  clears what was marked in earlier ones. All that had been written when it began is **settled**
  then: no older records are on the disk. Where nothing is marked the second flush is left to the
  next reclaiming, which settles that once it has flushed.
- A record that is moved supersedes itself. Its stamp may be settled, and its copy is retired: so
  nothing of its stripe with that stamp or a later one is settled any more, nor will be by what was
  swept before. Nobody moves records amid reclaiming.
- A record that is restored with the time that it had elsewhere does not tell by its stamp when it
  was written: its slot says that older ones may be there, until it is gone.
- A disk may refuse to have a record retired or cleared. Then it is there, and nobody knows: the
  store **leaks**. Until the next recovery no mark is cleared, and nothing becomes settled.
- **Clearing** all is one write of the state: every record with that stamp or an earlier one is
  **void**. That is flushed, the records are cleared one by one, that is flushed too, and no record
  is void any more.
- **Recovery** has the latest record of each key win, a marked one over a copy of it. It flushes,
  for a process that was killed may have left the winner in memory only; clears all others; flushes;
  and only then clears the winners that are marked, or have expired.

In `tests`, `python -m faults.superseding_model --without "stamps grow"` looks for what is lost
without one; the laboratory makes runs with all of them.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

from .laboratory import Experiment


class Rule(NamedTuple):
    """What is lost without a rule, and the deeds among which that shows soonest."""

    lost: str
    deeds: str


_ANY: Final = (
    "put put put put expiring expiring delete delete delete sync begin end reclaim reclaim reclaim "
    "move move purge later earlier restore clear reopen"
)
RULES: Final = {
    "stamps grow": Rule("the stamp is the time alone", _ANY),
    "stamps go on": Rule(
        "stamps begin anew with the time whenever the file is opened",
        "put put delete reopen reopen earlier sync",
    ),
    "promised are retired": Rule(
        "put clears the record before at once, whoever was promised it", "put put sync reclaim"
    ),
    "promised as a flush begins": Rule(
        "a flush makes its promises only as it ends", "put put begin end"
    ),
    "durable are promised": Rule(
        "a record of a durable store counts as one that nobody was promised", "put put delete"
    ),
    "older ones are outranked": Rule(
        "delete clears a record of which an older one may be on the disk", "put put delete sync"
    ),
    "settled by reclaiming": Rule(
        "any flush of everything settles what was written before it", "put put delete sync"
    ),
    "undated slots": Rule(
        "a record that was restored counts as written when its stamp says",
        "restore restore delete delete sync reclaim reclaim",
    ),
    "moved are doubted": Rule(
        "a record that was moved stays settled, although its copy is retired",
        "put delete delete move move reclaim reclaim reclaim sync",
    ),
    "doubted until swept": Rule(
        "what was swept before a record moved settles it",
        "put move move delete reclaim reclaim reclaim reclaim sync",
    ),
    "swept and flushed": Rule(
        "reclaiming settles all where it had nothing to mark, without a second flush",
        "put put delete reclaim reclaim reclaim sync",
    ),
    "generations": Rule(
        "what was retired during the flush is cleared with what was retired before it",
        "put put reclaim reclaim reclaim",
    ),
    "retired before marked": Rule(
        "marks are cleared with what they outrank, under one flush",
        "put put delete sync reclaim reclaim",
    ),
    "restored over marks": Rule(
        "a record is restored with its old stamp although there are marks",
        "put put delete delete restore restore sync",
    ),
    "refused clearing": Rule(
        "a slot does not tell of an older record whose clearing was refused", "put put delete"
    ),
    "leaks keep marks": Rule(
        "marks are cleared although a record could not be retired",
        "put put delete sync reclaim reclaim",
    ),
    "leaks settle nothing": Rule(
        "reclaiming settles all, although a record could not be retired",
        "put put delete sync reclaim reclaim reclaim",
    ),
    "purge owes a flush": Rule(
        "a durable store forgets that a purge cleared without a flush",
        "put expiring delete later purge earlier",
    ),
    "void is flushed": Rule(
        "records are cleared before the disk knows that all are void", "put put put clear"
    ),
    "void in all stripes": Rule(
        "stamps of a stripe may be void when all was cleared by a later stamp",
        "put put put clear clear earlier",
    ),
    "void until flushed": Rule(
        "nothing is void any more before the clearing was flushed", "put put clear clear"
    ),
    "winners are flushed": Rule(
        "recovery clears losers of winners that a kill left in memory only", "put put put sync"
    ),
    "winners are live": Rule(
        "a retired record that wins in recovery stays retired, and is reclaimed",
        "put put sync reclaim reclaim reclaim",
    ),
    "expiry last": Rule(
        "recovery drops what has expired before it compares stamps", "put expiring sync later"
    ),
    "marked win": Rule(
        "of two copies of a record the one that is not marked wins", "put move move delete sync"
    ),
    "losers before marks": Rule(
        "recovery clears losers and marked winners under one flush", "put put put delete sync"
    ),
    "recovered void": Rule(
        "recovery takes back that records are void before it has cleared them", "put put clear"
    ),
}

_BLOCKS: Final = 16
_STRIPES: Final = 2
_LIVES: Final = 3
_RUNS: Final = 2_000  # of a trial
_STAMPS_A_TICK: Final = 16

Content = TypeVar("Content")


class Record(NamedTuple):
    """What is in a block. Recovery does not look at the generation; that is 0 until retired."""

    key: int
    value: int
    stamp: int
    expires: int
    marked: bool = False
    generation: int = 0


class Slot(NamedTuple):
    """Where the record of a key is, and whether older ones of the key may be on the disk."""

    block: int
    older: bool = False
    undated: bool = False


class Value(NamedTuple):
    """What a key may be; None stands for absent."""

    value: int
    expires: int

    def at(self, now: int) -> int | None:
        return None if _has_expired(self.expires, now) else self.value


State = Value | None


def _has_expired(expires: int, now: int) -> bool:
    return 0 < expires <= now


class Crash(Exception):
    """The process dies, or power fails."""


# --- the disk ----------------------------------------------------------------------------------


class Cell(Generic[Content]):
    """What the disk takes or loses as a whole: first as it was flushed, then all written since."""

    def __init__(self, content: Content) -> None:
        self.versions = [content]
        self.flushed = 0  # writes

    @property
    def now(self) -> Content:
        return self.versions[-1]

    @property
    def writes(self) -> int:
        return self.flushed + len(self.versions) - 1

    def write(self, content: Content) -> None:
        self.versions.append(content)

    def flush(self, writes: int | None = None) -> None:
        """Have so many of its writes be on the disk, by default all."""
        writes = self.writes if writes is None else max(writes, self.flushed)
        del self.versions[: writes - self.flushed]
        self.flushed = writes


Cells = list[Cell[Any]]


class Flush:
    """A flush under way: what has been written by now is on the disk in the end."""

    def __init__(self, cells: Cells) -> None:
        self._covered = [(cell, cell.writes) for cell in cells]

    def end(self) -> None:
        for cell, writes in self._covered:
            cell.flush(writes)


class Disk:
    """Blocks and the stamp up to which records are void; a crash after so many steps."""

    def __init__(self, records: list[Record | None], void: int) -> None:
        self.blocks = [Cell(record) for record in records]
        self.void = Cell(void)
        self.steps_left = sys.maxsize

    @property
    def cells(self) -> Cells:
        return [*self.blocks, self.void]

    @property
    def records(self) -> list[Record | None]:
        return [cell.now for cell in self.blocks]

    def step(self) -> None:
        self.steps_left -= 1
        if self.steps_left <= 0:
            raise Crash

    def write(self, cell: Cell[Content], content: Content) -> None:
        cell.write(content)
        self.step()

    def flush(self) -> None:
        flush = Flush(self.cells)
        self.step()
        flush.end()

    def after_power_loss(self, rng: random.Random) -> "Disk":
        records = [rng.choice(cell.versions) for cell in self.blocks]
        return Disk(records, rng.choice(self.void.versions))


# --- what was promised -------------------------------------------------------------------------


class Promises:
    """What each key may be: after power loss, a cell each; now, a list of states."""

    def __init__(self, keys: int) -> None:
        self.cells: list[Cell[State]] = [Cell(None) for _ in range(keys)]
        self._now: list[list[State]] = [[None] for _ in range(keys)]

    def note(self, key: int, state: State) -> None:
        """An operation has returned."""
        self.cells[key].write(state)
        self._now[key] = [state]

    def promise(self, key: int) -> None:
        """It returned with a promise."""
        self.cells[key].flush()

    def crash(self, under_way: dict[int, State], *, power_loss: bool) -> None:
        for key, state in under_way.items():
            self._allow(key, state)
        if power_loss:
            self._now = [list(cell.versions) for cell in self.cells]

    def expire(self, now: int) -> None:
        """Whatever has expired by now may be taken back, and not be there with the time again."""
        for key, cell in enumerate(self.cells):
            if any(state and state.at(now) is None for state in cell.versions):
                self._allow(key, None)

    def _allow(self, key: int, state: State) -> None:
        self.cells[key].write(state)
        self._now[key] = [*self._now[key], state]

    def settle(self, found: dict[int, int], now: int) -> None:
        """Recovery has found and flushed this; raises AssertionError where it was not allowed."""
        for key, states in enumerate(self._now):
            value = found.get(key)
            fitting = [state for state in states if (state and state.at(now)) == value]
            assert fitting, f"key {key} is {value}, allowed is {states} at {now}"
            self.note(key, next(filter(None, fitting), None) if value is not None else None)
            self.promise(key)


# --- recovery ----------------------------------------------------------------------------------


def recover(disk: Disk, now: int, without: str | None) -> None:
    """Leave one record of each key, and no marked or expired one."""

    def clear(blocks: list[int]) -> None:
        for block in blocks:
            disk.write(disk.blocks[block], None)

    best: dict[int, tuple[int, bool, int]] = {}
    there = [(block, record) for block, record in enumerate(disk.records) if record is not None]
    for block, record in there:
        if record.stamp <= disk.void.now:
            continue
        if without == "expiry last" and _has_expired(record.expires, now):
            continue
        rank = record.stamp, record.marked != (without == "marked win"), block
        best[record.key] = max(rank, best.get(record.key, rank))
    winners = {block for _, _, block in best.values()}
    losers = [block for block, _ in there if block not in winners]
    gone = [
        block
        for block, record in there
        if block in winners and (record.marked or _has_expired(record.expires, now))
    ]
    if without == "recovered void":
        disk.write(disk.void, 0)
    # What is void may have been cleared already, and no disk know it.
    is_unsettled = bool(losers or disk.void.now)
    if is_unsettled and without != "winners are flushed":
        disk.flush()
    clear(losers)
    # Nor may one know of the losers that a recovery before this one has cleared.
    if (is_unsettled or gone) and without != "losers before marks":
        disk.flush()
    if disk.void.now:
        disk.write(disk.void, 0)
    clear(gone)
    disk.flush()
    for cell in disk.blocks:
        if cell.now and cell.now.generation and without != "winners are live":
            disk.write(cell, cell.now._replace(generation=0))


# --- a store -----------------------------------------------------------------------------------


class Store:
    """A store that is open, for as long as the process lives."""

    def __init__(
        self, disk: Disk, promises: Promises, now: int, life: "Life", rng: random.Random
    ) -> None:
        self.now = now
        self.under_way: dict[int, State] = {}  # what an operation makes of keys
        self._disk = disk
        self._promises = promises
        self._rng = rng
        self._life = life
        self._without = life.without
        self._open()

    def _open(self) -> None:
        void = self._disk.void.now
        self._promises.expire(self.now)
        recover(self._disk, self.now, self._without)
        records = self._disk.records
        there = {record.key: block for block, record in enumerate(records) if record}
        self._index = {key: Slot(block) for key, block in there.items()}
        self._free = [block for block, record in enumerate(records) if record is None]
        self._promises.settle({record.key: record.value for record in records if record}, self.now)
        latest = max([void, *(record.stamp for record in records if record)])
        if self._without == "stamps go on":
            latest = void
        first = max(latest, self.now * _STAMPS_A_TICK - 1)
        self._last, self._promised, self._settled = ([first] * _STRIPES for _ in range(3))
        self._generation = 1
        self._marks = 0
        self._leaks = False
        self._owes_flush = False
        self._flush: Flush | None = None
        self._swept: list[int] | None = None  # settled after the next flush of reclaiming
        self._is_amid = False  # reclaiming
        self._reclaiming = self._reclaim()

    # --- flushing and reclaiming

    def begin_flush(self) -> None:
        """Begin to flush everything, as a sync does; others go on meanwhile."""
        if self._flush:
            return
        self._owes_flush = False
        self._flush = Flush([*self._disk.cells, *self._promises.cells])
        if self._without != "promised as a flush begins":
            self._promised = list(self._last)
        self._disk.step()

    def end_flush(self) -> None:
        """End the flush that is under way, if there is one."""
        if not self._flush:
            return
        self._disk.step()
        self._flush.end()
        self._flush = None
        if self._without == "promised as a flush begins":
            self._promised = list(self._last)
        if self._without == "settled by reclaiming":
            self._settled = list(self._last)

    def sync(self) -> None:
        """Flush everything."""
        self.end_flush()
        self.begin_flush()
        self.end_flush()

    def reclaim(self, steps: int) -> None:
        """Do some steps of reclaiming. It goes on with the next call."""
        for _ in range(steps):
            if self._flush and self._rng.random() < 0.5:
                self.end_flush()
            next(self._reclaiming)

    def _reclaim(self) -> Iterator[None]:
        while True:
            self._is_amid = True
            before = self._generation
            self._generation += 1
            stamps, swept, self._swept = list(self._last), self._swept, None
            yield
            yield from self._wait_for_flush()
            if swept is not None:
                self._settled = swept
            end = before + (self._without == "generations")
            yield from self._sweep(end, marked=False)
            has_marks = bool(self._marks)
            if has_marks and self._without != "retired before marked":
                yield from self._wait_for_flush()
            if not self._leaks or self._without == "leaks keep marks":
                yield from self._sweep(end, marked=True)
            if not self._leaks or self._without == "leaks settle nothing":
                if has_marks or self._without == "swept and flushed":
                    self._settled = stamps
                else:
                    self._swept = stamps
            self._is_amid = False
            yield

    def _wait_for_flush(self) -> Iterator[None]:
        while self._flush:
            yield  # another one's, which may have begun too early
        self.begin_flush()
        mine = self._flush
        yield
        if self._flush is mine:
            self.end_flush()

    def _sweep(self, end: int, *, marked: bool) -> Iterator[None]:
        for block in range(_BLOCKS):
            record = self._disk.blocks[block].now
            if record and 0 < record.generation <= end and record.marked == marked:
                self._marks -= marked
                self._clear(block)
                yield

    # --- blocks

    def _write(self, block: int, record: Record | None) -> None:
        self._disk.write(self._disk.blocks[block], record)

    def _clear(self, block: int) -> None:
        self._write(block, None)
        self._free.append(block)

    def _allocate(self) -> int | None:
        for _ in range(60):
            if self._free:
                return self._free.pop(self._rng.randrange(len(self._free)))
            self.reclaim(1)
        return None

    def _record(self, slot: Slot) -> Record:
        record = self._disk.blocks[slot.block].now
        assert record is not None
        return record

    def _next_stamp(self, key: int, older_than: int = 0) -> int:
        last, now = self._last, self.now * _STAMPS_A_TICK
        if self._without == "stamps grow":
            return now
        stripe = key % _STRIPES
        last[stripe] = max(now, last[stripe] + 1, older_than + 1)
        return last[stripe]

    # --- operations

    def put(self, key: int, value: int, lifetime: int) -> None:
        """Store a value, whatever is there."""
        state = Value(value, self.now + lifetime if lifetime else 0)
        self.under_way = {key: state}

        def make(old: Record | None) -> Record:
            return Record(key, value, self._next_stamp(key, old.stamp if old else 0), state.expires)

        block = self._supersede(key, make)
        if block is not None:
            self._acknowledge(key, state, block)

    def move(self, key: int) -> None:
        """Write the record of a key to another block, with its stamp."""
        if key in self._index and self._free and not self._is_amid:
            slot, stripe = self._index[key], key % _STRIPES
            stamp = self._record(slot).stamp
            is_fresh = self._is_fresh(self._record(slot)) and not slot.undated
            if self._without != "doubted until swept":
                self._swept = None
            if not (is_fresh and not self._life.refuses) and self._without != "moved are doubted":
                self._settled[stripe] = min(self._settled[stripe], stamp - 1)

            def copy(old: Record | None) -> Record:
                assert old is not None
                return old._replace(generation=0)

            self._supersede(key, copy)

    def restore(self, key: int, value: int, age: int) -> None:
        """Store a value with the time that it had elsewhere, as a tool does: not durably."""
        if self._life.durable:
            return
        self.under_way = {key: Value(value, 0)}

        def make(old: Record | None) -> Record:
            stripe = key % _STRIPES
            stamp = (self.now - age) * _STAMPS_A_TICK
            if old is not None:
                stamp = max(stamp, old.stamp + 1)
            elif (self._marks or self._leaks) and self._without != "restored over marks":
                stamp = max(stamp, self._last[stripe] + 1)
            self._last[stripe] = max(stamp, self._last[stripe])
            return Record(key, value, stamp, 0)

        undated = key in self._index and self._without != "undated slots"
        block = self._supersede(key, make, undated=undated)
        if block is not None:
            self._acknowledge(key, Value(value, 0), block)

    def _supersede(
        self, key: int, make: Callable[[Record | None], Record], *, undated: bool = False
    ) -> int | None:
        block = self._allocate()
        if block is None:
            return None
        slot = self._index.get(key)
        if slot is None:
            self._write(block, make(None))
            self._index[key] = Slot(block)
            self._disk.step()
            return block
        old = self._record(slot)
        self._write(block, make(old))
        is_fresh = self._is_fresh(old) and not undated and not slot.undated
        may_refuse = self._life.refuses and self._without != "refused clearing"
        older = slot.older or not is_fresh or may_refuse
        self._index[key] = Slot(block, older, slot.undated or undated)
        self._disk.step()
        if self._life.refuses and self._rng.random() < 0.3:
            self._leaks = True
        elif is_fresh:
            self._clear(slot.block)
        else:
            self._write(slot.block, old._replace(generation=self._generation))
        return block

    def _is_fresh(self, record: Record) -> bool:
        if self._life.durable and self._without != "durable are promised":
            return False
        is_late = record.stamp > self._promised[record.key % _STRIPES]
        return is_late or self._without == "promised are retired"

    def delete(self, key: int) -> None:
        """Remove a key that is there."""
        slot = self._index.get(key)
        if slot is None or _has_expired(self._record(slot).expires, self.now):
            return
        self.under_way = {key: None}
        self._acknowledge(key, None, self._drop(key))

    def purge(self) -> None:
        """Remove all that has expired; what a durable store owes for that comes later."""
        for key, slot in list(self._index.items()):
            if _has_expired(self._record(slot).expires, self.now):
                self.under_way = {key: None}
                self._drop(key)
                self._promises.note(key, None)
                self._owes_flush = self._without != "purge owes a flush"

    def _drop(self, key: int) -> int:
        """Take a key out of the index; return the block, which is cleared or marked."""
        slot = self._index.pop(key)
        self._disk.step()
        record = self._record(slot)
        is_late = slot.undated or record.stamp > self._settled[key % _STRIPES]
        if slot.older and is_late and self._without != "older ones are outranked":
            self._marks += 1
            self._write(slot.block, record._replace(marked=True, generation=self._generation))
        else:
            self._clear(slot.block)
        return slot.block

    def _acknowledge(self, key: int, state: State, block: int) -> None:
        if self._life.durable and self._owes_flush:
            self.sync()
        elif self._life.durable:
            self._disk.step()
            self._disk.blocks[block].flush()
        self._promises.note(key, state)
        if self._life.durable:
            self._promises.promise(key)

    def clear(self) -> None:
        """Remove all keys at once; nothing is being reclaimed meanwhile."""
        disk = self._disk
        self.end_flush()
        self.under_way = dict.fromkeys(range(len(self._promises.cells)))
        disk.write(disk.void, max(self._last))
        for key in self.under_way:
            self._promises.note(key, None)
        if self._without != "void in all stripes":
            self._last = [disk.void.now] * _STRIPES
        self._index = {}
        if self._without != "void is flushed":
            self.sync()
        if self._without == "void until flushed":
            disk.write(disk.void, 0)
        for block, record in enumerate(disk.records):
            if record is not None:
                self._clear(block)
        self.sync()
        disk.write(disk.void, 0)
        self._marks = 0
        self._leaks = False
        self._reclaiming = self._reclaim()

    def reopen(self) -> None:
        """Close the store and open it again."""
        if self._leaks:
            self.sync()
        else:
            for marked in (False, True):
                self.sync()
                for _ in self._sweep(self._generation, marked=marked):
                    pass
            self.sync()
        self.under_way = {}
        self._open()


# --- runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Life:
    """What sort of store it is.

    Attributes:
        durable: each operation is.
        refuses: the disk may refuse what follows once a slot was switched.
        without: the rule that is left out.
    """

    durable: bool
    refuses: bool
    without: str | None


Deed = Callable[[Store, int, int, random.Random], None]
_DEEDS: Final[dict[str, Deed]] = {
    "put": lambda store, key, value, _: store.put(key, value, 0),
    "expiring": lambda store, key, value, _: store.put(key, value, 3),
    "delete": lambda store, key, *_: store.delete(key),
    "move": lambda store, key, *_: store.move(key),
    "restore": lambda store, key, value, rng: store.restore(key, value, rng.randrange(8)),
    "purge": lambda store, *_: store.purge(),
    "sync": lambda store, *_: store.sync(),
    "begin": lambda store, *_: store.begin_flush(),
    "end": lambda store, *_: store.end_flush(),
    "reclaim": lambda store, _key, _value, rng: store.reclaim(rng.randrange(1, 9)),
    "clear": lambda store, *_: store.clear(),
    "reopen": lambda store, *_: store.reopen(),
    "later": lambda store, *_: _turn_clock(store, 4),
    "earlier": lambda store, *_: _turn_clock(store, -5),
}


def run(seed: int, without: str | None = None) -> str | None:
    """Lead a store through its lives; return what went wrong, if anything did."""
    rng = random.Random(seed)
    rule = RULES[without or rng.choice(list(RULES))]
    life = Life(rng.random() < 0.4, rng.random() < 0.3, without)
    keys = rng.choice((1, 1, 2, 3))
    disk, promises = Disk([None] * _BLOCKS, 0), Promises(keys)
    now, done = 1_000, list[str]()
    try:
        for _ in range(_LIVES):
            deeds = rng.choice((rule.deeds, rule.deeds, _ANY)).split()
            disk.steps_left = rng.randrange(1, rng.choice((8, 40, 80)))
            store, under_way = None, dict[int, State]()
            try:
                store = Store(disk, promises, now, life, rng)
                for _ in range(rng.randrange(40)):
                    deed, key = rng.choice(deeds), rng.randrange(keys)
                    done.append(f"{deed} {key}")
                    _DEEDS[deed](store, key, len(done), rng)
                    store.under_way = {}
            except Crash:
                under_way = store.under_way if store else {}
            power_loss = rng.random() < 0.6
            promises.crash(under_way, power_loss=power_loss)
            if power_loss:
                disk = disk.after_power_loss(rng)
            done.append("power loss" if power_loss else "kill")
            now = max(1, (store.now if store else now) + rng.choice((-5, -2, 0, 0, 0, 2, 5)))
        disk.steps_left = sys.maxsize
        Store(disk, promises, now, life, rng)
    except AssertionError as error:
        return f"seed {seed}, durable: {life.durable}: {error}, after {', '.join(done)}"
    return None


def find(seeds: range, without: str | None = None) -> str | None:
    """Return what goes wrong first in the runs of these seeds, if anything does."""
    return next(filter(None, (run(seed, without) for seed in seeds)), None)


def try_runs(_folder: Path, rng: random.Random) -> int:
    """Make some runs with all rules; return how many."""
    first = rng.getrandbits(40)
    wrong = find(range(first, first + _RUNS))
    assert not wrong, wrong
    return _RUNS


def _turn_clock(store: Store, ticks: int) -> None:
    store.now = max(1, store.now + ticks)


def main() -> int:
    """Make as many runs as were asked for; return 1 if any went wrong."""
    parser = argparse.ArgumentParser(description="Look for what the protocol may lose.")
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--without", choices=RULES, metavar="RULE", help=", ".join(RULES))
    options = parser.parse_args()
    wrong = find(range(options.seed, options.seed + options.rounds), options.without)
    sys.stdout.write(f"{wrong or f'{options.rounds:,} runs, nothing lost'}\n")
    return 1 if wrong else 0


EXPERIMENTS = (
    Experiment(
        "superseding-model",
        "a crash at any step of a model of records that follow each other",
        "runs",
        try_runs,
    ),
)

if __name__ == "__main__":
    sys.exit(main())
