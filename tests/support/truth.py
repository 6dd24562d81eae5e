"""A store's file before it is damaged: what it holds, and where."""

from pathlib import Path
from typing import Any

from kvstore.format.layout import (
    EXTENT_SIZE,
    FIXED_EXTENTS,
    IDENTITY,
    IDENTITY_OFFSETS,
    RECORD,
    RECORD_HEADER_SIZE,
)
from kvstore.format.records import is_valid_record, magics, size_class_at


class Truth:
    """An undamaged file, what it holds, and where."""

    def __init__(self, path: Path, live: dict[str, Any]) -> None:
        self.path = path
        self.live = live
        self.contents = path.read_bytes()
        self.places = live_places(self.contents)
        assert self.places.keys() == live.keys()

    def whole(self, damaged: bytes) -> set[str]:
        """Return the keys whose records are untouched in a damaged file; none without identity."""
        if not self.has_identity(damaged):
            return set()
        contents = self.contents
        return {key for key, place in self.places.items() if damaged[place] == contents[place]}

    def has_identity(self, damaged: bytes) -> bool:
        """Return whether one of the two copies of the identity is untouched."""
        return any(
            damaged[offset : offset + IDENTITY.size]
            == self.contents[offset : offset + IDENTITY.size]
            for offset in IDENTITY_OFFSETS
        )


def live_places(contents: bytes) -> dict[str, slice]:
    """Return where the whole records of a file are, by their keys."""
    seed = IDENTITY.unpack_from(contents)[4]
    places: dict[str, slice] = {}
    for base in range(FIXED_EXTENTS * EXTENT_SIZE, len(contents), EXTENT_SIZE):
        extent = contents[base : base + EXTENT_SIZE]
        for position in magics(extent):
            if size_class_at(extent, position) >= 0 and is_valid_record(
                extent, position, base, seed
            ):
                _, value_size, key_size, *_ = RECORD.unpack_from(extent, position)
                start = base + position + RECORD_HEADER_SIZE
                key = contents[start : start + key_size].decode()
                places[key] = slice(base + position, start + key_size + value_size)
    return places
