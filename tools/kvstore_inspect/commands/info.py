"""`info`: what a file is, what is in it, where its bytes are, and what is unusual about it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from rich.table import Table
from rich.text import Text

from kvstore import IMPLEMENTATION
from kvstore.format.layout import EXTENT_SIZE, MAX_FILE_SIZE, SEGMENT_SLOTS
from kvstore_inspect.file_view import FileView
from kvstore_inspect.opening import Opening
from kvstore_inspect.space import Space, survey
from kvstore_inspect.terminal import (
    escaped,
    moment,
    out,
    print_json,
    progress,
    say,
    show_table,
    size,
    size_exactly,
)

from .common import DONE, PROBLEMS, json_option, now_ms, opened, reading

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
            largest_value; expired: beside them, still there and no longer read
  table     segments, slots, load (0 to 1, by expired records too), tombstones
  space     table_size, slab_size, live_size, padding_size, free_size, expired_size
  classes   for each size class in use: size_class, block_size, extents, records, expired,
            free_blocks, live_size, padding_size
  damage    count, first (up to 100, each offset, key and message)
  advice    sentences
  implementation  compiled or plain: the twin of the hot path that looked at the file
"""
_MUCH: Final = 4 * 1024 * 1024
_NEARLY_FULL: Final = MAX_FILE_SIZE * 9 // 10


@click.command(
    "info", help=_HELP, epilog="Example: kvstore-inspect info data.kvs --json | jq .records"
)
@reading
@json_option
def command(file: Path, wait: float, unlocked: bool, as_json: bool) -> int:
    """Print what the file is; exit 1 where something of it is damaged."""
    with opened(file, wait, unlocked) as view:
        with progress("counting") as show:
            space = survey(view, now_ms(), show)
        if as_json:
            print_json(_as_object(view, space))
        else:
            _print(view, space)
        altered = _is_altered(view)
    for damage in space.damages:
        key = "" if damage.key is None else f"key {escaped(damage.key)}: "
        say(f"{file}: byte {damage.offset:,}: {key}{damage.message}")
    if space.damaged > len(space.damages):
        say(f"{file}: {space.damaged - len(space.damages):,} more; `verify` names them all")
    return PROBLEMS if space.damaged or altered else DONE


def _is_altered(view: FileView) -> bool:
    """Return whether the index is not what it was when the file was closed."""
    return view.state.clean and not view.trusted and not view.in_use


def _is_refused(view: FileView) -> bool:
    """Return whether the next opening refuses the file; one in use was opened."""
    return not view.in_use and view.next_opening() is Opening.REFUSES


def _allocated(view: FileView) -> int | None:
    blocks: int | None = getattr(view.status(), "st_blocks", None)
    return None if blocks is None else 512 * blocks


