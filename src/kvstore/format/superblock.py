"""Identity, state and holder of a file, decoded and built: see `layout`, "Superblock"."""

from typing import TYPE_CHECKING, Final, NamedTuple

from xxhash import xxh3_64, xxh3_64_intdigest

from .layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    DIRECTORY_OFFSET,
    DIRECTORY_SIZE,
    EXTENT_MAP_OFFSET,
    EXTENT_SIZE,
    FILE_MAGIC,
    FORMAT_VERSION,
    HOLDER,
    IDENTITY,
    SLAB_ENTRY,
    STATE,
    U64,
)

if TYPE_CHECKING:
    from typing import Protocol

    class Sliceable(Protocol):
        """The bytes of a file, or of its start: `bytes`, say."""

        def __getitem__(self, where: slice, /) -> bytes: ...


_CHECKSUM_SIZE: Final = U64.size  # at the end of identity and state


class Identity(NamedTuple):
    """What a file is, as written at its creation."""

    version: int
    extent_size: int
    file_id: bytes
    hash_seed: int
    created_at: int
    """Milliseconds since 1970 UTC."""

    @property
    def is_known_format(self) -> bool:
        """Whether the file is of the format that `layout` describes."""
        return (self.version, self.extent_size) == (FORMAT_VERSION, EXTENT_SIZE)


class State(NamedTuple):
    """What the superblock says of the rest of the file."""

    clean: bool
    extent_count: int
    durable_count: int
    records: int
    index_checksum: int
    stamp: int = 0
    """Where it is clean, no record has a later one; else those up to it are void."""
    intact: bool = True
    """Whether it was found as `pack` writes it, checksum included."""

    def pack(self, hash_seed: int) -> bytes:
        """Return the 40 bytes of this state, checksum included, in a file with that seed."""
        return pack_state(*self[:5], hash_seed, self.stamp)


def pack_identity(file_id: bytes, hash_seed: int, created_at: int) -> bytes:
    """Return the 56 bytes of an identity, checksum included."""
    body = IDENTITY.pack(
        FILE_MAGIC, FORMAT_VERSION, EXTENT_SIZE, file_id, hash_seed, created_at, 0
    )[:-_CHECKSUM_SIZE]
    return body + U64.pack(xxh3_64_intdigest(body))


def unpack_identity(packed: bytes) -> Identity | None:
    """Return what one copy of the identity says; None where its magic or checksum is wrong.

    It may be that of another format.
    """
    if len(packed) != IDENTITY.size or not packed.startswith(FILE_MAGIC):
        return None
    _, *fields, checksum = IDENTITY.unpack(packed)
    return Identity(*fields) if checksum == xxh3_64_intdigest(packed[:-_CHECKSUM_SIZE]) else None


def unknown_format(identity: Identity) -> str:
    """Return what is said of a valid identity of another format than `layout` describes."""
    what = (
        f"format version {identity.version} with extents of {identity.extent_size:,} bytes; this "
        f"library reads version {FORMAT_VERSION} of {EXTENT_SIZE:,}"
    )
    if identity.version == 1:
        what += (
            ". Version 1 was never released: only the commits before version 2 read it; dump the "
            "file with the kvstore-inspect of such a commit, and load that with this one"
        )
    return f"{what}; the file was left as it is"


def pack_state(
    clean: bool,
    extent_count: int,
    durable_count: int,
    records: int,
    index_checksum: int,
    hash_seed: int,
    stamp: int = 0,
) -> bytes:
    """Return the 40 bytes of a state, checksum included."""
    body = STATE.pack(clean, extent_count, durable_count, records, index_checksum, stamp, 0)
    body = body[:-_CHECKSUM_SIZE]
    return body + U64.pack(xxh3_64_intdigest(body, hash_seed))


def unpack_state(packed: bytes, hash_seed: int) -> State:
    """Return what the 40 bytes of a state say, intact or not."""
    clean, *numbers, _ = STATE.unpack(packed)
    state = State(bool(clean), *numbers)
    return state._replace(intact=packed == state.pack(hash_seed))


def is_state(packed: bytes, hash_seed: int) -> bool:
    """Return whether these bytes are a state with a true checksum, in a file with that seed."""
    return len(packed) == STATE.size and packed[-_CHECKSUM_SIZE:] == U64.pack(
        xxh3_64_intdigest(packed[:-_CHECKSUM_SIZE], hash_seed)
    )


def index_checksum(contents: "Sliceable", extent_count: int, hash_seed: int) -> int:
    """Return the checksum of directory, extent map and allocator that a clean state has.

    `contents` is the file, or as much of its start as they take.
    """
    digest = xxh3_64(seed=hash_seed)
    for offset, size in (
        (DIRECTORY_OFFSET, DIRECTORY_SIZE),
        (EXTENT_MAP_OFFSET, SLAB_ENTRY.size * extent_count),
        (ALLOCATOR_OFFSET, ALLOCATOR_SIZE),
    ):
        digest.update(contents[offset : offset + size])
    return digest.intdigest()


def pack_holder(pid: int) -> bytes:
    """Return the bytes that name a process as the holder; those for nobody, if `pid` is 0."""
    return HOLDER.pack(pid)


def unpack_holder(packed: bytes) -> int:
    """Return the process id of the holder, at the start of these bytes; 0 where there is none."""
    return int.from_bytes(packed[: HOLDER.size], "little")
