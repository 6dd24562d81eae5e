"""`repair`: the index of a file rebuilt from its records."""

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import click

from kvstore import CorruptStoreError, KVStoreError
from kvstore.clock import now_ms
from kvstore.file.lock import FileLock
from kvstore.recovery.problems import Breach
from kvstore_inspect.check_result import CheckResult, Counts
from kvstore_inspect.file_view import FileView, locked, open_view
from kvstore_inspect.repair import back_up, prepare, rebuild_index, settle_identity
from kvstore_inspect.terminal import (
    counted,
    escaped,
    path_text,
    print_json,
    progress,
    say,
    show_line,
)

from .common import DONE, PROBLEMS, file_argument, json_option, wait_option

MOST_SHOWN: Final = 20


@dataclass
class Outcome:
    """What came of a repair. `lost`: what was dropped as damaged, offset and key if known."""

    file: str
    changed: bool = False
    backup: str | None = None
    found: Counter[Breach] = field(default_factory=Counter)
    counts: Counts = field(default_factory=Counts)
    lost: dict[int, str | None] = field(default_factory=dict)
    certain: bool = True
    kept: int = 0
    problems_left: int = 0

    @property
    def cut_off(self) -> bool:
        """Whether the file had lost its end."""
        return not self.found.keys().isdisjoint({Breach.FILE_CUT_OFF, Breach.FILE_TOO_SHORT})

    @property
    def complete(self) -> bool:
        """Whether the file is whole now and nothing had to be given up."""
        return not (
            self.problems_left
            or self.counts.damaged
            or (self.cut_off and not self.certain)
            or self.kept < self.counts.keys
        )


@click.command(
    "repair",
    epilog="Example: kvstore-inspect repair data.kvs",
    help="""Rebuild the index of FILE from its records; drop what is damaged.

    The file as it was stays beside it, as FILE.backup- and the time. Where the checker finds
    nothing wrong, nothing is done. A repair that was interrupted can be run again. Exit status 1
    where records had to be given up, or the file is still not whole.

    The fields of --json: file; changed; backup, its path or null; complete, whether nothing had to
    be given up; found, how often each kind of problem was; kept, the keys that there are now;
    counts, of the file as it was: keys, expiring, orphaned (brought back), expired, outdated (older
    records of a key that has a newer one), marked (as deleted), damaged, the last four dropped;
    lost, what was dropped as damaged, each with offset and key (null where unknown), at most
    100,000; cut_off; problems_left.
    """,
)
@file_argument
@wait_option
@json_option
@click.option("--no-backup", is_flag=True, help="Do not keep a copy of the file as it was.")
def command(file: Path, wait: float, as_json: bool, no_backup: bool) -> int:
    """Mend the file and say what came of it."""
    outcome = Outcome(path_text(file))
    moment = now_ms()
    try:
        with locked(file, wait) as lock:
            _begin(file, lock, moment, outcome, keep=not no_backup)
        if outcome.changed:
            with progress("rebuilding"):
                rebuild_index(file, wait, moment)
            _check_again(file, wait, moment, outcome)
    except CorruptStoreError as error:
        say(f"kvstore-inspect: {error}")
        say("no repair can bring it back: restore it from a copy")
        return PROBLEMS
    except (KVStoreError, OSError):
        if outcome.changed:
            kept = f"; as it was, it is {outcome.backup}" if outcome.backup else ""
            say(f"{escaped(outcome.file)}: the repair did not end, run it again{kept}")
        raise
    if as_json:
        print_json(_as_object(outcome))
    else:
        _print(outcome)
    return DONE if outcome.complete else PROBLEMS


class _NoBackupError(KVStoreError):
    """No copy of the file could be made, so it was left as it is."""


