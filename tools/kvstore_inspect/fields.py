"""Bytes of the file beside their meaning: each structure's fields by the names of the layout.

Trusts nothing: what is cut off, or is not what it should be there, is shown as it is, and named.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from struct import Struct, calcsize
from typing import Final, NamedTuple

from kvstore.format.layout import (
    BLOCK_SIZES,
    BUCKET_HEADER,
    BUCKET_HEADER_FIELDS,
    CONTROL_EMPTY,
    CONTROL_TOMBSTONE,
    EXTENT_SHIFT,
    FREE_BLOCK,
    FREE_BLOCK_FIELDS,
    FREE_MAGIC,
    IDENTITY,
    IDENTITY_FIELDS,
    KIND_FIXED,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    MARKED_MAGIC,
    MAX_DEPTH,
    NEVER,
    NO_BLOCK,
    NO_EXPIRY,
    NO_EXTENT,
    RECORD,
    RECORD_FIELDS,
    RECORD_MAGIC,
    SEGMENT_ENTRY,
    SEGMENT_ENTRY_FIELDS,
    SLAB_ENTRY,
    SLAB_ENTRY_FIELDS,
    SLOT,
    SLOT_FIELDS,
    SLOT_FLAGS,
    SLOT_OLDER,
    SLOT_OLDER_UNDATED,
    SLOT_RECORD_MASK,
    STAMP_SHIFT,
    STATE,
    STATE_FIELDS,
    U16,
    bucket_marker,
    segment_run,
)

from .terminal import escaped, moment

_TOKEN: Final = re.compile(r"(\d*)([a-zA-Z?])")
_LINE_SIZE: Final = 16
KIND_NAMES: Final = {
    KIND_FREE: "free, or never used",
    KIND_FIXED: "fixed",
    KIND_SEGMENT: "a segment of the table",
    KIND_SLAB: "a slab, cut into blocks",
}


class Field(NamedTuple):
    """A field of a structure in the file; `name` is empty for bytes that no field names."""

    name: str
    offset: int
    raw: bytes
    value: int | bytes
    meaning: str


Meaning = Callable[[int, int], str]
"""What a number means, given it and the offset of the structure that it is in."""


class Structure(NamedTuple):
    """A struct of the layout with its fields' names, and what the numbers in them mean."""

    packing: Struct
    names: tuple[str, ...]
    meanings: Mapping[str, Meaning] = {}

    def fields(self, contents: bytes, offset: int) -> Iterator[Field]:
        """Yield the fields of `contents`, which begin at file offset `offset`.

        Those that are cut off are not there.
        """
        names = iter(self.names)
        for position, size, code in _spans(self.packing.format):
            raw = contents[position : position + size]
            if len(raw) < size:
                return
            name = "" if code == "x" else next(names)
            value = raw if code in "sx" else int.from_bytes(raw, "little")
            yield Field(name, offset + position, raw, value, self._meaning(name, value, offset))

    def _meaning(self, name: str, value: int | bytes, offset: int) -> str:
        if name in ("", "zero"):
            wrong = any(value) if isinstance(value, bytes) else value
            return "should be zero" if wrong else ""
        if isinstance(value, bytes):
            return escaped(value.rstrip(b"\0").decode(errors="replace")) if name == "key" else ""
        explain = self.meanings.get(name) or _MEANINGS.get(name)
        return explain(value, offset) if explain else f"{value:,}"


def _spans(packing: str) -> Iterator[tuple[int, int, str]]:
    """Yield offset, size and code of each field that a struct's format names, one number each."""
    position = 0
    for count, code in _TOKEN.findall(packing):
        repeats, unit = (1, f"<{count}{code}") if code in "sx" else (int(count or 1), f"<{code}")
        for _ in range(repeats):
            yield position, calcsize(unit), code
            position += calcsize(unit)


# --- what numbers mean ---------------------------------------------------------------------------


def _earliest(value: int, _offset: int) -> str:
    return "nothing in it expires" if value == NO_EXPIRY else f"nothing before {moment(value)}"


def _magic(name: str, *known: tuple[int, str]) -> Meaning:
    said = {magic: f"of a {kind}" for magic, kind in known}
    return lambda value, _: said.get(value, f"NOT that of a {name}")


def _marker(value: int, offset: int) -> str:
    expected = bucket_marker(offset)
    page = value & 0xFFFF_FFFF
    return f"of page {page:,}" if value == expected else f"WRONG: that of this page is {expected:X}"


def _size_class(value: int, _offset: int) -> str:
    if value >= len(BLOCK_SIZES):
        return f"{value}: NOT a class that there is"
    return f"{value}: blocks of {BLOCK_SIZES[value]:,} bytes"


def _depth(value: int, _offset: int) -> str:
    owns = f": owns {segment_run(value):,} directory entries" if value <= MAX_DEPTH else ""
    return f"{value}{owns}"


