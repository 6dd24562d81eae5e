"""A key whose time-to-live has passed is absent for every member, and may be created again."""

import datetime
import math
from typing import Any

import pytest
from support import MIN_MAX_BYTES, scaled, seeded_random
from support.clock import START_SECONDS, FakeClock
from support.files import open_size
from support.keys import TRICKY
from support.stores import OpenStore, after_death
from support.threads import run_together
from support.values import sized_value

from kvstore import InvalidTTLError, KeyExistsError, KeyNotFoundError, KVStore
from kvstore.format.layout import IDENTITY, STRIPE_SHIFT, key_hash
from kvstore.index.segments import Segments

LONGEST = 10**10


def test_a_key_without_ttl_never_expires(store: KVStore, clock: FakeClock) -> None:
    store.create("k", {"n": 1})
    store.create("none", {"n": 2}, ttl=None)
    assert store.ttl("k") is None
    clock.advance(100 * 365 * 86_400)
    assert store.read("k") == {"n": 1}
    assert store.read("none") == {"n": 2}
    assert store.ttl("none") is None
    assert store.purge_expired() == 0


def test_ttl_is_the_whole_seconds_left_rounded_up(clock: FakeClock, store: KVStore) -> None:
    store.create("k", {}, 10)
    for passed, left in [(0, 10), (0.001, 10), (0.999, 9), (0.001, 9), (7.998, 2), (1.0, 1)]:
        clock.advance(passed)
        assert store.ttl("k") == left
    clock.advance(0.001)
    with pytest.raises(KeyNotFoundError):
        store.ttl("k")


def test_a_key_is_there_until_its_ttl_has_passed_and_absent_from_then_on(
    store: KVStore, clock: FakeClock
) -> None:
    store.create("k", {"n": 1}, ttl=1)
    clock.advance(0.999)
    assert "k" in store
    assert store.read("k") == {"n": 1}
    clock.advance(0.001)
    assert "k" not in store
    for passed in (0, 0.001, 1, 10**6):
        clock.advance(passed)
        assert store.get("k") is None


def test_an_expired_key_is_absent_for_every_member(store: KVStore, clock: FakeClock) -> None:
    store.create("gone", {"n": 1}, ttl=5)
    store.create("kept", {"n": 2}, ttl=6)
    clock.advance(5)
    for call in (
        store.read,
        store.read_bytes,
        store.__getitem__,
        store.delete,
        store.__delitem__,
        store.ttl,
    ):
        with pytest.raises(KeyNotFoundError):
            call("gone")
    assert store.get("gone") is None
    assert store.get("gone", 7) == 7
    assert "gone" not in store
    assert len(store) == 1
    assert list(store) == ["kept"]
    assert list(store.keys()) == ["kept"]
    assert list(store.values()) == [{"n": 2}]
    assert list(store.items()) == [("kept", {"n": 2})]
    assert dict(store) == {"kept": {"n": 2}}
    clock.advance(1)
    assert dict(store) == {}
    assert len(store) == 0


def test_create_takes_an_expired_key_again(store: KVStore, clock: FakeClock) -> None:
    store.create("k", {"n": 1}, ttl=5)
    clock.advance(4.999)
    with pytest.raises(KeyExistsError):
        store.create("k", {"n": 2})
    clock.advance(0.001)
    store.create("k", {"n": 2})
    assert store.ttl("k") is None
    assert dict(store) == {"k": {"n": 2}}
    assert len(store) == 1


def test_every_create_of_an_expired_key_counts_from_its_own_moment(
    store: KVStore, clock: FakeClock
) -> None:
    for number in range(100):
        store.create("k", {"n": number}, ttl=3)
        clock.advance(2.999)
        assert store.read("k") == {"n": number}
        clock.advance(0.001)
        assert len(store) == 0
    assert store.purge_expired() <= 1


