"""The parts of one open store: made at once as it is opened, and closed in order."""

import operator
import os
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

from . import clock, compiled
from .all_keys import AllKeys
from .changes import Changes
from .errors import KVStoreError, StoreFullError
from .file.datafile import DataFile
from .format.layout import MAX_FILE_SIZE, MIN_MAX_BYTES
from .index.buckets import wanted_shape
from .index.extents import Extents
from .index.records import Records
from .index.segments import Segments
from .index.slab import Slab
from .index.slots import Slots
from .index.versions import Versions
from .locks import StoreLocks
from .one_key import OneKey
from .reclaiming import Reclaimer
from .recovery.opening import open_file

if TYPE_CHECKING:
    from .compacting import Compactor
    from .compiled.interface import FastPath
    from .moving import Mover
    from .room import Room


class Parts:
    """What a store is made of. Its locks say that it is closed until whoever makes it opens it.

    Raises: as `KVStore`.
    """

    fast: "FastPath | None" = None
    _room: "Room"

    def __init__(
        self, path: str, *, max_bytes: int, timeout: float, durable: bool, create: bool
    ) -> None:
        now_ms = clock.now_ms()
        self.file = open_file(path, max_bytes, timeout, now_ms, durable=durable, create=create)
        try:
            self._make(self.file, max_bytes, durable=durable)
        except BaseException:
            self.give_up()
            raise

    def _make(self, file: DataFile, max_bytes: int, *, durable: bool) -> None:
        self.extents = extents = Extents(file)
        self.versions = versions = Versions(file.path, durable=durable)
        self.slab = slab = Slab(file, extents, versions)
        if not file.trusted:
            from .recovery.rebuild import rebuild  # after a crash only

            rebuild(file, extents, clock.now_ms())
        versions.start_after(file.latest_stamp, clock.now_ms())
        file.before_flush = slab.note_promises
        self.records = records = Records(file)
        self.slots = slots = Slots(file, slab, records, versions)
        self.segments = segments = Segments(file, extents, slab, slots, versions, compiled.selected)
        self.locks = locks = StoreLocks(file, extents.lock)
        make = compiled.selected.make_fast_path
        if make is not None:
            self.fast = make(
                file.map,
                file.live,
                slab.spare,
                slab.looked_at,
                versions.words,
                locks.stripes,
                locks.space,
                file.hash_seed,
                wanted_shape(file),
                vars(clock),
                file.fd,
            )
            slab.fast = slots.fast = self.fast
        self.changes = changes = Changes(file, slab, records, slots, segments, versions, self.fast)
        self.reclaimer = Reclaimer(locks, file, slab, versions, self._make_mover)
        self.reclaimer.make_ahead = self._make_room_ahead
        self.one_key = OneKey(locks, file, slots, records, changes, self.fast, durable=durable)
        self.all_keys = AllKeys(
            locks,
            file,
            extents,
            slab,
            segments,
            versions,
            max_bytes=max_bytes,
            durable=durable,
        )

        extents.refuses_growth = self._refuses_growth

    def _refuses_growth(self) -> bool:
        try:
            return self.room.should_be_made()
        except StoreFullError:  # it cannot be made
            return False

    def _make_room_ahead(self) -> None:
        self.room.make_ahead()

    @property
    def room(self) -> "Room":
        """What makes room: of several threads that want the first one, all get the same."""
        if "_room" not in vars(self):
            try:
                from .room import Room  # rarely needed
            except OSError as error:  # no descriptor is left
                raise StoreFullError(f"{self.file.path}: no room can be made: {error}") from error

            new = Room(
                self.locks,
                self.file,
                self.extents,
                self.slab,
                self.versions,
                self.reclaimer,
                self.all_keys,
            )
            vars(self).setdefault("_room", new)
        return self._room

    def _make_mover(self) -> "Mover":
        try:
            from .moving import Mover  # rarely needed
        except OSError as error:  # no descriptor is left
            raise StoreFullError(f"{self.file.path}: no room can be made: {error}") from error

        return Mover(self.locks, self.file, self.slab, self.records, self.changes, self.fast)

    def compactor(self) -> "Compactor":
        """Return what compacts the file."""
        from .compacting import Compactor  # rarely needed

        return Compactor(
            self.locks,
            self.file,
            self.extents,
            self.slab,
            self.segments,
            self.reclaimer,
            self.all_keys,
        )

    def give_up(self) -> None:
        """Close after an opening that failed."""
        self._let_go_of_map()
        self.file.give_up()

    def _let_go_of_map(self) -> None:
        if self.fast is not None:
            self.fast.close()

    # --- closing -------------------------------------------------------------------------------

    def have_let_go(self) -> bool:
        """Return whether nothing is left to be closed."""
        return self.locks.closed and (self.file.released or self.file.owned_by_parent)

    def reclaim(self) -> None:
        """Reclaim what is retired while that is fast; what is left then is for `close`."""
        if not self.locks.closed and self.versions.retired_size:
            with suppress(KVStoreError, OSError):
                self.reclaimer.reclaim()

    def close(self) -> None:
        """Let no operation begin, reclaim the rest, and close the file."""
        with self.locks.closing:
            # One that was interrupted on its way is ended by the next.
            if self.have_let_go():
                return
            try:
                self.locks.with_all_stripes(self._set_closed)
            finally:
                if self.locks.closed:
                    self._let_go_of_map()  # as where a fork came in between
                    self._close_file()

    def _set_closed(self) -> None:
        try:
            self._let_go_of_map()
        finally:
            self.locks.set_closed()

    def _close_file(self) -> None:
        try:
            if not (self.file.pristine or self.file.closed):
                self.reclaimer.finish()
        finally:
            self.file.latest_stamp = self.versions.latest_stamp
            self.file.close()

    def detach_after_fork(self) -> None:
        """In a forked child: be closed without touching anything of the parent's."""
        self._let_go_of_map()
        self.locks.reset_after_fork()
        self.locks.set_closed()
        self.file.detach_after_fork()


# --- what a store is asked to be -----------------------------------------------------------------


def check_max_bytes(max_bytes: SupportsIndex) -> int:
    """Return `max_bytes`, or raise ValueError where that is out of range."""
    number = operator.index(max_bytes)
    if not MIN_MAX_BYTES <= number <= MAX_FILE_SIZE:
        raise ValueError(
            f"max_bytes is {number:,}, allowed are {MIN_MAX_BYTES:,} to {MAX_FILE_SIZE:,}"
        )
    return number


def check_timeout(timeout: object) -> float:
    """Return `timeout`, or raise ValueError where that is out of range."""
    if isinstance(timeout, int | float) and isfinite(timeout) and timeout >= 0:
        return float(timeout)
    raise ValueError(f"timeout is {timeout!r}, allowed is a finite number of seconds, 0 or more")


def resolve(path: str | os.PathLike[str] | None) -> Path:
    """Return the absolute path of the file that is meant; None: the default one."""
    if path is None:
        from .location import default_path  # platformdirs is needed for this only

        return default_path()
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"path is {name!r}, allowed is a str or os.PathLike of str, or None")
    if not name:
        raise FileNotFoundError(2, "the path is empty", name)
    return Path(os.path.abspath(name))
