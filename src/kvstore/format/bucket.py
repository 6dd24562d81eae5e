"""One page of the table as bytes: its live slots, and what they are on their way to another one."""

from collections.abc import Iterator
from struct import Struct
from typing import Final

from .layout import (
    BUCKET_HEADER_SIZE,
    CONTROL_OFFSET,
    CONTROL_TOMBSTONE,
    SLOT_COUNT,
    SLOT_EXPIRY,
    SLOT_SIZE,
    SLOT_WHOLE,
)

# A live slot on its way from one segment to another: the hash of its key, or what a `found_words`
# word has of that, and its 48 bytes. Members are these, one after the other.
MEMBER: Final = Struct(f"<Q{SLOT_SIZE}s")
MEMBER_WORDS: Final = Struct("<Q32sQQ")  # the same, with the slot as `layout.SLOT_WORDS`


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