@pytest.mark.parametrize("sizes", [(12, 12), (12, 5_000), (16_384, 2)])
def test_a_key_created_over_an_expired_one_is_counted_purged_and_iterated_as_one(
    store: KVStore, clock: FakeClock, open_store: OpenStore, sizes: tuple[int, int]
) -> None:
    keys = {key: {"n": number} for number, key in enumerate(TRICKY)}
    for key in keys:
        store.create(key, sized_value(sizes[0]), ttl=10)
    store.sync()
    clock.advance(10)
    for key in keys:
        store.create(key, sized_value(sizes[1], 1))
    expected = dict.fromkeys(keys, sized_value(sizes[1], 1))
    assert dict(store) == after_death(store) == expected
    assert len(store) == len(list(store)) == store.stats().records == len(keys)
    assert store.purge_expired() == 0
    clock.advance(-10)
    assert dict(store) == after_death(store) == expected
    store.close()
    assert dict(open_store()) == expected


def test_what_a_create_over_an_expired_key_replaced_does_not_come_back(
    store: KVStore, clock: FakeClock
) -> None:
    """Neither once it has expired itself, nor once it was deleted, nor with a clock set back."""
    for key in ("expired", "deleted"):
        store.create(key, {"n": 1}, ttl=100)
    store.sync()
    clock.advance(100)
    store.create("expired", {"n": 2}, ttl=10)
    store.create("deleted", {"n": 2})
    store.delete("deleted")
    clock.advance(-50)
    assert dict(store) == after_death(store) == {"expired": {"n": 2}}
    clock.advance(60)
    assert dict(store) == after_death(store) == {}
    assert store.purge_expired() == 1
    clock.advance(-60)
    assert dict(store) == after_death(store) == {}


def test_a_delete_takes_the_ttl_with_it(store: KVStore, clock: FakeClock) -> None:
    store.create("k", {"n": 1}, ttl=5)
    store.delete("k")
    store.create("k", {"n": 2})
    clock.advance(6)
    assert store.read("k") == {"n": 2}
    assert store.ttl("k") is None


def test_the_longest_ttl_is_counted_to_the_last_second(store: KVStore, clock: FakeClock) -> None:
    store.create("k", {"n": 1}, ttl=LONGEST)
    assert store.ttl("k") == LONGEST
    clock.advance(LONGEST - 1)
    assert store.ttl("k") == 1
    assert store.read("k") == {"n": 1}
    clock.advance(1)
    assert "k" not in store


def test_ttl_goes_on_while_the_store_is_closed(
    store: KVStore, clock: FakeClock, open_store: OpenStore
) -> None:
    store.create("short", {"n": 1}, ttl=60)
    store.create("long", {"n": 2}, ttl=3600)
    store.create("none", {"n": 3})
    clock.advance(1)
    store.close()
    clock.advance(59)
    again = open_store()
    assert len(again) == 2
    assert dict(again) == {"long": {"n": 2}, "none": {"n": 3}}
    assert again.ttl("long") == 3540
    assert again.ttl("none") is None


def test_tricky_keys_expire_one_by_one(store: KVStore, clock: FakeClock) -> None:
    for seconds, key in enumerate(TRICKY, 1):
        store.create(key, {"n": seconds}, ttl=seconds)
    for passed in range(1, len(TRICKY) + 1):
        clock.advance(1)
        assert len(store) == len(TRICKY) - passed
        assert set(store) == set(TRICKY[passed:])


# --- purge ----------------------------------------------------------------------------------------


def test_purge_expired_counts_what_it_took_back_and_finds_nothing_twice(
    store: KVStore, clock: FakeClock
) -> None:
    for number in range(100):
        store.create(f"short:{number}", {"n": number}, ttl=10 + number % 2)
        store.create(f"long:{number}", {"n": number}, ttl=1000)
        store.create(f"none:{number}", {"n": number})
    assert store.purge_expired() == 0
    clock.advance(10)
    assert store.purge_expired() == 50
    assert store.purge_expired() == 0
    clock.advance(1)
    assert store.purge_expired() == 50
    assert len(store) == 200
    assert {key.split(":")[0] for key in store} == {"long", "none"}


def test_purge_expired_of_an_empty_store_is_zero(store: KVStore) -> None:
    assert store.purge_expired() == 0


def test_purged_and_deleted_keys_are_not_purged_again(store: KVStore, clock: FakeClock) -> None:
    store.create("deleted", {}, ttl=10)
    store.create("replaced", {}, ttl=10)
    store.create("expired", {}, ttl=10)
    store.delete("deleted")
    clock.advance(10)
    store.create("replaced", {"n": 2})
    assert store.purge_expired() == 1
    assert dict(store) == {"replaced": {"n": 2}}


