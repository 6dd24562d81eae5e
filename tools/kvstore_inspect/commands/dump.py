"""`dump`: every record, as lines of JSON or as commands for a Redis server."""

import sys
from pathlib import Path
from typing import Final

import click

from kvstore.clock import now_ms
from kvstore_inspect.jsonl import to_line, to_resp
from kvstore_inspect.records import DamagedRecord
from kvstore_inspect.terminal import progress

from .common import DONE, PROBLEMS, DamageReport, opened, reading, whole_records

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
    packed = _FORMATS[form]
    write = sys.stdout.buffer.write
    report = DamageReport(file)
    with opened(file, wait, unlocked) as view, progress("dumping") as show:
        for record in whole_records(view, now_ms(), show, report, expired=expired):
            try:
                record.parsed()
            except ValueError as error:
                message = f"its value is not JSON: {error}"
                report.add(DamagedRecord(record.offset, record.key, message))
            else:
                write(packed(record))
    sys.stdout.buffer.flush()
    return PROBLEMS if report.count else DONE
