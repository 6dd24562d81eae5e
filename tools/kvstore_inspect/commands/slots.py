"""`slots`: the table's segments, and the raw bytes of what a key or an offset leads to."""

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import click
from rich.table import Table
from rich.text import Text

from kvstore.clock import now_ms
from kvstore.format.bucket import live_slots
from kvstore.format.codec import encode_key
from kvstore.format.layout import (
    BLOCK_SIZES,
    BUCKET_COUNT,
    BUCKET_HEADER,
    BUCKET_HEADER_SIZE,
    BUCKET_SIZE,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    IDENTITY,
    IDENTITY_OFFSETS,
    KIND_SEGMENT,
    KIND_SLAB,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SLAB_ENTRY,
    SLOT_COUNT,
    SLOT_SIZE,
    U64,
    bucket_marker,
    segment_run,
)
from kvstore_inspect.describe import (
    Section,
    blocks,
    bucket_section,
    lookup,
    map_section,
    record_sections,
    slot_section,
    superblock,
)
from kvstore_inspect.fields import (
    IDENTITY_STRUCTURE,
    SLOT_STRUCTURE,
    Field,
    hexadecimal,
    lines,
    printable,
)
from kvstore_inspect.file_view import FileView
from kvstore_inspect.records import Records
from kvstore_inspect.table import bucket_counts
from kvstore_inspect.terminal import say, show_line, show_table

from .common import DONE, PROBLEMS, DamageReport, opened, reading

_DUMP_SIZE: Final = 256
_FIELD_LINE_SIZE: Final = 8
_BAR_SIZE: Final = 20
_SEED_OFFSETS: Final = tuple(
    each.offset
    for offset in IDENTITY_OFFSETS
    for each in IDENTITY_STRUCTURE.fields(bytes(IDENTITY.size), offset)
    if each.name == "hash_seed"
)
_HELP = """Show the raw bytes of the file with every field named, and what does not fit.

Without an option: the segments of the table, and how full they are. A segment is an extent of the
file; --segment takes its number, and shows a slab's blocks or the superblock (0) just as well.
--key shows the whole way of a lookup: hash, directory, bucket, slot, record.

The format of the file, with an example, is described in kvstore/layout.py: "python -m pydoc
kvstore.format.layout". Exit status 1 where something does not fit, or the key is absent.

The hash seed is the file's secret: whoever knows it can choose keys that the table has no room for.
It is shown as dots, so that what is printed can be passed on, unless --secret is given.
"""


@click.command(
    "slots",
    help=_HELP,
    epilog="Example: kvstore-inspect slots data.kvs --key user:1",
)
@reading
@click.option("--key", metavar="KEY", help="The way of a lookup of this key.")
@click.option(
    "--segment",
    "--extent",
    "extent",
    type=click.IntRange(0),
    metavar="N",
    help="The segment in extent N: its buckets and live slots.",
)
@click.option(
    "--bucket",
    type=click.IntRange(0, BUCKET_COUNT - 1),
    metavar="B",
    help="Of that segment only bucket B, each field of each live slot.",
)
@click.option("--slot", type=click.IntRange(0), metavar="OFFSET", help="The slot at this byte.")
@click.option("--record", type=click.IntRange(0), metavar="OFFSET", help="The record at this byte.")
@click.option("--full", is_flag=True, help="Values to their end, not their first 256 bytes.")
@click.option("--secret", is_flag=True, help="The bytes of the hash seed, not dots.")
def command(
    file: Path,
    wait: float,
    unlocked: bool,
    key: str | None,
    extent: int | None,
    bucket: int | None,
    slot: int | None,
    record: int | None,
    full: bool,
    secret: bool,
) -> int:
    """Print what was asked for; exit 1 where something of it does not fit."""
    if sum(each is not None for each in (key, extent, slot, record)) > 1:
        raise click.UsageError("--key, --segment, --slot and --record exclude each other")
    if bucket is not None and extent is None:
        raise click.UsageError("--bucket needs --segment")
    encoded = None if key is None else encode_key(key)
    how = _How(full, secret)
    with opened(file, wait, unlocked) as view:
        for problem in view.problems:
            say(f"{file}: {problem}")
        _warn_of_index(view)
        if encoded is not None:
            wrong = _show(view, lambda: lookup(view, encoded, now_ms()), how)
        elif slot is not None:
            wrong = _show(view, lambda: _slot_sections(view, _within(view, slot)), how)
        elif record is not None:
            offset = _within(view, record)
            wrong = _show(view, lambda: record_sections(view, offset, now_ms()), how)
        elif extent is not None:
            wrong = _show_extent(view, extent, bucket, how)
        else:
            wrong = _list_segments(view)
        return PROBLEMS if wrong or view.problems else DONE


