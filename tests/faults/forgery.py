"""Files forged with right checksums: the right value or an error, never a crash or a hang."""

import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from support import MEMORY_FACTOR, MIB
from support.consistency import assert_consistent
from support.damage import State
from support.forgery import KINDS, MAX_BYTES, Forge, build_deep
from support.workload import Value, make_value
from xxhash import xxh3_64_intdigest

import kvstore.backup
from kvstore import KVStore, KVStoreError
from kvstore.format.layout import (
    EXTENT_SIZE,
    FIXED_EXTENTS,
    IDENTITY,
    MARKED_MAGIC,
    MOST_GENERATIONS,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    STAMP_LIMIT,
    key_hash,
)
from kvstore.format.records import is_valid_record, places_of_magics, size_class_at
from kvstore.recovery.check import check_file

from .damage import use
from .laboratory import Experiment, stop_clock_between_calls

FILES: Final = 10  # a trial, all of one original
# More than the trial has as it begins and the map takes: see `limit_memory`.
MEMORY: Final = round(64 * MIB * MEMORY_FACTOR)


def use_forged_files(kind: str, folder: Path, rng: random.Random) -> int:
    """Forge a store in that way, some times, and use each; return how many."""
    stop_clock_between_calls()
    setattr(kvstore.backup, "MAX_FILE_SIZE", MAX_BYTES)  # noqa: B010 - more than memory allows
    path = folder / "forged.kvs"
    live = build_deep(path, rng)
    forge = Forge(path.read_bytes())
    use_all_of(path, live, rng)
    limit_memory()
    for number in range(FILES):
        contents, said = KINDS[kind](forge, rng)
        path.write_bytes(contents)
        try:
            check_file(path)
            # The records that a forged index denies may be overwritten: see `spares_others`.
            use(
                path,
                contents,
                live,
                "one copy" not in said[0],
                rng,
                spares_others=kind in {"table", "blocks"},
                max_bytes=MAX_BYTES,
            )
            check_file(path)
            assert path.stat().st_size <= len(contents) + 4 * MIB, "the file grew for nothing"
        except BaseException as error:
            error.add_note(f"file {number}, forged: {'; '.join(said)}")
            raise
    return FILES


def use_all_of(path: Path, live: State, rng: random.Random) -> None:
    """Use the file while it is whole, so that all that takes memory has been imported."""
    contents = path.read_bytes()
    use(path, contents, live, False, rng, max_bytes=MAX_BYTES)
    path.write_bytes(contents)


def use_forged_versions(folder: Path, rng: random.Random) -> int:
    """Forge stamps, marks and generations in the file of a process that died; return how often.

    Each key has a value that it had once, or none, or an error; whatever is put then, is there.
    """
    stop_clock_between_calls()
    path = folder / "forged.kvs"
    values: dict[str, list[Value]] = defaultdict(list)
    with KVStore(path, max_bytes=MAX_BYTES, durable=rng.random() < 0.3) as store:
        for number in range(150):
            key = f"{'é' * 16 if number % 5 == 0 else ''}{rng.randrange(40)}"
            values[key].append(make_value(key, number, rng.choice((0, 100, 3_000))))
            store.put(key, values[key][-1], rng.choice((None, 1_000)))
            if rng.random() < 0.2:
                store.delete(key)
            if rng.random() < 0.1:
                store.sync()
        killed = path.read_bytes()
    places = list(_find_records(killed))
    for _ in range(FILES):
        contents = bytearray(killed)
        some = rng.sample(places, rng.randrange(1, len(places)))
        for place in some:
            _forge_version(contents, place, rng)
        path.write_bytes(contents)
        try:
            _use_versions(path, values, rng)
        except BaseException as error:
            error.add_note(f"forged: {some}")
            raise
    return FILES


def _find_records(contents: bytes) -> Iterator[int]:
    seed = IDENTITY.unpack_from(contents)[4]
    for base in range(FIXED_EXTENTS * EXTENT_SIZE, len(contents), EXTENT_SIZE):
        extent = contents[base : base + EXTENT_SIZE]
        for place in places_of_magics(extent):
            if size_class_at(extent, place) >= 0 and is_valid_record(extent, place, base, seed):
                yield base + place


def _forge_version(contents: bytearray, place: int, rng: random.Random) -> None:
    """Give a record another stamp, magic or generation; mostly with a checksum that fits."""
    magic, value_size, key_size, generation, stamp, expires_at, checksum = RECORD.unpack_from(
        contents, place
    )
    far = rng.choice((0, 1, STAMP_LIMIT - 1, STAMP_LIMIT, 2**64 - 1, rng.getrandbits(64)))
    stamp = rng.choice((stamp, stamp + rng.randrange(-9, 9), far))
    magic = rng.choice((magic, magic, RECORD_MAGIC, MARKED_MAGIC))
    generation = rng.choice((generation, 0, rng.randint(1, MOST_GENERATIONS)))
    start = place + RECORD_HEADER_SIZE
    key = bytes(contents[start : start + key_size])
    value = bytes(contents[start + key_size : start + key_size + value_size])
    hashed = key_hash(key, IDENTITY.unpack_from(contents)[4])
    if rng.random() < 0.8:
        seed = (hashed ^ stamp ^ expires_at << 16 ^ place) & 2**64 - 1
        checksum = xxh3_64_intdigest(value, seed)
    RECORD.pack_into(
        contents, place, magic, value_size, key_size, generation, stamp, expires_at, checksum
    )


def _use_versions(path: Path, values: dict[str, list[Value]], rng: random.Random) -> None:
    with KVStore(path, max_bytes=2 * MAX_BYTES) as store:
        for key, each in values.items():
            with suppress(KVStoreError):
                assert store.get(key) in (*each, None), f"{key!r} has a value that it never had"
        expected: dict[str, Value | None] = {}
        for number, key in enumerate(values):
            value = make_value(key, -number, rng.choice((0, 100, 3_000)))
            with suppress(KVStoreError):  # no stamp is left
                store.put(key, value)
                expected[key] = value
                if number % 3 == 0:
                    store.put(key, value)
                    store.delete(key)
                    expected[key] = None
        killed = path.read_bytes()
        assert {key: store.get(key) for key in expected} == expected
        store.close()
        for contents in (path.read_bytes(), killed):
            path.write_bytes(contents)
            with KVStore(path, max_bytes=2 * MAX_BYTES) as again:
                assert {key: again.get(key) for key in expected} == expected
            assert_consistent(path)


def limit_memory() -> None:
    """Have this process get no more than a little memory from now on, but for the map."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_BYTES + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _why_not() -> str | None:
    return None if Path("/proc/self/statm").exists() else "limits memory as Linux counts it"


EXPERIMENTS = (
    *(
        Experiment(
            f"forged-{kind}", fault, "files", partial(use_forged_files, kind), unavailable=_why_not
        )
        for kind, fault in (
            ("superblock", "identity and state forged, checksums right"),
            ("index", "directory, extent map and allocator forged, checksums right"),
            ("table", "bucket headers, control bytes and slots forged"),
            ("blocks", "links of free blocks and records' headers forged"),
        )
    ),
    Experiment(
        "forged-versions",
        "stamps, marks and generations forged in the file of a process that died",
        "files",
        use_forged_versions,
    ),
)
