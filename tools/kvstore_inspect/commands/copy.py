"""`copy`: a compact copy, verified, flushed and renamed into place."""

import os
from pathlib import Path

import click

from kvstore.backup import new_copy
from kvstore.clock import now_ms
from kvstore_inspect.terminal import counted, progress, say, size

from .common import DONE, PROBLEMS, DamageReport, opened, reading, whole_records


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
    report = DamageReport(file)
    with opened(file, wait, unlocked) as view:
        try:
            with new_copy(os.path.abspath(out), source=str(file), overwrite=force) as copy:
                with progress("copying") as show:
                    records = whole_records(view, now_ms(), show, report)
                    copy.write(record[:4] for record in records)
                with progress("comparing") as show:
                    copy.verify(show)
        except FileExistsError as error:
            is_source = os.path.exists(out) and os.path.samefile(file, out)
            advice = "" if force or is_source else "; --force replaces it"
            raise click.UsageError(f"{out}: {error.strerror}{advice}") from None
        saved = f"{size(len(view))} -> {size(out.stat().st_size)}"
    left_out = f", {counted(report.count, 'damaged place')} left out" if report.count else ""
    say(f"{out}: {counted(copy.count, 'record')}, {saved}{left_out}")
    return PROBLEMS if report.count else DONE
