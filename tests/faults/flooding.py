"""Keys chosen so that their hashes collide: they cost what others cost, or end in `StoreFullError`.

Judged by counts that are the same each time, segments and buckets looked at, and not by time.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Final

import pytest
from support.consistency import assert_consistent
from xxhash import xxh3_64_intdigest

import kvstore.format.extent_records
import kvstore.format.layout
import kvstore.format.records
import kvstore.format.segment
import kvstore.index.records
import kvstore.index.segments
import kvstore.index.slots
import kvstore.one_key
import kvstore.recovery.check_table
from kvstore import KVStore, StoreFullError, compiled
from kvstore.format.layout import (
    BUCKET_COUNT,
    BUCKET_SHIFT,
    DIRECTORY_SHIFT,
    EXTENT_SHIFT,
    MAX_DEPTH,
    SEGMENT_SLOTS,
    segment_run,
)

from .laboratory import Experiment, stop_clock_between_calls

FLOOD: Final = 8_000  # keys that share some bits of a hash without a seed
BITS: Final = 7  # each bit doubles the keys that are tried: a million
FORCED: Final = 4_000
TOLERANCE: Final = 1.02  # how many times the pages that others take, for chance

Hash = Callable[..., int]


# --- keys that collide where no seed is --------------------------------------------------------


def colliding_keys(shift: int, rng: random.Random) -> list[str]:
    """Return keys whose hashes with seed 0 have the same bits, above the lowest `shift` ones."""
    mark, wanted = rng.getrandbits(32), rng.getrandbits(BITS) << shift
    mask = (1 << BITS) - 1 << shift
    digest = xxh3_64_intdigest
    keys = (f"{mark}:{number}".encode() for number in count())
    return [key.decode() for key in islice((k for k in keys if digest(k) & mask == wanted), FLOOD)]


def random_keys(count_of_keys: int, rng: random.Random) -> list[str]:
    """Return keys that nobody chose."""
    return [f"{rng.getrandbits(64):x}" for _ in range(count_of_keys)]


def flood(folder: Path, rng: random.Random) -> int:
    """Store keys that collide under a hash without a seed, and as many random ones; compare."""
    stop_clock_between_calls()
    others = cost(folder / "others.kvs", random_keys(FLOOD, rng))
    # The uppermost bits choose the segment, the lowest ones bucket and fingerprint.
    for name, shift in (("upper", 64 - BITS), ("lower", 0)):
        chosen = cost(folder / f"{name}.kvs", colliding_keys(shift, rng))
        assert chosen.segments <= others.segments + 2, f"{name} bits: {chosen}; random: {others}"
        assert chosen.deepest <= others.deepest + 1, f"{name} bits: {chosen}; random: {others}"
        assert chosen.pages <= others.pages * TOLERANCE, f"{name} bits: {chosen}; random: {others}"
    return 2 * FLOOD


class Cost:
    """What a set of keys costs a store.

    Attributes:
        segments: of the table.
        deepest: the greatest depth of one.
        pages: of the table, that all the keys' lookups read together.
    """

    def __init__(self, store: KVStore, keys: Sequence[str]) -> None:
        file = store._file
        directory = file.directory.tolist()
        self.segments = len(set(directory))
        self.deepest = max(file.map[extent << EXTENT_SHIFT | 16] for extent in set(directory))
        self.pages = 0
        for key in keys:
            key_hash = kvstore.format.layout.key_hash(key.encode(), file.hash_seed)
            slot = store._parts.slots.find(key_hash, key.encode())
            assert slot > 0
            passed = (slot >> BUCKET_SHIFT) - (key_hash & BUCKET_COUNT - 1)
            self.pages += passed % BUCKET_COUNT + 1

    def __repr__(self) -> str:
        return f"{self.segments} segments, the deepest {self.deepest}, {self.pages} pages read"


def cost(path: Path, keys: Sequence[str]) -> Cost:
    """Store these keys in a new file; return what that cost."""
    with KVStore(path) as store:
        for key in keys:
            store.create(key, {})
        found = Cost(store, keys)
    assert_consistent(path)
    return found


# --- keys forced to collide --------------------------------------------------------------------


@contextmanager
def forced(prefix: int) -> Iterator[None]:
    """Have every key's hash begin with these 15 bits: one entry of the directory has them all.

    In the plain implementation: the compiled one hashes by itself.
    """
    real = xxh3_64_intdigest
    rest = (1 << DIRECTORY_SHIFT) - 1

    seeds: set[int] = set()

    def of_key(key: bytes, seed: int) -> int:
        seeds.add(seed)
        return prefix << DIRECTORY_SHIFT | real(key, seed) & rest

    def in_recovery(data: bytes, seed: int) -> int:
        # One name for both hashes there; a record's checksum has a seed that is no file's.
        return of_key(data, seed) if seed in seeds else real(data, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "selected", compiled.PLAIN)
        patch.setattr(kvstore.one_key, "xxh3_64_intdigest", of_key)
        patch.setattr(
            kvstore.format.segment,
            "xxh3_64_digest",
            lambda key, seed: of_key(key, seed).to_bytes(8, "big"),
        )
        patch.setattr(kvstore.format.extent_records, "xxh3_64_intdigest", in_recovery)
        for module in (
            kvstore.format.records,
            kvstore.index.records,
            kvstore.index.segments,
            kvstore.index.slots,
            kvstore.recovery.check_table,
        ):
            patch.setattr(module, "key_hash", of_key)
        yield


def force(folder: Path, rng: random.Random) -> int:
    """Force more keys into one entry of the directory than it can have; return how many."""
    stop_clock_between_calls()
    path = folder / "forced.kvs"
    prefix = rng.randrange(1 << 15)
    keys = random_keys(FORCED, rng)
    with forced(prefix):
        with KVStore(path) as store:
            fill(store, keys)
            live = set(keys[:SEGMENT_SLOTS])
            assert_deepest(store, prefix)
            split_or_compact(store, live, keys, rng)
            crashed = path.with_name("crashed.kvs")
            crashed.write_bytes(path.read_bytes())
        for each in (path, crashed):
            assert_holds(each, live)
    return FORCED


def fill(store: KVStore, keys: Sequence[str]) -> None:
    """Create all: as many as one segment has slots are taken, each other is refused for itself."""
    for number, key in enumerate(keys):
        if number < SEGMENT_SLOTS:
            store.create(key, {"n": key})
        else:
            with pytest.raises(StoreFullError):
                store.create(key, {"n": key})
    assert len(store) == SEGMENT_SLOTS
    # Refused for want of a slot, and not by filling the file with segments or leaked blocks.
    assert store.stats().file_size < 4 << 20


def assert_deepest(store: KVStore, prefix: int) -> None:
    """Assert that segments were split as far as that goes and no further: 11 halvings."""
    directory = store._file.directory.tolist()
    assert directory.count(directory[prefix]) == segment_run(MAX_DEPTH)
    assert len(set(directory)) == 16 + 11


def split_or_compact(
    store: KVStore, live: set[str], keys: Sequence[str], rng: random.Random
) -> None:
    """Deleting makes room for as many others, and everything can be read."""
    gone = rng.sample(sorted(live), 100)
    for key in gone:
        store.delete(key)
    live.difference_update(gone)
    later = rng.sample(keys[SEGMENT_SLOTS:], 100)
    for key in later:
        store.create(key, {"n": key})
    live.update(later)
    with pytest.raises(StoreFullError):
        store.create("one more", {})
    for key in live:
        assert store.read(key) == {"n": key}
    for key in gone:
        assert key not in store


def assert_holds(path: Path, live: set[str]) -> None:
    """Assert that the file opens, closed or not, with these keys and room for no other one."""
    with KVStore(path) as store:
        assert dict(store) == {key: {"n": key} for key in live}
        with pytest.raises(StoreFullError):
            store.create("one more", {})
        assert all(store.read(key) == {"n": key} for key in live)
    assert_consistent(path)


EXPERIMENTS = (
    Experiment(
        "flooding-chosen-keys", "keys that collide under a hash without a seed", "keys", flood
    ),
    Experiment(
        "flooding-one-entry", "hashes forced into one entry of the directory", "keys", force
    ),
)
