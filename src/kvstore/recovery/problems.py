"""What the checker can find wrong in a file."""

from enum import StrEnum
from typing import NamedTuple


class Breach(StrEnum):
    """What can be wrong, by names for programs, which do not change."""

    FILE_EMPTY = "file-empty"
    FILE_TOO_SHORT = "file-too-short"
    FILE_CUT_OFF = "file-cut-off"
    GROWTH_LOST = "growth-lost"
    FILE_TOO_LONG = "file-too-long"
    IDENTITY_DAMAGED = "identity-damaged"
    IDENTITIES_DIFFER = "identities-differ"
    IDENTITIES_LOST = "identities-lost"
    STATE_DAMAGED = "state-damaged"
    NOT_CLOSED = "not-closed"
    STATE_COUNTS = "state-counts"
    STATE_RECORDS = "state-records"
    STATE_STAMP = "state-stamp"
    INDEX_CHECKSUM = "index-checksum"
    FRESH_EXTENT = "fresh-extent"
    EXTENT_KIND = "extent-kind"
    FREE_EXTENTS_BROKEN = "free-extents-broken"
    FREE_EXTENTS_IN_USE = "free-extents-in-use"
    FREE_EXTENT_UNLISTED = "free-extent-unlisted"
    SLAB_ENTRY = "slab-entry"
    CLASS_LIST_BROKEN = "class-list-broken"
    CLASS_LIST_MEMBERS = "class-list-members"
    CLASS_LIST_UNKNOWN = "class-list-unknown"
    DIRECTORY_ENTRY = "directory-entry"
    DIRECTORY_RUN = "directory-run"
    SEGMENT_HEADER = "segment-header"
    SEGMENT_UNNAMED = "segment-unnamed"
    SEGMENT_COUNTS = "segment-counts"
    BUCKET_MARKER = "bucket-marker"
    BUCKET_SHAPE = "bucket-shape"
    BUCKET_TOMBSTONE = "bucket-tombstone"
    SLOT_EXPIRY = "slot-expiry"
    SLOT_UNREACHED = "slot-unreached"
    SLOT_SEGMENT = "slot-segment"
    SLOT_FINGERPRINT = "slot-fingerprint"
    SLOT_FLAGS = "slot-flags"
    SLOT_RECORD = "slot-record"
    SLOT_RETIRED = "slot-retired"
    SLOT_SHARED = "slot-shared"
    SLOT_SAME_KEY = "slot-same-key"
    RECORD_HEADER = "record-header"
    RECORD_KEY = "record-key"
    RECORD_CHECKSUM = "record-checksum"
    RECORD_STAMP = "record-stamp"
    RECORD_CLASS = "record-class"
    RECORD_UNSLOTTED = "record-unslotted"
    RECORD_RETIRED = "record-retired"
    RECORD_LATEST = "record-latest"
    RECORD_OUTSIDE = "record-outside"
    RECORD_MISPLACED = "record-misplaced"
    FREE_BLOCKS_BROKEN = "free-blocks-broken"
    FREE_BLOCKS_LIVE = "free-blocks-live"
    SLAB_COUNT = "slab-count"
    SLAB_RETIRED = "slab-retired"
    BLOCK_LEAKED = "block-leaked"


class Problem(NamedTuple):
    """One breach of the format: where in the file, in what, and what is wrong.

    `slot` is the offset of the slot that led there; 0 where none did.
    """

    offset: int
    structure: str
    message: str
    breach: Breach
    slot: int = 0

    def __str__(self) -> str:
        return f"byte {self.offset:,}: {self.structure}: {self.message}"
