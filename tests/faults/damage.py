"""Files with damage in them, and what a store may say of one."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from support.workload import Value, make_value

from kvstore import (
    KeyExistsError,
    KeyNotFoundError,
    KVStore,
    KVStoreError,
)
from kvstore.format.layout import (
    BUCKET_MARKER,
    BUCKET_SIZE,
    EXTENT_MAP_OFFSET,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    MAX_FILE_SIZE,
    SLOT_RECORD_OFFSET,
    U64,
    key_hash,
)

from .laboratory import Experiment, stop_clock_between_calls

State = dict[str, Value]

FILES = 20  # a trial, all of one original
PAGE = 4096
_EXTENT_MAP = EXTENT_MAP_OFFSET // EXTENT_SIZE
SIZES = (0, 50, 50, 200, 200, 700, 3_000, 15_000)
LINE = 64  # damage is aimed at such pieces of the file that hold something


def build(path: Path, rng: random.Random, keys: int = 400) -> State:
    """Make a closed store at `path`, with gaps and long keys, and return what it holds."""
    live: State = {}
    with KVStore(path) as store:
        for number in range(keys):
            key = f"{'é' * 16 if number % 5 == 0 else ''}{number}"
            size = rng.choice(SIZES)
            value = make_value(key, number, size)
            store.create(key, value, ttl=10**9 if number % 3 == 0 else None)
            live[key] = value
        for key in rng.sample(sorted(live), keys // 4):
            store.delete(key)
            del live[key]
    return live


@dataclass
class Damage:
    """What was done to a file: `hits` are ranges of bytes, `said` is for messages."""

    said: list[str] = field(default_factory=list)
    hits: list[range] = field(default_factory=list)

    def add(self, what: str, start: int, stop: int) -> None:
        self.said.append(f"{what} {start:,}..{stop:,}")
        self.hits.append(range(start, stop))


class Original:
    """A store file before any damage."""

    def __init__(self, contents: bytes) -> None:
        self.contents = contents
        self.lines = [
            offset
            for offset in range(0, len(contents), LINE)
            if any(contents[offset : offset + LINE])
        ]
        self.pages = sorted({offset // PAGE * PAGE for offset in self.lines})
        self.buckets = [page for page in self.pages if is_bucket(contents, page)]
        self._segments = {page // EXTENT_SIZE for page in self.buckets}

    def may_hide_keys(self, damage: Damage) -> bool:
        """Return whether keys may be absent, without an error, after this damage.

        A page of the table that was replaced as a whole is found by its marker or its shape. If it
        was one of the fixed extents, the index is built anew only where all records are there, and
        that cannot be told only where both state and extent map are damaged.
        """
        extents = {
            extent
            for hit in damage.hits
            for extent in range(hit.start // EXTENT_SIZE, (hit.stop - 1) // EXTENT_SIZE + 1)
        }
        in_first_page = any(hit.start < PAGE for hit in damage.hits)
        if in_first_page and extents & set(range(_EXTENT_MAP, FIXED_EXTENTS)):
            return True
        return bool(extents & self._segments) and any(len(hit) != PAGE for hit in damage.hits)


def is_bucket(contents: bytes | bytearray, page: int) -> bool:
    """Tell a page of the table by its marker."""
    return bool(
        U64.unpack_from(contents, page)[0] == BUCKET_MARKER | page // BUCKET_SIZE
        and page >= FIXED_EXTENTS * EXTENT_SIZE
    )


# --- kinds of damage ---------------------------------------------------------------------------


def flip_bits(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Flip one bit, or a few, where something is."""
    damaged, damage = bytearray(original.contents), Damage()
    for _ in range(rng.choice((1, 1, 3, 20))):
        offset = rng.choice(original.lines) + rng.randrange(LINE)
        damaged[offset] ^= 1 << rng.randrange(8)
        damage.add("bit at", offset, offset + 1)
    return bytes(damaged), damage


