"""`copy`: a compact copy, verified, flushed and renamed into place."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
from xxhash import xxh3_128_intdigest

from kvstore import KVStore, KVStoreError, StoreFullError
from kvstore.clock import now_ms
from kvstore.file.platform import flush_folder
from kvstore.recovery.check import check_file
from kvstore_inspect.file_view import FileView
from kvstore_inspect.jsonl import to_line
from kvstore_inspect.records import DamagedRecord, Progress, Record, Records
from kvstore_inspect.terminal import counted, progress, say, size

from .common import DONE, PROBLEMS, DamageReport, opened, reading, whole_records


class _DiffersError(KVStoreError):
    """The copy that was written does not hold what was read."""


@click.command(
    "copy",
    epilog="Example: kvstore-inspect copy data.kvs smaller.kvs",
    help="Write a compact copy of FILE to OUT: all whole records that have not expired, with their "
    "times. It is checked, compared, flushed, and only then named OUT. What is damaged is named on "
    "standard error and left out, and the exit status is 1.",
)
@reading
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace OUT where it exists.")
def command(file: Path, wait: float, unlocked: bool, out: Path, force: bool) -> int:
    """Write the copy; exit 1 where anything is damaged."""
    if out.exists():
        if os.path.samefile(file, out):
            raise click.UsageError(f"{out} is the file that is to be copied")
        if not force:
            raise click.UsageError(f"{out} exists; --force replaces it")
    with opened(file, wait, unlocked) as view, _temporary(out) as temporary:
        with progress("copying") as show:
            count, damaged, digest = _write(view, file, temporary, show)
        with progress("comparing") as show:
            _compare(temporary, count, digest, show)
        _name(temporary, out, force)
    flush_folder(os.path.abspath(out))
    saved = f"{size(len(view))} -> {size(out.stat().st_size)}"
    left_out = f", {counted(damaged, 'damaged place')} left out" if damaged else ""
    say(f"{out}: {counted(count, 'record')}, {saved}{left_out}")
    return PROBLEMS if damaged else DONE


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """Give the name of an empty file beside `out`, which is gone in the end.

    Nobody is told of that name: what is wrong is said of the folder, or of `out`.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent)
    except OSError as error:
        error.filename = str(out.parent)
        raise
    os.close(descriptor)
    try:
        yield Path(name)
    except StoreFullError as error:
        raise StoreFullError(str(error).replace(os.path.abspath(name), str(out))) from error
    except OSError as error:
        if error.filename in (name, os.path.abspath(name)):
            error.filename = str(out)
        raise
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _write(view: FileView, file: Path, temporary: Path, show: Progress) -> tuple[int, int, int]:
    """Write all live records; return their number, that of damaged places, and a digest."""
    count = digest = 0
    report = DamageReport(file)
    with KVStore(temporary) as store:
        for record in whole_records(view, now_ms(), show, report):
            store._restore(*record[:4])
            count += 1
            digest += _digest(record)
    return count, report.count, digest


def _compare(temporary: Path, count: int, digest: int, show: Progress) -> None:
    """Raise where the copy is not whole, or does not hold exactly these records."""
    problems = check_file(temporary)
    if problems:
        raise _DiffersError(f"{temporary}: the copy is damaged: {problems[0]}")
    with opened(temporary, 0, unlocked=False) as view:
        for found in Records(view, show):
            if isinstance(found, DamagedRecord):
                raise _DiffersError(f"{temporary}: the copy is damaged: {found.message}")
            count -= 1
            digest -= _digest(found)
    if count or digest:
        raise _DiffersError(f"{temporary}: the copy does not hold what was read; it is removed")


def _digest(record: Record) -> int:
    # Summed up, so that the order does not matter.
    return xxh3_128_intdigest(to_line(record))


def _name(temporary: Path, out: Path, force: bool) -> None:
    """Give the copy its name, over another file only where that is wanted."""
    if force:
        temporary.replace(out)
        return
    try:
        os.link(temporary, out)
    except FileExistsError:
        raise click.UsageError(f"{out} exists by now; --force replaces it") from None
    except OSError:  # a file system without hard links
        temporary.rename(out)
