"""Found records as words: sorted, compared, and made members of a segment."""

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import seeded_random
from support.implementations import IMPLEMENTATIONS

from kvstore.compiled import Implementation
from kvstore.format.found_words import found_offset, found_word
from kvstore.format.layout import (
    FOUND_HASH_MASK,
    FOUND_UPPER_SHIFT,
    MAX_FILE_SIZE,
    RECORD,
    RECORD_MAGIC,
    SLOT,
)
from kvstore.format.segment import MEMBER


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
    assert members == 2 * MEMBER.pack(word, slot)


def test_word_that_leads_out_of_the_file_is_refused(implementation: Implementation) -> None:
    file = bytes(320) + RECORD.pack(RECORD_MAGIC, 2, 1, 0, 1, 0, 2).ljust(64, b"k")
    implementation.members_of_words(file, len(file), array("Q", [found_word(0, 320)]))
    for size, offset in ((len(file), 352), (len(file) - 1, 320), (63, 0), (len(file), 2**29)):
        with pytest.raises(ValueError, match=f"byte {offset:,}"):
            implementation.members_of_words(file, size, array("Q", [found_word(0, offset)]))
