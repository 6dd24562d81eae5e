"""`diff`: what differs between two stores, by key."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import orjson
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from kvstore_inspect.file_view import FileView
from kvstore_inspect.records import DamagedRecord, Record, Records
from kvstore_inspect.terminal import escaped, progress, write_json

from .common import (
    DONE,
    PROBLEMS,
    json_option,
    name_damage,
    now_ms,
    opened,
    unlocked_option,
    wait_option,
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
    write_json(line, b"\n")


class _Comparison:
    """Two files that are compared, a part of the keys at a time."""

    def __init__(self, first: FileView, second: FileView, created: bool) -> None:
        self._first = first
        self._second = second
        self._created = created
        self._now_ms = now_ms()
        self._parts = 1
        self._named: set[tuple[Path, int, str]] = set()
        self.damaged = False

    def differences(self) -> Iterator[tuple[str, str, list[str]]]:
        """Yield key, where it is (a, b, both), and which fields differ."""
        count = sum(1 for _ in self._records(self._first, 0))
        self._parts = count // _MOST_KEYS + 1
        for part in range(self._parts):
            contents = {record.key: _content(record) for record in self._records(self._first, part)}
            for record in self._records(self._second, part):
                theirs = contents.pop(record.key, None)
                if theirs is None:
                    yield record.key, "b", []
                elif fields := self._differing(theirs, _content(record)):
                    yield record.key, "both", fields
            for key in contents:
                yield key, "a", []

    def _differing(self, first: _Content, second: _Content) -> list[str]:
        fields = []
        if first[0] != second[0]:
            fields.append("value")
        if first[1] != second[1]:
            fields.append("expires_at")
        if self._created and first[2] != second[2]:
            fields.append("created_at")
        return fields

    def _records(self, view: FileView, part: int) -> Iterator[Record]:
        with progress(f"reading {view.path.name}") as show:
            for found in Records(view, self._now_ms, show):
                if isinstance(found, DamagedRecord):
                    self._name(view.path, found)
                elif not 0 < found.expires_at <= self._now_ms and (
                    self._parts == 1 or xxh3_64_intdigest(found.key.encode()) % self._parts == part
                ):
                    yield found

    def _name(self, path: Path, damage: DamagedRecord) -> None:
        """Name what is damaged, once."""
        self.damaged = True
        name = (path, damage.offset, damage.message)
        if name not in self._named:
            self._named.add(name)
            name_damage(path, damage)


def _content(record: Record) -> _Content:
    return xxh3_128_digest(record.value), record.expires_at, record.created_at
