"""One page of the table as bytes: its live slots."""

from collections.abc import Iterator

from .layout import (
    BUCKET_HEADER_SIZE,
    CONTROL_OFFSET,
    CONTROL_TOMBSTONE,
    SLOT_COUNT,
    SLOT_EXPIRY,
    SLOT_WHOLE,
)


def live_slots(bucket: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield index in the bucket, expires_at and the 48 bytes of each live slot of a page."""
    controls = bucket[CONTROL_OFFSET : CONTROL_OFFSET + SLOT_COUNT]
    if not any(controls):  # as most are in a small store
        return
    slots = bucket[BUCKET_HEADER_SIZE:]
    for index, control, (slot,), (expires_at,) in zip(
        range(SLOT_COUNT),
        controls,
        SLOT_WHOLE.iter_unpack(slots),
        SLOT_EXPIRY.iter_unpack(slots),
        strict=True,
    ):
        if control > CONTROL_TOMBSTONE:
            yield index, expires_at, slot
