"""Identity, state and holder: what is written is read again, and what is damaged is told."""

import pytest
from support.clock import START_SECONDS

from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    DIRECTORY_OFFSET,
    EXTENT_MAP_OFFSET,
    HOLDER,
    IDENTITY,
    STATE,
    map_entry_offset,
)
from kvstore.format.superblock import (
    Identity,
    State,
    index_checksum,
    is_state,
    pack_holder,
    pack_identity,
    unknown_format,
    unpack_holder,
    unpack_identity,
    unpack_state,
)

SEED = 2**64 - 3
NOW_MS = START_SECONDS * 1000
IDENTITY_BYTES = pack_identity(bytes(range(16)), SEED, NOW_MS)
STATE_HERE = State(True, 40, 32, 7, 2**63 + 1, 2**63 + 2)


def with_bit_flipped(packed: bytes, offset: int) -> bytes:
    return packed[:offset] + bytes([packed[offset] ^ 1]) + packed[offset + 1 :]


def test_identity_says_what_was_packed_into_it() -> None:
    identity = unpack_identity(IDENTITY_BYTES)
    assert identity == Identity(2, 65_536, bytes(range(16)), SEED, NOW_MS)
    assert identity.is_known_format


@pytest.mark.parametrize("offset", range(IDENTITY.size))
def test_identity_with_any_byte_changed_is_none(offset: int) -> None:
    assert unpack_identity(with_bit_flipped(IDENTITY_BYTES, offset)) is None


@pytest.mark.parametrize("size", [0, 8, IDENTITY.size - 1])
def test_identity_that_is_cut_off_is_none(size: int) -> None:
    assert unpack_identity(IDENTITY_BYTES[:size]) is None


@pytest.mark.parametrize(
    ("name", "number"), [("FORMAT_VERSION", 1), ("FORMAT_VERSION", 3), ("EXTENT_SIZE", 4_096)]
)
def test_identity_of_another_format_is_told_from_a_damaged_one(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"kvstore.format.superblock.{name}", number)
        other = pack_identity(bytes(16), SEED, NOW_MS)
    identity = unpack_identity(other)
    assert identity is not None
    assert not identity.is_known_format
    assert f"{number:,}" in unknown_format(identity)


def test_state_says_what_was_packed_into_it() -> None:
    packed = STATE_HERE.pack(SEED)
    assert unpack_state(packed, SEED) == STATE_HERE
    assert is_state(packed, SEED)
    assert STATE_HERE.intact


@pytest.mark.parametrize("offset", range(STATE.size))
def test_state_with_any_byte_changed_is_not_intact_and_says_what_it_says(offset: int) -> None:
    changed = with_bit_flipped(STATE_HERE.pack(SEED), offset)
    state = unpack_state(changed, SEED)
    assert not state.intact
    assert not is_state(changed, SEED)
    assert (state[1:6] == STATE_HERE[1:6]) == (offset < 4 or offset >= STATE.size - 8)


def test_state_of_a_file_with_another_seed_is_not_intact() -> None:
    packed = STATE_HERE.pack(SEED)
    assert not unpack_state(packed, SEED - 1).intact
    assert not is_state(packed, SEED - 1)


def test_bytes_that_are_cut_off_are_no_state() -> None:
    assert not is_state(STATE_HERE.pack(SEED)[:-1], SEED)
    assert not is_state(b"", SEED)


def test_index_checksum_covers_directory_map_and_allocator_and_nothing_else() -> None:
    count = 40
    start = bytes(map_entry_offset(count))
    whole = index_checksum(start, count, SEED)
    covered = (DIRECTORY_OFFSET, EXTENT_MAP_OFFSET - 1, EXTENT_MAP_OFFSET, len(start) - 1)
    for offset in (*covered, ALLOCATOR_OFFSET, ALLOCATOR_OFFSET + ALLOCATOR_SIZE - 1):
        assert index_checksum(with_bit_flipped(start, offset), count, SEED) != whole
    for offset in (0, ALLOCATOR_OFFSET - 1, ALLOCATOR_OFFSET + ALLOCATOR_SIZE):
        assert index_checksum(with_bit_flipped(start, offset), count, SEED) == whole
    assert index_checksum(start, count, SEED - 1) != whole


def test_holder_is_a_process_or_nobody() -> None:
    assert unpack_holder(pack_holder(2**31)) == 2**31
    assert unpack_holder(pack_holder(0)) == 0
    assert unpack_holder(b"") == 0, "the file ends before it"
    assert unpack_holder(pack_holder(7) + b"\xff") == 7
    assert len(pack_holder(1)) == HOLDER.size
