"""The operations that are interrupted and cut short at every step, each where it has most to do.

A case prepares a store and tells the one call that is then hurt, and which key it changes. Whatever
becomes of the call, every other key is as it was, and that one is as before or as after.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final
from unittest import mock

from kvstore import KVStore, StoreFullError
from kvstore.format.layout import (
    BLOCK_SIZES,
    BUCKET_COUNT,
    EXTENT_SHIFT,
    FREE_EXTENTS_OFFSET,
    FRESH_EXTENT_OFFSET,
    NO_EXTENT,
    SLOT_COUNT,
    SPLIT_AT,
    STRIPE_SHIFT,
    class_head_offset,
    key_hash,
)

from .clock import FakeClock
from .platforms import IN_PLACE
from .workload import Value, make_value

State = dict[str, Value]
Prepare = Callable[[KVStore], None]
Act = Callable[[KVStore], object]

HASH_SEED: Final = 0
MAX_BYTES: Final = 4 * 1024 * 1024
KEY: Final = "the key"
LONG_KEY: Final = "é" * 31 + "k"
VALUE: Final = make_value(KEY, 1, 30)
OTHER: Final = make_value(KEY, 4, 40)
LARGE: Final = make_value(KEY, 2, 15_000)
HUGE: Final = make_value(KEY, 3, 16_200)
SIZEABLE: Final = make_value(KEY, 5, 7_000)
_TTL_SECONDS: Final = 100


def _nothing(_store: KVStore) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One operation under way.

    Attributes:
        name: for messages.
        prepare: fills the store, which holds a few keys already; then it is closed.
        act: the call.
        key: what it changes; None where it changes nothing that can be seen.
        value: what the key has after it; None where it is gone.
        later: seconds between the two.
        first: what is done in the same opening as the call, and so may not be on the disk.
        empties: nothing is left after it.
        pristine: the call, or `first`, is the store's first change since it was opened.
        probes: there is room for more, before and after.
        may_be_full: it is refused for want of room, and nothing has changed.
    """

    name: str
    prepare: Prepare
    act: Act
    key: str | None = None
    value: Value | None = None
    later: int = 0
    first: Act = _nothing
    empties: bool = False
    pristine: bool = False
    may_be_full: bool = False
    probes: bool = True

    def run(self, store: KVStore) -> None:
        """Do the call."""
        if self.may_be_full:
            with suppress(StoreFullError):
                self.act(store)
        else:
            self.act(store)

    def after(self, before: State) -> State:
        """Return the contents once the call was done."""
        after = {} if self.empties else dict(before)
        if self.key is not None and not self.may_be_full:
            if self.value is None:
                after.pop(self.key, None)
            else:
                after[self.key] = self.value
        return after


class Prepared:
    """A case with the file that it begins with, as closed.

    Attributes:
        closed: what that holds.
        before: what is there just before the call.
        after: and after it.
    """

    def __init__(self, case: Case, folder: Path, clock: FakeClock) -> None:
        self.case = case
        file = folder / "prepared.kvs"
        file.unlink(missing_ok=True)
        with (
            mock.patch("os.urandom", bytes),  # a hash seed of 0
            KVStore(file, max_bytes=MAX_BYTES) as store,
        ):
            for number in range(20):
                key = f"{'é' * 16 if number % 5 == 0 else ''}{number}"
                value = make_value(key, number, (0, 50, 200, 700, 3_000)[number % 5])
                store.create(key, value)
            case.prepare(store)
        clock.advance(case.later)
        # Read through a copy: to be opened is the one thing that a case may be about.
        self.contents = file.read_bytes()
        with KVStore(file, max_bytes=MAX_BYTES) as store:
            self.closed = dict(store.items())
            case.first(store)
            self.before = dict(store.items())
        self.after = case.after(self.before)
        file.unlink()

    def open(self, file: Path, *, durable: bool = False) -> KVStore:
        """Open a copy of the file at the moment before the call."""
        file.write_bytes(self.contents)
        store = KVStore(file, max_bytes=MAX_BYTES, durable=durable)
        if not self.case.pristine:
            store.create("warm", {})
            store.delete("warm")
        self.case.first(store)
        return store


