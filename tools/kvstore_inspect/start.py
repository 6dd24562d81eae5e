"""What is said to somebody who gave no command: which files there may be, and what to try first."""

import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import list2cmdline
from typing import Final, NamedTuple

from kvstore import KVStoreError
from kvstore.location import expected_path

from .file_view import FileView, open_view
from .terminal import counted, path_text, say, size

_COMMANDS: Final = (
    ("what it is, what is in it, and what is unusual", "info {}"),
    ("its largest values", "keys {} --sort size --top 10"),
    ("all of it in pictures, for a browser or a phone", "report {} -o report.html"),
)


class _Found(NamedTuple):
    """A file to look at, and what it is in a few words."""

    path: Path
    what: str
    in_use: bool = False


def show_start() -> None:
    """Say on standard error what to do first; look at files, and wait for none."""
    for line in _lines():
        say(line)


def _lines() -> Iterator[str]:
    yield "kvstore-inspect sees into a kvstore file, checks it, carries it elsewhere, mends it."
    yield ""
    default, found = expected_path(), None
    if default is not None:
        found = _look_at(default)
        yield f"The default store, which KVStore() opens: {path_text(default)}"
        yield f"  {'It is not there yet.' if found is None else found.what}"
    if found is None:
        newest = _newest_here()
        found = _look_at(newest) if newest is not None else None
        if found is None:
            found = _Found(Path("data.kvs"), "")
            yield "Make a store to look at:"
            yield """  python -m kvstore put --file data.kvs user:1 '{"name": "Ada"}'"""
        else:
            yield f"A store in this folder: {path_text(found.path)}"
            yield f"  {found.what}"
    yield ""
    yield "Try:"
    for what, command in _COMMANDS:
        yield f"  # {what}"
        unlocked = " --unlocked" if found.in_use else ""
        yield f"  kvstore-inspect {command.format(_quoted(found.path))}{unlocked}"
    yield ""
    yield "kvstore-inspect FILE is short for info FILE; kvstore-inspect --help lists all commands."
    yield "A store that a program has open can be looked at with --unlocked."


def _quoted(path: Path) -> str:
    """Return a path as a shell takes it."""
    text = path_text(path)
    return shlex.quote(text) if os.name == "posix" else list2cmdline([text])


def _newest_here() -> Path | None:
    """Return the file in this folder that was written last and has the name of a store."""
    with suppress(OSError):
        files = [each for each in Path().glob("*.kvs") if each.is_file()]
        return max(files, key=lambda each: each.stat().st_mtime_ns, default=None)
    return None


def _look_at(path: Path) -> _Found | None:
    """Return what a file is, or why there is no telling; None if there is none."""
    try:
        with open_view(path, unlocked=True) as view:
            what, in_use = _state(view)
            return _Found(path, f"{size(len(view))}, {what}", in_use)
    except FileNotFoundError:
        return None
    except (KVStoreError, OSError) as error:
        return _Found(path, getattr(error, "strerror", None) or str(error))


def _state(view: FileView) -> tuple[str, bool]:
    """Return what state a file is in, and whether it is known to be in use."""
    if view.holder_lives():
        return f"in use by process {view.holder()}", True
    if view.problems:
        return "damaged: kvstore-inspect verify says how", False
    if view.trusted:
        return f"{counted(view.state.records, 'record')}, closed in order", False
    return "not closed in order, or in use; the next opening mends it", False
