"""The index built anew from the records, which are the only truth.

Runs when a file is opened that was not closed, or whose directory, extent map or allocator fail
their checksum, once `evidence` has nothing against it; also makes the index of a new file, which is
that of no records.

1. Scan every extent for whole records of one class, and clear whatever else looks like one: see
   `scan`. Find out which numbers of rebuilds the buckets in the file have, for this one to get
   another: see `layout`, "Segment".
2. Of the records of each key let the latest win, and clear all others, in the order and with the
   flushes that no key is lost by, and no older value comes back: see `contest`.
3. Write extent map, allocator and free lists. Write each segment of a fresh table whole, in free
   extents, then the directory. Flush. Every file has room for that: see `room`.

Records are not moved and the file stays marked "not clean" until it is closed, so a crash in here
does no harm: it starts again. It takes 8 bytes of memory a record for as long as it runs.
"""

from kvstore import compiled
from kvstore.errors import StoreFullError
from kvstore.file.datafile import DataFile
from kvstore.index.extents import Extents

from .contest import Contest
from .found_records import FoundRecords
from .new_table import NewTable
from .report import Report
from .scan import Scan


def rebuild(file: DataFile, extents: Extents, now_ms: int) -> None:
    """Build the index of `file` from its records, which must be nobody else's to touch meanwhile.

    The latest stamp of all its records, those that are dropped included, is in
    `file.latest_stamp` then.

    A file whose blocks are shared takes room to be changed. Where a full disk has none, the index
    is built in memory, if `file` can do that, and serves readers in this opening.

    Raises:
        StoreFullError: the disk or the file has no room for the table.
        OSError: the operating system refused a write or the flush.
    """
    try:
        _rebuild(file, extents, now_ms)
    except StoreFullError as error:
        if not file.private:
            raise
        file.use_private_map()
        _rebuild(file, extents, now_ms)
        file.make_read_only(error)


def _rebuild(file: DataFile, extents: Extents, now_ms: int) -> None:
    implementation = compiled.selected
    report = Report(file)
    file.mark_dirty()
    found = FoundRecords(implementation)
    file.read_ahead(True)
    scan = Scan(file, found, report, now_ms, implementation)
    scan.run()
    file.read_ahead(False)
    file.latest_stamp = max(file.latest_stamp, file.void_stamp, scan.latest_stamp)
    found.sort()
    Contest(file, found, scan, report, now_ms, implementation).run()
    scan.write_map()
    NewTable(file, extents, found, report, implementation).write()
    if not file.in_memory:
        file.flush()
    file.accept_rebuilt_index()
    report.log()
