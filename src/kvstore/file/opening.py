"""A data file as it was found, and a new one: what comes before it is mapped.

Invariant: `FoundFile` changes not a byte of a file, nor its length. What is to
be done with its index is decided in `kvstore.recovery.opening`, before anything is changed.
"""

import os
from typing import Final

from kvstore.errors import CorruptStoreError, UnsupportedFormatError
from kvstore.format.layout import (
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FILE_MAGIC,
    FIRST_FILE_SIZE,
    IDENTITY,
    IDENTITY_OFFSETS,
    MAX_EXTENTS,
    MAX_FILE_SIZE,
    STATE,
    STATE_OFFSET,
    map_entry_offset,
)
from kvstore.format.superblock import (
    State,
    is_state,
    pack_identity,
    unknown_format,
    unpack_identity,
    unpack_state,
)

from .held import HeldFile
from .platform import raise_if_full, system

_FEWEST_EXTENTS: Final = FIRST_FILE_SIZE >> EXTENT_SHIFT


class FoundFile:
    """A data file as it was found, open as `fd`; nobody may be changing it meanwhile.

    Attributes:
        length: of the file, in bytes.
        is_blank: it is empty or holds nothing but zeros. Then nothing else is known of it.
        identity: the true one, packed.
        identity_damaged: not both copies are as it is.
        hash_seed: of the identity.
        state: as far as the file is long enough for it; where it is not intact, what the file's
            length allows.

    Raises:
        UnsupportedFormatError: the file is no store, or of another format.
        CorruptStoreError: both identities are damaged, or the file is shorter than its contents.
        OSError: it cannot be read.
    """

    identity: bytes
    identity_damaged: bool
    hash_seed: int
    state: State

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.is_blank = not self._find_identity()
        self.length = os.fstat(fd).st_size
        if not self.is_blank:
            self._find_state()

    def _find_identity(self) -> bool:
        """Find a valid identity. False: the file is empty or holds nothing but zeros."""
        copies = [system.read_at(self.fd, IDENTITY.size, offset) for offset in IDENTITY_OFFSETS]
        valid = []
        for copy in copies:
            identity = unpack_identity(copy)
            if identity is not None:
                if not identity.is_known_format:
                    raise UnsupportedFormatError(f"{self.path}: {unknown_format(identity)}")
                valid.append((copy, identity.hash_seed))
        if not valid:
            self._check_blank(copies)
            return False
        # Two that differ are of two files: the state knows its own.
        state = system.read_at(self.fd, STATE.size, STATE_OFFSET)
        (self.identity, self.hash_seed), *_ = sorted(
            valid, key=lambda identity: not is_state(state, identity[1])
        )
        self.identity_damaged = any(copy != self.identity for copy in copies)
        if len({seed for _, seed in valid}) > 1 and not is_state(state, self.hash_seed):
            raise CorruptStoreError(
                f"{self.path}: the copies of the identity, at bytes {IDENTITY_OFFSETS[0]} and "
                f"{IDENTITY_OFFSETS[1]:,}, give different hash seeds, and the state at byte "
                f"{STATE_OFFSET} fits neither; without the right one no record can be found"
            )
        return True

    def _check_blank(self, copies: list[bytes]) -> None:
        """Raise unless the file, whose identities are both invalid, may become a new store."""
        if any(copy.startswith(FILE_MAGIC) for copy in copies):
            raise CorruptStoreError(
                f"{self.path}: both copies of the identity, at bytes {IDENTITY_OFFSETS[0]} and "
                f"{IDENTITY_OFFSETS[1]:,}, fail their checksums; without the hash seed in them no "
                f"record can be found"
            )
        size = os.fstat(self.fd).st_size
        if any(map(any, copies)) or size > MAX_FILE_SIZE or not system.is_zero(self.fd, size):
            raise UnsupportedFormatError(
                f"{self.path}: not a kvstore file (it begins with {copies[0][:8]!r}, "
                f"expected {FILE_MAGIC!r}); it was left as it is"
            )

    def _find_state(self) -> None:
        packed = system.read_at(self.fd, STATE.size, STATE_OFFSET)
        whole_extents = self.length >> EXTENT_SHIFT
        state = State(False, min(whole_extents, MAX_EXTENTS), 0, 0, 0, intact=False)
        if is_state(packed, self.hash_seed):
            found = unpack_state(packed, self.hash_seed)
            if found.extent_count >= _FEWEST_EXTENTS:
                state = found._replace(intact=True)
        # Power loss may take back a growth that was never flushed, but no more than that.
        least = max(state.extent_count if state.clean else state.durable_count, _FEWEST_EXTENTS)
        if self.length < least * EXTENT_SIZE or state.extent_count > MAX_EXTENTS:
            raise CorruptStoreError(
                f"{self.path}: the file is {self.length:,} bytes, shorter than its contents of "
                f"{least * EXTENT_SIZE:,}; it was cut off, or bytes were removed from it; "
                f"restore it from a copy. Where there is none, kvstore-inspect repair {self.path} "
                f"saves the records that are whole"
            )
        count = min(state.extent_count, whole_extents)
        self.state = state._replace(
            extent_count=count, durable_count=min(state.durable_count, count)
        )

    def read_start(self, extent_count: int) -> bytes:
        """Read the file up to, and with, the entries of so many extents in the extent map."""
        size = map_entry_offset(extent_count)
        return system.read_at(self.fd, size, 0).ljust(size, b"\0")

    def read_extent(self, extent: int) -> bytes:
        """Read all bytes of an extent; zeros where the file ends."""
        contents = system.read_at(self.fd, EXTENT_SIZE, extent << EXTENT_SHIFT)
        return contents.ljust(EXTENT_SIZE, b"\0")


def create_store(held: HeldFile, now_ms: int) -> FoundFile:
    """Make of a blank file an empty store that only needs its index built.

    A crash leaves zeros, or an identity that is on disk before anything else is. The name is there
    before that: a file that opens as a store is never made anew, nor its folder flushed.

    Raises:
        StoreFullError: the disk has no room for it.
        OSError: what else the operating system said.
    """
    fd = held.fd
    held.is_new = True
    system.flush_folder(held.path)
    hash_seed = int.from_bytes(os.urandom(8), "little")
    identity = pack_identity(os.urandom(16), hash_seed, now_ms)
    state = State(False, _FEWEST_EXTENTS, _FEWEST_EXTENTS, 0, 0)
    os.ftruncate(fd, 0)
    if not held.in_place:
        system.disable_copy_on_write(fd)
    try:
        system.reserve(fd, 0, FIRST_FILE_SIZE)
        system.write_at(fd, 0, identity)
        system.flush_file(fd)
        system.write_at(fd, IDENTITY_OFFSETS[1], identity)
        system.write_at(fd, STATE_OFFSET, state.pack(hash_seed))
        system.flush_file(fd)
    except OSError as error:
        raise_if_full(error, held.path, "create the file")
        raise
    return FoundFile(held.path, fd)
