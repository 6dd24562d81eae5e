"""Members of segments in the kinds of both implementations, and as tests see them."""

from struct import Struct
from typing import TYPE_CHECKING, Final, cast

from kvstore.compiled import Implementation
from kvstore.format.members import Members as PlainMembers
from kvstore.format.members import fingerprints_of, place_members

if TYPE_CHECKING:
    from kvstore.compiled.interface import Members

MEMBER: Final = Struct("<Q48s")  # of the compiled code: see `members.pxi`
HASH_MASK: Final = 0xFFF  # what of a hash a segment asks: home bucket and fingerprint


def pack_members(implementation: Implementation, members: list[tuple[int, bytes]]) -> "Members":
    """Return hashes and slots as members."""
    if implementation.name == "compiled":
        return b"".join(MEMBER.pack(*each) for each in members)
    hashes = b"".join(hash_of_key.to_bytes(8, "big") for hash_of_key, _ in members)
    return place_members([slot for _, slot in members], hashes, fingerprints_of(hashes))[0]


def unpack_members(members: "Members") -> list[tuple[int, bytes]]:
    """Return what members have of hashes, and the slots, in the order of their home buckets."""
    if isinstance(members, bytes):
        unpacked = [(word & HASH_MASK, slot) for word, slot in MEMBER.iter_unpack(members)]
        return sorted(unpacked, key=lambda member: member[0] & 0xF)
    plain = cast("PlainMembers", members)
    return [
        (fingerprint << 4 | home, slot)
        for home in range(16)
        for fingerprint, slot in zip(plain.fingerprints[home], plain.slots[home], strict=True)
    ]
