"""`info`: what a file is, what is in it, where its bytes are, and what is unusual about it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click
from rich.table import Table
from rich.text import Text

from kvstore import IMPLEMENTATION
from kvstore.clock import now_ms
from kvstore.format.layout import EXTENT_SIZE, SEGMENT_SLOTS
from kvstore_inspect.advice import advice
from kvstore_inspect.file_view import FileView
from kvstore_inspect.survey import Survey, survey
from kvstore_inspect.terminal import (
    escaped,
    moment,
    out,
    print_json,
    progress,
    say,
    show_fields,
    show_table,
    size,
    size_exactly,
)

from .common import DONE, PROBLEMS, DamageReport, json_option, opened, reading

_HELP = """Show what FILE is and what is in it: header, records, load, space by size class.

Says what is unusual, and what to do about it. Exit status 1 where something is damaged; `verify`
looks at each structure and each record, this only at what it counts.

\b
--json prints one object; sizes in bytes, times in ms since 1970 UTC:
  file      path, size, allocated_size (null where the system does not tell)
  header    version, extent_size, file_id (hex), created_at
  state     intact, clean, trusted (clean, and the index is as it was then), in_use (looked
            at with --unlocked), extent_count, durable_count (null where the state is damaged),
            holder (process id, or null)
  records   counted_by (index or records), count, of these expiring; key_size, value_size,
            largest_value; beside them, still there and no longer read: expired, and retired
            (superseded or deleted, not yet reclaimed), of these marked (deleted)
  table     segments, slots, load (0 to 1, by expired records too), tombstones
  space     table_size, slab_size, live_size, padding_size, free_size, expired_size,
            retired_size
  classes   for each size class in use: size_class, block_size, extents, records, expired,
            retired, free_blocks, live_size, padding_size
  damage    count, first (up to 100, each offset, key and message)
  advice    sentences
  implementation  compiled or plain: the implementation that looked at the file
