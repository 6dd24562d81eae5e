"""`compact`: everything in a file moves together, and the rest is cut off."""

from pathlib import Path

import click

from kvstore import KVStore
from kvstore_inspect.file_view import open_view
from kvstore_inspect.terminal import counted, progress, say, size

from .common import DONE, file_argument, wait_option


class _ExistingStore(KVStore):
    """One that is there already."""

    _creates = False


@click.command(
    "compact",
    epilog="Example: kvstore-inspect compact data.kvs",
    help="Make FILE as short as what is in it allows, in place: what has expired is taken back, "
    "records and the table move together, and the file is cut. Interrupted at any moment, it loses "
    "nothing and can be run again.",
)
@file_argument
@wait_option
def command(file: Path, wait: float) -> int:
    """Compact the file and say what came of it."""
    with open_view(file, wait=wait) as view:  # so that nothing else becomes a store
        before = len(view)
    with _ExistingStore(file, timeout=wait) as store:
        with progress("compacting") as show:
            store._parts.compactor().compact(show)
        stats = store.stats()
    saved = f"{size(before)} -> {size(stats.file_size)}"
    say(f"{file}: {counted(stats.records, 'record')}, {saved}")
    return DONE
