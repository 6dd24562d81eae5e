"""`report`: an HTML page of its own, with pictures."""

import os
import stat
import sys
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import click

from kvstore import KVStoreError, __version__
from kvstore.clock import now_ms
from kvstore_inspect.advice import advice
from kvstore_inspect.file_view import FileView
from kvstore_inspect.survey import Survey, survey
from kvstore_inspect.terminal import duration, escaped, moment, progress, say, size

from .common import DONE, PROBLEMS, opened, reading


@click.command(
    "report",
    epilog="Example: kvstore-inspect report data.kvs -o data.html",
    help="Write an HTML page about the file, with pictures: readable offline, on a phone, in the "
    "dark.",
)
@reading
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Where to write it, - for standard output.  [default: FILE.html, in this folder]",
)
def command(file: Path, wait: float, unlocked: bool, output: Path | None) -> int:
    """Write the page; exit 1 where anything is damaged."""
    target = Path(f"{file.name}.html") if output is None else output
    if target.exists() and os.path.samefile(target, file):
        raise click.UsageError(f"{target} is the store itself")
    with opened(file, wait, unlocked) as view:
        with progress("looking at every record") as show:
            found = survey(view, now_ms(), show, every_record=True)
        page = render(view, found)
    if str(target) == "-":
        sys.stdout.write(page)
    else:
        contents = page.encode()
        _write(target, contents)
        say(f"{target}: {len(contents):,} bytes")
    return PROBLEMS if found.damaged or found.orphans else DONE


class _NotWrittenError(KVStoreError):
    """The disk did not take the page."""


def _write(target: Path, contents: bytes) -> None:
    """Write the page; where that fails no part of one is left, nor anything else removed."""
    with target.open("wb", buffering=0) as file:
        try:
            while contents:
                contents = contents[file.write(contents) or 0 :]
        except OSError as error:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                with suppress(OSError):
                    target.unlink()
            message = f"{target}: the page could not be written: {error.strerror}"
            raise _NotWrittenError(message) from error


def render(view: FileView, found: Survey) -> str:
    """Return the page."""
    # Large libraries, which neither `--help` nor completion should wait for.
    from jinja2 import Environment, StrictUndefined

    from kvstore_inspect.pictures import pictures

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("kvstore_inspect").joinpath("templates/report.html.j2").read_text("utf-8")
    )
    return template.render(
        name=escaped(view.path.name),
        version=__version__,
        looked_at=moment(found.now_ms),
        in_use=view.in_use,
        advice=[sentence.replace("`", "") for sentence in advice(view, found)],
        numbers=_numbers(view, found),
        contents=found.contents,
        groups=found.contents.groups(),
        pictures=pictures(found),
        damage=sorted(found.damages, key=lambda damage: damage.offset),
        damage_count=found.damaged,
        escaped=escaped,
        size=size,
        left=lambda expires_at: duration(expires_at - found.now_ms) if expires_at else "no TTL",
        moment=moment,
    )


def _numbers(view: FileView, found: Survey) -> list[tuple[str, str, str]]:
    """Return what is told in numbers: of what, how much in few digits, and to the byte."""
    return [
        ("records", f"{found.records:,}", ""),
        ("of these with a time-to-live", f"{found.expiring:,}", ""),
        ("expired, not yet taken back", f"{found.expired:,}", ""),
        ("file", *_size(len(view))),
        ("free in it", *_size(found.free_size)),
        ("held by what has expired", *_size(found.expired_size)),
        ("superseded or deleted, not yet reclaimed", f"{found.retired:,}", ""),
        ("held by these", *_size(found.retired_size)),
        ("padding of the records", *_size(found.padding_size)),
        ("segments of the table", f"{found.segments:,}", ""),
        ("mean load", f"{found.load:.0%}" if found.segments else "no table", ""),
        ("created", *_moment(view.identity.created_at)),
        ("closed in order", "yes" if view.state.clean else "no", ""),
    ]


def _size(count: int) -> tuple[str, str]:
    return size(count), f"{count:,} B" if count >= 1024 else ""


def _moment(milliseconds: int) -> tuple[str, str]:
    date, _, time = moment(milliseconds).partition(" ")
    return date, time
