"""Keys that are written again and again without a sync: nothing piles up."""

import random
from pathlib import Path
from typing import Final

from support import MIB
from support.consistency import assert_consistent
from support.workload import make_value

from kvstore import IMPLEMENTATION, KVStore
from kvstore.format.layout import EXTENT_MAP_OFFSET, FIXED_EXTENTS, KIND_SLAB, SLAB_ENTRY

from .laboratory import Experiment

PUTS: Final = 1_000_000 if IMPLEMENTATION == "compiled" else 30_000  # of a trial
MORE_MEMORY: Final = 2 * MIB


def count_retired(store: KVStore) -> int:
    """Count what the extent map says is retired or marked."""
    end = EXTENT_MAP_OFFSET + SLAB_ENTRY.size * store._file.extent_count
    entries = list(SLAB_ENTRY.iter_unpack(store._file.map[EXTENT_MAP_OFFSET:end]))
    return sum(retired for kind, *_, retired, _ in entries[FIXED_EXTENTS:] if kind == KIND_SLAB)


def write_hot_keys(folder: Path, rng: random.Random) -> int:
    """Put few keys, which were synced once, in values of a few sizes; return how often."""
    path = folder / "hot.kvs"
    keys = [f"{'é' * 16}{number}" for number in range(rng.choice((1, 1, 5)))]
    values = [make_value("hot", mark, rng.choice((0, 100, 3_000))) for mark in range(100)]
    with KVStore(path) as store:
        for key in keys:
            store.create(key, values[0])
        store.sync()
        size = memory = 0
        for number in range(PUTS):
            store.put(keys[number % len(keys)], values[number % len(values)])
            if number == 1_000:
                size, memory = store.stats().file_size, _peak_memory()
        assert count_retired(store) == len(keys)
        assert store.stats().file_size == size
        assert _peak_memory() <= memory + MORE_MEMORY
        for key in keys:
            store.delete(key)
        assert count_retired(store) == 2 * len(keys)
    assert_consistent(path)
    return PUTS


def _peak_memory() -> int:
    import resource  # of POSIX

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


EXPERIMENTS = (
    Experiment(
        "hot-keys",
        "a few keys written a million times without a sync",
        "puts",
        write_hot_keys,
    ),
)
