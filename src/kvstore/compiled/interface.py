"""What the compiled code offers, for readers and type checkers: no program imports this.

At run time a protocol would only take time and memory.
"""

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Literal, Protocol, Self

from kvstore.format.codec import JSONObject


class OwnedLock(Protocol):
    """A lock that knows which thread holds it, as `threading.RLock` does."""

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; return False where it is held and `blocking` is false."""

    def release(self) -> None:
        """Let go of the lock."""

    def __enter__(self) -> bool: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    def _is_owned(self) -> bool: ...


class Members(Protocol):
    """Live slots on their way from one segment to another, as one implementation has them."""

    def __add__(self, others: Self, /) -> Self:
        """Return these and others."""


Change = tuple[int, bytes, bytes]
"""An offset in the file, what is to be there, and what is there."""

Plan = tuple[int, int, list[Change]]
"""A slot, the offset of its record, and changes to be made in this order."""


class FastPath(Protocol):
    """The common case of the operations on one key, or None: nothing was done, do it in Python.

    See `_fast_path.pyx`. Where nothing is said of locks, the caller holds none.
    """

    def create(self, key: object, value: object, ttl: object) -> int | bytes | None:
        """Create a key; return where its record is, 0 where the key is there already.

        That is its offset, with its size in the bits above `SLOT_RECORD_MASK`. Or bytes: nothing
        was done, but that the value was made JSON.
        """

    def put(self, key: object, value: object, ttl: object) -> int | bytes | None:
        """Create a key or replace its record, expired or not; return as `create`, but never 0."""

    def touch(self, key: object, ttl: object) -> int | Literal[False] | None:
        """Replace a record by one with the same value and another expiry; return as `put`.

        False where the key is absent.
        """

    def pop(self, key: object) -> bytes | Literal[False] | None:
        """Delete a key and return its value as JSON; False where it is absent."""

    def read_bytes(self, key: object) -> bytes | Literal[False] | None:
        """Return the value of a key as JSON; False where the key is absent."""

    def read_record(
        self, key: bytes, now_ms: int
    ) -> tuple[bytes, int, int] | Literal[False] | None:
        """Return value, stamp and expires_at of a key's record, unless expired by `now_ms`.

        False where the key is absent.
        """

    def expiry(self, key: object) -> bool | tuple[int, int] | None:
        """Return whether a key is there; if it has an expires_at, that and the time now, in ms."""

    def delete(self, key: object) -> bool | None:
        """Delete a key; return False where it is absent."""

    def read_many(
        self,
        keys: Iterator[str],
        found: "dict[str, JSONObject]",
        parse: "Callable[[bytes], JSONObject]",
        rare: Callable[[str], None],
    ) -> bool:
        """Set the values of the next keys in `found`, as `parse` makes them of JSON.

        `rare` does it for what is out of the ordinary. Of this and the next two: the caller holds
        no lock, and calls it again as long as there may be more, which it returns.
        """

    def put_many(
        self,
        pairs: "Iterator[tuple[str, Mapping[str, object]]]",
        ttl: object,
        written: list[int],
        rare: Callable[[tuple[str, object], bytes | None], None],
    ) -> bool:
        """Put the next pairs; return whether there may be more.

        `written`, from and to where in the file something was written, is extended. `rare` puts
        what is out of the ordinary: a pair, and its value as JSON where that is known; which is in
        the pair then as well.
        """

    def delete_many(self, keys: Iterator[str], rare: Callable[[str], bool]) -> tuple[int, bool]:
        """Delete the next keys; return how many were there, and whether there may be more.

        `rare` deletes what is out of the ordinary, and returns whether it was there.
        """

    def delete_slot(self, slot: int, key: bytes) -> bool | None:
        """Delete the key in a live slot. The caller holds its stripe."""

    def free(self, record: int) -> bool | None:
        """Free the block of a record that no slot points to."""

    def sweep(self, extent: int, magic: int, generation: int) -> int | None:
        """Free the blocks of an extent that were retired in another generation than this.

        As `Slab.sweep`, for a caller that holds a stripe, but not the space lock. None: some may
        have been freed, but not all could be.
        """

    def move(self, place: int, most: int) -> int:
        """Move records of an extent, from the block at `place` on, to others of its class.

        As `Changes.move`, at the most so many, for a caller that is reclaiming and holds no stripe.
        Returns where it stopped: at the extent's end, or at a block; `place`: that is for Python.
        """

    def create_under_locks(
        self,
        key: bytes,
        encoded: bytes,
        stamp: int,
        expires_at: int,
        now_ms: int,
        replace: bool,
    ) -> int | Plan | None:
        """Create a key whose stripe the caller holds; as `create`, but 0: open an extent first.

        With `replace`, as `put`. The stamp 0 stands for the next one; with another one no record is
        replaced.

        Where the file is written by calls, and the caller holds the space lock: what is to be done.
        First the entry of the block's extent, then the record but for its magic, the slot, ..., of
        a new key entry and control byte of the segment, and last the magic. Of a key that is there,
        of the slot only its last 16 bytes; what becomes of the record before is left to the caller.
        """

    def delete_under_locks(self, key: bytes, now_ms: int) -> int | Plan | None:
        """Delete a key whose stripe the caller holds; return its record, 0: free the spare first.

        Where the file is written by calls, and the caller holds the space lock: what is to be done.
        Control byte and entry of the segment, then entry and block of the slab.
        """

    def has_magic(self, extent: int) -> bool | None:
        """Return whether an extent has a magic where a record can begin."""

    def use_shape(self, shape: int) -> None:
        """Go on with an index that was built anew: see `buckets.wanted_shape`."""

    def begin(self) -> None:
        """Allow changes: the disk knows that the index is in flux."""

    def close(self) -> None:
        """Do nothing any more, and let go of the map. A second call does nothing."""
