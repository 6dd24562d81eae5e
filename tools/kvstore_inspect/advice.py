"""What is unusual about a file: what it means, and what to do about it, in sentences."""

import os
import stat
from collections.abc import Iterator
from typing import Final

from kvstore.format.layout import EXTENT_SIZE, MAX_FILE_SIZE

from .file_view import FileView
from .opening import Opening
from .survey import Survey
from .terminal import size

_MUCH: Final = 4 * 1024 * 1024


def advice(view: FileView, survey: Survey) -> Iterator[str]:
    """Yield a sentence or two for everything unusual about a file."""
    refused = not view.in_use and view.next_opening() is Opening.REFUSES
    if view.problems:
        yield (
            "The file is damaged. `kvstore-inspect verify` says what is lost by it, `dump` saves "
            "every record that is whole, `repair` rebuilds the index from them."
        )
    if refused:
        yield (
            "The store does not open as it is: its index is not to be trusted, and to rebuild it "
            "would lose records. `kvstore-inspect verify` says what is wrong, `repair` rebuilds "
            "the index from the records that are whole."
        )
    elif not (view.problems or view.state.clean or view.in_use):
        yield (
            "The file was not closed in order: its process was killed, or the machine stopped. "
            "Nothing needs to be done: the next opening rebuilds the index from the records."
        )
    if survey.damaged > len(view.problems):
        yield "Some of what was counted is damaged. `kvstore-inspect verify` names all of it."
    yield from _on_finding(survey)
    if not (refused or view.in_use):
        yield from _on_length(view)
    yield from _on_space(view, survey)
    yield from _on_mode(view)


def _on_finding(survey: Survey) -> Iterator[str]:
    """Yield what is known only where every record was read."""
    if survey.orphans:
        yield (
            f"Whole records in no slot of the table: {survey.orphans:,}. No key leads there; "
            f"`kvstore-inspect repair` brings them back."
        )
    if sum(count for pages, count in survey.probes.items() if pages > 2) * 100 > survey.records:
        yield (
            "Finding one record in a hundred takes more than two pages of the table. The table "
            "had no room to grow; after deleting, `kvstore-inspect copy` spreads it anew."
        )


def _on_length(view: FileView) -> Iterator[str]:
    beyond = len(view) - view.state.extent_count * EXTENT_SIZE
    if view.state.intact and beyond > 0:
        yield (
            f"The file is {size(beyond)} longer than what it holds: its process died while it "
            f"opened the file or made it grow. The next opening cuts that off."
        )


def _on_space(view: FileView, survey: Survey) -> Iterator[str]:
    allocated = view.allocated_size()
    if allocated is not None and allocated < len(view) - EXTENT_SIZE and not view.in_use:
        yield (
            f"{size(len(view) - allocated)} of the file have no room on the disk yet: it was "
            f"copied with holes, or its file system compresses. The next opening reserves them."
        )
    if survey.expired_size > max(_MUCH, survey.live_size // 4):
        yield (
            f"{survey.expired:,} expired records hold {size(survey.expired_size)}. `create` takes "
            f"that back when it needs room, `purge_expired()` at once."
        )
    if survey.retired_size > max(_MUCH, survey.live_size // 4):
        yield (
            f"{survey.retired:,} records that were superseded or deleted hold "
            f"{size(survey.retired_size)}. The store takes that back after its next flush; of a "
            f"file that was not closed, the next opening does."
        )
    if survey.free_size > max(_MUCH, len(view) // 2):
        yield (
            f"{survey.free_size / len(view):.0%} of the file is free, for records to come. If "
            f"none are: `kvstore-inspect copy` makes a compact copy."
        )
    if survey.padding_size > max(_MUCH, survey.live_size // 3):
        yield (
            f"{survey.padding_size / survey.live_size:.0%} of the records' space is padding: their "
            f"sizes are just above what a block holds. `info` shows of which classes."
        )
    if len(view) >= MAX_FILE_SIZE * 9 // 10 and survey.free_size < MAX_FILE_SIZE // 10:
        yield (
            f"The file is close to {MAX_FILE_SIZE:,} bytes, the most that one can have. `dump "
            f"--format resp` carries it to Redis, which has no such limit."
        )


def _on_mode(view: FileView) -> Iterator[str]:
    mode = stat.S_IMODE(view.status().st_mode)
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield (
            f"Others than its owner may use the file (mode {mode:04o}; kvstore creates it with "
            f"0600). If that is not meant: chmod 600."
        )
