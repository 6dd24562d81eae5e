"""What the fast path leaves to the Python code, and what no caller can lead it to."""

import copy
import gc
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import Any, Final, cast

import orjson
import pytest
from support.cases import CASES
from support.platforms import needs_fork, needs_pwrite, needs_signals
from support.processes import run_script
from support.stores import OpenStore
from xxhash import xxh3_64_intdigest

import kvstore.clock
import kvstore.file.platform
from kvstore import (
    CorruptStoreError,
    KeyExistsError,
    KeyNotFoundError,
    KVStore,
    StoreBusyError,
    StoreClosedError,
)
from kvstore.compiled import IMPLEMENTATION, PLAIN, Lock, selected
from kvstore.compiled.interface import FastPath, OwnedLock
from kvstore.file.reentry import thread
from kvstore.file.rollback import Rollback
from kvstore.format.bucket import live_slots
from kvstore.format.layout import (
    BUCKET_SIZE,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FREE_MAGIC,
    FRESH_EXTENT_OFFSET,
    LAST_STAMPS,
    MARKED_MAGIC,
    MARKED_MAGIC_BYTES,
    MAX_VALUE_SIZE,
    MIN_DEPTH,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    RECORD_MAGIC_SIZE,
    SHAPE_OFFSET,
    SHAPE_REWRITES_SHIFT,
    SLOT_EXPIRES_OFFSET,
    SLOT_KEY_SIZE_OFFSET,
    SLOT_OLDER,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    STAMP_LIMIT,
    STAMP_SHIFT,
    STRIPE_SHIFT,
    U64,
    UNDONE_WORD,
    VERSION_WORDS,
    key_hash,
    segment_run,
    slot_offset,
)
from kvstore.index.buckets import wanted_shape

U32: Final = Struct("<I")
SPLITTING: Final = next(case for case in CASES if case.name == "create and split")

pytestmark = pytest.mark.skipif(
    IMPLEMENTATION != "compiled", reason="the compiled code is not built, or not in use"
)


