"""`get`: one record, value and all metadata."""

from pathlib import Path

import click
import orjson

from kvstore.clock import now_ms
from kvstore.format.codec import encode_key
from kvstore_inspect.records import DamagedRecord, Record, Records
from kvstore_inspect.terminal import (
    duration,
    escaped,
    moment,
    print_json,
    progress,
    say,
    show_fields,
    show_json_text,
    size,
)

from .common import DONE, PROBLEMS, json_option, opened, reading

_HELP = """Show the record of KEY: its value and all that is stored with it.

Exit status 1 where the key is absent, has expired or is damaged.

\b
--json prints one object, nothing where the key is absent or damaged:
  key            text
  value          as it was stored
  created_at     ms since 1970 UTC
  expires_at     likewise; null where the key has no TTL
  expired        whether it has; the store then treats the key as absent
  value_size     bytes of JSON
  record_offset  byte of the file where the record is
  slot_offset    where its slot is; null where the index is not used
"""


@click.command("get", epilog="Example: kvstore-inspect get data.kvs user:1", help=_HELP)
@reading
@click.argument("key")
@json_option
def command(file: Path, key: str, wait: float, unlocked: bool, as_json: bool) -> int:
    """Print the record; exit 1 where it is absent, expired or damaged."""
    encode_key(key)  # what cannot be a key is wrong usage
    with opened(file, wait, unlocked) as view, progress("looking") as show:
        found = Records(view, show).find(key)
        problems = view.problems
    for problem in problems:
        say(f"{file}: {problem}")
    if isinstance(found, DamagedRecord):
        say(f"key {escaped(key)}: {found.message} (byte {found.offset:,})")
        return PROBLEMS
    if found is None:
        say(f"key {escaped(key)}: not in the store")
        return PROBLEMS
    try:
        value = orjson.dumps(found.parsed(), option=orjson.OPT_INDENT_2).decode()
    except (ValueError, TypeError) as error:
        say(f"key {escaped(key)}: its value is not JSON: {error} (byte {found.offset:,})")
        return PROBLEMS
    expired = found.has_expired(now_ms())
    if as_json:
        print_json(as_object(found, expired))
    else:
        _print(found, expired, value)
    if expired:
        say(f"key {escaped(key)}: has expired")
    return PROBLEMS if expired or problems else DONE


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


def _print(record: Record, expired: bool, value: str) -> None:
    left = record.expires_at - now_ms()
    ends = f"{moment(record.expires_at)}, {duration(left)} {'ago' if expired else 'left'}"
    show_fields(
        (
            ("key", escaped(record.key)),
            ("created", moment(record.created_at)),
            ("expires", ends if record.expires_at else "never"),
            ("value", f"{size(len(record.value))} of JSON"),
            ("record", f"byte {record.offset:,}"),
            ("slot", f"byte {record.slot:,}" if record.slot else "none was looked for"),
        )
    )
    show_json_text(value)
