"""Found records as words: sorted, compared, and made members of a segment."""

import random
from array import array
from itertools import permutations
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import scaled, seeded_random
from support.implementations import IMPLEMENTATIONS
from support.members import HASH_MASK, unpack_members

from kvstore.compiled import Implementation
from kvstore.format.found_words import found_offset, found_word
from kvstore.format.layout import (
    FOUND_HASH_MASK,
    FOUND_UPPER_SHIFT,
    MARKED_MAGIC,
    MAX_FILE_SIZE,
    RECORD,
    RECORD_MAGIC,
    SLOT,
)

NOW_MS: Final = 1_700_000_000_000


@given(st.integers(0, 2**64 - 1), st.integers(0, MAX_FILE_SIZE // 32 - 1))
def test_word_has_the_place_and_what_a_segment_asks_of_the_hash(key_hash: int, place: int) -> None:
    word = found_word(key_hash, 32 * place)
    assert found_offset(word) == 32 * place
    assert word & 0xFFF == key_hash & 0xFFF
    assert word >> FOUND_UPPER_SHIFT == key_hash >> FOUND_UPPER_SHIFT


@given(
    st.lists(
        st.one_of(
            st.lists(st.integers(0, 2**64 - 1)),
            st.lists(st.integers(0, 3).map(lambda n: n << 56 | n << 30 | n), max_size=300),
            st.integers(0, 2_000).map(
                lambda n: [random.Random(n).getrandbits(64) for _ in range(n)]
            ),
        ),
        max_size=4,
    )
)
def test_words_of_all_extents_are_sorted(by_extent: list[list[int]]) -> None:
    expected = sorted(word for words in by_extent for word in words)
    for implementation in IMPLEMENTATIONS:
        found = [array("Q", words) for words in by_extent]
        assert implementation.sort_words(found).tolist() == expected
        assert found == []


def test_equal_hashes_are_seen_though_others_are_between_them(
    implementation: Implementation,
) -> None:
    """A place is above the lowest bits of a hash, by which alone others may differ."""
    rng = seeded_random()
    hashes = [rng.getrandbits(64) for _ in range(1_000)]
    words = sorted(found_word(each, 32 * place) for place, each in enumerate(hashes))
    assert not implementation.has_equal_hashes(array("Q", words))
    between = [found_word(hashes[0] ^ low, 32 * (2_000 + low)) for low in range(1, 30)]
    same = found_word(hashes[0], 32 * 5_000)
    assert not implementation.has_equal_hashes(array("Q", sorted([*words, *between])))
    assert implementation.has_equal_hashes(array("Q", sorted([*words, *between, same])))
    assert not implementation.has_equal_hashes(array("Q"))
    assert (same ^ words[0]) & FOUND_HASH_MASK


@pytest.mark.parametrize("key_size", [1, 31, 32, 33, 128])
def test_members_have_the_slots_of_their_records(
    implementation: Implementation, key_size: int
) -> None:
    key, expires_at = b"k" * key_size, 1_700_000_000_000
    record = RECORD.pack(RECORD_MAGIC, 1_000, key_size, 0, 1, expires_at, 2) + key + b"v" * 1_000
    file = bytes(320) + record
    word = found_word(2**64 - 1, 320)
    slot = SLOT.pack(key, expires_at, 320, 1_000, key_size)
    members = implementation.members_of_words(file, len(file), array("Q", [word, word]))
    assert unpack_members(members) == 2 * [(word & HASH_MASK, slot)]


@pytest.mark.skipif(len(IMPLEMENTATIONS) < 2, reason="the plain one has no pointers")
def test_what_are_no_words_are_not_taken_for_some() -> None:
    for items in (array("H", [1, 2, 3, 4]), bytes(16), "words"):
        with pytest.raises((ValueError, TypeError)):
            IMPLEMENTATIONS[1].has_equal_hashes(items)  # type: ignore[arg-type]


def test_word_that_leads_out_of_the_file_is_refused(implementation: Implementation) -> None:
    file = bytes(320) + RECORD.pack(RECORD_MAGIC, 2, 1, 0, 1, 0, 2).ljust(64, b"k")
    implementation.members_of_words(file, len(file), array("Q", [found_word(0, 320)]))
    for size, offset in ((len(file), 352), (len(file) - 1, 320), (63, 0), (len(file), 2**29)):
        with pytest.raises(ValueError, match=f"byte {offset:,}"):
            implementation.members_of_words(file, size, array("Q", [found_word(0, offset)]))


# --- which of the records of a key stays ---------------------------------------------------------


class Records:
    """Records by their keys, in a file of nothing else, whose hashes agree where the test says."""

    def __init__(self) -> None:
        self.file = b""
        self.words: list[int] = []

    def add(
        self,
        key: bytes,
        stamp: int,
        *,
        key_hash: int = 0,
        marked: bool = False,
        generation: int = 0,
        expires_at: int = 0,
    ) -> int:
        """Add a record and return its word."""
        word = found_word(key_hash, len(self.file))
        magic = MARKED_MAGIC if marked else RECORD_MAGIC
        header = RECORD.pack(magic, 2, len(key), generation, stamp, expires_at, 0)
        self.file += (header + key + b"{}").ljust(192, b"\0")
        self.words.append(word)
        return word

    def judge(
        self, implementation: Implementation, void_stamp: int = 0
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Return the words of those that are live, retired among these, losers, and gone."""
        words = array("Q", sorted(self.words))
        live, retired, losers, gone = implementation.judge_words(
            self.file, len(self.file), words, NOW_MS, void_stamp
        )
        return live.tolist(), retired.tolist(), losers.tolist(), gone.tolist()


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_latest_stamp_wins(implementation: Implementation, order: tuple[int, ...]) -> None:
    records = Records()
    words = {stamp: records.add(b"k", 10 + stamp) for stamp in order}
    live, retired, losers, gone = records.judge(implementation)
    assert (live, retired, gone) == ([words[2]], [], [])
    assert losers == sorted([words[0], words[1]])


@pytest.mark.parametrize("is_first", [True, False])
def test_of_equal_stamps_a_marked_one_wins(implementation: Implementation, is_first: bool) -> None:
    records = Records()
    words = {marked: records.add(b"k", 7, marked=marked) for marked in (is_first, not is_first)}
    assert records.judge(implementation) == ([], [], [words[False]], [words[True]])


def test_of_two_copies_one_is_left(implementation: Implementation) -> None:
    records = Records()
    one, other = records.add(b"k", 7), records.add(b"k", 7)
    assert records.judge(implementation) == ([one], [], [other], [])


def test_newest_outranks_the_others_though_it_has_expired(implementation: Implementation) -> None:
    records = Records()
    old = records.add(b"k", 7)
    expired = records.add(b"k", 8, expires_at=NOW_MS)
    other = records.add(b"other", 8, expires_at=NOW_MS + 1)
    assert records.judge(implementation) == ([other], [], [old], [expired])


def test_record_after_a_marked_one_is_live(implementation: Implementation) -> None:
    records = Records()
    marked = records.add(b"k", 7, marked=True, generation=3)
    live = records.add(b"k", 8)
    assert records.judge(implementation) == ([live], [], [marked], [])


def test_void_records_lose_and_outrank_nothing(implementation: Implementation) -> None:
    records = Records()
    void = [records.add(b"k", 5), records.add(b"only", 4, marked=True)]
    live = records.add(b"k", 6)
    assert records.judge(implementation, 5) == ([live], [], void, [])


def test_winner_that_was_retired_is_told(implementation: Implementation) -> None:
    """Whatever superseded it is not on the disk. The generation of the others does not matter."""
    records = Records()
    old = records.add(b"k", 5, generation=9)
    winner = records.add(b"k", 6, generation=255)
    marked = records.add(b"other", 6, generation=255, marked=True)
    assert records.judge(implementation) == ([winner], [winner], [old], [marked])


def test_keys_of_one_hash_are_told_apart(implementation: Implementation) -> None:
    """By all their bytes, though the first 32 are the same, or one begins with the other."""
    records = Records()
    keys = [b"k" * 32 + rest for rest in (b"", b"a", b"b", b"b" * 96)]
    old = [records.add(key, 7) for key in keys[1:]]
    live = [records.add(key, 8) for key in keys]
    assert records.judge(implementation) == (live, [], old, [])


@pytest.mark.skipif(len(IMPLEMENTATIONS) < 2, reason="there is one implementation")
@pytest.mark.parametrize("number", range(scaled(20)))
def test_both_implementations_judge_the_same(number: int) -> None:
    rng = random.Random(f"{seeded_random().random()} {number}")
    records = Records()
    hashes = [rng.getrandbits(64) for _ in range(rng.choice((1, 5, 100)))]
    for _ in range(rng.choice((2, 20, 500))):
        # Of some, only what is above the place is the same.
        key_hash = rng.choice(hashes) ^ rng.choice((0, 0, 0, 1, 2))
        key = b"k" * 32 + key_hash.to_bytes(8, "little") + bytes([rng.randrange(3)])
        records.add(
            key,
            rng.randrange(6),
            key_hash=key_hash,
            marked=rng.random() < 0.2,
            generation=rng.choice((0, 0, 1)),
            expires_at=rng.choice((0, NOW_MS, NOW_MS + 1)),
        )
    judged = [records.judge(implementation, 1) for implementation in IMPLEMENTATIONS]
    assert judged[0] == judged[1]
    live, _, losers, gone = judged[0]
    assert sorted([*live, *losers, *gone]) == sorted(records.words)


def test_word_that_leads_out_of_the_file_is_not_judged(implementation: Implementation) -> None:
    file = bytes(320) + RECORD.pack(RECORD_MAGIC, 2, 32, 0, 1, 0, 2).ljust(64, b"k")
    judge = implementation.judge_words
    judge(file, len(file), array("Q", [found_word(0, 320)]), NOW_MS, 0)
    for size, offset in ((len(file), 384), (len(file) - 1, 320), (31, 0), (len(file), 2**29)):
        with pytest.raises(ValueError, match=f"byte {offset:,}"):
            judge(file, size, array("Q", [found_word(0, offset)]), NOW_MS, 0)
