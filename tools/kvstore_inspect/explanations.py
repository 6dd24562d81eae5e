"""What each problem that the checker can find means for the data, and what to do about it."""

from enum import StrEnum
from typing import Final, NamedTuple

from kvstore.recovery.problems import Breach

from .opening import Opening


class Remedy(StrEnum):
    """What to do, by names for programs, which do not change."""

    OPEN = "open"
    REPAIR = "repair"
    DELETE = "delete"
    RESTORE = "restore"

    def advice(self, file: str) -> str:
        """Return what to do about `file`, as a clause."""
        return _ADVICE[self].format(file=file)


_ADVICE: Final = {
    Remedy.OPEN: "nothing to do: the next opening of the store mends it",
    Remedy.REPAIR: "kvstore-inspect repair {file}",
    Remedy.DELETE: (
        "put the value again (python -m kvstore put --file {file} KEY VALUE), from a copy if there "
        "is one, or delete the key; kvstore-inspect repair {file} drops all such records at once"
    ),
    Remedy.RESTORE: (
        "restore the file from a copy; where there is none, kvstore-inspect repair {file} saves "
        "what is whole"
    ),
}


class Explanation(NamedTuple):
    """What a problem means, as sentences, and what to do where the store opens with it."""

    meaning: str
    remedy: Remedy = Remedy.REPAIR
    opened: str = ""
    """Meant besides where the next opening uses the index as it is."""
    rebuilt: str = ""
    """Likewise where it rebuilds the index."""


_ORPHANED = "If the record is whole, its key cannot be found, and repair brings it back."
_LEAKED = "No data is touched. Space is lost until the index is rebuilt."
_MIXED = (
    "No record is damaged yet. But a later create could take space that is in use: do not write to "
    "the store before it is repaired."
)
_RAISES = "Keys that are looked for there raise an error."
_KEY_RAISES = "The key raises an error."
_UNREACHED = "The key cannot be found, though its record may be whole."