def garble_bytes(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Write a few random bytes, zeros or ones over what is there."""
    damaged, damage = bytearray(original.contents), Damage()
    for _ in range(rng.choice((1, 1, 3))):
        size = rng.choice((1, 2, 4, 8, 48, 512))
        offset = rng.choice(original.lines) // size * size
        damaged[offset : offset + size] = rng.choice(
            (bytes(size), b"\xff" * size, rng.randbytes(size))
        )
        damage.add("bytes", offset, offset + size)
    return bytes(damaged), damage


def zero_pages(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Make pages zeros, as a disk that lost them gives them."""
    damaged, damage = bytearray(original.contents), Damage()
    for _ in range(rng.choice((1, 1, 4))):
        page = rng.choice(original.pages)
        damaged[page : page + PAGE] = bytes(PAGE)
        damage.add("zeros in", page, page + PAGE)
    return bytes(damaged), damage


def swap_pages(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Exchange two pages, or write one over the other, as a disk that mixed up addresses."""
    damaged, damage = bytearray(original.contents), Damage()
    one, other = rng.choice(original.pages), rng.choice(original.pages)
    if one != other:
        damaged[one : one + PAGE] = original.contents[other : other + PAGE]
        damage.add(f"page {other:,} in", one, one + PAGE)
        if rng.random() < 0.5:
            damaged[other : other + PAGE] = original.contents[one : one + PAGE]
            damage.add(f"page {one:,} in", other, other + PAGE)
    return bytes(damaged), damage


def truncate(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Cut the file off anywhere, or at a page or an extent."""
    size = rng.randrange(1, len(original.contents))
    unit = rng.choice((1, PAGE, EXTENT_SIZE))
    size = max(1, size // unit * unit)
    damage = Damage()
    damage.add("cut off", size, len(original.contents))
    return original.contents[:size], damage


def append_garbage(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Add bytes at the end: random ones, or a piece of the file itself."""
    size = rng.choice((1, 100, PAGE, EXTENT_SIZE, 300_000))
    start = rng.choice(original.pages)
    garbage = rng.choice((rng.randbytes(size), original.contents[start : start + size]))
    damage = Damage()
    damage.said.append(f"{len(garbage):,} bytes more at the end")
    return original.contents + garbage, damage


def swap_sectors_of_the_index(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Exchange two slots or two sectors within the table: each is well-formed, in a wrong place."""
    damaged, damage = bytearray(original.contents), Damage()
    size = rng.choice((48, 512))
    one, other = (
        rng.choice(original.buckets) + 256 + size * rng.randrange((PAGE - 256) // size)
        for _ in range(2)
    )
    damaged[one : one + size], damaged[other : other + size] = (
        original.contents[other : other + size],
        original.contents[one : one + size],
    )
    damage.add("exchanged", one, one + size)
    damage.add("exchanged", other, other + size)
    return bytes(damaged), damage


KINDS: dict[str, Callable[[Original, random.Random], tuple[bytes, Damage]]] = {
    "flip_bits": flip_bits,
    "garble_bytes": garble_bytes,
    "zero_pages": zero_pages,
    "swap_pages": swap_pages,
    "truncate": truncate,
    "append_garbage": append_garbage,
    "swap_sectors_of_the_index": swap_sectors_of_the_index,
}


# --- what a store may say of it ----------------------------------------------------------------


def use_damaged_files(kind: str, folder: Path, rng: random.Random) -> int:
    """Damage a store in that way, some times, and use each; return how many."""
    stop_clock_between_calls()
    path = folder / "damaged.kvs"
    live = build(path, rng)
    original = Original(path.read_bytes())
    for number in range(FILES):
        contents, damage = KINDS[kind](original, rng)
        path.write_bytes(contents)
        try:
            use(path, contents, live, original.may_hide_keys(damage), rng)
        except BaseException as error:
            error.add_note(f"file {number}, damage: {'; '.join(damage.said)}")
            raise
    return FILES


def use(
    path: Path,
    contents: bytes,
    live: State,
    may_hide_keys: bool,
    rng: random.Random,
    *,
    spares_others: bool = True,
    max_bytes: int = MAX_FILE_SIZE,
) -> None:
    """Open a damaged file and do everything with it: right values or errors, and none else.

    Args:
        path: the file.
        contents: what is in it.
        live: what it held before the damage.
        may_hide_keys: whether keys may be absent without an error.
        rng: what decides.
        spares_others: what could be read is there after changes, too. Not where the index was
            forged: one that denies a record, with right checksums, has it overwritten, and the
            damage that this makes is found.
        max_bytes: as of `KVStore`.
    """
    try:
        store = KVStore(path, max_bytes=max_bytes)
    except KVStoreError:
        assert path.read_bytes() == contents, "a file that was refused has changed"
        return
    with store:
        before = {key: look_at(store, key, live[key]) for key in live}
        absent = [key for key, outcome in before.items() if outcome == "absent"]
        assert may_hide_keys or not absent, f"absent without damage to the index: {absent[:5]}"
        iterate(store, live, before)
        change(store, live, before, rng)
        # Damage stays with whom it hit: what could be read can be read, whatever was written.
        right = {key: value for key, value in live.items() if before[key] == "right"}
        for key, value in right.items():
            outcome = look_at(store, key, value)
            assert outcome == "right" or not spares_others, f"{key!r} was right before the changes"
        for act in (store.sync, store.stats, store.purge_expired, store.__len__):
            _or_error(act)
        right = {key: value for key, value in right.items() if outlives_the_index(store, key)}
    with KVStore(path, max_bytes=max_bytes) as store:
        for key, value in right.items():
            outcome = look_at(store, key, value)
            assert outcome == "right" or not spares_others, f"{key!r} was right before the closing"


def outlives_the_index(store: KVStore, key: str) -> bool:
    """Return whether a key that can be read has its name in its record, not in its slot alone.

    A read needs the one, and rebuilding the index the other.
    """
    encoded = key.encode()
    slot = store._slots.find(key_hash(encoded, store._file.hash_seed), encoded)
    return store._records.contains_record_of(
        store._file.words[slot + SLOT_RECORD_OFFSET >> 3], encoded
    )


def look_at(store: KVStore, key: str, value: Value) -> str:
    """Return "right", "error" or "absent"; anything else fails."""
    try:
        found = store.read(key)
    except KeyNotFoundError:
        return "absent"
    except KVStoreError:
        _or_error(lambda: store.read_bytes(key))
        _or_error(lambda: key in store)
        _or_error(lambda: store.ttl(key))
        return "error"
    assert found == value, f"{key!r} reads as {str(found)[:80]}, a wrong value"
    assert store.get(key) == value
    assert key in store
    return "right"


def iterate(store: KVStore, live: State, before: dict[str, str]) -> None:
    """Walk over all: it ends, and gives right pairs, each once, all of them unless it raises."""
    seen = []
    try:
        for key, value in store.items():
            assert live.get(key) == value, f"items gave {key!r}: {str(value)[:80]}"
            seen.append(key)
    except KVStoreError:
        pass
    else:
        assert {key for key, outcome in before.items() if outcome == "right"} <= set(seen)
    assert len(seen) == len(set(seen)), "a key came twice"
    names = []
    try:
        for key in store:
            names.append(key)
            assert len(names) < 100_000, "no end of keys"
    except KVStoreError:
        pass
    else:
        assert {key for key, outcome in before.items() if outcome == "right"} <= set(names)


def change(store: KVStore, live: State, before: dict[str, str], rng: random.Random) -> None:
    """Delete and create: it works, or raises a `KVStoreError`; what worked can be seen."""
    harmed = [key for key in sorted(live) if before[key] == "error"]
    for key in harmed[:40] + rng.sample(sorted(live), 40):
        if before[key] == "right":
            if _or_error(lambda: store.delete(key)) is None and key not in store:  # noqa: B023
                before[key] = "deleted"
        elif before[key] == "error":
            try:
                store.create(key, {"over": "damage"})
            except KeyExistsError:
                if _or_error(lambda: store.delete(key)) is None:  # noqa: B023
                    _or_error(lambda: store.create(key, live[key]))  # noqa: B023
            except KVStoreError:
                pass
            else:
                before[key] = "created"
    # Of the sizes that `build` deleted some of: these take their blocks.
    for number in range(500, 580):
        key = str(number)
        value = make_value(key, number, rng.choice(SIZES))
        if _or_error(lambda: store.create(key, value)) is None:  # noqa: B023
            assert look_at(store, key, value) == "right", f"{key!r} was created just now"


def _or_error(act: Callable[[], Any]) -> Any:
    """Return what it returns, or the `KVStoreError` that it raises."""
    try:
        return act()
    except KVStoreError as error:
        return error


EXPERIMENTS = tuple(
    Experiment(f"damage-{name}", fault, "files", partial(use_damaged_files, kind))
    for name, kind, fault in (
        ("bits", "flip_bits", "one bit to twenty flipped"),
        ("bytes", "garble_bytes", "1 to 512 bytes overwritten"),
        ("zeroed-pages", "zero_pages", "pages of zeros"),
        ("swapped-pages", "swap_pages", "pages exchanged, or one over the other"),
        ("truncation", "truncate", "the file cut off anywhere"),
        ("garbage-at-the-end", "append_garbage", "bytes added at the end"),
        ("swapped-slots", "swap_sectors_of_the_index", "slots or sectors of the table exchanged"),
    )
)
