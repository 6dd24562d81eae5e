"""The index built anew from the records, which are the only truth.

Runs when a file is opened that was not closed, or whose directory, extent map or allocator fail
their checksum, once `evidence` has nothing against it; also makes the index of a new file, which is
that of no records.

1. Scan every extent for whole, live records of one class: see `scan`. Find out which numbers of
   rebuilds the buckets in the file have, for this one to get another: see `layout`, "Segment".
2. Clear the magic of everything that lost; write extent map, allocator and free lists.
3. Write each segment of a fresh table whole, in free extents, then the directory. Of two records of
   one key the newer gets the slot, and the older is freed: likewise. Flush.

Every file gets its table, whatever power loss has left. Say that everything was last flushed at a
time F, with a table of T extents that held a slot for each record there was then. What the disk may
hold are those records, promised or deleted since, and newer ones, which are promised to nobody;
those that are durable were flushed with a table of their own, whose extents count like the T. No
record is in any extent of that table, for a segment stays one. So the T are left, and enough for
the records of F. Only all records together may need more, in a file at its limit: as where old ones
were deleted and new ones created in other blocks, and the disk took the latter but not the former.
Then the newest are given up, as few as that takes: no record of F is among them, unless the clock
was set back since. A process that died has left one state, for which its table was enough.

Records are not moved and the file stays marked "not clean" until it is closed, so a crash in here
does no harm: it starts again. It takes 8 bytes of memory a record for as long as it runs.
"""

from kvstore import compiled
from kvstore.errors import StoreFullError
from kvstore.file.datafile import DataFile
from kvstore.index.extents import Extents
from kvstore.index.slab import Slab

from .found_records import FoundRecords
from .new_table import NewTable
from .report import Report
from .scan import Scan


def rebuild(file: DataFile, extents: Extents, slab: Slab, now_ms: int) -> None:
    """Build the index of `file` from its records, which must be nobody else's to touch meanwhile.

    A file whose blocks are shared takes room to be changed. Where a full disk has none, the index
    is built in memory, if `file` can do that, and serves readers in this opening.

    Raises:
        StoreFullError: the disk or the file has no room for the table.
        OSError: the operating system refused a write or the flush.
    """
    try:
        _rebuild(file, extents, slab, now_ms)
    except StoreFullError as error:
        if not file.private:
            raise
        file.use_private_map()
        _rebuild(file, extents, slab, now_ms)
        file.make_read_only(error)


def _rebuild(file: DataFile, extents: Extents, slab: Slab, now_ms: int) -> None:
    implementation = compiled.selected
    report = Report(file)
    file.mark_dirty()
    found = FoundRecords(implementation)
    file.read_ahead(True)
    Scan(file, found, report, now_ms, implementation).run()
    file.read_ahead(False)
    NewTable(file, extents, slab, found, report, implementation).write()
    slab.free_spare()
    if not file.in_memory:
        file.flush()
    file.accept_rebuilt_index()
    report.log()
