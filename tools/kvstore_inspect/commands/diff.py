"""`diff`: what differs between two stores, by key."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import orjson
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from kvstore.clock import now_ms
from kvstore_inspect.file_view import FileView
from kvstore_inspect.records import Record
from kvstore_inspect.terminal import escaped, progress

from .common import (
    DONE,
    PROBLEMS,
    DamageReport,
    json_option,
    opened,
    unlocked_option,
    wait_option,
    whole_records,
)

# Keys that are held in memory at a time; with more, both files are read several times.
_MOST_KEYS: Final = 250_000

# What of a record is compared: digest of its value, expires_at, created_at.
_Content = tuple[bytes, int, int]


@click.command(
    "diff",
    epilog="Example: kvstore-inspect diff data.kvs copy.kvs",
    help="Compare two stores by key. Prints a line for each key that is only in A (-), only in B "
    "(+), or in both and not the same (~), with what differs: value, expires_at. What has expired "
    "counts as absent. The exit status is 1 where they differ, or where anything is damaged. "
    "--json prints an object a line: key, in (a, b or both), differs (a list of fields).",
)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@wait_option
@unlocked_option
@click.option("--created", is_flag=True, help="Compare the times of creation too.")
@json_option
def command(a: Path, b: Path, wait: float, unlocked: bool, created: bool, as_json: bool) -> int:
    """Print the differences; exit 1 where there are any."""
    if os.path.samefile(a, b):
        raise click.UsageError(f"{a} and {b} are the same file")
    status = DONE
    with opened(a, wait, unlocked) as first, opened(b, wait, unlocked) as second:
        comparison = _Comparison(first, second, created)
        for key, where, fields in comparison.differences():
            status = PROBLEMS
            _print(key, where, fields, as_json)
    return PROBLEMS if comparison.damaged else status


def _print(key: str, where: str, fields: list[str], as_json: bool) -> None:
    if as_json:
        line = orjson.dumps({"key": key, "in": where, "differs": fields})
    else:
        sign = {"a": "-", "b": "+", "both": "~"}[where]
        line = f"{sign} {escaped(key)}{'  ' * bool(fields)}{', '.join(fields)}".encode()
    sys.stdout.buffer.write(line + b"\n")


class _Comparison:
    """Two files that are compared, a part of the keys at a time."""

    def __init__(self, first: FileView, second: FileView, created: bool) -> None:
        self._first = first
        self._second = second
        self._created = created
        self._now_ms = now_ms()
        self._parts = 1
        self._reports = {view: DamageReport(view.path) for view in (first, second)}

    def differences(self) -> Iterator[tuple[str, str, list[str]]]:
        """Yield key, where it is (a, b, both), and which fields differ."""
        count = sum(1 for _ in self._records(self._first, 0, report=True))
        self._parts = count // _MOST_KEYS + 1
        for part in range(self._parts):
            contents = {record.key: _content(record) for record in self._records(self._first, part)}
            for record in self._records(self._second, part, report=part == 0):
                theirs = contents.pop(record.key, None)
                if theirs is None:
                    yield record.key, "b", []
                elif fields := self._differing(theirs, _content(record)):
                    yield record.key, "both", fields
            for key in contents:
                yield key, "a", []

    def _differing(self, first: _Content, second: _Content) -> list[str]:
        names = ("value", "expires_at", "created_at")[: 3 if self._created else 2]
        return [name for name, a, b in zip(names, first, second, strict=False) if a != b]

    def _records(self, view: FileView, part: int, *, report: bool = False) -> Iterator[Record]:
        """Yield the records of a part; report what is damaged the first time."""
        damage = self._reports[view] if report else DamageReport(None)
        with progress(f"reading {view.path.name}") as show:
            for record in whole_records(view, self._now_ms, show, damage):
                if self._parts == 1 or xxh3_64_intdigest(record.key.encode()) % self._parts == part:
                    yield record

    @property
    def damaged(self) -> bool:
        """Whether anything of what was read is damaged."""
        return any(report.count for report in self._reports.values())


def _content(record: Record) -> _Content:
    return xxh3_128_digest(record.value), record.expires_at, record.created_at
