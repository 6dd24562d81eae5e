"""What a store keeps in memory of the versions of its keys: an array of words, shared with C.

A record may be superseded by a later one of its key, or deleted. Three questions are asked then;
what the answers rely on is in `layout`, "Records that follow each other".

1. *Which stamp comes next?* One later than all of its stripe, `last`. As a store is opened, no
   record in the file has a later stamp than `last` of any stripe.
2. *May the old record be cleared at once?* Only if nobody was promised it: it is **fresh**. Whoever
   is about to flush everything first has `promised` be `last`, under the space lock; a record with
   a later stamp was written after that. A durable store makes promises with each operation: there
   nothing is fresh. Who clears a fresh record asks and clears under the space lock, so that no
   promise is made in between.
3. *May older records of its key be on the disk?* Then it must go on outranking them, and is marked
   instead of cleared. They may, if its slot says so, unless it is `settled`: all that was retired
   before it was made has been cleared, and that is on the disk. Of a record that was moved, a copy
   is retired that is as old as itself: then it counts as not settled, and whatever of its stripe is
   later, until all that was retired by then has been cleared.

Whatever is retired is so in a generation, and reclaimed by a later one; see `kvstore.reclaiming`.
The words of a stripe are covered by the stripe, all others by the space lock.
"""

from array import array
from typing import Final

from kvstore.errors import CorruptStoreError
from kvstore.format.layout import (
    ALWAYS_PROMISED_WORD,
    GENERATION_WORD,
    LAST_STAMPS,
    MARKS_WORD,
    MOST_GENERATIONS,
    PROMISED_STAMPS,
    RELEASED_WORD,
    RETIRED_SIZE_WORD,
    SETTLED_STAMPS,
    SLOT_OLDER,
    SLOT_OLDER_UNDATED,
    STAMP_LIMIT,
    STAMP_SHIFT,
    STRIPE_COUNT,
    VERSION_WORDS,
)

_LAST: Final = slice(LAST_STAMPS, LAST_STAMPS + STRIPE_COUNT)
_PROMISED: Final = slice(PROMISED_STAMPS, PROMISED_STAMPS + STRIPE_COUNT)


class Versions:
    """The stamps, promises and generation of an open store.

    Args:
        path: of the file, for messages.
        durable: each operation makes its own promise.

    Attributes:
        words: see `layout`, "what a store keeps of versions".
        leaks: a record that was superseded could not be retired, and nobody knows where it is. Then
            marks, which outrank it, stay until the next opening has settled all.
    """

    def __init__(self, path: str, *, durable: bool) -> None:
        self._path = path
        self.words = array("Q", bytes(8 * VERSION_WORDS))
        self.words[GENERATION_WORD] = 1
        self.words[ALWAYS_PROMISED_WORD] = durable
        self.leaks = False

    def start_after(self, latest_stamp: int, now_ms: int) -> None:
        """Have every stamp be later than that of any record in the file, and not before `now_ms`.

        All that is in the file is on the disk, and has no older record there.
        """
        first = max(latest_stamp, (now_ms << STAMP_SHIFT) - 1, 0)
        self.words[: 3 * STRIPE_COUNT] = array("Q", [first]) * (3 * STRIPE_COUNT)

    def last_stamp(self, stripe: int) -> int:
        """Return the latest stamp of a stripe: a record that has a later one is damaged."""
        return self.words[LAST_STAMPS + stripe]

    def next_stamp(self, stripe: int, now_ms: int) -> int:
        """Return the stamp of a record that is about to be written. The caller holds the stripe.

        Raises:
            CorruptStoreError: there is none; a record's stamp was forged.
        """
        return self._take(stripe, max(now_ms << STAMP_SHIFT, self.last_stamp(stripe) + 1))

    def _take(self, stripe: int, stamp: int) -> int:
        if stamp >= STAMP_LIMIT:
            raise CorruptStoreError(
                f"{self._path}: a record would need the stamp {stamp:,}, the limit is "
                f"{STAMP_LIMIT:,}: the time of a record was damaged or forged; dump the file with "
                f"kvstore-inspect dump, mend the times, and load that into a new one"
            )
        self.words[LAST_STAMPS + stripe] = max(stamp, self.words[LAST_STAMPS + stripe])
        return stamp

    def stamp_of(self, stripe: int, created_at: int, supersedes: int | None) -> int:
        """Return the stamp of a record that is carried over with its time, if that is possible.

        It has to be later than the stamp of the record that it supersedes, if there is one; else
        than all of its stripe, if one that is marked might outrank it. The caller holds the stripe.
        """
        stamp = max(created_at << STAMP_SHIFT, 1)  # for 0 is void in any file
        if supersedes is not None:
            stamp = max(stamp, supersedes + 1)
        elif self.words[MARKS_WORD] or self.leaks:
            stamp = max(stamp, self.words[LAST_STAMPS + stripe] + 1)
        return self._take(stripe, stamp)

    def note_promises(self) -> None:
        """Count everything that was written as promised. The caller holds the space lock."""
        self.words[_PROMISED] = self.words[_LAST]

    def is_fresh(self, stripe: int, stamp: int, slot_tail: int) -> bool:
        """Return whether nobody was promised a slot's record with this stamp.

        The caller holds its stripe, and the space lock for as long as that must stay so.
        """
        return (
            stamp > self.words[PROMISED_STAMPS + stripe]
            and not slot_tail & SLOT_OLDER_UNDATED
            and not self.words[ALWAYS_PROMISED_WORD]
        )

    def may_have_older(self, stripe: int, stamp: int, slot_tail: int) -> bool:
        """Return whether older records may be on the disk than a slot's with this stamp."""
        return bool(
            slot_tail & SLOT_OLDER_UNDATED
            or (slot_tail & SLOT_OLDER and stamp > self.words[SETTLED_STAMPS + stripe])
        )

    def begin_generation(self) -> "array[int]":
        """Begin a new generation; return what `settle` takes once all others are reclaimed.

        The caller holds all stripes: nothing is amid being retired.
        """
        self.words[GENERATION_WORD] = self.words[GENERATION_WORD] % MOST_GENERATIONS + 1
        return self.words[_LAST]

    def settle(self, stamps: "array[int]") -> None:
        """Note that older records are gone of all that had these stamps or earlier ones."""
        self.words[SETTLED_STAMPS : SETTLED_STAMPS + STRIPE_COUNT] = stamps

    def doubt(self, stripe: int, stamp: int) -> None:
        """Count a record with this stamp, which was moved, as later than all that was settled.

        Its copy, which is retired, is as old as itself. The caller holds the stripe, and nobody is
        reclaiming: what was retired by now is settled by the next to come.
        """
        word = SETTLED_STAMPS + stripe
        self.words[word] = min(self.words[word], max(stamp - 1, 0))

    @property
    def released(self) -> int:
        """How many bytes of blocks were freed or retired, ever since the store was opened."""
        return self.words[RELEASED_WORD]

    @property
    def generation(self) -> int:
        """That in which records are retired now."""
        return self.words[GENERATION_WORD]

    @property
    def retired_size(self) -> int:
        """Bytes of the blocks that are retired, marked ones included."""
        return self.words[RETIRED_SIZE_WORD]

    @property
    def marks(self) -> int:
        """How many records are marked."""
        return self.words[MARKS_WORD]

    @property
    def latest_stamp(self) -> int:
        """The latest of all stripes. The caller holds them, or is the only one left."""
        return max(self.words[_LAST])