"""
_SIZES: Final = ("live_size", "padding_size", "free_size", "expired_size", "retired_size")
_CLASS_FIELDS: Final = (
    "size_class",
    "block_size",
    "extents",
    "records",
    "expired",
    "retired",
    "free_blocks",
    "live_size",
    "padding_size",
)
# What each field is called for people, and at last the share of its blocks that is padding.
_CLASS_COLUMNS: Final = (
    *("class", "block", "extents", "records", "expired", "retired", "free blocks"),
    *("live", "padding", ""),
)


@click.command(
    "info", help=_HELP, epilog="Example: kvstore-inspect info data.kvs --json | jq .records"
)
@reading
@json_option
def command(file: Path, wait: float, unlocked: bool, as_json: bool) -> int:
    """Print what the file is; exit 1 where something of it is damaged."""
    with opened(file, wait, unlocked) as view:
        with progress("counting") as show:
            found = survey(view, now_ms(), show)
        if as_json:
            print_json(_as_object(view, found))
        else:
            _print(view, found)
    report = DamageReport(file)
    for damage in found.damages:
        report.add(damage)
    if found.damaged > len(found.damages):
        say(f"{file}: {found.damaged - len(found.damages):,} more; `verify` names them all")
    return PROBLEMS if found.damaged else DONE


def _as_object(view: FileView, found: Survey) -> dict[str, object]:
    return {
        **_of_file(view),
        **_of_contents(found),
        "advice": list(advice(view, found)),
        "implementation": IMPLEMENTATION,
    }


def _of_file(view: FileView) -> dict[str, object]:
    identity, state = view.identity, view.state
    return {
        "file": {
            "path": str(view.path).encode(errors="replace").decode(),
            "size": len(view),
            "allocated_size": view.allocated_size(),
        },
        "header": {
            "version": identity.version,
            "extent_size": identity.extent_size,
            "file_id": identity.file_id.hex(),
            "created_at": identity.created_at,
        },
        "state": {
            "intact": state.intact,
            "clean": state.clean,
            "trusted": view.trusted,
            "in_use": view.in_use,
            "extent_count": view.extent_count,
            "durable_count": state.durable_count if state.intact else None,
            "holder": view.holder() or None,
        },
    }


def _of_contents(found: Survey) -> dict[str, object]:
    return {
        "records": {
            "counted_by": "index" if found.by_index else "records",
            "count": found.records,
            "expiring": found.expiring,
            "expired": found.expired,
            "retired": found.retired,
            "marked": found.marked,
            "key_size": found.key_size,
            "value_size": found.value_size,
            "largest_value": found.largest_value,
        },
        "table": {
            "segments": found.segments,
            "slots": found.segments * SEGMENT_SLOTS,
            "load": round(found.load, 6),
            "tombstones": found.tombstones,
        },
        "space": {
            "table_size": found.segments * EXTENT_SIZE,
            "slab_size": found.slabs * EXTENT_SIZE,
            **{name: getattr(found, name) for name in _SIZES},
        },
        "classes": [
            {name: getattr(each, name) for name in _CLASS_FIELDS} for each in found.used_classes
        ],
        "damage": {
            "count": found.damaged,
            "first": [asdict(each) for each in found.damages],
        },
    }


# --- for people ----------------------------------------------------------------------------------


def _print(view: FileView, found: Survey) -> None:
    show_fields(_rows(view, found))
    if found.used_classes:
        out.print()
        show_table(_class_table(found))
    for sentence in advice(view, found):
        out.print()
        out.print(Text(sentence), soft_wrap=not out.is_terminal)


def _rows(view: FileView, found: Survey) -> Iterator[tuple[str, str]]:
    identity, state = view.identity, view.state
    yield "file", escaped(str(view.path))
    yield (
        "size",
        f"{size_exactly(len(view))}, {view.extent_count:,} extents of {size(EXTENT_SIZE)}",
    )
    yield "format", f"version {identity.version}, file id {identity.file_id.hex()}"
    yield "created", moment(identity.created_at)
    yield "state", _state(view)
    if state.intact:
        yield "durable", f"{state.durable_count:,} extents at least are left by any power loss"
    yield "", ""
    how = "by the index" if found.by_index else "record by record: the index was not trusted"
    yield "records", f"{found.records:,}, counted {how}"
    if found.records:
        yield "with TTL", f"{found.expiring:,} of them"
        yield "keys", f"{size(found.key_size)}, {found.key_size / found.records:,.1f} B each"
        mean = found.value_size / found.records
        largest = size(found.largest_value)
        yield "values", f"{size(found.value_size)} of JSON, {mean:,.1f} B each, largest {largest}"
    yield "expired", f"{found.expired:,} beside them, whose space was not yet taken back"
    if found.retired:
        marked = f"{found.marked:,} of them marked as deleted"
        yield "retired", f"{found.retired:,} beside them, not yet reclaimed, {marked}"
    slots = f"{found.segments:,} segments, {found.segments * SEGMENT_SLOTS:,} slots"
    yield "table", f"{slots}, {found.load:.1%} full, {found.tombstones:,} tombstones"
    yield "", ""
    yield "table space", size_exactly(found.segments * EXTENT_SIZE)
    padding = size(found.padding_size)
    yield "records space", f"{size_exactly(found.live_size)}, padding {padding} of it"
    yield "expired space", size_exactly(found.expired_size)
    if found.retired:
        yield "retired space", size_exactly(found.retired_size)
    free = f"{found.free_extents:,} whole extents in it"
    yield "free space", f"{size_exactly(found.free_size)}, {free}"
    yield "", ""
    yield "hot path", IMPLEMENTATION


def _state(view: FileView) -> str:
    pid = view.holder()
    if view.in_use:
        written = f"process {pid} wrote itself in as its holder" if pid else "nobody is written in"
        return f"looked at without its lock; {written}"
    if not view.state.intact:
        return "damaged"
    if view.state.clean:
        return "clean: closed in order" if view.trusted else "clean, but the index has changed"
    return f"not clean: process {pid} did not close it" if pid else "not clean: it was not closed"


def _class_table(found: Survey) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in _CLASS_COLUMNS:
        table.add_column(name, justify="right")
    for each in found.used_classes:
        table.add_row(
            str(each.size_class),
            f"{each.block_size:,} B",
            f"{each.extents:,}",
            f"{each.records:,}",
            f"{each.expired:,}",
            f"{each.retired:,}",
            f"{each.free_blocks:,}",
            size(each.live_size),
            size(each.padding_size),
            f"{each.padding_size / each.live_size:.0%}" if each.live_size else "",
        )
    return table
