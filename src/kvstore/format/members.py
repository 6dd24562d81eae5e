"""Live slots on their way from one segment to another, as the plain implementation has them.

They are by their home buckets from the start, so that little is done for each.
"""

from collections.abc import Iterable
from typing import Final

from .layout import BUCKET_COUNT, FINGERPRINT_SHIFT, U64

_HOMES: Final = bytes(byte % BUCKET_COUNT for byte in range(256))
_LOWEST: Final = slice(U64.size - 1, None, U64.size)  # byte of each hash


class Members:
    """Live slots, all of one segment to be.

    Attributes:
        slots: of each of its buckets, those whose home it is, 48 bytes each.
        fingerprints: of each of its buckets, likewise, the lowest byte of each.
    """

    __slots__ = ("fingerprints", "slots")

    def __init__(self, slots: list[list[bytes]], fingerprints: list[bytearray]) -> None:
        self.slots = slots
        self.fingerprints = fingerprints

    def __add__(self, others: "Members") -> "Members":
        """Return these and others; of each bucket these come first."""
        return Members(
            [one + other for one, other in zip(self.slots, others.slots, strict=True)],
            [
                one + other
                for one, other in zip(self.fingerprints, others.fingerprints, strict=True)
            ],
        )


def count_members(members: Members) -> int:
    """Return how many slots these are."""
    return sum(map(len, members.fingerprints))


def fingerprints_of(hashes: bytes) -> bytes:
    """Return the fingerprints of hashes as those that `place_members` takes."""
    shifted = int.from_bytes(hashes, "big") >> FINGERPRINT_SHIFT  # all at once
    return shifted.to_bytes(len(hashes), "big")[_LOWEST]


def place_members(
    slots: Iterable[bytes], hashes: bytes, fingerprints: bytes, halves: bytes | None = None
) -> tuple[Members, Members]:
    """Return the slots with a 0 in `halves`, and those with a 1; without it, all are the former.

    `hashes`, of 8 bytes each, the uppermost first, are those of their keys, or what `found_words`
    words have of that.
    """
    places = hashes[_LOWEST].translate(_HOMES)
    if halves is not None:
        both = int.from_bytes(places, "big") + int.from_bytes(halves, "big") * BUCKET_COUNT
        places = both.to_bytes(len(places), "big")
    slots_at: list[list[bytes]] = [[] for _ in range(2 * BUCKET_COUNT)]
    fingerprints_at = [bytearray() for _ in range(2 * BUCKET_COUNT)]
    for place, slot, fingerprint in zip(places, slots, fingerprints, strict=True):
        slots_at[place].append(slot)
        fingerprints_at[place].append(fingerprint)
    return (
        Members(slots_at[:BUCKET_COUNT], fingerprints_at[:BUCKET_COUNT]),
        Members(slots_at[BUCKET_COUNT:], fingerprints_at[BUCKET_COUNT:]),
    )
