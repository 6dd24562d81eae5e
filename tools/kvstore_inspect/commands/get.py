"""`get`: one record, value and all metadata."""

from pathlib import Path

import click
import orjson
from rich.table import Table

from kvstore_inspect.records import Damage, Record, Records
from kvstore_inspect.terminal import duration, escaped, moment, out, print_json, progress, say, size

from .common import DONE, PROBLEMS, json_option, now_ms, opened, reading


@click.command(
    "get",
    epilog="Example: kvstore-inspect get data.kvs user:1",
    help="Show the record of KEY: its value and all that is stored with it.",
)
@reading
@click.argument("key")
@json_option
def command(file: Path, key: str, wait: float, unlocked: bool, as_json: bool) -> int:
    """Print the record; exit 1 where it is absent, expired or damaged."""
    with opened(file, wait, unlocked) as image, progress("looking") as show:
        found = Records(image, now_ms(), show).find(key)
    if isinstance(found, Damage):
        say(f"key {escaped(key)}: {found.message} (byte {found.offset:,})")
        return PROBLEMS
    if found is None:
        say(f"key {escaped(key)}: not in the store")
        return PROBLEMS
    expired = 0 < found.expires_at <= now_ms()
    if as_json:
        print_json(as_object(found, expired))
    else:
        _print(found, expired)
    return PROBLEMS if expired else DONE


def as_object(record: Record, expired: bool) -> dict[str, object]:
    """Return the record as `--json` prints it."""
    return {
        "key": record.key,
        "value": record.parsed(),
        "created_at": record.created_at,
        "expires_at": record.expires_at or None,
        "expired": expired,
        "value_size": len(record.value),
        "record_offset": record.offset,
        "slot_offset": record.slot or None,
    }


def _print(record: Record, expired: bool) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("key", escaped(record.key))
    table.add_row("created", moment(record.created_at))
    left = record.expires_at - now_ms()
    ends = f"{moment(record.expires_at)}, {duration(left)} {'ago' if expired else 'left'}"
    table.add_row("expires", ends if record.expires_at else "never")
    table.add_row("value", f"{size(len(record.value))} of JSON")
    table.add_row("record", f"byte {record.offset:,}")
    table.add_row("slot", f"byte {record.slot:,}" if record.slot else "none")
    out.print(table)
    out.print_json(orjson.dumps(record.parsed()).decode())