@contextmanager
def write_path(in_place: bool) -> Iterator[None]:
    """Have stores write through the map, or by calls of the operating system if it has them."""
    chosen = in_place or False not in IN_PLACE
    with mock.patch("kvstore.file.platform.system.overwrites_in_place", return_value=chosen):
        yield


def make_probes(store: KVStore) -> None:
    """Use an opened store as anybody would: it is not only readable, it works."""
    for number, size in enumerate((0, 50, 3_000)):
        store.create(f"probe {number}", make_value("probe", number, size), ttl=10**6)
    for number in range(3):
        assert store.read(f"probe {number}")["mark"] == number
        store.delete(f"probe {number}")


# --- what is there before the call -------------------------------------------------------------


def _keys_of_first_segment(count: int, buckets: int = BUCKET_COUNT) -> list[str]:
    """Return keys whose hashes lead to the first stripe, spread evenly over its first buckets."""
    left = [-(-count // buckets)] * buckets
    keys: list[str] = []
    for number in range(10**6):
        hashed = key_hash(f"s{number}".encode(), HASH_SEED)
        home = hashed & BUCKET_COUNT - 1
        if hashed >> STRIPE_SHIFT == 0 and home < buckets and left[home]:
            left[home] -= 1
            keys.append(f"s{number}")
            if len(keys) == count:
                break
    return keys


def _create_all(store: KVStore, keys: list[str], ttl: int | None = None) -> None:
    for key in keys:
        store.create(key, {}, ttl)


def _full_segment(store: KVStore) -> None:
    _create_all(store, _keys_of_first_segment(SPLIT_AT)[1:-30])
    _fill_first_segment(store)


def _nearly_empty_buddies(store: KVStore) -> None:
    """Have the first segment split, and split again, and delete most of what they have."""
    keys = _keys_of_first_segment(2 * SPLIT_AT)
    _create_all(store, keys[:-50])
    _create_all(store, keys[-50:], _TTL_SECONDS)
    for key in keys[20:-50]:
        store.delete(key)


def _segment_of_tombstones(store: KVStore) -> None:
    """Fill whole buckets, then delete more than half, and let some of the others expire."""
    keys = _keys_of_first_segment(SPLIT_AT, SPLIT_AT // SLOT_COUNT)[1:-40]
    _create_all(store, keys[5:])
    _create_all(store, keys[:5], _TTL_SECONDS)
    for key in keys[5:-100]:
        store.delete(key)
    _fill_first_segment(store)


def _fill_first_segment(store: KVStore) -> None:
    """Use up empty slots, until the next key makes the segment be rewritten."""
    extent = store._file.directory[0]
    number = 0
    while store._parts.slots.used_slot_count(extent << EXTENT_SHIFT) < SPLIT_AT:
        key = f"fill{number}"
        number += 1
        if key_hash(key.encode(), HASH_SEED) >> STRIPE_SHIFT == 0:
            store.create(key, {})


def _extents_left(store: KVStore) -> bool:
    """Return whether there is an extent to take, or a free block of the class of the largest."""
    file = store._file
    return (
        file.shorts[FRESH_EXTENT_OFFSET >> 1] < file.extent_count
        or file.shorts[FREE_EXTENTS_OFFSET >> 1] != NO_EXTENT
        or file.shorts[class_head_offset(len(BLOCK_SIZES) - 1) >> 1] != NO_EXTENT
    )


def _file_about_to_grow(store: KVStore) -> None:
    number = 0
    while _extents_left(store):
        store.create(f"f{number}", make_value("f", number, 16_200))
        number += 1


def _file_without_room(store: KVStore) -> None:
    """Fill the file up to its limit with large records."""
    with suppress(StoreFullError):
        for number in range(10**6):
            store.create(f"f{number}", make_value("f", number, 16_200))


def _file_without_room_but_by_expiry(store: KVStore) -> None:
    store.create("expires", make_value("e", 0, 16_200), ttl=_TTL_SECONDS)
    _file_without_room(store)


def _file_of_sparse_extents(store: KVStore) -> None:
    """Fill the file, and delete most of what is in a few extents of one class."""
    for number in range(50):
        store.create(f"s{number}", make_value("s", number, 3_000))
    _file_without_room(store)
    for number in range(50):
        if number % 10:
            store.delete(f"s{number}")


def _scattered(store: KVStore) -> None:
    """Have few records left, in extents far apart."""
    for number in range(60):
        store.create(f"f{number}", make_value("f", number, 16_200))
    for number in range(50):
        store.create(f"s{number}", make_value("s", number, 3_000))
    for number in range(60):
        if number % 30 != 29:
            store.delete(f"f{number}")
        if number < 50 and number % 20:
            store.delete(f"s{number}")


def _segment_behind_all_others(store: KVStore) -> None:
    """Have a segment split once the extents of a new file are in use, and free most of these."""
    _full_segment(store)
    names = (
        name
        for name in map("f{}".format, count())
        if key_hash(name.encode(), HASH_SEED) >> STRIPE_SHIFT
    )
    large = []
    while _extents_left(store):
        large.append(next(names))
        store.create(large[-1], make_value("f", 0, 16_200))
    store.create(_FIRST, {})
    for name in large:
        store.delete(name)


def _extent_with_one_block(store: KVStore) -> None:
    store.create(KEY, LARGE)


def _full_extent(store: KVStore) -> None:
    """Fill an extent of a class of few blocks, the key's among them."""
    store.create(KEY, LARGE)
    _almost_full_extent(store)


def _almost_full_extent(store: KVStore) -> None:
    for number in range(3):
        store.create(f"x{number}", make_value(KEY, number, 15_000))


def _freed_block(store: KVStore) -> None:
    for number in range(5):
        store.create(f"x{number}", VALUE)
    store.delete("x1")
    store.delete("x3")


def _neighbours(store: KVStore) -> None:
    store.create("x0", VALUE)
    store.create(KEY, VALUE)
    store.create(LONG_KEY, VALUE, ttl=10**6)
    store.create("x1", VALUE)


def _put_again(store: KVStore) -> None:
    """Have a retired record of the key, and one that nobody was promised."""
    store.put(KEY, LARGE)
    store.put(KEY, VALUE)


def _retire_and_mark(store: KVStore) -> None:
    """Have retired and marked records, some of them all that their extents hold."""
    for value in (LARGE, VALUE, OTHER):
        store.put(KEY, value)
        store.put("x0", value)
        store.sync()
    store.delete("x0")
    store.put(LONG_KEY, LARGE, 50)
    store.delete(LONG_KEY)


def _retire_in_full_file(store: KVStore) -> None:
    """Have the only room in a full file be in a retired record."""
    store.delete("f0")
    store.put("f1", HUGE)


def _only_key(store: KVStore) -> None:
    for key in list(store):
        store.delete(key)
    store.create(KEY, LARGE)


def _marked_keys(store: KVStore) -> None:
    """Have records that expire and took the places of others."""
    _expired_keys(store)
    for number in range(6):
        store.put(f"e{number}", VALUE, _TTL_SECONDS)


def _expired_key(store: KVStore) -> None:
    store.create(KEY, make_value(KEY, 3, 400), ttl=_TTL_SECONDS)


def _expired_keys(store: KVStore) -> None:
    for number in range(6):
        size = (10, 700, 15_000)[number % 3]
        store.create(f"e{number}", make_value("e", number, size), ttl=_TTL_SECONDS)
        store.create(f"{'é' * 20}{number}", {}, ttl=_TTL_SECONDS + number % 2 * 10**6)


# --- the cases ---------------------------------------------------------------------------------


def _create(key: str, value: Value, ttl: int | None = None) -> Act:
    return lambda store: store.create(key, value, ttl)


def _put(key: str, value: Value, ttl: int | None = None) -> Act:
    return lambda store: store.put(key, value, ttl)


def _touch(key: str, ttl: int | None) -> Act:
    return lambda store: store.touch(key, ttl)


def _pop(key: str) -> Act:
    return lambda store: store.pop(key)


def _setdefault(key: str, value: Value) -> Act:
    return lambda store: store.setdefault(key, value)


# What changes is the last of a batch: closed amid it, that ends where another item would follow.


def _put_many(*pairs: tuple[str, Value]) -> Act:
    return lambda store: store.put_many(pairs)


def _delete_many(*keys: str) -> Act:
    return lambda store: store.delete_many(keys)


def _merge(store: KVStore) -> None:
    store._all_keys.merge_segments()


def _reclaim(store: KVStore) -> None:
    store._parts.reclaimer.reclaim()


def _delete(key: str) -> Act:
    return lambda store: store.delete(key)


_FIRST: Final = _keys_of_first_segment(1)[0]
_LATER: Final = 2 * _TTL_SECONDS

CASES: Final = (
    Case("create", _nothing, _create(KEY, VALUE), KEY, VALUE),
    Case("create first", _nothing, _create(KEY, VALUE), KEY, VALUE, pristine=True),
    Case("create long key", _nothing, _create(LONG_KEY, VALUE), LONG_KEY, VALUE),
    Case("create with TTL", _neighbours, _create("ttl", VALUE, 50), "ttl", VALUE),
    Case("create into a freed block", _freed_block, _create(KEY, VALUE), KEY, VALUE),
    Case("create in a new extent", _nothing, _create(KEY, LARGE), KEY, LARGE),
    Case("create the last of an extent", _almost_full_extent, _create(KEY, LARGE), KEY, LARGE),
    Case("create over an expired one", _expired_key, _create(KEY, VALUE), KEY, VALUE, _LATER),
    Case("create and grow", _file_about_to_grow, _create(KEY, LARGE), KEY, LARGE),
    Case("create and split", _full_segment, _create(_FIRST, VALUE), _FIRST, VALUE),
    Case(
        "create and rewrite", _segment_of_tombstones, _create(_FIRST, VALUE), _FIRST, VALUE, _LATER
    ),
    Case(
        "create in a full file",
        _file_without_room,
        _create(KEY, HUGE),
        may_be_full=True,
        pristine=True,
        probes=False,
    ),
    Case(
        "create in what expired",
        _file_without_room_but_by_expiry,
        _create(KEY, HUGE),
        KEY,
        HUGE,
        _LATER,
        pristine=True,
        probes=False,
    ),
    Case(
        "make room",
        _file_of_sparse_extents,
        _create(KEY, SIZEABLE),
        KEY,
        SIZEABLE,
        pristine=True,
        probes=False,
    ),
    Case("compact", _scattered, KVStore.compact),
    Case("compact first", _scattered, KVStore.compact, pristine=True),
    Case("compact the table", _segment_behind_all_others, KVStore.compact),
    Case("put", _neighbours, _put(KEY, OTHER), KEY, OTHER),
    Case("put first", _neighbours, _put(KEY, OTHER), KEY, OTHER, pristine=True),
    Case("put an absent key", _nothing, _put(KEY, VALUE), KEY, VALUE),
    Case("put a long key", _neighbours, _put(LONG_KEY, OTHER, 50), LONG_KEY, OTHER),
    Case("put over a fresh one", _nothing, _put(KEY, OTHER), KEY, OTHER, first=_put(KEY, VALUE)),
    Case("put over an expired one", _expired_key, _put(KEY, VALUE), KEY, VALUE, _LATER),
    Case("put again", _neighbours, _put(KEY, OTHER), KEY, OTHER, first=_put_again),
    Case("put a larger one", _neighbours, _put(KEY, LARGE), KEY, LARGE),
    Case("put a smaller one", _extent_with_one_block, _put(KEY, VALUE, 50), KEY, VALUE),
    Case("put and grow", _file_about_to_grow, _put("f0", LARGE), "f0", LARGE),
    Case(
        "put in a full file",
        _file_without_room,
        _put("f0", HUGE),
        may_be_full=True,
        pristine=True,
        probes=False,
    ),
    Case(
        "put in what was retired",
        _file_without_room,
        _put("f2", HUGE),
        "f2",
        HUGE,
        first=_retire_in_full_file,
        pristine=True,
        probes=False,
    ),
    Case("touch", _neighbours, _touch(KEY, 50), KEY, VALUE),
    Case("touch a long key", _neighbours, _touch(LONG_KEY, None), LONG_KEY, VALUE),
    Case(
        "put many",
        _neighbours,
        _put_many(("x0", VALUE), ("x1", VALUE), (KEY, OTHER)),
        KEY,
        OTHER,
    ),
    Case("put many first", _nothing, _put_many((KEY, LARGE)), KEY, LARGE, pristine=True),
    Case("put many and grow", _file_about_to_grow, _put_many((KEY, HUGE)), KEY, HUGE),
    Case("delete many", _neighbours, _delete_many("none", "no other", KEY), KEY),
    Case("delete many first", _neighbours, _delete_many("none", KEY), KEY, pristine=True),
    Case("set a default", _nothing, _setdefault(KEY, VALUE), KEY, VALUE),
    Case("set no default", _neighbours, _setdefault(KEY, OTHER), KEY, VALUE),
    Case("pop", _neighbours, _pop(KEY), KEY),
    Case("pop what was put", _neighbours, _pop(KEY), KEY, first=_put(KEY, LARGE)),
    Case("pop an item", _only_key, KVStore.popitem, KEY, empties=True),
    Case("delete what was put", _neighbours, _delete(KEY), KEY, first=_put(KEY, OTHER)),
    Case("delete what was put again", _neighbours, _delete(KEY), KEY, first=_put_again),
    Case("delete a fresh replacement", _nothing, _delete(KEY), KEY, first=_put_again),
    Case("clear", _neighbours, KVStore.clear, first=_retire_and_mark, empties=True),
    Case("clear first", _neighbours, KVStore.clear, empties=True, pristine=True),
    Case(
        "clear and shrink",
        _file_without_room,
        KVStore.clear,
        empties=True,
        pristine=True,
        probes=False,
    ),
    Case("reclaim", _neighbours, _reclaim, first=_retire_and_mark),
    Case("sync what was put", _neighbours, KVStore.sync, first=_retire_and_mark),
    Case("close with retired records", _neighbours, KVStore.close, first=_retire_and_mark),
    Case("purge replacements", _marked_keys, KVStore.purge_expired, later=_LATER),
    Case("delete", _neighbours, _delete(KEY), KEY),
    Case("delete first", _neighbours, _delete(KEY), KEY, pristine=True),
    Case("delete long key", _neighbours, _delete(LONG_KEY), LONG_KEY),
    Case("delete from a full extent", _full_extent, _delete(KEY), KEY),
    Case("delete the last of an extent", _extent_with_one_block, _delete(KEY), KEY),
    Case("purge", _expired_keys, KVStore.purge_expired, later=_LATER),
    Case("purge first", _expired_keys, KVStore.purge_expired, later=_LATER, pristine=True),
    Case("merge", _nearly_empty_buddies, _merge),
    Case("merge what expired", _nearly_empty_buddies, _merge, later=_LATER, pristine=True),
    Case("sync", _neighbours, KVStore.sync),
    Case("close", _neighbours, KVStore.close),
    Case("close unchanged", _neighbours, KVStore.close, pristine=True),
)