@pytest.fixture(autouse=True)
def through_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files written through the map, wherever they are."""
    monkeypatch.setattr("kvstore.file.platform.system.overwrites_in_place", lambda _fd: True)


@pytest.fixture
def fast(store: KVStore) -> FastPath:
    """The fast path of `store`, in which changes have begun and "key" is."""
    store.create("key", {"n": 1})
    assert store._fast is not None
    return store._fast


# --- what it does, and what it does not -----------------------------------------------------------


def test_the_common_case_is_done(fast: FastPath) -> None:
    record = fast.create("other", {"n": 2}, 60)
    assert type(record) is int
    extent = (record & SLOT_RECORD_MASK) >> EXTENT_SHIFT
    assert (fast.has_magic(extent), fast.has_magic(extent + 1)) == (True, False)
    assert fast.create("other", {}, None) == 0
    assert fast.read_bytes("other") == b'{"n":2}'
    assert fast.expiry("key") is True
    assert type(fast.expiry("other")) is tuple
    value, stamp, expires_at = cast(tuple[bytes, int, int], fast.read_record(b"other", 0))
    assert (value, expires_at - (stamp >> STAMP_SHIFT)) == (b'{"n":2}', 60_000)
    assert fast.read_record(b"other", expires_at - 1) == (value, stamp, expires_at)
    assert fast.read_record(b"other", expires_at) is None
    assert fast.read_record(b"absent", 0) is False
    assert type(fast.touch("other", None)) is type(fast.put("new", {}, None)) is int
    assert fast.expiry("other") is True
    assert type(fast.put("other", {"n": 3}, 9)) is int
    assert fast.pop("other") == b'{"n":3}'
    assert fast.pop("other") is fast.touch("other", 1) is False
    assert fast.delete("new") is True
    assert fast.delete("other") is fast.read_bytes("other") is fast.expiry("other") is False


class Batches:
    """The batches of a fast path, each done to its end, with what it left to Python."""

    def __init__(self, fast: FastPath) -> None:
        self._fast = fast
        self.rare: list[object] = []

    def read(self, *keys: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        left = iter(keys)
        while self._fast.read_many(left, found, orjson.loads, self.rare.append):
            pass
        return found

    def put(self, *pairs: Any, ttl: object = None) -> list[int]:
        written = [2**64 - 1, 0]
        left = iter(pairs)
        while self._fast.put_many(left, ttl, written, lambda *rare: self.rare.append(rare)):
            pass
        return written

    def delete(self, *keys: Any) -> int:
        def delete(key: str) -> bool:
            self.rare.append(key)
            return False

        left, deleted, goes_on = iter(keys), 0, True
        while goes_on:
            count, goes_on = self._fast.delete_many(left, delete)
            deleted += count
        return deleted


@pytest.fixture
def batches(fast: FastPath) -> Batches:
    return Batches(fast)


def test_batches_of_common_cases_are_done(store: KVStore, batches: Batches) -> None:
    pairs = {f"k{number}": {"n": number} for number in range(100)}
    start, end = batches.put(*pairs.items(), ttl=60)
    contents = store.path.read_bytes()
    assert contents.index(b'k0{"n":0}') == start + RECORD_HEADER_SIZE
    assert contents.index(b'k99{"n":99}') + len(b'k99{"n":99}') == end
    assert batches.read("absent", *pairs, "key") == {**pairs, "key": {"n": 1}}
    assert batches.delete("absent", *pairs, "k0") == 100
    assert batches.read(*pairs) == {}
    assert batches.put() == [2**64 - 1, 0]
    assert batches.rare == []


def test_what_is_not_ordinary_in_a_batch_is_left_to_python_in_its_turn(
    store: KVStore, batches: Batches
) -> None:
    text = type("Text", (str,), {})("key")
    odd = ("", "x" * 33, "\ud800", 1, None, text)
    assert batches.read(*odd, "key") == {"key": {"n": 1}}
    assert batches.delete(*odd) == 0
    assert batches.rare == [*odd, *odd]
    del batches.rare[:]
    pairs: Any = (("", {}), ["key", {}], ("key",), ("key", {}, None), ("key", {"n": object}), 7)
    batches.put(*pairs)
    assert batches.rare == [(pair, None) for pair in pairs]
    del batches.rare[:]
    batches.put(("key", {}), ttl=0)
    assert batches.rare == [(("key", {}), None)]
    assert dict(store) == {"key": {"n": 1}}


def test_what_became_out_of_the_ordinary_amid_a_group_is_left_to_python(
    store: KVStore, fast: FastPath
) -> None:
    """Its JSON is made already. What comes after it in the group is done as ever."""
    written = [2**64 - 1, 0]
    stripe = store._locks.stripes[key_hash(b"held", store._file.hash_seed) >> STRIPE_SHIFT]
    seed, keys = store._file.hash_seed, [f"k{number}" for number in range(8)]
    free = [key for key in keys if key_hash(key.encode(), seed) >> STRIPE_SHIFT]
    assert free
    rare: list[object] = []
    pairs = [("held", {"n": 2}), *((key, {}) for key in keys)]
    with stripe:
        other = threading.Thread(
            target=lambda: fast.put_many(
                iter(pairs), None, written, lambda pair, encoded: rare.append((pair, encoded))
            )
        )
        other.start()
        other.join()
    held = [
        key
        for key, _ in pairs
        if store._locks.stripes[key_hash(key.encode(), seed) >> STRIPE_SHIFT] is stripe
    ]
    assert [pair[0] for pair, _ in cast(list[Any], rare)] == held
    assert rare[0] == (("held", b'{"n":2}'), b'{"n":2}')
    assert set(store) == {"key", *keys} - set(held)


def test_a_batch_that_its_store_is_closed_amid_leaves_the_rest_to_python(
    store: KVStore, batches: Batches
) -> None:
    store.close()
    assert batches.read("key", "absent") == {}
    assert batches.put(("key", {})) == [2**64 - 1, 0]
    assert batches.delete("key") == 0
    assert batches.rare == ["key", "absent", (("key", b"{}"), b"{}"), "key"]


def test_batches_of_a_thread_that_is_inside_are_left_to_the_rules(batches: Batches) -> None:
    with thread.inside:
        assert batches.read("key") == {}
        assert batches.put(("other", {})) == [2**64 - 1, 0]
        assert batches.delete("key") == 0
    assert batches.rare == ["key", (("other", b"{}"), b"{}"), "key"]
    assert batches.read("key", "other") == {"key": {"n": 1}}


@pytest.mark.parametrize("key", ["", "x" * 33, "\ud800", 1, None, type("Text", (str,), {})("key")])
def test_what_is_no_ordinary_key_is_left_alone(fast: FastPath, key: object) -> None:
    answers = [fast.create(key, {}, None), fast.read_bytes(key), fast.expiry(key), fast.delete(key)]
    answers += [fast.put(key, {}, None), fast.touch(key, None), fast.pop(key)]
    assert answers == [None] * 7


@pytest.mark.parametrize(
    "value", [[], {"x": {1}}, {1: 2}, {"x": float("nan")}, {"x": "y" * 17_000}]
)
def test_what_is_no_ordinary_value_is_left_alone(fast: FastPath, value: object) -> None:
    assert fast.create("other", value, None) is fast.put("key", value, None) is None


@pytest.mark.parametrize("ttl", [0, -1, True, 1.5, 10**10 + 1, 2**70])
def test_what_is_no_ordinary_ttl_is_left_alone(fast: FastPath, ttl: object) -> None:
    assert fast.create("other", {}, ttl) is fast.put("key", {}, ttl) is None
    assert fast.touch("key", ttl) is None


def test_nothing_is_done_before_changes_have_begun(path: Path) -> None:
    """The disk has to know first that the index is in flux."""
    KVStore(path).close()
    with KVStore(path) as store:
        assert store._fast is not None
        assert store._fast.create("key", {}, None) == store._fast.put("key", {}, None) == b"{}"
        assert store._fast.delete("key") is store._fast.pop("key") is None
        assert store._fast.touch("key", None) is None
        assert "key" not in store


def test_nothing_is_done_once_the_store_is_closed(store: KVStore, fast: FastPath) -> None:
    store.close()
    answers = [fast.create("k", {}, None), fast.read_bytes("key"), fast.expiry("key")]
    answers += [fast.put("key", {}, None), fast.touch("key", None), fast.pop("key")]
    assert answers == [None] * 6
    assert fast.delete("key") is fast.delete_under_locks(b"key", 0) is None
    assert fast.read_record(b"key", 0) is None
    assert fast.sweep(16, RECORD_MAGIC, 1) is None
    assert fast.create_under_locks(b"k", b"{}", 0, 0, 0, False) is fast.free(2**20) is None
    with pytest.raises(StoreClosedError):
        store.read("key")


def test_a_clock_of_somebody_else_is_asked(
    store: KVStore, fast: FastPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore.clock, "time_ns", lambda: 1_000_000_000)
    store.create("other", {}, ttl=1)
    assert fast.expiry("other") == (2_000, 1_000)
    monkeypatch.setattr(kvstore.clock, "time_ns", lambda: 2_000_000_000)
    assert fast.expiry("other") is fast.read_bytes("other") is fast.delete("other") is None
    assert fast.pop("other") is fast.touch("other", None) is None
    assert "other" not in store


def test_an_empty_value_is_damage_and_not_absence(store: KVStore) -> None:
    """Only a forged record has one, with a checksum that is right."""
    store._restore("key", b"", 0, 0)
    for read in (store.read, store.get):
        with pytest.raises(CorruptStoreError):
            read("key")
    assert "key" in store
    store.delete("key")


# --- records that follow each other --------------------------------------------------------------


def put(fast: FastPath, key: str = "key") -> int:
    """Put a key, or replace it, and return where its record is."""
    record = fast.put(key, {"n": 1}, None)
    assert type(record) is int
    return record & SLOT_RECORD_MASK


def first_word(store: KVStore, record: int) -> tuple[bytes, int]:
    """Return the magic of a block and its generation."""
    word = store._file.map[record : record + 8]
    return word[:4], word[7]


def test_a_record_that_nobody_was_promised_is_freed_at_once(store: KVStore, fast: FastPath) -> None:
    first = put(fast)
    second = put(fast)
    assert first_word(store, first) == (U32.pack(FREE_MAGIC), 0)
    assert put(fast) == first
    assert first_word(store, second) == (U32.pack(FREE_MAGIC), 0)
    assert (store._parts.versions.retired_size, store._parts.versions.marks) == (0, 0)


@pytest.mark.parametrize("replace", [put, lambda fast: fast.touch("key", None)])
def test_a_record_that_was_synced_is_retired(
    store: KVStore, fast: FastPath, replace: Callable[[FastPath], object]
) -> None:
    record = put(fast)
    store.sync()
    replace(fast)
    assert first_word(store, record) == (RECORD_MAGIC_BYTES, store._parts.versions.generation)
    assert (store._parts.versions.retired_size, store._parts.versions.marks) == (64, 0)
    assert store.read("key") == {"n": 1}


@pytest.mark.parametrize("remove", ["delete", "pop"])
def test_what_may_have_older_records_is_marked(store: KVStore, fast: FastPath, remove: str) -> None:
    put(fast)
    store.sync()
    record = put(fast)
    assert getattr(fast, remove)("key")
    assert first_word(store, record) == (MARKED_MAGIC_BYTES, store._parts.versions.generation)
    assert (store._parts.versions.retired_size, store._parts.versions.marks) == (128, 1)
    assert "key" not in store


def test_what_is_damaged_is_not_marked_as_it_is(store: KVStore, fast: FastPath) -> None:
    """Recovery would not take the mark for a record, and an older one would come back."""
    put(fast)
    store.sync()
    record = put(fast)
    store._file.write(record + RECORD_HEADER_SIZE + len("key") + 1, b"?")
    assert fast.pop("key") is fast.touch("key", None) is fast.delete("key") is None
    assert first_word(store, record) == (RECORD_MAGIC_BYTES, 0)
    store.delete("key")
    assert first_word(store, record) == (MARKED_MAGIC_BYTES, store._parts.versions.generation)


def test_only_what_was_retired_in_other_generations_is_swept(
    store: KVStore, fast: FastPath
) -> None:
    records = [put(fast, f"key {n}") for n in range(3)]
    store.sync()
    put(fast, "key 0")
    put(fast, "key 1")
    fast.delete("key 1")
    extent = records[0] >> EXTENT_SHIFT
    generation = store._parts.versions.generation
    with store._locks.space:
        assert fast.sweep(extent, RECORD_MAGIC, 0) is None
    assert fast.sweep(extent, RECORD_MAGIC, generation) == 0
    assert fast.sweep(extent, RECORD_MAGIC, generation + 1) == 2
    assert (store._parts.versions.retired_size, store._parts.versions.marks) == (64, 1)
    assert fast.sweep(extent, MARKED_MAGIC, generation + 1) == 1
    assert (store._parts.versions.retired_size, store._parts.versions.marks) == (0, 0)
    assert fast.sweep(extent, MARKED_MAGIC, generation + 1) == 0
    assert [first_word(store, record)[1] for record in records] == [0] * 3
    assert set(store) == {"key", "key 0", "key 2"}


# --- records that move --------------------------------------------------------------------------


BIG: Final = {"v": "x" * 3_000}  # 21 an extent
A_THIRD: Final = 7


@pytest.fixture
def sparse(store: KVStore, fast: FastPath) -> list[int]:
    """Two extents of one class, with seven records each; the one put last comes first."""
    for number in range(42):
        store.create(f"r{number}", BIG)
    extents = sorted({place_of(store, f"r{number}") >> EXTENT_SHIFT for number in range(42)})
    for number in range(42):
        if number % 3:
            store.delete(f"r{number}")
    store._slab.put_last(extents[:1])
    return extents


def place_of(store: KVStore, key: str) -> int:
    slot = store._parts.slots.find(key_hash(key.encode(), store._file.hash_seed), key.encode())
    return store._file.words[slot + SLOT_RECORD_OFFSET >> 3] & SLOT_RECORD_MASK


def end_of(extent: int) -> int:
    return extent + 1 << EXTENT_SHIFT


@pytest.mark.parametrize("is_promised", [False, True])
def test_records_of_an_extent_move_to_others_of_its_class(
    store: KVStore, fast: FastPath, sparse: list[int], is_promised: bool
) -> None:
    """Their old blocks are free at once only where nobody was promised what is in them."""
    source, target = sparse
    if is_promised:
        store.sync()
    before = [store._whole(f"r{number}") for number in range(0, 42, 3)]
    old = place_of(store, "r0")
    assert fast.move(source << EXTENT_SHIFT, 100) == end_of(source)
    assert {place_of(store, f"r{n}") >> EXTENT_SHIFT for n in range(0, 42, 3)} == {target}
    assert [store._whole(f"r{number}") for number in range(0, 42, 3)] == before
    versions = store._parts.versions
    if is_promised:
        assert first_word(store, old) == (RECORD_MAGIC_BYTES, versions.generation)
        assert versions.retired_size == A_THIRD * 3_072
        store.delete("r0")
        assert versions.marks == 1, "a copy may be on the disk"
    else:
        assert versions.retired_size == 0
        store.delete("r0")
        assert versions.marks == 0


def test_record_that_moved_is_cleared_at_once_again_after_the_next_reclaiming(
    store: KVStore, fast: FastPath, sparse: list[int]
) -> None:
    store.sync()
    fast.move(sparse[0] << EXTENT_SHIFT, 100)
    store._parts.reclaimer.reclaim()
    store.delete("r0")
    assert store._parts.versions.marks == 1, "what was cleared is not on the disk yet"
    store._parts.reclaimer.reclaim()
    store.delete("r3")
    assert (store._parts.versions.retired_size, store._parts.versions.marks) == (0, 0)


def test_so_many_records_move_as_are_asked_for(
    store: KVStore, fast: FastPath, sparse: list[int]
) -> None:
    place = sparse[0] << EXTENT_SHIFT
    stops = []
    while place != end_of(sparse[0]):
        place = fast.move(place, 2)
        stops.append(place)
    assert len(stops) == 4
    assert fast.move(place, 0) == fast.move(place, 0)


def test_what_is_not_ordinary_is_not_moved(
    store: KVStore, fast: FastPath, sparse: list[int]
) -> None:
    source, target = sparse
    start, record = source << EXTENT_SHIFT, place_of(store, "r3")
    held = store._locks.stripes[key_hash(b"r3", store._file.hash_seed) >> STRIPE_SHIFT]
    with held:
        assert fast.move(record, 9) == record
    with store._locks.space:
        assert fast.move(start, 9) == start
    store._file.write(record + 60, b"?")
    assert fast.move(record, 9) == record, "damaged"
    assert fast.move(start + 32, 9) == start + 32, "no block begins there"
    for extent in (0, 3, 6, 2**14):  # fixed, a segment, none
        assert fast.move(extent << EXTENT_SHIFT, 9) == extent << EXTENT_SHIFT
    store._slab.put_last([target])
    assert fast.move(start, 9) == start, "no other extent of its class has room before it"
    store.delete("r3")
    store.close()
    assert fast.move(start, 9) == start


@pytest.mark.parametrize("latest", [STAMP_LIMIT - 1, 2**64 - 1])
def test_no_record_has_a_stamp_at_the_limit(store: KVStore, fast: FastPath, latest: int) -> None:
    """It would be no record for the next opening."""
    stripe = key_hash(b"key", store._file.hash_seed) >> STRIPE_SHIFT
    store._parts.versions.words[LAST_STAMPS + stripe] = latest
    assert fast.put("key", {}, None) == b"{}"
    assert fast.touch("key", None) is None
    assert fast.create_under_locks(b"key", b"{}", 0, 0, 1, True) is None
    with pytest.raises(CorruptStoreError):
        store.put("key", {})
    assert store.read("key") == {"n": 1}


@needs_pwrite
def test_a_replacement_is_planned_where_files_are_written_by_calls(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the slot is switched to says that there may be older records; the magic comes last."""
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _: False)
    store = open_store()
    store.create("key", {"n": 1})
    store.create("beside", {"n": 1})
    assert store._fast is not None
    with store._locks.space:
        plan = store._fast.create_under_locks(b"key", b"{}", 0, 9, 1, True)
        assert store._fast.create_under_locks(b"key", b"{}", 1, 9, 1, True) is None  # its own stamp
    assert type(plan) is tuple
    slot, record, changes = plan
    (entry, _, _), (body, _, _), *earliest, (ending, data, _), magic = changes
    assert entry >> EXTENT_SHIFT == EXTENT_MAP_OFFSET >> EXTENT_SHIFT
    assert (body, ending) == (record + RECORD_MAGIC_SIZE, slot + SLOT_EXPIRES_OFFSET)
    assert data[:12] == U64.pack(9) + U32.pack(record | SLOT_OLDER)
    assert [old for _, _, old in earliest] == [U64.pack(2**64 - 1)] * 2
    assert magic == (record, RECORD_MAGIC_BYTES, b"")
    assert store.read("key") == {"n": 1}