EXPLANATIONS: Final[dict[Breach, Explanation]] = {
    Breach.FILE_EMPTY: Explanation(
        "There is nothing in the file. Opening it makes a new store.", Remedy.OPEN
    ),
    Breach.FILE_TOO_SHORT: Explanation(
        "The file was cut off so early that it can hold no record.", Remedy.RESTORE
    ),
    Breach.FILE_CUT_OFF: Explanation(
        "The end of the file is missing, and the records in it with it. The store refuses to open.",
        Remedy.RESTORE,
    ),
    Breach.GROWTH_LOST: Explanation(
        "A crash of the machine took back growth of the file that was never flushed. Nothing that "
        "was synced is lost.",
        Remedy.OPEN,
    ),
    Breach.FILE_TOO_LONG: Explanation(
        "Bytes follow the last extent, as when a process died while it opened or grew the file. "
        "They are cut off where they hold nothing; else a closed store does not open, for they may "
        "have been appended, or all after some place been moved, and repair says what is left.",
        Remedy.OPEN,
    ),
    Breach.IDENTITY_DAMAGED: Explanation(
        "One of two copies of the file's identity is damaged. While the other is whole nothing is "
        "lost; the first change to the store restores it, as repair does.",
    ),
    Breach.IDENTITIES_DIFFER: Explanation(
        "The two copies of the file's identity are those of different stores. With the wrong one "
        "no record can be read: do not open the store before it is repaired.",
    ),
    Breach.IDENTITIES_LOST: Explanation(
        "Both copies of the file's identity are damaged, and without the hash seed in them no "
        "record can be told from garbage. No repair can bring it back.",
        Remedy.RESTORE,
    ),
    Breach.STATE_DAMAGED: Explanation(
        "Whether the file was closed in order cannot be told, so its index is not trusted. The "
        "next opening rebuilds it if every record is whole; else the store does not open before "
        "it is repaired.",
        Remedy.OPEN,
    ),
    Breach.NOT_CLOSED: Explanation(
        "The process that had the store open ended without closing it.",
        Remedy.OPEN,
        rebuilt="The next opening rebuilds the index from the records: nothing that was promised "
        "to be kept is lost.",
    ),
    Breach.STATE_COUNTS: Explanation(
        "The state gives a length that no store has. All of the file is searched for records.",
    ),
    Breach.INDEX_CHECKSUM: Explanation(
        "Directory, extent map or allocator are not as they were when the store was closed, or "
        "this is a copy that was torn while it was made. The next opening rebuilds them if all "
        "records of then are there and whole; else the store does not open before it is repaired.",
        Remedy.OPEN,
    ),
    Breach.STATE_RECORDS: Explanation(
        "The state does not say how many records there were when the store was closed. No data is "
        "touched, but were the index damaged too, the store would not open.",
    ),
    Breach.STATE_STAMP: Explanation(
        "A record is later than the state says that any is. No data is touched yet; but a record "
        "that is stored from now on could count as older than that one, after a crash.",
    ),
    Breach.FRESH_EXTENT: Explanation(_MIXED),
    Breach.EXTENT_KIND: Explanation(_MIXED),
    Breach.FREE_EXTENTS_BROKEN: Explanation(_MIXED),
    Breach.FREE_EXTENTS_IN_USE: Explanation(_MIXED),
    Breach.FREE_EXTENT_UNLISTED: Explanation(_LEAKED),
    Breach.SLAB_ENTRY: Explanation(_MIXED),
    Breach.CLASS_LIST_BROKEN: Explanation(_MIXED),
    Breach.CLASS_LIST_MEMBERS: Explanation(_MIXED),
    Breach.CLASS_LIST_UNKNOWN: Explanation(_LEAKED),
    Breach.DIRECTORY_ENTRY: Explanation(
        "The records of keys whose hashes lead there may be whole.",
        opened="These keys cannot be read or written.",
    ),
    Breach.DIRECTORY_RUN: Explanation(
        "Some keys are looked for in the wrong segment and not found there, though their records "
        "may be whole.",
    ),
    Breach.SEGMENT_HEADER: Explanation(
        "The keys of this segment cannot all be found, and new ones may go to a wrong place, "
        "though their records may be whole.",
    ),
    Breach.SEGMENT_UNNAMED: Explanation(
        "The keys of this segment cannot be found, though their records may be whole.",
    ),
    Breach.SEGMENT_COUNTS: Explanation(
        "No key is touched by that alone; the number of keys that the store tells is wrong.",
    ),
    Breach.BUCKET_MARKER: Explanation(
        "A page of the table is damaged. The records that it leads to may be whole.",
        opened=_RAISES,
    ),
    Breach.BUCKET_SHAPE: Explanation(
        "A page of the table is damaged, or is of another moment than its neighbours, as in a copy "
        "that was torn while it was made. The records that it leads to may be whole.",
        opened=_RAISES,
    ),
    Breach.BUCKET_TOMBSTONE: Explanation(
        "A control byte is damaged: a key may not be found, though its record may be whole.",
    ),
    Breach.SLOT_EXPIRY: Explanation(
        "The key may be counted although it has expired, and its space be taken back late.",
    ),
    Breach.SLOT_UNREACHED: Explanation(_UNREACHED),
    Breach.SLOT_SEGMENT: Explanation(_UNREACHED),
    Breach.SLOT_FINGERPRINT: Explanation(_UNREACHED),
    Breach.SLOT_FLAGS: Explanation(
        "Bits of the slot that mean nothing are set, so it is damaged, though what is known of its "
        "record fits.",
    ),
    Breach.SLOT_RECORD: Explanation(
        "The slot is damaged. If its record is whole elsewhere, repair brings it back.",
        opened=_KEY_RAISES,
    ),
    Breach.SLOT_RETIRED: Explanation(
        "The slot leads to a record that was superseded or deleted: one of the two is damaged. "
        "Repair brings back the latest record of the key that is whole, unless that says that the "
        "key was deleted.",
        opened=_KEY_RAISES,
    ),
    Breach.SLOT_SHARED: Explanation(
        "At least one of the two slots is damaged. Its own record may be whole elsewhere: then "
        "repair brings it back.",
    ),
    Breach.SLOT_SAME_KEY: Explanation(
        "The key has two values, and either may be read. Repair keeps the newer."
    ),
    Breach.RECORD_HEADER: Explanation(
        "Slot or record is damaged. If the record is whole, or is elsewhere, repair brings it "
        "back; else its value is lost.",
        opened=_KEY_RAISES,
    ),
    Breach.RECORD_KEY: Explanation(
        "Slot or record is damaged. If the record is whole, repair brings it back; else its value "
        "is lost.",
        opened=_KEY_RAISES,
    ),
    Breach.RECORD_CHECKSUM: Explanation(
        "The value is lost: bytes of the record are not what was written.",
        Remedy.DELETE,
        "Reading the key raises an error. That touches no other key.",
    ),
    Breach.RECORD_STAMP: Explanation(
        "The time of the record is later than any can be: it is damaged or forged, and no rebuild "
        "of the index keeps it. Read the value and put it again.",
        Remedy.DELETE,
    ),
    Breach.RECORD_CLASS: Explanation(
        "The record is whole, but in a block of another size: a recovery could drop it. Read the "
        "value and put it again.",
        Remedy.DELETE,
    ),
    Breach.RECORD_UNSLOTTED: Explanation(
        "There is a record, or what is left of one, that no key leads to. " + _ORPHANED,
    ),
    Breach.RECORD_RETIRED: Explanation(
        "There is a record that was superseded or deleted, and as the file was closed there was "
        "none. It holds space until the index is rebuilt; where nothing later is left of its key, "
        "repair brings back what was superseded.",
    ),
    Breach.RECORD_LATEST: Explanation(
        "A record that counts as superseded or deleted is the latest of its key. After a crash, or "
        "a repair, the key has its value, or none where it is marked as deleted.",
    ),
    Breach.RECORD_OUTSIDE: Explanation(
        "There is a record, or what is left of one, in an extent that is not marked as holding "
        "any; it may be overwritten. " + _ORPHANED,
    ),
    Breach.RECORD_MISPLACED: Explanation(
        "There is a record, or what is left of one, where none is expected; it may be "
        "overwritten. " + _ORPHANED,
    ),
    Breach.FREE_BLOCKS_BROKEN: Explanation(_MIXED),
    Breach.FREE_BLOCKS_LIVE: Explanation(_MIXED),
    Breach.SLAB_COUNT: Explanation(
        "Fewer or more records are in an extent than it counts. Which are missing, other problems "
        "tell; an extent may be given away too early.",
    ),
    Breach.SLAB_RETIRED: Explanation(
        "An extent counts fewer or more records that are to be reclaimed than there are. " + _LEAKED
    ),
    Breach.BLOCK_LEAKED: Explanation(_LEAKED + " If it held a record, that is damaged."),
}

