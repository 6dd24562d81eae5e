"""A store with the compiled code beside one without: the same results, errors and bytes.

Both are told the same. Compared is what each step returned or raised, and after it the whole file
but for its holder.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MIN_MAX_BYTES, SEED, scaled, seeded_random
from support.cases import CASES
from support.clock import FakeClock
from support.damage import KINDS as DAMAGES
from support.damage import Original, State
from support.disks import quick_folder
from support.edge_values import MEMBERS, TTLS, VALUES
from support.forgery import KINDS as FORGERIES
from support.forgery import Forge, build_deep
from support.keys import IMPOSSIBLE, contended_key
from support.platforms import IN_PLACE
from support.scripted_store import FOREIGN, Step
from support.store_pair import StorePair
from support.values import json_value, sized_value

import kvstore.clock
from kvstore import KVStore
from kvstore.compiled import IMPLEMENTATION
from kvstore.format.layout import (
    CONTROL_OFFSET,
    SLOT_COUNT,
    SLOT_EXPIRES_OFFSET,
    SLOT_SIZE,
    SPLIT_AT,
    STRIPE_SHIFT,
    key_hash,
    slot_offset,
)

pytestmark = pytest.mark.skipif(
    IMPLEMENTATION != "compiled", reason="the compiled code is not built, or not in use"
)

# Before 1970, at its beginning, now, beyond the last moment that the file can have, beyond all.
MOMENTS: Final = (-1e9, -0.001, 0.0, 0.001, 1.7e9, 2**48 / 1000 - 10**10 - 1, 2**48 / 1000, 1e12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with quick_folder(tmp_path_factory.mktemp("pair")) as quick:
        yield quick


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[StorePair]:
    with StorePair(folder) as pair:
        yield pair


# --- random operations -------------------------------------------------------------------------

values = st.one_of(
    json_value,
    st.builds(sized_value, st.one_of(st.integers(12, 700), st.integers(12, 16_384))),
    st.sampled_from(VALUES),
    st.builds(lambda member: {"m": member}, st.sampled_from(MEMBERS)),
)
ttls = st.one_of(st.none(), st.none(), st.integers(1, 30), st.sampled_from(TTLS))
keys = st.one_of(
    *[contended_key] * 6,
    st.sampled_from([key for key in IMPOSSIBLE.values() if type(key) is not object]),
    st.sampled_from(MEMBERS),
)
times = st.one_of(
    st.integers(0, 2**48 - 1),
    st.integers(1_699_999_990_000, 1_700_000_040_000),
    st.sampled_from((0, 1, 2**48, 2**63, 2**64 - 1)),
)


def calls(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    return st.tuples(st.just("call"), st.just(name), *arguments)


creates = calls("create", keys, values, ttls)
steps = st.one_of(
    creates,
    creates,
    creates,
    calls("create", contended_key, st.just({}), st.integers(1, 5)),
    calls("put", keys, values, ttls),
    calls("put", contended_key, st.just({"n": 1}), st.sampled_from((None, 1, 5))),
    calls("put", contended_key, st.builds(sized_value, st.integers(12, 300))),
    calls("__setitem__", keys, values),
    calls("touch", keys, ttls),
    calls("touch", contended_key, st.integers(1, 5)),
    calls("setdefault", keys, values, ttls),
    calls("pop", keys),
    calls("pop", keys, st.just("another")),
    calls("popitem"),
    calls("get_many", st.lists(keys, max_size=70)),
    calls("put_many", st.lists(st.tuples(keys, values), max_size=10), ttls),
    calls("put_many", st.lists(st.tuples(contended_key, st.just({"n": 1})), max_size=70)),
    calls("update", st.dictionaries(contended_key, values, max_size=5)),
    calls("delete_many", st.lists(keys, max_size=70)),
    calls("__bool__"),
    calls("delete", keys),
    calls("delete", contended_key),
    calls("__delitem__", keys),
    st.tuples(st.just("look"), keys),
    calls("get", keys, st.just("another")),
    st.tuples(
        st.just("restore"),
        contended_key,
        st.sampled_from((b"{}", b'{"a":1}', b"[")),
        st.tuples(times, times),
        st.booleans(),
    ),
    calls("purge_expired"),
    calls("sync"),
    calls("sync"),
    st.just(("reclaim",)),
    st.just(("merge",)),
    calls("compact"),
    calls("__len__"),
    st.sampled_from((("keys",), ("items",), ("stats",), ("close",), ("open",))),
    st.sampled_from((("reopen",), ("crash",))),
    st.tuples(st.just("set_clock"), st.sampled_from(MOMENTS)),
    st.tuples(
        st.just("advance_clock"),
        st.one_of(st.integers(0, 20), st.integers(-20, 0), st.sampled_from((1e10, -1e10))),
    ),
)


@settings(max_examples=scaled(50))
@given(
    st.lists(steps, max_size=60), st.integers(0, 2**32), st.sampled_from(IN_PLACE), st.booleans()
)
def test_both_do_the_same_whatever_they_are_told(
    pair: StorePair, told: list[Step], seed: int, in_place: bool, durable: bool
) -> None:
    pair.do(
        ("new", seed, in_place, MIN_MAX_BYTES, durable),
        *told,
        ("keys",),
        ("items",),
        ("close",),
        ("open",),
        ("items",),
        ("end",),
    )


@pytest.mark.parametrize("in_place", IN_PLACE)
def test_both_take_and_refuse_the_same(pair: StorePair, in_place: bool) -> None:
    told: list[Step] = [("new", 1, in_place)]
    told += [("call", "create", f"m {n}", {"m": member}) for n, member in enumerate(MEMBERS)]
    told += [("call", "create", f"v {n}", value) for n, value in enumerate(VALUES)]
    told += [("call", "create", f"t {n}", {}, ttl) for n, ttl in enumerate(TTLS)]
    told += [("call", "put", "key", value) for value in VALUES]
    told += [("call", "touch", "key", ttl) for ttl in TTLS]
    for key in (*IMPOSSIBLE.values(), *MEMBERS, *VALUES[:20]):
        if type(key) is not object:
            told += [("call", "create", key, {}), ("look", key), ("call", "delete", key)]
            told += [("call", "put", key, {}), ("call", "touch", key, 5), ("call", "pop", key)]
    for depth in (300, 5_000, 100_000):
        told += [("create_deep", "deep", depth, kind) for kind in (dict, list, tuple)]
    outcomes = pair.do(*told, ("items",), ("reopen",), ("items",), ("end",))
    own = [outcome.text for outcome in outcomes if outcome.text.startswith(FOREIGN)]
    assert not own, own[0]


# --- a long walk -------------------------------------------------------------------------------


class Walk:
    """Steps that fill a store of the least size, empty it, and let it expire, again and again."""

    def __init__(self, rng: random.Random, seed: int) -> None:
        self._rng = rng
        self._hash_seed = int.from_bytes(random.Random(seed).randbytes(8), "little")
        self._live: list[str] = []
        self._mark = 0
        self._crowd = self._crowded()

    def _crowded(self) -> Iterator[str]:
        """Yield keys of one stripe, so that its segments are split and rewritten."""
        number = 0
        while True:
            number += 1
            key = f"{'é' * 16 if number % 7 == 0 else ''}{number}"
            if key_hash(key.encode(), self._hash_seed) >> STRIPE_SHIFT == 3:
                yield key

    def _key(self) -> str:
        self._mark += 1
        start = self._rng.choice(("", "", "🐍" * 8, "é" * 16 + "x" * self._rng.randrange(8)))
        return (
            f"{start}{self._mark}" if self._rng.random() < 0.9 else "🐍" * 27 + str(self._mark)[:5]
        )

    def crowd(self, count: int) -> Iterator[Step]:
        for key in islice(self._crowd, count):
            self._live.append(key)
            yield "call", "create", key, {}, self._rng.choice((None, None, None, 60))

    def fill(self, count: int, sizes: tuple[int, ...]) -> Iterator[Step]:
        for _ in range(count):
            key, size = self._key(), self._rng.choice(sizes)
            self._live.append(key)
            value = {"n": self._mark, "p": "x" * self._rng.randrange(size)}
            yield "call", "create", key, value, self._rng.choice((None, None, 5, 60))

    def drop(self, share: float) -> Iterator[Step]:
        for _ in range(round(share * len(self._live))):
            yield "call", "delete", self._live.pop(self._rng.randrange(len(self._live)))

    def replace(self, count: int, sizes: tuple[int, ...]) -> Iterator[Step]:
        for key in self._rng.choices(self._live or ["none"], k=count):
            value = {"p": "x" * self._rng.randrange(self._rng.choice(sizes))}
            ttl = self._rng.choice((None, 5, 60))
            yield self._rng.choice(
                (
                    ("call", "put", key, value, ttl),
                    ("call", "put", key, value),
                    ("call", "touch", key, ttl),
                    ("call", "pop", key, None),
                )
            )
            if self._rng.random() < 0.05:
                yield "call", "sync"
        yield from self.in_batches(count, sizes)

    def in_batches(self, count: int, sizes: tuple[int, ...]) -> Iterator[Step]:
        for _ in range(count // 50):
            batch = self._rng.choices(self._live or ["none"], k=self._rng.choice((3, 40, 80)))
            value = {"p": "x" * self._rng.randrange(self._rng.choice(sizes))}
            yield "call", "put_many", [(key, value) for key in batch], self._rng.choice((None, 60))
            yield "call", "delete_many", self._rng.choices(batch, k=len(batch) // 4)
            yield "call", "get_many", batch

    def reclaim(self) -> Iterator[Step]:
        yield ("reclaim",)

    def merge(self) -> Iterator[Step]:
        yield ("merge",)

    def compact(self) -> Iterator[Step]:
        yield ("call", "compact")

    def meet_again(self, count: int) -> Iterator[Step]:
        for key in self._rng.choices(self._live or ["none"], k=count):
            yield self._rng.choice(
                (("call", "create", key, {"again": 1}, 5), ("look", key), ("call", "delete", key))
            )

    def whole(self) -> Iterator[Step]:
        yield from (("call", "__len__"), ("keys",), ("stats",))

    def wait(self) -> Iterator[Step]:
        yield "advance_clock", self._rng.choice((3, 10, 70, -30))
        if self._rng.random() < 0.5:
            yield "call", "purge_expired"

    def leave(self) -> Iterator[Step]:
        yield self._rng.choice((("reopen",), ("crash",), ("call", "sync")))
        yield ("items",)


@pytest.mark.parametrize("in_place", IN_PLACE)
def test_both_go_the_same_way(pair: StorePair, in_place: bool) -> None:
    rng = seeded_random()
    seed = rng.getrandbits(32)
    walk = Walk(rng, seed)
    pair.do(("new", seed, in_place, MIN_MAX_BYTES), ("digest_every", 20))
    pair.do(*walk.crowd(SPLIT_AT + 150))
    full = 0
    for _ in range(scaled(3)):
        doing: list[Callable[[], Iterator[Step]]] = [
            lambda: walk.crowd(200),
            lambda: walk.fill(150, (20, 200, 600)),
            lambda: walk.fill(200, (16_000,)),
            lambda: walk.fill(60, (40, 300, 3_000, 16_000)),
            lambda: walk.drop(rng.choice((0.3, 0.9))),
            lambda: walk.meet_again(80),
            lambda: walk.replace(200, (20, 200, 600)),
            lambda: walk.replace(60, (40, 300, 3_000, 16_000)),
            walk.reclaim,
            walk.merge,
            walk.compact,
            walk.wait,
            walk.leave,
        ]
        rng.shuffle(doing)
        for part in doing:
            outcomes = pair.do(*part(), *walk.whole())
            full += sum("StoreFullError" in outcome.text for outcome in outcomes)
    assert full, "the store was never full"
    pair.do(*walk.drop(0.9), *walk.merge(), *walk.whole())
    pair.do(*walk.drop(1.0), *walk.merge(), *walk.whole(), ("reopen",), ("items",), ("end",))


# --- the order of changes ----------------------------------------------------------------------


@pytest.mark.parametrize("in_place", IN_PLACE)
def test_both_write_the_same_in_the_same_order(pair: StorePair, in_place: bool) -> None:
    rng = seeded_random()
    seed = rng.getrandbits(32)
    walk = Walk(rng, seed)
    pair.do(("new", seed, in_place, MIN_MAX_BYTES), ("digest_every", 50), ("record",))
    told = [
        *walk.crowd(SPLIT_AT + 20),
        *walk.drop(0.5),
        *walk.fill(150, (20, 600, 16_000)),
        ("advance_clock", 20),
        *walk.meet_again(150),
        *walk.replace(300, (20, 60, 600)),
        *walk.reclaim(),
        *walk.replace(100, (600, 16_000)),
        *walk.drop(0.2),
        *walk.fill(100, (16_000,)),
        ("advance_clock", 60),
        ("call", "purge_expired"),
        *walk.crowd(50),
        *walk.replace(50, (60,)),
        ("reopen",),
        *walk.replace(50, (60,)),
        *walk.meet_again(50),
        *walk.drop(0.9),
        *walk.merge(),
        *walk.compact(),
        *walk.drop(1.0),
        ("crash",),
        *walk.fill(20, (600,)),
    ]
    for start in range(0, len(told), 50):
        pair.do(*(step for one in told[start : start + 50] for step in (one, ("writes",))))
    pair.do(("end",))


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_both_are_cut_short_alike(pair: StorePair, case: str) -> None:
    """By an error of every single write, in one way at least of those that there are."""
    ways = list(product(IN_PLACE, ("OSError", "KeyboardInterrupt"), (True, False)))
    first = 5 * [each.name for each in CASES].index(case)  # not the same for neighbours
    for number in range(min(scaled(1), len(ways))):
        in_place, error, lasting = ways[(first + number) % len(ways)]
        pair.try_out("cut_short", case, in_place, error, lasting)


# --- damaged files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(folder: Path) -> tuple[bytes, State]:
    """A file with much in it, some of it expired by the time that it is looked at, and what."""
    clock = FakeClock()
    path = folder / "deep.kvs"
    with (
        mock.patch.object(kvstore.clock, "time_ns", clock),
        mock.patch("os.urandom", random.Random(1).randbytes),
    ):
        live = build_deep(path, random.Random(f"{SEED}/deep"))
        clock.advance(-1_000)
        with KVStore(path) as store:
            for number in range(60):
                key = f"{'é' * 16 if number % 3 == 0 else ''}short {number}"
                live[key] = {"short": number}
                store.create(key, live[key], ttl=100 * (number % 2) + 900)
        return path.read_bytes(), live


def crowd_slots(original: bytes, rng: random.Random) -> tuple[bytes, list[str]]:
    """Copy slots over others of any bucket, with their control bytes: keys twice, keys astray."""
    image = bytearray(original)
    buckets = Original(original).buckets
    said = []
    for _ in range(rng.choice((1, 5, 50))):
        one = rng.choice(buckets)
        other = rng.choice((one, one, rng.choice(buckets)))
        index = rng.choice(
            [i for i in range(SLOT_COUNT) if image[one + CONTROL_OFFSET + i] > 1] or [0]
        )
        place = rng.randrange(SLOT_COUNT)
        start, target = slot_offset(one, index), slot_offset(other, place)
        image[target : target + SLOT_SIZE] = image[start : start + SLOT_SIZE]
        image[other + CONTROL_OFFSET + place] = image[one + CONTROL_OFFSET + index]
        said.append(f"slot {start:,} also at {target:,}")
    return bytes(image), said


def bend_slots(original: bytes, rng: random.Random) -> tuple[bytes, list[str]]:
    """Flip one bit in each of some slots that expire, after the key."""
    image = bytearray(original)
    slots = [
        slot_offset(bucket, index)
        for bucket in Original(original).buckets
        for index in range(SLOT_COUNT)
        if image[bucket + CONTROL_OFFSET + index] > 1
    ]
    expiring = [slot for slot in slots if any(image[slot + SLOT_EXPIRES_OFFSET :][:8])]
    said = []
    for slot in rng.sample(expiring, 40):
        bit = rng.choice((rng.randrange(128), rng.randrange(64, 72)))
        image[slot + SLOT_EXPIRES_OFFSET + bit // 8] ^= 1 << bit % 8
        said.append(f"bit {bit} after the key in slot {slot:,}")
    return bytes(image), said


def make_damaged(kind: str, original: bytes, rng: random.Random) -> tuple[bytes, list[str]]:
    if kind in DAMAGES:
        contents, damage = DAMAGES[kind](Original(original), rng)
        return contents, damage.said
    if kind in FORGERIES:
        return FORGERIES[kind](Forge(original), rng)
    return BENDINGS[kind](original, rng)


BENDINGS: Final = {"crowded slots": crowd_slots, "bent slots": bend_slots}


@pytest.mark.parametrize("kind", [*DAMAGES, *FORGERIES, *BENDINGS])
def test_both_make_the_same_of_damaged_files(
    pair: StorePair, deep: tuple[bytes, State], folder: Path, kind: str
) -> None:
    original, live = deep
    rng = random.Random(f"{seeded_random().getrandbits(32)}/{kind}")
    path = folder / "damaged.kvs"
    short_lived = sorted(key for key in live if "short" in key)
    for number in range(scaled(1)):
        contents, said = make_damaged(kind, original, rng)
        path.write_bytes(contents)
        keys = rng.sample(short_lived, 40) + rng.sample(sorted(live.keys() - set(short_lived)), 60)
        try:
            pair.try_out("use", path, rng.random() < 0.7, keys, rng.getrandbits(32))
        except AssertionError as error:
            error.add_note(f"file {number}: {'; '.join(said)}")
            raise
