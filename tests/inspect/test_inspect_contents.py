"""What the report says of keys: their prefixes, the largest values, what expires next."""

import random
import sys
from collections import Counter
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_inspect.contents import HOUR, SOON, Contents, Group, Prefixes, Total
from kvstore_inspect.records import Record

NOW: Final = 1_800_000_000_000
BLOCK: Final = 64


def contents_of(*keys: str) -> Contents:
    """Count a record for each key, in a block of `BLOCK` bytes."""
    contents = Contents(NOW)
    for offset, key in enumerate(keys):
        contents.add(Record(key, b"{}", NOW, 0, offset), BLOCK)
    return contents


def groups_of(*keys: str) -> dict[str | None, int]:
    return {group.prefix: group.total.keys for group in contents_of(*keys).groups()}


def blocks(keys: int) -> Total:
    return Total(keys, keys * BLOCK)


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("user:1", "user:"),
        ("user:", "user:"),
        ("static/app.css", "static/"),
        ("metrics.cpu/1", "metrics."),
        ("last_seen:ada", "last_seen:"),
        ("user_1", "user_"),
        ("user-1", "user-"),
        ("/home/ada", "/home/"),
        (":", None),
        ("ada", None),
        ("漢字:1", "漢字:"),
    ],
)
def test_a_prefix_ends_with_the_first_separator(key: str, prefix: str | None) -> None:
    counted = dict(contents_of(key).prefixes.totals())
    assert counted == ({} if prefix is None else {prefix: blocks(1)})


def test_groups_are_in_the_order_of_their_space_and_sum_up_to_all() -> None:
    contents = contents_of("a:1", "b:1", "b:2", "c:1", "c:2", "c:3", "none")
    groups = contents.groups()
    assert [group.prefix for group in groups][:2] == ["c:", "b:"]
    assert groups[0] == Group("c:", blocks(3))
    assert contents.others(groups) == Total()
    assert contents.whole == blocks(7)


def test_a_group_has_parts_where_longer_prefixes_are_much_of_it() -> None:
    users = [f"app:user:{number}" for number in range(30)]
    jobs = [f"app:job:{number}" for number in range(60)]
    (group,) = contents_of(*users, *jobs).groups()
    assert group.prefix == "app:"
    assert group.parts == (Group("app:job:", blocks(60)), Group("app:user:", blocks(30)))


def test_a_longer_prefix_that_all_keys_have_takes_the_place_of_the_shorter() -> None:
    assert groups_of("cache/page/1", "cache/page/2") == {"cache/page/": 2}


def test_longer_prefixes_of_one_key_each_are_no_parts() -> None:
    (group,) = contents_of(*(f"user:{number}:profile" for number in range(1_000))).groups()
    assert group == Group("user:", blocks(1_000))


def test_groups_of_less_than_a_hundredth_are_others() -> None:
    contents = contents_of(*["user:1"] * 1_000, *(f"{number}-x" for number in range(20)))
    groups = contents.groups()
    assert [group.prefix for group in groups] == ["user:"]
    assert contents.others(groups) == blocks(20)


def test_a_few_large_records_are_a_group_as_well() -> None:
    contents = contents_of(*["user:1"] * 1_000)
    contents.add(Record("video:1", b"{}", NOW, 0, 1), 1_000 * BLOCK)
    assert {group.prefix for group in contents.groups()} == {"user:", "video:"}


def test_any_number_of_prefixes_takes_no_more_memory_and_hides_no_large_one() -> None:
    """A million keys that each have a prefix of their own, and among them one with ten thousand."""
    prefixes = Prefixes(most=1_000)
    for number in range(100_000):
        prefixes.add(f"{number}:", BLOCK)
        if number % 10 == 0:
            prefixes.add("user:", BLOCK)
    assert len(prefixes.totals()) <= 1_000
    assert not prefixes.exact
    assert dict(prefixes.totals())["user:"] == blocks(10_000)


def test_lists_hold_no_more_than_they_show() -> None:
    contents = contents_of()
    sizes = []
    for number in range(5_000):
        contents.add(Record(f"k{number}", b"{}", NOW, NOW + 1 + number, number), BLOCK)
        sizes.append(sys.getsizeof(contents._largest) + sys.getsizeof(contents._next))
    assert max(sizes[100:]) == sizes[100]


@given(st.lists(st.tuples(st.integers(2, 40), st.integers(0, 30)), max_size=60))
def test_lists_are_those_of_all_records_sorted(drawn: list[tuple[int, int]]) -> None:
    records = [
        Record(f"key {offset}", b"x" * size, NOW, seconds and NOW + 1000 * seconds, offset)
        for offset, (size, seconds) in enumerate(drawn)
    ]
    contents = Contents(NOW)
    for record in records:
        contents.add(record, BLOCK)
    largest = sorted(records, key=lambda record: (-len(record.value), record.offset))
    expiring = [record for record in records if record.expires_at]
    expiring.sort(key=lambda record: (record.expires_at, record.offset))
    assert [each.key for each in contents.largest()] == [each.key for each in largest[:10]]
    assert [each.key for each in contents.next_to_expire()] == [each.key for each in expiring[:10]]


def test_what_expires_soon_is_counted_up_to_an_hour_a_day_and_a_week() -> None:
    contents = Contents(NOW)
    lifetimes = Counter({1: 3, HOUR: 2, HOUR + 1: 4, 24 * HOUR: 1, 100 * HOUR: 5, 10**7: 9})
    shuffled = list(lifetimes.elements())
    random.Random(1).shuffle(shuffled)
    for offset, seconds in enumerate(shuffled):
        contents.add(Record(str(offset), b"{}", NOW, NOW + 1000 * seconds, offset), BLOCK)
    contents.add(Record("for ever", b"{}", NOW, 0, 1), BLOCK)
    assert contents.soon() == list(zip(SOON, map(blocks, (5, 10, 15)), strict=True))