# With one of these an opening goes wrong where it is not refused.
_UNOPENED = frozenset({Breach.IDENTITIES_DIFFER, Breach.IDENTITIES_LOST, Breach.STATE_COUNTS})


def meaning(breach: Breach, opening: Opening) -> str:
    """Return what a breach means in a file with which the next opening does this."""
    said = EXPLANATIONS[breach]
    besides = {Opening.USES: said.opened, Opening.REBUILDS: said.rebuilt}.get(opening)
    return f"{said.meaning} {besides}" if besides else said.meaning


def remedies(found: set[Breach], opening: Opening) -> dict[Breach, Remedy]:
    """Return what to do about each of the breaches that were found in one file.

    `opening` is what the next opening does with it. Where that rebuilds the index, it mends; where
    it is refused, only a repair does, or a copy.
    """
    chosen = {breach: EXPLANATIONS[breach].remedy for breach in found}
    if opening is Opening.REFUSES or not found.isdisjoint(_UNOPENED):
        kept, other = (Remedy.REPAIR, Remedy.RESTORE), Remedy.REPAIR
    elif opening is Opening.REBUILDS:
        kept, other = (Remedy.OPEN, Remedy.RESTORE), Remedy.OPEN
    else:
        return chosen
    return {b: r if r in kept else other for b, r in chosen.items()}