def test_a_purge_takes_back_what_was_put_and_touched_by_its_last_time_to_live(
    store: KVStore, clock: FakeClock
) -> None:
    for number in range(300):
        store.create(f"k{number}", {"n": number}, ttl=10)
    for number in range(100):
        store.put(f"k{number}", {"n": -number}, ttl=20)
        store.touch(f"k{100 + number}", 30 if number % 2 else None)
    for passed, purged in [(9, 0), (1, 100), (10, 100), (10, 50), (10**9, 0)]:
        clock.advance(passed)
        assert store.purge_expired() == purged
    assert len(store) == 50
    store.put("k100", {}, ttl=1)
    clock.advance(1)
    assert len(store) == 49
    assert store.purge_expired() == 1


def test_what_has_expired_is_purged_after_opening_again(
    store: KVStore, clock: FakeClock, open_store: OpenStore
) -> None:
    for number in range(50):
        store.create(f"k{number}", {}, ttl=10)
    store.close()
    clock.advance(10)
    again = open_store()
    assert len(again) == 0
    assert again.purge_expired() == 50


# --- many -----------------------------------------------------------------------------------------


def test_len_is_exact_at_every_moment_of_a_long_expiry(clock: FakeClock, store: KVStore) -> None:
    """Thousands of keys, each with its own second; purges now and then change nothing seen."""
    random = seeded_random()
    due: list[int] = []
    for number in range(3000):
        seconds = random.randint(1, 200)
        store.create(f"k{number}", {"n": number}, ttl=seconds)
        due.append(seconds)
    for now in range(1, 201):
        clock.advance(1)
        assert len(store) == sum(seconds > now for seconds in due)
        if random.random() < 0.1:
            store.purge_expired()
    assert list(store) == []


def test_churn_of_short_lived_keys_does_not_fill_the_store(
    open_store: OpenStore, clock: FakeClock
) -> None:
    """Nobody purges: what has expired makes room for what comes, many times the file's size."""
    store = open_store(max_bytes=MIN_MAX_BYTES)
    payload = "x" * 4000
    for number in range(scaled(4000)):
        store.create(f"session:{number}", {"n": number, "p": payload}, ttl=100)
        clock.advance(1)
        assert store.ttl(f"session:{number}") == 99
    assert len(store) == 99
    assert open_size(store) <= MIN_MAX_BYTES


def test_churn_of_small_short_lived_keys_does_not_make_the_file_grow(
    store: KVStore, clock: FakeClock
) -> None:
    """The table drops what has expired where it would have to split, and frees its records."""
    for number in range(40_000):
        store.create(f"session:{number}", {"n": number}, ttl=1000)
        clock.advance(1)
    assert len(store) == 999
    assert store.stats().file_size <= MIN_MAX_BYTES
    assert all(store.read(f"session:{number}") == {"n": number} for number in range(39_001, 40_000))
    store.create("k", {})
    assert store.purge_expired() < 20_000
    assert len(store) == 1000


# --- the clock ------------------------------------------------------------------------------------


def test_a_clock_set_back_makes_keys_live_longer_and_harms_nothing(
    store: KVStore, clock: FakeClock, open_store: OpenStore
) -> None:
    store.create("k", {"n": 1}, ttl=10)
    clock.advance(-3600)
    assert store.read("k") == {"n": 1}
    assert store.ttl("k") == 3610
    with pytest.raises(KeyExistsError):
        store.create("k", {})
    store.create("later", {"n": 2}, ttl=5)
    store.close()
    again = open_store()
    assert dict(again) == {"k": {"n": 1}, "later": {"n": 2}}
    clock.advance(5)
    assert dict(again) == {"k": {"n": 1}}


def test_a_clock_just_after_1970_or_far_ahead_harms_nothing(
    clock: FakeClock, store: KVStore
) -> None:
    for seconds in (1, 2**31, 2**32, 2**33):
        clock.set(seconds)
        store.create("k", {"n": seconds}, ttl=LONGEST)
        assert store.ttl("k") == LONGEST
        store.delete("k")
    clock.set(START_SECONDS)
    assert len(store) == 0