# --- locks ---------------------------------------------------------------------------------------


@pytest.fixture
def stripe(store: KVStore) -> OwnedLock:
    return store._locks.stripes[key_hash(b"key", store._file.hash_seed) >> STRIPE_SHIFT]


def test_what_another_thread_has_locked_is_not_touched(
    store: KVStore, fast: FastPath, stripe: OwnedLock
) -> None:
    """Neither looked at nor changed: it may be half-made. The Python code waits."""
    answers: list[object] = []

    def look_and_change() -> None:
        answers.extend((fast.delete("key"), fast.create("key", {}, None), fast.read_bytes("key")))
        answers.extend((fast.pop("key"), fast.put("key", {}, None), fast.touch("key", 1)))

    for lock in (stripe, store._locks.space):
        with lock:
            thread_of_another = threading.Thread(target=look_and_change)
            thread_of_another.start()
            thread_of_another.join()
    changes = [None, b"{}", None]
    assert answers == [None, b"{}", None, *changes, None, b"{}", b'{"n":1}', *changes]
    assert dict(store) == {"key": {"n": 1}}


def test_a_thread_that_is_inside_is_left_to_the_rules(store: KVStore, fast: FastPath) -> None:
    """Those of `reentry`: a signal handler amid an operation, say."""
    with thread.inside:
        assert fast.read_bytes("key") is fast.delete("key") is None
        assert fast.read_record(b"key", 0) is None
        assert fast.pop("key") is fast.touch("key", 1) is None
        assert fast.create("other", {}, None) == fast.put("key", {}, None) == b"{}"
        assert store.read("key") == {"n": 1}  # nobody holds anything
        with store._locks.stripes[key_hash(b"key", store._file.hash_seed) >> STRIPE_SHIFT]:
            for call in (store.read, store.delete, store.ttl):
                with pytest.raises(StoreBusyError):
                    call("key")
    with pytest.raises(KeyExistsError):
        store.create("key", {})


