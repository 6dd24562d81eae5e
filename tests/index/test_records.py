"""Records are read as they were written, or told to be damaged, wherever a slot leads."""

from pathlib import Path

import pytest
from support.components import (
    KEY,
    NOW_MS,
    VALUE,
    Components,
    open_components,
    tail_of,
    take_written,
)
from support.platforms import needs_pwrite

import kvstore.file.platform
from kvstore import CorruptStoreError
from kvstore.format.layout import (
    BLOCK_SIZES,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    map_entry_offset,
)
from kvstore.index.records import verify
from kvstore.recovery.check import check_file


@pytest.mark.parametrize("expires_at", [0, NOW_MS + 1])
@pytest.mark.parametrize("key", [b"a", "é".encode() * 16 + b"x", b"k" * 128])
@pytest.mark.parametrize("value", [b"{}", b'{"a":"' + b"x" * 16_376 + b'"}'])
def test_record_is_read_as_it_was_written(
    parts: Components, key: bytes, value: bytes, expires_at: int
) -> None:
    record = take_written(parts, key, value, expires_at)
    tail = tail_of(record, key, value)
    header, read = parts.records.read_record(tail)
    assert read == value
    assert verify(header, read, tail, expires_at, parts.hash(key))
    assert parts.records.contains_record_of(tail, key)
    assert parts.records.is_record(record)
    assert parts.records.key_at(record, len(key)) == key
    assert parts.records.expiry_at(record) == expires_at


@needs_pwrite
def test_record_is_none_until_it_is_finished_where_a_write_may_be_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that nothing can be written over any more would come back to life at a recovery."""
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _fd: False)
    with open_components(path) as parts:
        record = parts.slab.allocate(32 + len(KEY) + len(VALUE))
        parts.records.write_record(record, KEY, VALUE, parts.hash(KEY), NOW_MS, 0)
        assert not parts.records.is_record(record)
        assert not parts.records.contains_record_of(tail_of(record), KEY)
        parts.records.finish_record(record)
        assert parts.records.is_record(record)
        assert parts.records.contains_record_of(tail_of(record), KEY)
        parts.slab.free(record)
    assert [str(problem) for problem in check_file(path)] == []


def test_any_changed_bit_of_a_record_fails_its_verification(parts: Components) -> None:
    expires_at = NOW_MS + 1
    record = take_written(parts, KEY, VALUE, expires_at)
    tail = tail_of(record)
    for offset in range(record, record + 32 + len(KEY) + len(VALUE)):
        if record + 32 <= offset < record + 32 + len(KEY):
            continue  # who reads knows the key, and does not look at it here
        whole = parts.file.map[offset]
        for bit in range(8):
            parts.file.write(offset, bytes([whole ^ 1 << bit]))
            header, value = parts.records.read_record(tail)
            assert not verify(header, value, tail, expires_at, parts.hash(KEY)), f"{offset}, {bit}"
        parts.file.write(offset, bytes([whole]))
    header, value = parts.records.read_record(tail)
    assert verify(header, value, tail, expires_at, parts.hash(KEY))


def test_record_is_not_verified_for_another_key_expiry_or_size(parts: Components) -> None:
    record = take_written(parts)
    for tail, expires_at, key in (
        (tail_of(record), 0, b"another key"),
        (tail_of(record), NOW_MS, KEY),
        (tail_of(record, KEY, VALUE[:-1]), 0, KEY),
        (tail_of(record, KEY + b"x", VALUE[1:]), 0, KEY),
        (tail_of(record) | 1 << 56, 0, KEY),
    ):
        header, value = parts.records.read_record(tail)
        assert not verify(header, value, tail, expires_at, parts.hash(key))


@pytest.mark.parametrize("key_size", [0, 1, 128, 255])
@pytest.mark.parametrize("value_size", [0, 2, 16_384, 65_535])
def test_forged_slot_leads_nowhere_outside_of_the_file(
    parts: Components, key_size: int, value_size: int
) -> None:
    """Every sum is bounded before a byte is read: pages past the end of the file are deadly."""
    size = parts.file.size
    key = b"k" * key_size
    for record in (0, 32, 65_536, FIXED_EXTENTS * EXTENT_SIZE - 32, size, size + 32, 2**32 - 32):
        tail = record | value_size << 32 | key_size << 48
        with pytest.raises(CorruptStoreError, match=f"{record:,}"):
            parts.records.read_record(tail)
        assert not parts.records.contains_record_of(tail, key)
        assert record < size or parts.records.key_at(record, 1) == b""
        assert record < size or parts.records.expiry_at(record) == 0
    total = 32 + key_size + value_size
    for record in (size - 32, (size - total) // 32 * 32, size - (total + 31) // 32 * 32 + 32):
        tail = record | value_size << 32 | key_size << 48
        if record + total <= size:
            header, value = parts.records.read_record(tail)
            assert (len(header), len(value)) == (4, value_size)
        else:
            with pytest.raises(CorruptStoreError, match=f"{record:,}"):
                parts.records.read_record(tail)
        assert not parts.records.contains_record_of(tail, key)
        inside = record + 32 + key_size <= size
        assert len(parts.records.key_at(record, key_size)) == (key_size if inside else 0)
        assert parts.records.expiry_at(record) == 0


@pytest.mark.parametrize("flags", [*range(1, 8), 31])
def test_low_bits_of_an_offset_do_not_lead_elsewhere(parts: Components, flags: int) -> None:
    """In a slot they are flags, and a record begins at a multiple of 32."""
    record = take_written(parts)
    assert parts.records.read_record(tail_of(record + flags)) == parts.records.read_record(
        tail_of(record)
    )
    assert parts.records.contains_record_of(tail_of(record + flags), KEY)


def test_block_holds_the_record_of_its_key_and_of_no_other(parts: Components) -> None:
    record = take_written(parts)
    assert parts.records.contains_record_of(tail_of(record), KEY)
    for tail, key in (
        (tail_of(record), b"a kez"),
        (tail_of(record, KEY[:-1]), KEY[:-1]),
        (tail_of(record, KEY, VALUE + b"x"), KEY),
        (tail_of(record) | 1 << 56, KEY),
        (tail_of(record + 32), KEY),
        (tail_of(record + BLOCK_SIZES[0]), KEY),
    ):
        assert not parts.records.contains_record_of(tail, key)
    parts.slab.free(take_written(parts))
    assert parts.records.contains_record_of(tail_of(record), KEY)
    parts.slab.free(record)
    assert not parts.records.contains_record_of(tail_of(record), KEY)


def test_block_of_an_extent_that_is_no_slab_holds_nothing(parts: Components) -> None:
    """A record there was forged: to free its block would harm the table."""
    segment = parts.file.directory[0] << EXTENT_SHIFT
    parts.records.write_record(segment, KEY, VALUE, parts.hash(KEY), NOW_MS, 0)
    assert not parts.records.contains_record_of(tail_of(segment), KEY)


def test_block_of_an_extent_with_a_forged_class_holds_nothing(parts: Components) -> None:
    record = take_written(parts)
    for size_class in (1, len(BLOCK_SIZES), 255):
        parts.file.write(map_entry_offset(record >> EXTENT_SHIFT) + 1, bytes([size_class]))
        assert parts.records.contains_record_of(tail_of(record), KEY) == (size_class == 1)
