"""`dump`: every record, as lines of JSON or as commands for a Redis server."""

import sys
from pathlib import Path
from typing import Final

import click
import orjson

from kvstore_inspect.jsonl import to_line, to_resp
from kvstore_inspect.records import DamagedRecord, Found, Records
from kvstore_inspect.terminal import progress

from .common import DONE, PROBLEMS, name_damage, now_ms, opened, reading

_CHUNK_SIZE: Final = 1024 * 1024
_FORMATS: Final = {"json": to_line, "resp": to_resp}


@click.command(
    "dump",
    epilog="Examples: kvstore-inspect dump data.kvs > data.jsonl; kvstore-inspect dump data.kvs "
    "--format resp | redis-cli --pipe",
    help="Write every record as a JSON object on a line of its own: key, value, created_at, "
    "expires_at; the times in whole milliseconds since 1970 UTC, expires_at null where there is no "
    "time-to-live. What is damaged is named on standard error and left out, and the exit status "
    "is 1.",
)
@reading
@click.option("--expired", is_flag=True, help="Include what has expired and is still there.")
@click.option(
    "--format",
    "form",
    type=click.Choice([*_FORMATS]),
    default="json",
    help="resp: the protocol of Redis 6.2 or newer, SET key json PXAT ms.  [default: json]",
)
def command(file: Path, wait: float, unlocked: bool, expired: bool, form: str) -> int:
    """Write the records; exit 1 where any is damaged."""
    write = _FORMATS[form]
    status = DONE
    waiting: list[bytes] = []
    waiting_size = 0
    now = now_ms()
    with opened(file, wait, unlocked) as view, progress("dumping") as show:
        for found in Records(view, now, show):
            judged = _judged(found)
            if isinstance(judged, DamagedRecord):
                name_damage(file, judged)
                status = PROBLEMS
            elif expired or not 0 < judged.expires_at <= now:
                waiting.append(write(judged))
                waiting_size += len(waiting[-1])
                if waiting_size >= _CHUNK_SIZE:
                    sys.stdout.buffer.write(b"".join(waiting))
                    waiting.clear()
                    waiting_size = 0
    sys.stdout.buffer.write(b"".join(waiting))
    sys.stdout.buffer.flush()
    return status


def _judged(found: Found) -> Found:
    """Return a record as it is, if its value is JSON."""
    if isinstance(found, DamagedRecord):
        return found
    try:
        orjson.loads(found.value)
    except ValueError as error:
        return DamagedRecord(found.offset, found.key, f"its value is not JSON: {error}")
    return found
