"""Copies that some program made of a file, a page after the other, while a store wrote to it.

Such a copy has each page as it was at some moment; which, the order of copying tells. Keys that
nobody touched meanwhile are in it as they were, or the copy says that it is torn: no lookup, no
listing and no count may pass over one, and none may be created once more.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Final, TypeVar

from kvstore import CorruptStoreError, KeyExistsError, KeyNotFoundError, KVStore, StoreFullError
from kvstore.format.layout import (
    BUCKET_COUNT,
    BUCKET_SIZE,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    SEGMENT_SLOTS,
    SPLIT_AT,
    STATE_OFFSET,
    STRIPE_SHIFT,
    key_hash,
)

from .clock import FakeClock
from .components import replace_writes
from .damage import State
from .images import before_each_flush
from .workload import make_value

T = TypeVar("T")

PAGE: Final = BUCKET_SIZE
MAX_BYTES: Final = 8 * 1024 * 1024
_STRIPE: Final = 5
_HOMES: Final = (1, 2, 3, 9, 14, 15)
_STILL: Final = 400
_LOOKED_AT: Final = 60
_HEAD: Final = FIXED_EXTENTS * EXTENT_SIZE // PAGE


class History:
    """A store that is written to, closed, killed and opened, and its file at many moments.

    Attributes:
        still: keys that nobody touches from the first moment on.
        images: the file at each moment.
    """

    def __init__(self, path: Path, rng: random.Random, clock: FakeClock) -> None:
        self._path = path
        self._rng = rng
        self._clock = clock
        self.still: State = {}
        self.images: list[bytes] = []
        with KVStore(path, max_bytes=MAX_BYTES) as store:
            self._seed = seed = store._file.hash_seed
            # In one stripe, so that its segments fill, are rewritten and split; in a few home
            # buckets, so that most go on to the next ones.
            self._names = (
                name
                for name in map("{}".format, count())
                if (hash_of_name := key_hash(name.encode(), seed)) >> STRIPE_SHIFT == _STRIPE
                and hash_of_name % BUCKET_COUNT in _HOMES
            )
            self._moving: set[str] = set()
            for number in range(_STILL):
                key = next(self._names) if number % 4 else f"{'é' * 16}{number}"
                self.still[key] = make_value(key, number, rng.choice((0, 20, 200, 5_000)))
                store.create(key, self.still[key])
            # Those that were created before the moving ones go on to the next pages with them.
            self._create(store, SPLIT_AT - _STILL)
        self._see()

    def live(self, steps: int) -> "History":
        """Take so many steps, each with a few moments; return this."""
        acts = (
            *(self._fill, self._fill, self._empty, self._expire),
            *(self._rewrite, self._merge, self._close, self._close, self._be_killed),
            *(self._replace, self._replace),
        )
        self._store = KVStore(self._path, max_bytes=MAX_BYTES)
        with self._seen_at_rewrites():
            self._rng.choice((self._fill, self._rewrite))()
        for _ in range(steps):
            act = self._rng.choice(acts)
            with self._seen_at_rewrites():
                act()
            self._see()
        self._store.close()
        self._see()
        return self

    def _see(self) -> None:
        self.images.append(self._path.read_bytes())

    @contextmanager
    def _seen_at_rewrites(self) -> Iterator[None]:
        """Have a moment before each page that changes where a segment is written whole."""
        file = self._store._file
        write, write_word = file.write, file.write_word

        def watch(offset: int, data: bytes) -> None:
            if len(data) >= EXTENT_SIZE:
                self._see()
            write(offset, data)

        replace_writes(file, watch)
        try:
            yield
        finally:
            file.write, file.write_word = write, write_word

    def _create(self, store: KVStore, how_many: int) -> None:
        for _ in range(how_many):
            key = next(self._names)
            ttl = self._rng.choice((None, 50, 500))
            store.create(key, make_value(key, 1, self._rng.choice((0, 0, 60, 300))), ttl=ttl)
            self._moving.add(key)

    def _fill(self) -> None:
        self._create(self._store, self._rng.randrange(1, SEGMENT_SLOTS // 2))

    def _replace(self) -> None:
        """Put some keys, and delete some of these; reclaim what was retired for that."""
        for key in self._rng.sample(sorted(self._moving), len(self._moving) // 3):
            for mark in range(2, self._rng.randrange(3, 6)):
                size = self._rng.choice((0, 60, 300, 5_000))
                self._store.put(key, make_value(key, mark, size), self._rng.choice((None, 50)))
            if self._rng.random() < 0.3:
                self._moving.remove(key)
                self._store.delete(key)
        self._see()
        if self._rng.random() < 0.5:
            with before_each_flush(self._see):
                self._store._parts.reclaimer.reclaim()

    def _empty(self) -> None:
        for key in self._rng.sample(sorted(self._moving), len(self._moving) // 2):
            self._moving.remove(key)
            if key in self._store:
                self._store.delete(key)

    def _rewrite(self) -> None:
        """Have a segment rewritten in place, its keys back in their home buckets."""
        for key in self._rng.sample(sorted(self._moving), len(self._moving) * 9 // 10):
            self._moving.remove(key)
            if key in self._store:
                self._store.delete(key)
        hash_of_one = key_hash(self._rng.choice(sorted(self.still)).encode(), self._seed)
        self._store._parts.segments.split_or_compact(hash_of_one, self._clock.now_ms)
        self._see()
        self._close()

    def _merge(self) -> None:
        """Have buddies that were split become one, and others take the extents that are free."""
        self._create(self._store, SEGMENT_SLOTS // 2)
        for key in self._rng.sample(sorted(self._moving), len(self._moving) * 9 // 10):
            self._moving.remove(key)
            if key in self._store:
                self._store.delete(key)
        self._store._all_keys.merge_segments()
        self._see()
        if self._rng.random() < 0.5:
            self._close()
        for number in range(self._rng.randrange(6)):
            key = f"in what was freed {number}"
            self._store.put(key, make_value(key, number, self._rng.choice((300, 5_000, 16_000))))

    def _expire(self) -> None:
        self._clock.advance(60)
        if self._rng.random() < 0.5:
            self._store.purge_expired()

    def _close(self) -> None:
        self._store.close()
        self._see()
        self._store = KVStore(self._path, max_bytes=MAX_BYTES)
        self._fill_a_little()

    def _be_killed(self) -> None:
        crashed = self._path.read_bytes()
        self._store.close()
        self._path.write_bytes(crashed)
        with before_each_flush(self._see):
            self._store = KVStore(self._path, max_bytes=MAX_BYTES)
        self._fill_a_little()

    def _fill_a_little(self) -> None:
        self._create(self._store, self._rng.randrange(3))


# --- copies --------------------------------------------------------------------------------------


def differing_pages(before: bytes, after: bytes) -> list[int]:
    """Return the numbers of the pages that are not the same in both."""
    length = max(len(before), len(after))
    return [
        page
        for page in range(length // PAGE)
        if before[page * PAGE : (page + 1) * PAGE] != after[page * PAGE : (page + 1) * PAGE]
    ]


def forwards(images: list[bytes], cuts: list[int]) -> bytes:
    """Copy from the first page on; before the page of each cut, the next moment has come."""
    copy = bytearray()
    ends = [*cuts, len(images[-1]) // PAGE]
    for image, end in zip(images, ends, strict=True):
        start = len(copy)
        copy += image[start : max(end * PAGE, start)]
    return bytes(copy)


def backwards(images: list[bytes], cuts: list[int]) -> bytes:
    """Copy from the last page that there was at first; after each cut the next moment has come."""
    copy = bytearray(images[0])
    end = len(copy)
    for image, cut in zip(images[1:], reversed(cuts), strict=True):
        end = min(cut * PAGE, end)
        copy[:end] = image[:end].ljust(end, b"\0")
    return bytes(copy)


def shuffled(images: list[bytes], rng: random.Random) -> bytes:
    """Copy the pages in any order, each at any moment."""
    length = len(rng.choice((images[0], images[-1])))
    copy = bytearray()
    while len(copy) < length:
        pages = rng.choice((1, 1, 2, 8))
        copy += rng.choice(images)[len(copy) :][: pages * PAGE].ljust(pages * PAGE, b"\0")
    return bytes(copy[:length])


def tear(images: list[bytes], rng: random.Random) -> tuple[str, bytes]:
    """Make a copy of a file while the moments of a part of its history pass.

    As a rule its head is of a moment when the file was closed: else its records alone count.
    """
    closed = [number for number, image in enumerate(images) if image[STATE_OFFSET]]
    whole_head = rng.random() < 0.8
    number = rng.choice(closed) if whole_head else rng.randrange(len(images))
    more = rng.choice((1, 1, 2, 5, len(images)))
    before = images[max(number - more, 0) : number + 1]
    after = images[number : number + more + 1]
    kind = rng.choice(("forwards", "backwards", "shuffled"))
    what = f"{kind}, {more} moments around {number}"
    if kind == "shuffled":
        copy = shuffled([*before, *after[1:]], rng)
        head = images[number][: _HEAD * PAGE] if whole_head else b""
        return what, head + copy[len(head) :]
    # Forwards the head is of the first moment, backwards of the last.
    moments = after if kind == "forwards" else before
    pages = differing_pages(moments[0], moments[-1])
    pages = [page for page in pages if page >= _HEAD or not whole_head] or [_HEAD]
    cuts = sorted(rng.choice(pages) for _ in moments[1:])
    copy = (forwards if kind == "forwards" else backwards)(moments, cuts)
    return f"{what}, cut at pages {cuts}", copy


# --- their use -----------------------------------------------------------------------------------


def use(path: Path, copy: bytes, still: State, rng: random.Random) -> bool:
    """Open a copy and look for each key that nobody touched; return whether it was refused."""
    path.write_bytes(copy)
    try:
        store = KVStore(path, max_bytes=MAX_BYTES)
    except CorruptStoreError:
        assert path.read_bytes() == copy, "a file that was refused has changed"
        return True
    with store:
        looked_at = rng.sample(sorted(still), _LOOKED_AT)
        for key in still:
            assert _or_torn(lambda: key in store) in (True, None), f"{key!r}: in"  # noqa: B023
        for key in looked_at:
            look_at(store, key, still[key])
        go_through(store, still)
        # Nor does what is written to the copy do away with them.
        for number in range(100):
            _or_torn(lambda: store.create(f"in the copy {number}", {"n": number}))  # noqa: B023
        for key in names(store) - still.keys():
            with suppress(CorruptStoreError, KeyNotFoundError):  # it went while it was copied
                store.delete(key)
        for key in looked_at:
            look_at(store, key, still[key])
        for key in looked_at[::9]:
            try:
                store.delete(key)
                store.create(key, still[key])
            except CorruptStoreError:
                continue
    use_further(path, {}, rng)  # some of the keys were deleted by now
    path.write_bytes(copy)
    use_further(path, still, rng)
    return False


def use_further(path: Path, still: State, rng: random.Random) -> None:
    """Create records in a copy, be killed or close it; look for them, and for what was there."""
    created: State = {}
    try:
        store = KVStore(path, max_bytes=MAX_BYTES)
    except CorruptStoreError:  # it was closed after it had met damage, and told of it
        return
    with store:
        for number in range(60):
            key = f"further {number}"
            value = make_value(key, number, rng.choice((0, 60, 200, 300, 1_000, 5_000)))
            with suppress(CorruptStoreError, StoreFullError):
                store.create(key, value)
                created[key] = value
        left = path.read_bytes()
    if rng.random() < 0.7:
        path.write_bytes(left)
    with KVStore(path, max_bytes=MAX_BYTES) as store:
        for key, value in (still | created).items():
            assert _or_torn(lambda: store.read(key)) in (value, None), f"{key!r}: after"  # noqa: B023


def look_at(store: KVStore, key: str, value: dict[str, object]) -> None:
    """Assert that each way to look for a key finds it, or says that the file is torn."""
    assert _or_torn(lambda: store.read(key)) in (value, None), f"{key!r}: read"
    assert _or_torn(lambda: store.get(key, {})) in (value, None), f"{key!r}: get"
    _or_torn(lambda: store.ttl(key))
    try:
        store.create(key, {})
    except (KeyExistsError, CorruptStoreError):
        return
    raise AssertionError(f"{key!r}: created once more")


def go_through(store: KVStore, still: State) -> None:
    """Assert that listings and counts leave none out without saying so."""
    for act in (lambda: set(store), lambda: set(dict(store.items()))):
        seen = _or_torn(act)
        left_out = still.keys() - seen if seen is not None else ()
        assert not left_out, f"{len(left_out)} keys left out"
    number = _or_torn(lambda: len(store))
    assert number is None or number >= len(still), f"{number:,} keys, {len(still):,} untouched"


def names(store: KVStore) -> set[str]:
    """Return the keys that it lists, until it says that it can tell no more."""
    seen: set[str] = set()
    try:
        for key in store:
            seen.add(key)
    except CorruptStoreError:
        pass
    return seen


def _or_torn(act: Callable[[], T]) -> T | None:
    """Return what it returns; None where it says that something is not as it should be."""
    try:
        return act()
    except CorruptStoreError:
        return None
    except KeyNotFoundError as error:
        raise AssertionError(f"not there: {error}") from error