def _warn_of_index(view: FileView) -> None:
    if not view.trusted and not view.in_use:
        say("the file was not closed in order or has changed since: its index may be out of date")


def _within(view: FileView, offset: int) -> int:
    if offset >= len(view):
        raise click.UsageError(f"byte {offset:,} is past the end of the file, {len(view):,} bytes")
    return offset


def _slot_sections(view: FileView, slot: int) -> Iterator[Section]:
    yield map_section(view, slot >> EXTENT_SHIFT, KIND_SEGMENT)
    yield slot_section(view, slot)


class _How(NamedTuple):
    """How bytes are shown: values to their end, and the hash seed as it is."""

    full: bool
    secret: bool

    def hexadecimal(self, raw: bytes, offset: int) -> str:
        """Return the bytes at a file offset, those of the hash seed as dots."""
        digits = hexadecimal(raw).split(" ")
        if not self.secret:
            for start in _SEED_OFFSETS:
                for place in range(max(start, offset), min(start + U64.size, offset + len(raw))):
                    digits[place - offset] = ".."
        return " ".join(digits)


# --- sections -------------------------------------------------------------------------------------


def _show(view: FileView, look: Callable[[], Iterable[Section]], how: "_How") -> bool:
    """Print sections; return whether something in them does not fit."""
    for _ in view.looks():
        sections = list(look())
        if not any(section.problems for section in sections):
            break
    for number, section in enumerate(sections):
        if number:
            show_line()
        _show_section(section, how)
    return any(section.problems for section in sections)


def _show_section(section: Section, how: "_How") -> None:
    show_line(section.title, style="bold")
    if section.fields:
        show_table(_field_table(section.fields, how))
    if section.dump:
        _show_dump(*section.dump, how)
    for note in section.notes:
        show_line(f"  {note}")
    for problem in section.problems:
        show_line(f"  ! {problem}", style="red")


def _field_table(fields: Iterable[Field], how: "_How") -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True, min_width=13)
    table.add_column(no_wrap=True, min_width=3 * _FIELD_LINE_SIZE - 1)
    table.add_column(no_wrap=True, style="cyan", min_width=15)
    table.add_column(overflow="fold")
    for each in fields:
        raw = "\n".join(
            how.hexadecimal(line, start)
            for start, line in lines(each.raw, each.offset, _FIELD_LINE_SIZE)
        )
        hidden = "secret; --secret shows it" if ".." in raw else each.meaning
        table.add_row(f"{each.offset:,}", raw, each.name or "(unnamed)", Text(hidden))
    return table


def _show_dump(offset: int, raw: bytes, how: "_How") -> None:
    shown = raw if how.full else raw[:_DUMP_SIZE]
    for start, line in lines(shown, offset):
        digits = how.hexadecimal(line, start)
        text = "" if ".." in digits else printable(line)
        show_line(f"{start:13,}  {digits:47}  {text}")
    if len(shown) < len(raw):
        show_line(f"  {len(raw) - len(shown):,} more bytes; --full shows them")


# --- segments ------------------------------------------------------------------------------------


def _list_segments(view: FileView) -> bool:
    """Print a line for each segment that the directory leads to."""
    _write("extent           byte  directory      depth  live  dead    load")
    report = DamageReport(view.path)
    for position, extent, contents, damage in Records(view).segments():
        if damage is not None:
            report.add(damage)
            continue
        counts = [bucket_counts(contents, page) for page in range(0, EXTENT_SIZE, BUCKET_SIZE)]
        live, dead, _ = map(sum, zip(*counts, strict=True))
        depth = BUCKET_HEADER.unpack_from(contents)[2]
        run = f"{position}..{position + segment_run(depth) - 1}"
        bar = "#" * round(_BAR_SIZE * live / SEGMENT_SLOTS)
        _write(
            f"{extent:6}  {extent << EXTENT_SHIFT:13,}  {run:13}  {depth:5}  {live:4}  {dead:4}  "
            f"{live / SEGMENT_SLOTS:6.1%}  {bar}"
        )
    return report.count > 0


