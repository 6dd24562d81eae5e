"""What is in a table, by a search that is as plain as can be; keys by where they lead."""

from collections.abc import Callable, Iterator

from xxhash import xxh3_64_intdigest

from kvstore.format.layout import (
    BUCKET_SIZE,
    CONTROL_OFFSET,
    DIRECTORY_ENTRIES,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    SEGMENT_ENTRY,
    SLOT_COUNT,
    map_entry_offset,
)

from .components import NOW_MS, Components


class Reader:
    """A search in the bytes of a file, after the docstring of `layout`, as plain as can be."""

    def __init__(self, image: bytes) -> None:
        self._image = image
        self._seed = self._number(32, 8)

    def _number(self, offset: int, size: int) -> int:
        return int.from_bytes(self._image[offset : offset + size], "little")

    def find(self, key: bytes) -> int:
        """Return the offset of the slot of `key`; -1 where it is absent."""
        hash_of_key = xxh3_64_intdigest(key, self._seed)
        segment = self._number(65_536 + 2 * (hash_of_key >> 49), 2) * 65_536
        fingerprint = hash_of_key >> 4 & 255
        for step in range(16):
            bucket = segment + (hash_of_key + step) % 16 * 4_096
            assert self._number(bucket, 8) == 0x4B425630 << 32 | bucket // 4_096
            control = self._image[bucket + 32 : bucket + 112]
            for index in range(80):
                slot = bucket + 256 + 48 * index
                if control[index] == fingerprint + 2 * (fingerprint < 2) and self._is(slot, key):
                    return slot
            if 0 in control:
                return -1
        return -1

    def _is(self, slot: int, key: bytes) -> bool:
        record = self._number(slot + 40, 4) & ~31
        size = self._number(slot + 46, 1)
        start = self._image[slot : slot + 32]
        whole = self._image[record + 32 : record + 32 + size]
        return size == len(key) and start == key[:32].ljust(32, b"\0") and whole == key

    def value(self, key: bytes) -> bytes | None:
        """Return the value of `key`; None where it is absent."""
        slot = self.find(key)
        if slot < 0:
            return None
        record = self._number(slot + 40, 4) & ~31
        value_size = self._number(slot + 44, 2)
        start = record + 32 + len(key)
        value = self._image[start : start + value_size]
        stamp, expires_at = self._number(record + 8, 8), self._number(record + 16, 8)
        assert self._number(slot + 32, 8) == expires_at
        hash_of_key = xxh3_64_intdigest(key, self._seed)
        seed = (hash_of_key ^ stamp ^ expires_at << 16 ^ record) % 2**64
        assert self._number(record + 24, 8) == xxh3_64_intdigest(value, seed)
        return value


def assert_holds(parts: Components, expected: dict[bytes, bytes], absent: Iterator[bytes]) -> None:
    """Assert that the table and the plain search find just this."""
    reader = Reader(parts.file.map[: parts.file.size])
    for key, value in expected.items():
        slot = parts.slots.find(parts.hash(key), key)
        assert slot == reader.find(key) > 0
        assert reader.value(key) == value
    for key in absent:
        assert parts.slots.find(parts.hash(key), key) <= 0
        assert reader.find(key) == -1


def all_keys(parts: Components, stripe: int, now_ms: int = NOW_MS) -> list[bytes]:
    """Return the keys of a stripe as iteration gives them."""
    run = DIRECTORY_ENTRIES // 16
    position, found = stripe * run, []
    while position < (stripe + 1) * run:
        keys, position, damage = parts.segments.segment_keys(position, now_ms)
        assert damage == []
        found += keys
    return found


def controls(parts: Components, extent: int) -> list[bytes]:
    """Return the control bytes of each bucket of a segment."""
    start = extent << EXTENT_SHIFT
    return [
        parts.file.map[bucket + CONTROL_OFFSET : bucket + CONTROL_OFFSET + SLOT_COUNT]
        for bucket in range(start, start + EXTENT_SIZE, BUCKET_SIZE)
    ]


def counts(parts: Components, extent: int) -> tuple[int, int]:
    """Return how many slots are live and how many used, as the segment's entry says."""
    _, _, live, used, _, _ = SEGMENT_ENTRY.unpack_from(parts.file.map, map_entry_offset(extent))
    return live, used


def keys_where(
    parts: Components, wanted: Callable[[int], bool], *, long: bool = False
) -> Iterator[bytes]:
    """Yield keys, without end, whose hashes are wanted."""
    number = 0
    while True:
        number += 1
        key = f"{'é' * 16 if long else ''}{number}".encode()
        if wanted(parts.hash(key)):
            yield key


def home_in(directory: int, bucket: int) -> Callable[[int], bool]:
    """Tell hashes of one stripe's first segment and one home bucket."""
    return lambda hash_of_key: hash_of_key >> 60 == directory and hash_of_key & 15 == bucket
