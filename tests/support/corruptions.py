"""Breaches planted in the bytes of a file, with checksums that fit them."""

from xxhash import xxh3_64_intdigest

from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    BUCKET_SIZE,
    CONTROL_OFFSET,
    DIRECTORY_OFFSET,
    DIRECTORY_SIZE,
    EXTENT_MAP_ENTRIES,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    FREE_EXTENTS_OFFSET,
    IDENTITY,
    SEGMENT_ENTRY,
    SLAB_ENTRY,
    SLOT,
    SLOT_COUNT,
    SLOT_RECORD_MASK,
    STATE,
    STATE_OFFSET,
    U16,
    U64,
    key_hash,
    map_entry_offset,
)


class Corruption:
    """A copy of a good file's bytes, to plant breaches in, and where in it things are."""

    def __init__(self, image: bytes) -> None:
        self.image = bytearray(image)
        self.seed = IDENTITY.unpack_from(image)[4]
        self.extent_count = STATE.unpack_from(image, STATE_OFFSET)[1]

    # --- where things are

    def u16(self, offset: int) -> int:
        number: int = U16.unpack_from(self.image, offset)[0]
        return number

    def segment_of(self, key: bytes) -> int:
        return self.u16(DIRECTORY_OFFSET + 2 * (key_hash(key, self.seed) >> 49))

    def slot(self, key: bytes) -> int:
        """Return the offset of the slot of `key`, which is in its home bucket."""
        hash_of_key = key_hash(key, self.seed)
        bucket = (self.segment_of(key) << EXTENT_SHIFT) + (hash_of_key & 15) * BUCKET_SIZE
        for index in range(SLOT_COUNT):
            slot = bucket + 256 + 48 * index
            if self.image[bucket + CONTROL_OFFSET + index] > 1:
                start, *_, size = SLOT.unpack_from(self.image, slot)
                if start[:size] == key:
                    return slot
        raise AssertionError("the key is not in its home bucket")

    def bucket(self, key: bytes) -> int:
        return self.slot(key) & -BUCKET_SIZE

    def control(self, key: bytes) -> int:
        slot = self.slot(key)
        return self.bucket(key) + CONTROL_OFFSET + ((slot & BUCKET_SIZE - 1) - 256) // 48

    def record(self, key: bytes) -> int:
        record: int = SLOT.unpack_from(self.image, self.slot(key))[2]
        return record & SLOT_RECORD_MASK

    def slab_of(self, key: bytes) -> int:
        return self.record(key) >> EXTENT_SHIFT

    def free_extents(self) -> list[int]:
        extents = []
        extent = self.u16(FREE_EXTENTS_OFFSET)
        while extent:
            extents.append(extent)
            extent = self.slab_entry(extent)["next"]
        return extents

    def slab_entry(self, extent: int) -> dict[str, int]:
        fields = SLAB_ENTRY.unpack_from(self.image, map_entry_offset(extent))
        names = ("kind", "class", "live", "first_free", "fresh", "previous", "next")
        return dict(zip((*names, "retired", "zero"), fields, strict=True))

    # --- changing them

    def put(self, offset: int, data: bytes) -> None:
        self.image[offset : offset + len(data)] = data

    def put_u16(self, offset: int, number: int) -> None:
        self.put(offset, U16.pack(number))

    def change_slab(self, extent: int, **fields: int) -> None:
        entry = {**self.slab_entry(extent), **fields}
        self.put(map_entry_offset(extent), SLAB_ENTRY.pack(*entry.values()))

    def change_segment(self, extent: int, *, live: int = 0, used: int = 0) -> None:
        """Add to the counts of a segment."""
        kind, zero, was_live, was_used, zero_too, earliest = SEGMENT_ENTRY.unpack_from(
            self.image, map_entry_offset(extent)
        )
        self.put(
            map_entry_offset(extent),
            SEGMENT_ENTRY.pack(kind, zero, was_live + live, was_used + used, zero_too, earliest),
        )

    def sign(self, records: int | None = None) -> bytes:
        """Return the bytes with checksums in the state that fit the index as it is now.

        It tells of so many records, by default of as many as before.
        """
        clean, count, durable, *_ = STATE.unpack_from(self.image, STATE_OFFSET)
        return self.sign_state(clean, count, durable, records)

    def records(self) -> int:
        """Return how many records the state tells of."""
        return int(STATE.unpack_from(self.image, STATE_OFFSET)[3])

    def sign_identity(self, fields: tuple[object, ...]) -> bytes:
        """Return an identity of these fields, the last of them made to fit the others."""
        body = IDENTITY.pack(*fields)[: -U64.size]
        return body + U64.pack(xxh3_64_intdigest(body))

    def sign_state(self, clean: int, count: int, durable: int, records: int | None = None) -> bytes:
        """As `sign`, with these fields in the state; with as many records as there were.

        Where it is clean, also with the latest stamp that there was; else nothing is void.
        """
        _, _, _, had_records, _, stamp, _ = STATE.unpack_from(self.image, STATE_OFFSET)
        if records is None:
            records = had_records
        index = (
            self.image[DIRECTORY_OFFSET : DIRECTORY_OFFSET + DIRECTORY_SIZE]
            + self.image[EXTENT_MAP_OFFSET : map_entry_offset(min(count, EXTENT_MAP_ENTRIES))]
            + self.image[ALLOCATOR_OFFSET : ALLOCATOR_OFFSET + ALLOCATOR_SIZE]
        )
        checksum = xxh3_64_intdigest(bytes(index), self.seed)
        body = STATE.pack(clean, count, durable, records, checksum, stamp if clean else 0, 0)[
            : -U64.size
        ]
        self.put(STATE_OFFSET, body + U64.pack(xxh3_64_intdigest(body, self.seed)))
        return bytes(self.image)