def _as_object(view: FileView, space: Space) -> dict[str, object]:
    identity, state = view.identity, view.state
    return {
        "file": {
            "path": str(view.path).encode(errors="replace").decode(),
            "size": len(view),
            "allocated_size": _allocated(view),
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
        "records": {
            "counted_by": "index" if space.by_index else "records",
            "count": space.records,
            "expiring": space.expiring,
            "expired": space.expired,
            "key_size": space.key_size,
            "value_size": space.value_size,
            "largest_value": space.largest_value,
        },
        "table": {
            "segments": space.segments,
            "slots": space.segments * SEGMENT_SLOTS,
            "load": round(space.load, 6),
            "tombstones": space.tombstones,
        },
        "space": {
            "table_size": space.segments * EXTENT_SIZE,
            "slab_size": space.slabs * EXTENT_SIZE,
            "live_size": space.live_size,
            "padding_size": space.padding_size,
            "free_size": space.free_size,
            "expired_size": space.expired_size,
        },
        "classes": [
            {
                "size_class": each.size_class,
                "block_size": each.block_size,
                "extents": each.extents,
                "records": each.records,
                "expired": each.expired,
                "free_blocks": each.free_blocks,
                "live_size": each.records * each.block_size,
                "padding_size": each.padding_size,
            }
            for each in space.classes
            if each.records or each.expired
        ],
        "damage": {
            "count": space.damaged,
            "first": [
                {"offset": each.offset, "key": each.key, "message": each.message}
                for each in space.damages
            ],
        },
        "advice": list(_advice(view, space)),
        "implementation": IMPLEMENTATION,
    }


# --- for people ----------------------------------------------------------------------------------


def _print(view: FileView, space: Space) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in _rows(view, space):
        table.add_row(name, Text(text))
    show_table(table)
    if space.records or space.expired:
        out.print()
        show_table(_class_table(space))
    for sentence in _advice(view, space):
        out.print()
        out.print(Text(sentence), soft_wrap=not out.is_terminal)


def _rows(view: FileView, space: Space) -> Iterator[tuple[str, str]]:
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
    how = "by the index" if space.by_index else "record by record: the index was not trusted"
    yield "records", f"{space.records:,}, counted {how}"
    if space.records:
        yield "with TTL", f"{space.expiring:,} of them"
        yield "keys", f"{size(space.key_size)}, {space.key_size / space.records:,.1f} B each"
        mean = space.value_size / space.records
        largest = size(space.largest_value)
        yield "values", f"{size(space.value_size)} of JSON, {mean:,.1f} B each, largest {largest}"
    yield "expired", f"{space.expired:,} beside them, whose space was not yet taken back"
    slots = f"{space.segments:,} segments, {space.segments * SEGMENT_SLOTS:,} slots"
    yield "table", f"{slots}, {space.load:.1%} full, {space.tombstones:,} tombstones"
    yield "", ""
    yield "table space", size_exactly(space.segments * EXTENT_SIZE)
    padding = size(space.padding_size)
    yield "records space", f"{size_exactly(space.live_size)}, padding {padding} of it"
    yield "expired space", size_exactly(space.expired_size)
    free = f"{space.free_extents:,} whole extents in it"
    yield "free space", f"{size_exactly(space.free_size)}, {free}"
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


def _class_table(space: Space) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = (
        "class",
        "block",
        "extents",
        "records",
        "expired",
        "free blocks",
        "live",
        "padding",
        "",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for each in space.classes:
        if each.records or each.expired:
            live = each.records * each.block_size
            table.add_row(
                str(each.size_class),
                f"{each.block_size:,} B",
                f"{each.extents:,}",
                f"{each.records:,}",
                f"{each.expired:,}",
                f"{each.free_blocks:,}",
                size(live),
                size(each.padding_size),
                f"{each.padding_size / live:.0%}" if live else "",
            )
    return table


def _advice(view: FileView, space: Space) -> Iterator[str]:
    """Yield a sentence for everything unusual: what it means, what to do."""
    if view.problems:
        yield (
            "The file is damaged. `kvstore-inspect verify` says what is lost by it, `dump` saves "
            "every record that is whole, `repair` rebuilds the index from them."
        )
    elif _is_refused(view):
        yield (
            "The store does not open as it is: its index is not to be trusted, and to rebuild it "
            "would lose records. `kvstore-inspect verify` says what is wrong, `repair` rebuilds "
            "the index from the records that are whole."
        )
    elif _is_altered(view):
        yield (
            "The index is not what it was when the file was closed, so it is damaged, or something "
            "else than kvstore wrote to the file, or this is a copy torn while it was made. The "
            "next opening rebuilds the index: all records of then are there and whole."
        )
    elif not view.state.clean and not view.in_use:
        yield (
            "The file was not closed in order: its process was killed, or the machine stopped. "
            "Nothing needs to be done: the next opening rebuilds the index from the records."
        )
    if space.damaged > len(view.problems):
        yield "Some of what was counted is damaged. `kvstore-inspect verify` names all of it."
    yield from _advice_on_space(view, space)


def _advice_on_space(view: FileView, space: Space) -> Iterator[str]:
    beyond = len(view) - view.state.extent_count * EXTENT_SIZE
    if view.state.intact and beyond > 0 and not (view.in_use or _is_refused(view)):
        yield (
            f"The file is {size(beyond)} longer than what it holds: its process died while it "
            f"opened the file or made it grow. The next opening cuts that off."
        )
    allocated = _allocated(view)
    if allocated is not None and allocated < len(view) - EXTENT_SIZE and not view.in_use:
        yield (
            f"{size(len(view) - allocated)} of the file have no room on the disk yet: it was "
            f"copied with holes, or its file system compresses. The next opening reserves them."
        )
    if space.expired_size > max(_MUCH, space.live_size // 4):
        yield (
            f"{space.expired:,} expired records hold {size(space.expired_size)}. `create` takes "
            f"that back when it needs room, `purge_expired()` at once."
        )
    if space.free_size > max(_MUCH, len(view) // 2):
        yield (
            f"{space.free_size / len(view):.0%} of the file is free, for records to come. If "
            f"none are: `kvstore-inspect copy` makes a compact copy."
        )
    if space.padding_size > max(_MUCH, space.live_size // 3):
        yield (
            f"{space.padding_size / space.live_size:.0%} of the records' space is padding: their "
            f"sizes are just above what a block holds. The table above tells of which classes."
        )
    if len(view) >= _NEARLY_FULL and space.free_size < MAX_FILE_SIZE // 10:
        yield (
            f"The file is close to {MAX_FILE_SIZE:,} bytes, the most that one can have. `dump "
            f"--format resp` carries it to Redis, which has no such limit."
        )
    if os.name == "posix" and view.status().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(view.status().st_mode)
        yield (
            f"Others than its owner may use the file (mode {mode:04o}; kvstore creates it with "
            f"0600). If that is not meant: chmod 600."
        )
