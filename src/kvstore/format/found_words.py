"""A record that recovery has found, in one word that sorts by hash and has its place.

It is the hash of the record's key with the record's place, which is its offset in steps of 32, in
the middle. What is left of the hash is all that a segment asks of it: the lowest 12 bits are home
bucket and fingerprint, and by the uppermost 27 two records of one key are found close together.
"""

from array import array
from struct import Struct
from typing import TYPE_CHECKING, Final

from .layout import (
    FOUND_HASH_MASK,
    FOUND_OFFSET_MASK,
    FOUND_OFFSET_SHIFT,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    SLOT_KEY_SIZE,
    SLOT_KEY_SIZE_SHIFT,
)
from .segment import MEMBER_WORDS

if TYPE_CHECKING:
    from mmap import mmap

_HEAD_AND_EXPIRY: Final = Struct("<Q8xQ")  # of a record
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


def members_of_words(mapped: "mmap | bytes", file_size: int, words: "array[int]") -> bytes:
    """Return the members of a segment that these words become: see `segment.MEMBER`.

    Raises:
        ValueError: one leads out of the file, of which the first `file_size` bytes are there.
    """
    pack, unpack = MEMBER_WORDS.pack, _HEAD_AND_EXPIRY.unpack_from
    offset_shift, offset_mask = FOUND_OFFSET_SHIFT, FOUND_OFFSET_MASK
    magic, header_size, size_shift = RECORD_MAGIC, RECORD_HEADER_SIZE, SLOT_KEY_SIZE_SHIFT
    last = file_size - header_size - SLOT_KEY_SIZE
    members = []
    for word in words:
        offset = word >> offset_shift & offset_mask
        if offset > last:
            raise ValueError(f"a found word leads to byte {offset:,} of a file of {file_size:,}")
        head, expires_at = unpack(mapped, offset)
        start = offset + header_size
        # The sizes are in the same place in header and slot: change the magic for the offset.
        members.append(
            pack(
                word,
                mapped[start : start + (head >> size_shift)],
                expires_at,
                head - magic + offset,
            )
        )
    return b"".join(members)