@pytest.mark.parametrize("ttl", [1, LONGEST])
@pytest.mark.parametrize("seconds", [2**48 // 1000 - LONGEST + 1, 2**48 // 1000, 2**60])
def test_a_clock_past_what_the_file_can_tell_stands_still_and_loses_nothing(
    clock: FakeClock, store: KVStore, open_store: OpenStore, seconds: int, ttl: int
) -> None:
    """Recovery took a record with an expiry past the limit of the format for a damaged one."""
    clock.set(seconds)
    store.create("key", {"n": 1}, ttl=ttl)
    clock.advance(86_400)
    assert store.read("key") == {"n": 1}
    assert store.ttl("key") == ttl
    assert "key" in store
    assert len(store) == 1
    killed = store.path.with_suffix(".killed")
    killed.write_bytes(store.path.read_bytes())
    again = open_store(killed)
    assert dict(again) == {"key": {"n": 1}}
    assert again.purge_expired() == 0
    clock.set(START_SECONDS)
    assert again.read("key") == {"n": 1}


def test_a_clock_before_1970_stands_still_there(clock: FakeClock, store: KVStore) -> None:
    store.create("before", {}, ttl=1)
    clock.set(-(10**10))
    store.create("key", {"n": 1}, ttl=1)
    assert store.ttl("key") == 1
    assert dict(store) == {"before": {}, "key": {"n": 1}}
    clock.set(0.999)
    assert "key" in store
    clock.set(1)
    assert store.purge_expired() == 1
    assert dict(store) == {"before": {}}


def test_a_clock_set_back_while_a_purge_is_under_way_costs_no_key_created_after_that(
    store: KVStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A purge that had read the clock once, at its start, took such keys for expired ones."""
    segment_expiry = Segments.segment_expiry

    def set_the_clock_back(segments: Segments, position: int, now_ms: int) -> tuple[int, int, bool]:
        if position == 0:
            clock.set(START_SECONDS)
            run_together(create_some)
        return segment_expiry(segments, position, now_ms)

    def create_some() -> None:
        for number in range(100):  # in all stripes but the first, which the purge holds now
            if key_hash(f"{number}".encode(), seed) >> STRIPE_SHIFT:
                store.create(f"{number}", {}, ttl=60)
                created.append(f"{number}")

    created: list[str] = []
    seed = IDENTITY.unpack_from(store.path.read_bytes())[4]
    store.create("key", {})
    clock.advance(10**9)
    monkeypatch.setattr(Segments, "segment_expiry", set_the_clock_back)
    assert store.purge_expired() == 0
    assert sorted(created) == sorted(set(store) - {"key"})


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", [1, 2, 59, 2**31, 2**32, LONGEST - 1, LONGEST])
def test_ttls_from_one_second_to_the_longest_are_taken(
    store: KVStore, clock: FakeClock, ttl: int
) -> None:
    store.create("k", {}, ttl=ttl)
    assert store.ttl("k") == ttl
    assert type(store.ttl("k")) is int


@pytest.mark.parametrize(
    "ttl",
    [
        0,
        -1,
        LONGEST + 1,
        2**64,
        10**5000,
        -(2**63),
        True,
        False,
        1.0,
        60.5,
        math.nan,
        math.inf,
        "60",
        b"60",
        (60,),
        datetime.timedelta(seconds=60),
        object(),
    ],
    ids=lambda ttl: f"{type(ttl).__name__} {str(ttl)[:20]}" if ttl != 10**5000 else "10**5000",
)
def test_any_other_ttl_is_refused(store: KVStore, ttl: Any) -> None:
    with pytest.raises(InvalidTTLError):
        store.create("k", {}, ttl=ttl)
    assert len(store) == 0


class Liar(int):
    """An integer that tells another number where it is asked for one."""

    def __int__(self) -> int:
        return -5

    def __mul__(self, other: object) -> int:
        return 2**70

    def __ge__(self, other: object) -> bool:
        return True

    __le__ = __ge__


def test_ttl_of_a_subclass_is_the_number_that_it_is(store: KVStore, clock: FakeClock) -> None:
    """One that told another gave a key that had expired at once, or an error of `struct`."""
    store.create("k", {}, ttl=Liar(60))
    assert store.ttl("k") == 60
    for ttl in (0, 2**70, -5):
        with pytest.raises(InvalidTTLError):
            store.create("other", {}, ttl=Liar(ttl))
    assert len(store) == 1
