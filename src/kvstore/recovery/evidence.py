"""Whether a file's records may make its index anew, found out before a byte of it is changed.

A crash leaves a file that is not clean, in which a record may be torn; rebuilding drops it, and
nothing is lost that was promised. Whatever else takes an index for wrong is damage, of which nobody
knows how far it goes: a rebuild would wipe what a repair can still use. So before a file is
rebuilt, and first of all before it is changed,

- one that was closed must have all the records that it had then, and each of them whole;
- one whose state is damaged, each of them whole;
- one that was not closed must have them in their places: where bytes were inserted or removed, they
  are not found, though all of them are there.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from kvstore import compiled
from kvstore.format.extent_records import classify
from kvstore.format.layout import (
    BLOCK_ALIGNMENT,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    RECORD_HEADER_SIZE,
    RECORD_KEY_SIZE_OFFSET,
)
from kvstore.format.records import (
    is_valid_record,
    magics,
    places_of_magics,
    size_class_at,
)

Read = Callable[[int], bytes]
"""Returns all bytes of an extent, given its number."""

# Of bytes that are no magic one in four billion places looks like one.
_FEW: Final = 1


class Evidence(NamedTuple):
    """What the records of a file are like."""

    whole: int
    """Whole records, those of the wrong size class for their extent included."""
    damaged: int
    """Aligned magics of records that are not whole, or of another class than the rest."""
    astray: int
    """Magics at places where no record can begin."""
    first: int
    """Offset of the first of either; 0 where there is none."""

    def __str__(self) -> str:
        said = f"{self.whole:,} whole records"
        if self.damaged:
            said += f", {self.damaged:,} damaged ones"
        if self.astray:
            said += f", {self.astray:,} where none can begin"
        return f"{said}, the first of these at byte {self.first:,}" if self.first else said


def gather(read: Read, extent_count: int, hash_seed: int) -> Evidence:
    """Look at every record of a file: expired, retired and marked ones too."""
    implementation = compiled.selected
    whole = damaged = astray = first = 0
    for extent in range(FIXED_EXTENTS, extent_count):
        base, contents = extent << EXTENT_SHIFT, read(extent)
        count, aligned, first_magic = implementation.find_magics(contents)
        if not count:
            continue
        # As a rule each is that of a whole record, of one class.
        size_class = size_class_at(contents, first_magic) if aligned == count else -1
        if size_class >= 0:
            found = implementation.scan_blocks(contents, base, size_class, hash_seed, 0, 0)
            if len(found.positions) == count:
                whole += count
                continue
        verdict = classify(contents, base, hash_seed)
        whole += len(verdict.whole) + len(verdict.outdated)
        damaged += len(verdict.damaged) + len(verdict.outdated)
        unaligned = list(_unaligned(contents))
        astray += len(unaligned)
        wrong = (*verdict.damaged, *verdict.outdated, *unaligned)
        if wrong and not first:
            first = base + min(wrong)
    return Evidence(whole, damaged, astray, first)


def find_shift(read: Read, extent_count: int, size: int, hash_seed: int) -> int | None:
    """Return the offset of a record that is not in its place, for bytes were inserted or removed.

    None where there is none: in a file of `size` bytes that was in use a record may be torn, but
    not elsewhere. Reads the file, and looks at little of it.
    """
    find_magics = compiled.selected.find_magics
    astray = aligned = first = 0
    shifts = _possible_shifts(size - (extent_count << EXTENT_SHIFT))
    for extent in range(FIXED_EXTENTS, extent_count):
        contents = read(extent)
        count, in_place, _ = find_magics(contents)
        aligned += in_place
        if count > in_place and (unaligned := list(_unaligned(contents))):
            first = first or (extent << EXTENT_SHIFT) + unaligned[0]
            astray += len(unaligned)
            if len(unaligned) > _FEW:
                return first
        base = extent << EXTENT_SHIFT
        for moved in shifts:
            if moved > base:
                continue
            for position in magics(contents):
                if _is_moved(contents, position, base, base - moved, hash_seed):
                    return base + position
    return first if astray > aligned else None


def _possible_shifts(longer: int) -> list[int]:
    """Return by how many bytes aligned records may have moved in a file that is so much longer.

    Where bytes were inserted or removed, it has another length. It may have been longer than its
    contents before, by whole extents: where it had grown, or on Windows since it was in use.
    """
    part = longer % EXTENT_SIZE
    shifts = {longer, part, part - EXTENT_SIZE} if part else {longer}
    return sorted(each for each in shifts if each and not each % BLOCK_ALIGNMENT)


def _is_moved(contents: bytes, position: int, base: int, before: int, hash_seed: int) -> bool:
    """Return whether a record would be whole where the extent was at `before`, and is not here."""
    # No size class: at its place before there was another extent's edge.
    return is_valid_record(contents, position, before, hash_seed) and not is_valid_record(
        contents, position, base, hash_seed
    )


def _unaligned(contents: bytes) -> Iterator[int]:
    """Yield where an extent has a magic that is not aligned as a block is, and is no time.

    Two milliseconds in 49.7 days look so, and with them times and stamps. A record has a key, whose
    size is where a time in the table has zero; and a stamp or a time of a record has its magic
    before it.
    """
    aligned = -BLOCK_ALIGNMENT
    for position in places_of_magics(contents):
        if position % BLOCK_ALIGNMENT == 0:
            aligned = position
            continue
        key_size = position + RECORD_KEY_SIZE_OFFSET
        is_in_header = position - aligned < RECORD_HEADER_SIZE
        if key_size < EXTENT_SIZE and contents[key_size] and not is_in_header:
            yield position