def _show_extent(view: FileView, extent: int, bucket: int | None, how: "_How") -> bool:
    if extent >= view.extent_count:
        raise click.UsageError(f"the file has extents 0 to {view.extent_count - 1:,}")
    if extent == 0 and bucket is None:
        return _show(view, lambda: superblock(view), how)
    contents = view.extent(extent)
    marked = contents[:8] == bucket_marker(extent << EXTENT_SHIFT).to_bytes(8, "little")
    kind = view.map_entry(extent)[:1]
    if bucket is not None:
        offset = (extent << EXTENT_SHIFT) + bucket * BUCKET_SIZE
        return _show(view, lambda: _bucket_sections(view, offset), how)
    segment = marked or kind == bytes([KIND_SEGMENT])
    wrong = _show(view, lambda: [map_section(view, extent, KIND_SEGMENT if segment else None)], how)
    _write("")
    if segment:
        return _show_segment(view, extent, contents) or wrong
    if kind == bytes([KIND_SLAB]):
        return _show_slab(view, extent) or wrong
    _write(
        "Directory (1) and extent map (2 to 5) are tables of all other extents."
        if extent < FIXED_EXTENTS
        else "Nothing is in this extent."
    )
    return wrong


def _bucket_sections(view: FileView, bucket: int) -> Iterator[Section]:
    page = view[bucket : bucket + BUCKET_SIZE]
    yield bucket_section(page, bucket)
    if len(page) == BUCKET_SIZE:
        for index, _, _ in live_slots(page):
            yield slot_section(view, bucket + BUCKET_HEADER_SIZE + index * SLOT_SIZE)


def _show_segment(view: FileView, extent: int, contents: bytes) -> bool:
    """Print the buckets of a segment, then each live slot."""
    wrong = False
    pages = []
    live_found = 0
    _write("bucket           byte  live  dead  empty  load    earliest expiry")
    for number in range(BUCKET_COUNT):
        offset = (extent << EXTENT_SHIFT) + number * BUCKET_SIZE
        page = contents[number * BUCKET_SIZE : (number + 1) * BUCKET_SIZE]
        section = bucket_section(page, offset)
        for problem in section.problems:
            wrong = True
            say(f"{view.path}: byte {offset:,}: bucket {number}: {problem}")
        if len(page) < BUCKET_SIZE:
            continue
        pages.append((number, offset, page))
        live, dead, empty = bucket_counts(page)
        live_found += live
        earliest = next(each.meaning for each in section.fields if each.name == "earliest_expiry")
        _write(
            f"{number:6}  {offset:13,}  {live:4}  {dead:4}  {empty:5}  {live / SLOT_COUNT:4.0%}    "
            f"{earliest}"
        )
    live_by_map = SEGMENT_ENTRY.unpack(view.map_entry(extent))[2]
    if live_by_map != live_found and not view.in_use:
        wrong = True
        say(
            f"{view.path}: extent {extent}: {live_by_map} live slots by the map, {live_found} found"
        )
    for number, offset, page in pages:
        for index, _, packed in live_slots(page):
            control_byte = BUCKET_HEADER.unpack_from(page)[-1][index]
            _write(f"\nslot {index} of bucket {number}, control byte {control_byte:02X}")
            _write_slot(packed, offset + BUCKET_HEADER_SIZE + index * SLOT_SIZE)
    return wrong


def _write_slot(packed: bytes, slot: int) -> None:
    """Print the bytes of a slot in lines of sixteen, beside each what begins in it."""
    fields = list(SLOT_STRUCTURE.fields(packed, slot))
    for start, raw in lines(packed, slot):
        beside = [
            f"{each.name} {each.meaning}"
            for each in fields
            if each.name and start <= each.offset < start + len(raw)
        ]
        _write(f"{start:13,}  {hexadecimal(raw)}  {', '.join(beside)}".rstrip())


def _show_slab(view: FileView, extent: int) -> bool:
    size_class = SLAB_ENTRY.unpack(view.map_entry(extent))[1]
    if size_class >= len(BLOCK_SIZES):
        say(f"{view.path}: extent {extent}: there is no size class {size_class}")
        return True
    wrong = False
    for offset, what, header in blocks(view, extent):
        wrong |= what in ("cut off", "neither a record nor a free block")
        _write(f"{offset:13,}  {hexadecimal(header[:8]):23}  {what}")
    return wrong and not view.in_use


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