def _begin(file: Path, lock: FileLock, moment: int, outcome: Outcome, *, keep: bool) -> None:
    """Find out what is wrong; where anything is, keep a copy and repair the superblock."""
    view = FileView(file, lock.fd, in_use=False)
    result = _find(view, moment)
    outcome.found = result.breaches
    if not outcome.found:
        outcome.counts = _count(result)
        outcome.kept = outcome.counts.keys
        return
    fd = lock.open_again()
    try:
        if keep:
            outcome.backup = path_text(_back_up(file, lock.fd))
        if outcome.found[Breach.IDENTITIES_DIFFER]:
            settle_identity(view, fd)
            outcome.changed = True
            view = FileView(file, lock.fd, in_use=False)
            result = _find(view, moment)
            outcome.found += result.breaches
        outcome.counts = _count(result)
        outcome.lost, outcome.certain = result.lost, result.certain
        prepare(view, fd)
        outcome.changed = True
    finally:
        os.close(fd)


def _find(view: FileView, moment: int) -> CheckResult:
    result = CheckResult(view, moment)
    with progress("checking") as show:
        for _ in result.problems(show):
            pass
    return result


def _count(result: CheckResult) -> Counts:
    with progress("counting") as show:
        return result.count(show)


def _back_up(file: Path, fd: int) -> Path:
    try:
        with progress("copying"):
            return back_up(file, fd)
    except OSError as error:
        raise _NoBackupError(
            f"{path_text(file)}: no copy of it could be kept ({error.strerror}), so it was left "
            f"as it is; make room, or do without one: --no-backup"
        ) from error


def _check_again(file: Path, wait: float, moment: int, outcome: Outcome) -> None:
    with open_view(file, wait=wait) as view:
        result = _find(view, moment)
        outcome.problems_left = result.breaches.total()
        outcome.kept = _count(result).keys


def _as_object(outcome: Outcome) -> dict[str, Any]:
    return {
        "file": outcome.file,
        "changed": outcome.changed,
        "complete": outcome.complete,
        "backup": outcome.backup,
        "found": {str(breach): count for breach, count in outcome.found.items()},
        "kept": outcome.kept,
        "counts": asdict(outcome.counts),
        "cut_off": outcome.cut_off,
        "lost": [{"offset": offset, "key": key} for offset, key in sorted(outcome.lost.items())],
        "problems_left": outcome.problems_left,
    }


def _print(outcome: Outcome) -> None:
    name = escaped(outcome.file)
    counts = outcome.counts
    if not outcome.changed:
        show_line(f"{name}: no problems, nothing to do; {counted(outcome.kept, 'key')}")
        return
    for label, number, explained in (
        ("kept", outcome.kept, f"keys, {counts.expiring:,} of them expiring"),
        ("brought back", counts.orphaned, "of them, which their keys did not lead to"),
        ("expired", counts.expired, "dropped"),
        ("duplicates", counts.outdated, "dropped: older records of keys that have a newer one"),
        ("deleted", counts.marked, "dropped: marked as deleted"),
        ("damaged", counts.damaged, "dropped"),
    ):
        show_line(f"{label:12} {number:10,}  {explained}")
    for offset, key in islice(sorted(outcome.lost.items()), MOST_SHOWN):
        show_line(f"  byte {offset:,}: {f'key {escaped(key)}' if key else 'key unknown'}")
    if len(outcome.lost) > MOST_SHOWN:
        show_line(f"  and {len(outcome.lost) - MOST_SHOWN:,} more; --json names them")
    if 0 < len(outcome.lost) < counts.damaged:
        show_line(f"  of {counts.damaged - len(outcome.lost):,} no trace tells which")
    if counts.damaged > outcome.kept:
        whole = outcome.kept + counts.damaged
        show_line(
            f"{name}: {outcome.kept:,} of {whole:,} records could be kept; restore it from a "
            f"copy if there is one"
        )
    if outcome.cut_off and not outcome.certain:
        show_line(f"{name}: had been cut off; what was in the missing part is lost")
    if outcome.backup:
        show_line(f"{name}: as it was, it is {escaped(outcome.backup)}")
    if outcome.problems_left or outcome.kept < counts.keys:
        show_line(f"{name}: still not whole; see kvstore-inspect verify {name}")
    else:
        result = "repaired" if counts.damaged <= outcome.kept else "what is left is a whole store"
        show_line(f"{name}: {result}; checked again, no problems")