@needs_signals
@pytest.mark.parametrize("lock", ["stripe", "space"])
def test_who_waits_for_a_lock_can_be_interrupted(path: Path, lock: str) -> None:
    """And then holds none, and nothing has changed. The main thread waited deaf to Ctrl-C."""
    said = run_script(
        """
        import threading, time
        store = KVStore(sys.argv[1])
        store.create("key", {})
        locks = store._locks.stripes if sys.argv[2] == "stripe" else (store._locks.space,)
        held, enough = threading.Event(), threading.Event()
        def hold():
            for lock in locks:
                lock.acquire()
            held.set()
            enough.wait()
            for lock in locks:
                lock.release()
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        def interrupted(*_):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt
        def interrupt():
            while not done:  # one that comes before the wait begins does not end it
                time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGINT)
        for act in (
            lambda: store.create("other", {}),
            lambda: store.delete("key"),
            lambda: store.read("key") if locks is store._locks.stripes else store.stats(),
        ):
            done = []
            signal.signal(signal.SIGINT, interrupted)
            thread = threading.Thread(target=interrupt)
            try:
                thread.start()
                act()
            except KeyboardInterrupt:
                done.append(1)
            thread.join()
        enough.set()
        holder.join()
        assert not any(lock._is_owned() for lock in (*store._locks.stripes, store._locks.space))
        assert len(store) == 1 and store.stats().records == 1
        say(dict(store))
        store.close()
        """,
        path,
        lock,
    )
    assert said == "{'key': {}}\n"
    with KVStore(path) as store:
        assert dict(store) == {"key": {}}


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="garbage is collected between instructions")
@needs_pwrite
def test_nothing_is_collected_amid_a_plan(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finalizer could fork, and the child closed the map that its plan was being made of."""
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _: False)
    store = open_store()
    store.create("beside", {})
    store.create("key", {})
    fast = store._fast
    assert fast is not None
    collected: list[str] = []
    gc.collect()
    threshold = gc.get_threshold()

    def note(phase: str, _: object) -> None:
        collected.append(phase)

    kept = [(n, n, n) for n in range(3_000)]  # so that a tuple is made anew
    gc.callbacks.append(note)
    gc.set_threshold(1)
    try:
        with store._locks.space:
            collected.clear()
            planned = fast.create_under_locks(b"other", b"{}", 1, 0, 1, False)
            during_create = len(collected)
            collected.clear()
            replaced = fast.create_under_locks(b"key", b"{}", 0, 0, 1, True)
            during_put = len(collected)
            collected.clear()
            deleted = fast.delete_under_locks(b"key", 1)
            during_delete = len(collected)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(note)
    assert type(planned) is type(replaced) is type(deleted) is tuple
    assert (during_create, during_put, during_delete, len(kept)) == (0, 0, 0, 3_000)
    assert fast.create_under_locks(b"other", b"{}", 1, 0, 1, False) is None  # without the lock


def test_nothing_is_collected_while_a_long_value_is_hashed(
    store: KVStore, fast: FastPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its block was chosen by then, and a finalizer that created a record got the same one.

    The record of the finalizer was lost. An xxhash before 4.0 makes a tuple of its arguments, at
    which Python 3.11 collects garbage.
    """
    hashing = importlib.import_module("kvstore.compiled._fast_path")
    collects: list[bool] = []

    def watched(value: bytes, seed: int) -> int:
        collects.append(gc.isenabled())
        return xxh3_64_intdigest(value, seed)

    monkeypatch.setattr(hashing, "xxh3_64_intdigest", watched)
    store.create("long", {"x": "y" * 500})
    assert store.read("long") == {"x": "y" * 500}
    assert collects == [False, False]
    assert gc.isenabled()


def test_hashing_a_long_value_lets_no_other_thread_in() -> None:
    """A promise of xxhash that the fast path is built on, for all that a value can be."""
    ran: list[int] = []
    start = threading.Lock()
    interval = sys.getswitchinterval()

    def run_once_it_starts() -> None:
        with start:
            ran.append(1)

    waiting = threading.Thread(target=run_once_it_starts)
    with start:
        waiting.start()
        sys.setswitchinterval(1_000)  # nobody else runs until this thread lets go by itself
    try:
        ran_before = len(ran)
        for size in range(0, MAX_VALUE_SIZE + 1, 64):
            xxh3_64_intdigest(bytes(size), 1)
        assert len(ran) == ran_before
    finally:
        sys.setswitchinterval(interval)
        waiting.join()


# --- extents opened, and segments split -----------------------------------------------------------


@pytest.fixture
def full(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> KVStore:
    """A store in which the next key of its first segment has that split."""
    monkeypatch.setattr(os, "urandom", bytes)
    store = open_store(check=False)
    SPLITTING.prepare(store)
    return store


def has_split(store: KVStore) -> bool:
    directory = store._file.directory
    return directory[0] != directory[segment_run(MIN_DEPTH) // 2]


def create_splitting(store: KVStore) -> object:
    assert store._fast is not None
    return store._fast.create(SPLITTING.key, {}, None)


def test_an_extent_is_opened_in_one_go(store: KVStore, fast: FastPath) -> None:
    size = store._file.size
    create_large(store, 0, lambda: store._file.size > size)
    # What the file has before it grows may have records of another time.
    create_large(store, 1000, lambda: fresh_end(store) >= size + EXTENT_SIZE)
    records = [fast.create(f"key {number}", LARGE, None) for number in range(12)]
    assert all(type(record) is int for record in records)
    assert len({cast(int, record) >> EXTENT_SHIFT & 0xFFFF for record in records}) > 3


def test_a_segment_is_split_in_one_go(full: KVStore) -> None:
    keys = set(full)
    assert type(create_splitting(full)) is int
    assert has_split(full)
    assert set(full) == keys | {SPLITTING.key}
    assert {full.read(key) == {} for key in keys} == {True}


def test_a_batch_finds_its_keys_where_a_split_amid_it_has_put_them(full: KVStore) -> None:
    """They were looked up before it, and those that were absent are put twice."""
    seed = full._file.hash_seed
    keys = [
        key
        for key in (f"more {number}" for number in range(500))
        if key_hash(key.encode(), seed) >> STRIPE_SHIFT == 0
    ][:15]
    contents = {key: full[key] for key in full}
    put = [
        (key, {"n": number}) for number, key in enumerate((cast(str, SPLITTING.key), *keys, *keys))
    ]
    full.put_many(put)
    assert has_split(full)
    contents.update(put)
    assert full.get_many(contents) == contents
    assert sorted(full) == sorted(contents)
    assert full.delete_many(contents) == len(contents)


def some_slot(store: KVStore) -> int:
    """Return the offset of a live slot of the first segment."""
    extent = store._file.directory[0]
    for bucket in range(extent << EXTENT_SHIFT, extent + 1 << EXTENT_SHIFT, BUCKET_SIZE):
        for index, *_ in live_slots(store._file.map[bucket : bucket + BUCKET_SIZE]):
            return slot_offset(bucket, index)
    raise AssertionError("an empty segment")


def expire(store: KVStore) -> None:
    store._file.words[some_slot(store) + SLOT_EXPIRES_OFFSET >> 3] = 1


def spoil_key(store: KVStore) -> None:
    store._file.map[some_slot(store)] ^= 0x55


def spoil_key_size(store: KVStore) -> None:
    store._file.map[some_slot(store) + SLOT_KEY_SIZE_OFFSET] = 255


def spoil_page(store: KVStore) -> None:
    store._file.words[(some_slot(store) & -BUCKET_SIZE) >> 3] ^= 1


def spoil_directory(store: KVStore) -> None:
    directory = store._file.directory
    run = segment_run(MIN_DEPTH)
    directory[run] = directory[run - 1]


def free_an_extent(store: KVStore) -> None:
    extents = store._parts.extents
    with extents.lock, Rollback(store._file) as rollback:
        extents.free(extents.allocate(rollback), rollback)


@pytest.mark.parametrize(
    "harm", [expire, spoil_key, spoil_key_size, spoil_page, spoil_directory, free_an_extent]
)
def test_a_segment_out_of_the_ordinary_is_left_to_python(
    full: KVStore, harm: Callable[[KVStore], None]
) -> None:
    full._file.require_rebuild()
    harm(full)
    before = bytes(full._file.map[: full._file.size])
    assert create_splitting(full) == b"{}"
    assert bytes(full._file.map[: full._file.size]) == before


def test_rewrites_that_were_taken_back_are_counted(full: KVStore) -> None:
    """Pages of them may be in a copy, and must not look like those of the next one."""
    full._parts.versions.words[UNDONE_WORD] = 3
    before, _ = rewrites_of_first(full), create_splitting(full)
    assert has_split(full)
    assert rewrites_of_first(full) == before + 4


def rewrites_of_first(store: KVStore) -> int:
    first = store._file.directory[0] << EXTENT_SHIFT
    return store._file.words[first + SHAPE_OFFSET >> 3] >> SHAPE_REWRITES_SHIFT


# --- pages brought in ahead ---------------------------------------------------------------------


def test_what_is_in_extents_that_nobody_has_yet_stays(store: KVStore, fast: FastPath) -> None:
    """Their pages are brought in ahead of need, with whatever is there."""
    file = store._file
    before = fresh_end(store)
    create_large(store, 0, lambda: fresh_end(store) > before)
    first = fresh_end(store)
    garbage = bytes(range(256)) * ((file.size - first) // 256)
    file.map[first : file.size] = garbage
    for number in range(100):
        assert type(fast.create(f"other {number}", {"n": number}, None)) is int
    assert fresh_end(store) == first
    assert file.map[first : file.size] == garbage
    file.map[first : file.size] = bytes(file.size - first)


LARGE: Final = {"text": "x" * (MAX_VALUE_SIZE - 11)}


@contextmanager
def descriptor_replaced(store: KVStore, other: int) -> Iterator[None]:
    """Have another file by the number of the store's own; `other` is closed in the end."""
    number = store._file.fd
    kept = os.dup(number)
    os.dup2(other, number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)
        os.close(other)


def fresh_end(store: KVStore) -> int:
    """Return where the extents begin that nobody has taken so far, in bytes."""
    return store._file.shorts[FRESH_EXTENT_OFFSET >> 1] << EXTENT_SHIFT


def create_large(store: KVStore, first: int, until: Callable[[], bool]) -> int:
    """Create large records, numbered from `first`, until that is so; return the next number."""
    while not until():
        store.create(f"large {first}", LARGE)
        first += 1
    return first


def create_large_in_new_space(store: KVStore, other: int) -> int:
    """Create records where the file has just grown, with `other` for its descriptor; count all."""
    file = store._file
    size = file.size
    count = create_large(store, 0, lambda: file.size > size)
    size = file.size
    with descriptor_replaced(store, other):
        count = create_large(store, count, lambda: fresh_end(store) == size)
        assert file.size == size
    return count


def test_large_records_of_all_sizes_are_whole(open_store: OpenStore) -> None:
    store = open_store()
    sizes = [*range(7000, MAX_VALUE_SIZE - 11, 97)] * 3
    for number, size in enumerate(sizes):
        store.create(f"large {number}", {"text": "x" * size})
    for number in range(0, len(sizes), 2):
        store.delete(f"large {number}")
    for number in range(0, len(sizes), 2):
        store.create(f"large {number}", {"text": "y" * sizes[number]})
    store.close()
    store = open_store()
    for number, size in enumerate(sizes):
        assert store.read(f"large {number}") == {"text": "xy"[number % 2 == 0] * size}


def test_large_records_are_created_where_the_system_writes_no_zeros(open_store: OpenStore) -> None:
    """They only take a little longer: here the file is open for reading by that number."""
    store = open_store()
    count = create_large_in_new_space(store, os.open(store.path, os.O_RDONLY))
    store.close()
    store = open_store()
    assert [store.read(f"large {number}") for number in range(count)] == [LARGE] * count


def test_another_file_by_the_number_of_the_stores_is_left_alone(
    open_store: OpenStore, tmp_path: Path
) -> None:
    """A program that becomes a daemon closes all that it finds open, and opens files of its own."""
    other = tmp_path / "other"
    other.write_bytes(b"its own")
    store = open_store()
    count = create_large_in_new_space(store, os.open(other, os.O_RDWR))
    assert other.read_bytes() == b"its own"
    store.close()
    assert len(open_store()) == count


# --- misuse --------------------------------------------------------------------------------------


def arguments(store: KVStore) -> Iterator[tuple[int, object]]:
    """Yield what a fast path is made of, and in its place what is not that."""
    for place, wrong in enumerate(
        (
            (b"", None),
            ([], None),
            ([], b"1234567"),
            (bytearray(), None),
            (bytes(8 * VERSION_WORDS), bytearray(8 * VERSION_WORDS - 8), None),
            ((), (None,) * 16, None),
        )
    ):
        yield from ((place, each) for each in wrong)
    yield from ((6, None), (9, None))


def test_it_is_made_of_the_parts_of_an_open_store_only(store: KVStore) -> None:
    make_fast_path = selected.make_fast_path
    assert make_fast_path is not None
    file, slab = store._file, store._slab
    right = (
        file.map, file.live, slab.spare, slab.looked_at, store._parts.versions.words,
        store._locks.stripes, store._locks.space, store._file.hash_seed, wanted_shape(file),
        vars(kvstore.clock),
    )  # fmt: skip
    make_fast_path(*right).close()
    for place, wrong in arguments(store):
        with pytest.raises((TypeError, ValueError, BufferError)):
            make_fast_path(*(wrong if at == place else each for at, each in enumerate(right)))
    with pytest.raises(TypeError):
        cast(Any, make_fast_path).__new__(make_fast_path)


def test_the_map_stays_as_long_as_it_is_needed(store: KVStore, fast: FastPath) -> None:
    with pytest.raises(BufferError):
        store._file.map.close()
    assert store.read("key") == {"n": 1}


@pytest.mark.parametrize("place", [0, 40, 255, 2**21 - 47, 2**26, 2**32, 2**63, 2**64 - 1])
def test_no_offset_leads_out_of_the_map(fast: FastPath, place: int) -> None:
    assert fast.delete_slot(place, b"key") is fast.free(place) is None
    assert fast.has_magic(place or 2**15) is None
    assert fast.sweep(place or 2**15, RECORD_MAGIC, 0) is None


def test_nothing_is_taken_for_bytes_that_is_none(fast: FastPath) -> None:
    nothing = cast(bytes, None)
    for call in (
        lambda: fast.delete_slot(2**20 + 256, nothing),
        lambda: fast.create_under_locks(nothing, b"{}", 0, 0, 0, False),
        lambda: fast.create_under_locks(b"k", nothing, 0, 0, 0, False),
        lambda: fast.delete_under_locks(nothing, 0),
        lambda: fast.read_record(nothing, 0),
        lambda: fast.free(-1),
        lambda: copy.copy(fast),
        lambda: copy.copy(Lock()),
        lambda: Lock().release(),
    ):
        with pytest.raises((TypeError, OverflowError, RuntimeError)):
            call()
    assert fast.create_under_locks(b"k" * 200, b"{}", 0, 0, 0, False) is None
    assert fast.read_record(b"k" * 200, 0) is fast.read_record(b"", 0) is None
    assert fast.create_under_locks(b"k", b"x" * 17_000, 0, 0, 0, False) is None


def test_both_kinds_are_open_side_by_side(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it = open_store(tmp_path / "with.kvs")
    monkeypatch.setattr("kvstore.compiled.selected", PLAIN)
    without = open_store(tmp_path / "without.kvs")
    assert (with_it._fast is None, without._fast is None) == (False, True)
    for store in (with_it, without):
        store.create("key", {"n": 1})
        assert store.read("key") == {"n": 1}
        store.delete("key")
        with pytest.raises(KeyNotFoundError):
            store.read("key")


# --- forks ---------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("amid", ["_open_extent", "split_or_compact"])
def test_child_forked_amid_an_operation_leaves_the_file_alone(path: Path, amid: str) -> None:
    """By a signal handler, which runs where the operation runs Python, and returns in the child.

    The compiled code went on there: it had seen before that it may store through the map.
    """
    said = run_script(
        """
        from kvstore.file.rollback import Rollback
        from support.cases import CASES
        os.urandom = bytes
        case = next(case for case in CASES if case.name == "create and split")
        store = KVStore(sys.argv[1])
        if sys.argv[2] == "split_or_compact":
            case.prepare(store)
            # Which only the Python code takes.
            with store._parts.extents.lock, Rollback(store._file) as rollback:
                store._parts.extents.free(store._parts.extents.allocate(rollback), rollback)
        parts = store._slab if sys.argv[2] == "_open_extent" else store._parts.segments
        real = getattr(parts, sys.argv[2])
        children = []
        def and_fork(*arguments):
            result = real(*arguments)
            children.append(os.fork())
            if children[-1]:
                before = bytes(store._file.map[:store._file.size])
                _, status = os.waitpid(children[-1], 0)
                assert bytes(store._file.map[:store._file.size]) == before
                say("child ended with", os.waitstatus_to_exitcode(status))
            return result
        setattr(parts, sys.argv[2], and_fork)
        try:
            case.act(store)
        except StoreClosedError:
            if children != [0]:
                raise
        os._exit(5) if children == [0] else say(len(children), case.key in store)
        """,
        path,
        amid,
    )
    assert said == "child ended with 5\n1 True\n"