def _hexadecimal(value: int, _offset: int) -> str:
    return f"0x{value:016X}"


def stamp_meaning(stamp: int, _offset: int = 0) -> str:
    """Return the time of a stamp, and its counter, which tells those of one millisecond apart."""
    if not stamp:
        return "none"
    counter = stamp & (1 << STAMP_SHIFT) - 1
    return f"{moment(stamp >> STAMP_SHIFT, exact=True)}, counter {counter:,}"


def _generation(value: int, _offset: int) -> str:
    if not value:
        return "neither superseded nor deleted"
    return f"{value}: that in which it was superseded or deleted"


def _record(value: int, _offset: int) -> str:
    place = value & SLOT_RECORD_MASK
    said = [f"at byte {place:,}, in extent {place >> EXTENT_SHIFT:,}"]
    said += [f"{name}: {what}" for flag, (name, what) in _FLAG_MEANINGS.items() if value & flag]
    if value & ~(SLOT_RECORD_MASK | SLOT_FLAGS):
        said.append("bits 2 to 4 should be zero")
    return "; ".join(said)


def _numbered(thing: str, none: int) -> Meaning:
    return lambda value, _: "none" if value == none else f"{thing} {value:,}"


_FLAG_MEANINGS: Final = {
    SLOT_OLDER: ("SLOT_OLDER", "older records of the key may be on the disk"),
    SLOT_OLDER_UNDATED: ("SLOT_OLDER_UNDATED", "they may be, whatever the stamp of this one"),
}
# By the fields' names, in all structures but those that say otherwise.
_MEANINGS: Final[dict[str, Meaning]] = {
    **dict.fromkeys(("hash_seed", "checksum", "index_checksum"), _hexadecimal),
    **dict.fromkeys(("value_size", "key_size"), lambda value, _: f"{value:,} bytes"),
    **dict.fromkeys(("extent", "previous", "next"), _numbered("extent", NO_EXTENT)),
    "created_at": lambda value, _: moment(value),
    "expires_at": lambda value, _: "never" if value == NEVER else moment(value),
    "earliest_expiry": _earliest,
    "kind": lambda value, _: f"{value}: {KIND_NAMES.get(value, 'NOT a kind that there is')}",
    "size_class": _size_class,
    "first_free": _numbered("block", NO_BLOCK),
    "fresh": lambda value, _: f"block {value:,}, and all after it, were never used",
    "marker": _marker,
    "depth": _depth,
    "record": _record,
    "generation": _generation,
    "stamp": stamp_meaning,
    "retired": lambda value, _: f"{value:,} of the live blocks: superseded or deleted records",
}
IDENTITY_STRUCTURE: Final = Structure(IDENTITY, IDENTITY_FIELDS)
STATE_STRUCTURE: Final = Structure(STATE, STATE_FIELDS)
DIRECTORY_STRUCTURE: Final = Structure(U16, ("extent",))
SEGMENT_ENTRY_STRUCTURE: Final = Structure(SEGMENT_ENTRY, SEGMENT_ENTRY_FIELDS)
SLAB_ENTRY_STRUCTURE: Final = Structure(SLAB_ENTRY, SLAB_ENTRY_FIELDS)
BUCKET_STRUCTURE: Final = Structure(BUCKET_HEADER, BUCKET_HEADER_FIELDS)
SLOT_STRUCTURE: Final = Structure(SLOT, SLOT_FIELDS)
RECORD_STRUCTURE: Final = Structure(
    RECORD,
    RECORD_FIELDS,
    {
        "magic": _magic(
            "record", (RECORD_MAGIC, "record"), (MARKED_MAGIC, "record that is marked as deleted")
        )
    },
)
FREE_BLOCK_STRUCTURE: Final = Structure(
    FREE_BLOCK,
    FREE_BLOCK_FIELDS,
    {
        "magic": _magic("free block", (FREE_MAGIC, "free block")),
        "next": _numbered("block", NO_BLOCK),
    },
)


# --- bytes ---------------------------------------------------------------------------------------


def hexadecimal(raw: bytes) -> str:
    """Return bytes as hex, two digits each."""
    return raw.hex(" ").upper()


def lines(raw: bytes, offset: int, size: int = _LINE_SIZE) -> Iterator[tuple[int, bytes]]:
    """Yield bytes `size` at a time, each with the file offset of the first."""
    for position in range(0, len(raw), size):
        yield offset + position, raw[position : position + size]


def printable(raw: bytes) -> str:
    """Return bytes as ASCII, a dot for each that has no sign of its own."""
    return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in raw)


def control_meaning(control: int) -> str:
    """Return what a control byte says of its slot."""
    if control == CONTROL_EMPTY:
        return "empty"
    return "a tombstone" if control == CONTROL_TOMBSTONE else "live, this is its fingerprint"
