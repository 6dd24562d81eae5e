"""A record that recovery has found, in one word that sorts by hash and has its place.

It is the hash of the record's key with the record's place, which is its offset in steps of 32, in
the middle. What is left of the hash is all that a segment asks of it: the lowest 12 bits are home
bucket and fingerprint, and by the uppermost 27 two records of one key are found close together.
"""

import sys
from array import array
from struct import Struct
from typing import TYPE_CHECKING, Final

from .layout import (
    FOUND_HASH_MASK,
    FOUND_OFFSET_MASK,
    FOUND_OFFSET_SHIFT,
    GENERATION_SHIFT,
    MARKED_MAGIC,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    SLOT_KEY_SIZE,
    SLOT_KEY_SIZE_SHIFT,
    SLOT_WORDS,
)
from .members import Members, fingerprints_of, place_members

if TYPE_CHECKING:
    from mmap import mmap

_HEAD_AND_EXPIRY: Final = Struct("<Q8xQ")  # of a record
_HEAD_STAMP_EXPIRY: Final = Struct("<QQQ")
_PART_SHIFT: Final = 56


def found_word(key_hash: int, offset: int) -> int:
    """Return the word for the record at `offset`, whose key has this hash."""
    return key_hash & FOUND_HASH_MASK | offset << FOUND_OFFSET_SHIFT


def found_offset(word: int) -> int:
    """Return the offset of a word's record."""
    return word >> FOUND_OFFSET_SHIFT & FOUND_OFFSET_MASK


def sort_words(found: "list[array[int]]") -> "array[int]":
    """Return all words of these arrays, sorted. The list is empty then.

    It takes little more memory than the words do.
    """
    # Parted first: to sort all of them at a time takes five times the memory that they do.
    parts = [array("Q") for _ in range(1 << 64 - _PART_SHIFT)]
    append = [part.append for part in parts]
    while found:
        for word in found.pop():
            append[word >> _PART_SHIFT](word)
    del append
    parts.reverse()
    words = array("Q")
    while parts:
        words.extend(array("Q", sorted(parts.pop())))
    return words


def has_equal_hashes(words: "array[int]") -> bool:
    """Return whether two of these sorted words have the same hash, as far as they have it."""
    return len(set(map(FOUND_HASH_MASK.__and__, words))) < len(words)


def judge_words(
    mapped: "mmap | bytes",
    file_size: int,
    words: "array[int]",
    now_ms: int,
    void_stamp: int,
) -> "tuple[array[int], array[int], array[int], array[int]]":
    """Tell what becomes of the records of these sorted words; all those of their keys are there.

    Returns:
        Four times words, sorted: those of records that are live; of those among them that have a
        generation, as if they were retired; of those that another one of their key outranks, or
        that are void by `void_stamp`; and of those that nothing outranks, but which are marked or
        have expired.

    Raises:
        ValueError: one leads out of the file, of which the first `file_size` bytes are there.
    """
    best: dict[bytes, tuple[int, bool, int, int, int]] = {}
    losers = []
    for word in words:
        offset = found_offset(word)
        start = offset + RECORD_HEADER_SIZE
        if start > file_size:
            raise _outside(offset, file_size)
        head, stamp, expires_at = _HEAD_STAMP_EXPIRY.unpack_from(mapped, offset)
        end = start + (head >> SLOT_KEY_SIZE_SHIFT & 0xFF)
        if end > file_size:
            raise _outside(offset, file_size)
        if stamp <= void_stamp:
            losers.append(word)
            continue
        key = mapped[start:end]
        record = stamp, head & 0xFFFF_FFFF == MARKED_MAGIC, head, expires_at, word
        other = best.setdefault(key, record)
        if other[:2] < record[:2]:
            losers.append(other[-1])
            best[key] = record
        elif other is not record:
            losers.append(word)
    live, retired, gone = [], [], []
    for _, is_marked, head, expires_at, word in best.values():
        if is_marked or 0 < expires_at <= now_ms:
            gone.append(word)
            continue
        live.append(word)
        if head >> GENERATION_SHIFT:
            retired.append(word)
    return (
        array("Q", sorted(live)),
        array("Q", sorted(retired)),
        array("Q", sorted(losers)),
        array("Q", sorted(gone)),
    )


def members_of_words(mapped: "mmap | bytes", file_size: int, words: "array[int]") -> Members:
    """Return the members of a segment that these words of live records become.

    Raises:
        ValueError: one leads out of the file, of which the first `file_size` bytes are there.
    """
    pack, unpack = SLOT_WORDS.pack, _HEAD_AND_EXPIRY.unpack_from
    offset_shift, offset_mask = FOUND_OFFSET_SHIFT, FOUND_OFFSET_MASK
    magic, header_size, size_shift = RECORD_MAGIC, RECORD_HEADER_SIZE, SLOT_KEY_SIZE_SHIFT
    last = file_size - header_size - SLOT_KEY_SIZE
    slots = []
    for word in words:
        offset = word >> offset_shift & offset_mask
        if offset > last:
            raise _outside(offset, file_size)
        head, expires_at = unpack(mapped, offset)
        start = offset + header_size
        # The sizes are in the same place in header and slot: change the magic for the offset.
        slots.append(
            pack(
                mapped[start : start + (head >> size_shift & 0xFF)],
                expires_at,
                head - magic + offset,
            )
        )
    by_uppermost = array("Q", words)
    if sys.byteorder == "little":
        by_uppermost.byteswap()
    hashes = by_uppermost.tobytes()
    return place_members(slots, hashes, fingerprints_of(hashes))[0]


def _outside(offset: int, file_size: int) -> ValueError:
    return ValueError(f"a found word leads to byte {offset:,} of a file of {file_size:,}")
