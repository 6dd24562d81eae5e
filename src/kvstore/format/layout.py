"""The file format, version 2. Every offset, size and reserved value is declared here and only here.

All integers are unsigned and little-endian. Times are whole milliseconds since 1970 UTC, below
2**48. Offsets are in bytes from the start of the file unless they say "in the ...". Bytes that no
field names are zero. A reader in another language needs nothing but this module.

Version 2 is not frozen before it is released. Version 1 never was released: its buckets, but for
the first of a segment, did not say what segment they are of, its state had no count of records, and
its records had no stamps.

The file
========
The file is a row of **extents** of 65,536 bytes, numbered from 0; at most 15,258 of them::

    extent 0       superblock: identity, state, holder, allocator heads
    extent 1       directory: 32,768 x u16, hash prefix -> segment
    extents 2..5   extent map: 16 bytes for each of 16,384 possible extents
    extents 6..    table segments and slab extents, as they were needed

Extent number 0 can be none of the last two, so a stored 0 means "no extent".

To read key K: hash it; look up its segment in the directory; look for its slot in that segment's
buckets; read, check and parse the record at the slot's offset.

    key_hash = xxh3_64(UTF-8 of the key, seed = the hash seed of the superblock)

    bits 63..49   directory index        bits 63..60   stripe (a lock in memory, not on disk)
    bits 11..4    fingerprint            bits 3..0     home bucket

Superblock (extent 0)
=====================
``IDENTITY`` at byte 0, and the same 56 bytes again at byte 4,096. Written once, at creation. Where
both are valid and differ, the true one is that whose seed fits the checksum of the state::

     0  8s   magic            89 4B 56 53 0D 0A 1A 0A
     8  u32  version          2
    12  u32  extent size      65,536
    16  16s  file id          random
    32  u64  hash seed        random
    40  u64  created_at
    48  u64  checksum         xxh3_64(bytes 0..47)

``STATE`` at byte 512, rewritten whole whenever one of its fields changes::

     0  u32  clean            1: directory, extent map and allocator can be trusted; 0: rebuild them
     4  u32  extent count     the file is this many extents long
     8  u32  durable count    no power loss can have left fewer extents than this
    12  u32  records          where clean is 1: how many there are, expired ones included; else 0
    16  u64  index checksum   where clean is 1: xxh3_64, with the hash seed, of the directory, the
                              first `extent count` entries of the extent map, and ``ALLOCATOR``
    24  u64  stamp            where clean is 1: no record has a later one; else: records with this
                              stamp or an earlier one are void, for all of them were removed
    32  u64  checksum         xxh3_64(bytes 0..31, seed = hash seed)

A state of fewer than 32 extents, which every file has, counts as one whose checksum is wrong. No
crash leaves a wrong checksum (a sector is written whole or not at all), nor an index that is not
the one that a clean state vouches for: both are damage, or a copy that was torn while it was made.
Then the index may be rebuilt only if every aligned magic of a record is that of a whole one, and
their number, where the state is clean, is `records`. The file may be longer than `extent count`
says (a process died while it opened or grew it). Where it is clean, what is beyond holds nothing.

``HOLDER`` at byte 1,024: u32 process id of who has the file open; 0 when closed. It is advice for a
message: the lock itself is the operating system's.

``ALLOCATOR`` at byte 1,536::

     0  u16      free extents     first extent of the list of free ones, linked by `next`
     2  u16      fresh extent     every extent from this one on is unused, and on no list
     4  u16      rebuilds         counts how often the index was built anew, modulo 2**16; as in
                                  the header of every bucket
     6  u16      zero
     8  64xu16   class heads      for each size class the first extent of those with a free block,
                                  linked both ways

Directory (extent 1)
====================
Entry i is the extent number of the segment for all keys whose hash begins with the 15 bits of i. A
segment of depth d (4 to 15) owns 2**(15-d) equal entries, beginning at its `prefix`, a multiple of
that number. Split, it becomes two of depth d + 1. These are **buddies**: once they are nearly empty
they may be merged into one again.

Extent map (extents 2..5)
=========================
Entry n, 16 bytes at byte 131,072 + 16 n, is about extent n::

     0  u8   kind        0 free or never used, 1 fixed (extents 0..5), 2 segment, 3 slab

    slab:                                           segment:
     1  u8   size class                              2  u16  live slots, expired ones included
     2  u16  live blocks                             4  u16  used slots: live and tombstones
     4  u16  first free block, 0xFFFF none           6  u16  zero
     6  u16  fresh block: it and all after it        8  u64  earliest expiry in the segment, or
             have never been used                            2**64-1; never later than the true one
     8  u16  previous extent of the class with room
    10  u16  next extent of the class with room     free: as slab, but only `next` counts
    12  u16  retired blocks, among the live ones

Segment: sixteen buckets of one 4 KiB page
==========================================
Bucket b of the segment in extent n begins at byte 65,536 n + 4,096 b::

      0  u64    marker          0x4B425630 << 32 | (number of this page: its offset / 4,096)
      8  u64    earliest expiry in this bucket, or 2**64-1; never later than the true one
     16  u8     depth           of the segment: 4 to 15
     18  u16    prefix          first directory index of the segment
     20  u16    rebuilds        as the allocator has it
     22  u16    rewrites        how often, modulo 2**16, the segment was written whole since then
     32  80xu8  control bytes   one a slot: 0 empty, 1 tombstone, 2..255 fingerprint of a live slot
    256  80x48  slots

A fingerprint of 0 or 1 is stored as 2 or 3. ``SLOT``::

     0  32s  key        first 32 bytes of its UTF-8, zero-padded
    32  u64  expires_at 0 = never; else the key is absent from this moment on
    40  u32  record     offset of its record; of its lowest bits, which are 0 in an offset, 0 and 1
                        tell of older records: see "Records that follow each other"
    44  u16  value size in bytes
    46  u8   key size   in bytes, 1..128
    47  u8   zero

Look for a key in its home bucket, then in the next ones, wrapping from 15 to 0, until it is found,
or a bucket with an empty slot (control byte 0) has been searched, or all sixteen have been. A key
longer than 32 bytes is compared on its first 32 in the slot and on the rest in its record. A
deleted slot becomes *empty* where its bucket has another empty slot, else a *tombstone*; so a
bucket with an empty slot never holds a tombstone. A page without its marker is damage.

Bytes 16..23 are one word, the bucket's **shape**. It must fit the hash that is looked for (depth,
`rebuilds`, and as many of the uppermost bits of `prefix` as the depth says) in the home bucket, and
be the same in each bucket that the search goes on to. Whatever else is damage, or a copy of the
file whose pages are of different moments: some program read one after the other while a store wrote
to them. For in such a copy a key that nobody touched meanwhile is found, or this tells:

1. A segment is written whole by a rewrite, a split, a merge, a move or a rebuild only. Each gives
   all its pages a shape that no page had before, at that place or another: more rewrites than any
   segment that its keys were in, counting those that were undone; after a rebuild, a number of it
   that is in no bucket of the file.
2. Between two of these, a key stays in its page, and a page without an empty slot stays so. So the
   pages from a key's home bucket to its own, of whatever moments, lead to it.
3. Where the pages are of a time before and one after, their shapes differ, and the search does not
   go on. Within one page, and so where the search ends in the home bucket, all is of one moment.
4. A page that was left behind, in an extent that is free or a slab by now, has no marker, for a
   merge or a move fills what it gives up with zeros; or it has another number of `rebuilds`. One of
   before that still has what nobody touched since. Directory and allocator are of one moment by the
   index checksum of a clean state; where it is wrong, the records alone count, and those of keys
   that nobody touched are in their places.

It takes for granted that each page of the copy is of one moment.

Slab: records in blocks of one size class an extent
===================================================
An extent of size class c is cut from its start into equal blocks of ``BLOCK_SIZES[c]`` bytes; what
is left at its end is not used. Every block begins at a multiple of 32. Classes: 64 to 512 in steps
of 32, then eight equal steps for each doubling to 16,384, then 16,544. A record is in the smallest
class that holds it. ``RECORD``::

     0  u32  magic       FF FE 4B 52
     4  u16  value size  in bytes, 2..16,384
     6  u8   key size    in bytes, 1..128
     7  u8   generation  0; not so where the record is retired
     8  u64  stamp       when it was made, in milliseconds << 16, or a little later
    16  u64  expires_at  0 = never
    24  u64  checksum    xxh3_64(value, seed), where seed, modulo 2**64, is
                         key_hash ^ stamp ^ (expires_at << 16) ^ offset of the record
    32  key as UTF-8, then the value as compact JSON in UTF-8

The checksum vouches for the key too, whose hash is in the seed, and for the place: a record that
strayed to another one fails it. A free block that was used before
begins with ``FREE_BLOCK``::

     0  u32  magic       FF FE 4B 46
     4  u16  next        index in the extent of the next free block, 0xFFFF none
     6  u16  zero

Bytes FF and FE are in no UTF-8, so neither in a key nor in JSON. A record's magic is overwritten
before its block counts as free: aligned magics with a true checksum are the records and nothing
else, wherever in the file they are, and all else can be rebuilt from them.

Records that follow each other
==============================
A record may be superseded by a later one of its key, and at no moment may the key be lost, nor an
older value come back, whatever part of what was written since the last flush the disk has. The
**stamp** says which of two records of a key is the later. It grows strictly within a stripe,
whatever the clock does: it is the time, or one more than the last. Equal stamps are copies, for a
record that moves to another block keeps its own. A stamp of ``STAMP_LIMIT`` or later is none.
(After Kulkarni et al., "Logical Physical Clocks", 2014.)

A record that was superseded is **retired** if a flush may have promised it: it stays as it is, but
for its generation, and its block is not free. One that is deleted while an older one of its key may
still be on the disk is not cleared but **marked**: it stays likewise, with another magic::

     0  u32  magic       FF FE 4B 44

Retired and marked records are no slot's, count as live blocks, and as retired ones in the entry of
their extent. They are reclaimed in this order: flush; clear what was retired before; flush; clear
what was marked before that. So a file that is clean has none. `kvstore.index.versions` tells what a
store keeps in memory for that. What is left of a store that was not closed is settled by recovery:

1. Flush: a process that died has left changes that no disk has. Of the whole records of a key the
   one with the latest stamp wins; of equal stamps a marked one. All others are cleared. Flush.
2. Winners that are marked, or have expired, are cleared. Flush.

Under one flush the disk could keep a loser and lose the mark that outranks it.

The generation, 1 to 255, tells what was retired before a flush from what came later. The checksum
does not cover it, and recovery does not ask for it. In a slot, bit 0 of `record` says that older
records of the key may be on the disk, unless its own was made before the last time that all were
reclaimed; bit 1, that they may be whatever its stamp. After a rebuild neither is set.

An example
==========
The hash seed is 0x0123456789ABCDEF, the file id counts from 0 to 15. At 1,700,000,000,000 ms the
file was created, ``user:1`` with the value ``{"name":"Ada"}`` and a time-to-live of 3,600 seconds
was stored as its first record, and the file was closed. Each line below gives an offset in the file
and the bytes from there on.

Identity, and again at byte 4,096::

            0  89 4B 56 53 0D 0A 1A 0A 02 00 00 00 00 00 01 00
           16  00 01 02 03 04 05 06 07 08 09 0A 0B 0C 0D 0E 0F
           32  EF CD AB 89 67 45 23 01 00 68 E5 CF 8B 01 00 00
           48  6A BD 57 3D 12 4C B7 ED

    magic, version 2, extents of 65,536 bytes; file id; hash seed, created_at 1,700,000,000,000;
    checksum 0xEDB74C123D57BD6A of bytes 0..47

State::

          512  01 00 00 00 20 00 00 00 20 00 00 00 01 00 00 00
          528  32 78 3C 4B 3A AF F0 E7 00 00 00 68 E5 CF 8B 01
          544  3E 3F B9 28 17 AB 3D 29

    clean, 32 extents, all of them durable, 1 record; index checksum 0xE7F0AF3A4B3C7832, stamp
    1,700,000,000,000 << 16, checksum 0x293DAB1728B93F3E of bytes 512..543

The hash of the key is xxh3_64("user:1", seed 0x0123456789ABCDEF) = 0xB3749DA551FA0168::

    directory index   0xB3749DA551FA0168 >> 49          0x59BA = 22,970
    fingerprint       0xB3749DA551FA0168 >> 4 & 0xFF    0x16
    home bucket       0xB3749DA551FA0168 & 15           8

Directory entry 22,970, at byte 65,536 + 2 x 22,970::

      111,476  11 00

    the segment is extent 17

Extent map, entry 17, at byte 131,072 + 16 x 17::

      131,344  02 00 01 00 01 00 00 00 80 56 1C D0 8B 01 00 00

    a segment, 1 live slot, 1 used slot, earliest expiry 1,700,003,600,000

Bucket 0 of this segment, at byte 65,536 x 17, the first 32 bytes of its header::

    1,114,112  10 01 00 00 30 56 42 4B FF FF FF FF FF FF FF FF
    1,114,128  04 00 00 58 01 00 00 00 00 00 00 00 00 00 00 00

    marker of page 0x110 = 272, nothing in it expires; depth 4, prefix 0x5800 = 22,528, so this
    segment owns the directory entries 22,528..24,575; first build of the index, never rewritten

Bucket 8, the home bucket, at byte 65,536 x 17 + 4,096 x 8, and its first control byte::

    1,146,880  18 01 00 00 30 56 42 4B 80 56 1C D0 8B 01 00 00
    1,146,896  04 00 00 58 01 00 00 00 00 00 00 00 00 00 00 00
    1,146,912  16

    marker of page 0x118 = 280, earliest expiry 1,700,003,600,000; shape as in bucket 0, and the
    uppermost 4 bits of the prefix are those of the hash; the fingerprint, so slot 0 may be the
    key's

Slot 0 of this bucket, 256 bytes after the bucket's start::

    1,147,136  75 73 65 72 3A 31 00 00 00 00 00 00 00 00 00 00
    1,147,152  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
    1,147,168  80 56 1C D0 8B 01 00 00 00 00 16 00 0E 00 06 00

    key "user:1"; expires_at 1,700,003,600,000, record at byte 0x00160000 = 1,441,792, value of 14
    bytes, key of 6, zero

Extent map, entry 1,441,792 / 65,536 = 22, at byte 131,072 + 16 x 22::

      131,424  03 00 01 00 FF FF 01 00 00 00 00 00 00 00 00 00

    a slab of size class 0, blocks of 64 bytes; 1 live block, no free block, fresh block 1; neither
    a previous nor a next extent of the class with room

Record, 32 + 6 + 14 = 52 bytes::

    1,441,792  FF FE 4B 52 0E 00 06 00 00 00 00 68 E5 CF 8B 01
    1,441,808  80 56 1C D0 8B 01 00 00 4B 41 B5 BD 9D 65 B7 05
    1,441,824  75 73 65 72 3A 31 7B 22 6E 61 6D 65 22 3A 22 41
    1,441,840  64 61 22 7D

    magic, value of 14 bytes, key of 6, generation 0, stamp 1,700,000,000,000 << 16; expires_at
    1,700,003,600,000, checksum 0x05B7659DBDB5414B; the key "user:1"; the value {"name":"Ada"}

The seed of the record's checksum, modulo 2**64::

    key_hash ^ stamp ^ (expires_at << 16) ^ offset
        = 0xB3749DA551FA0168 ^ 0x018BCFE568000000 ^ 0x018BD01C56800000 ^ 0x0000000000160000
        = 0xB374825C6F6C0168
"""

from itertools import pairwise
from struct import Struct
from typing import Final

from xxhash import xxh3_64_intdigest

# --- sizes -------------------------------------------------------------------------------------

EXTENT_SIZE: Final = 65_536
EXTENT_SHIFT: Final = 16
MAX_FILE_SIZE: Final = 1_000_000_000
MAX_EXTENTS: Final = MAX_FILE_SIZE // EXTENT_SIZE  # 15,258
MIN_MAX_BYTES: Final = 4 * 1024 * 1024
NO_EXTENT: Final = 0

MAX_KEY_CHARACTERS: Final = 32
MAX_KEY_SIZE: Final = 4 * MAX_KEY_CHARACTERS
MIN_VALUE_SIZE: Final = 2
MAX_VALUE_SIZE: Final = 16_384

NEVER: Final = 0  # an `expires_at`
TIME_LIMIT: Final = 2**48
NO_EXPIRY: Final = 2**64 - 1  # an "earliest expiry"

# --- superblock --------------------------------------------------------------------------------

IDENTITY: Final = Struct("<8sII16sQQQ")
IDENTITY_OFFSETS: Final = (0, 4096)
IDENTITY_FIELDS: Final = (
    "magic", "version", "extent_size", "file_id", "hash_seed", "created_at", "checksum",
)  # fmt: skip
FILE_MAGIC: Final = b"\x89KVS\r\n\x1a\n"
FORMAT_VERSION: Final = 2

STATE: Final = Struct("<IIIIQQQ")
STATE_OFFSET: Final = 512
STATE_FIELDS: Final = (
    "clean", "extent_count", "durable_count", "records", "index_checksum", "stamp", "checksum",
)  # fmt: skip

HOLDER: Final = Struct("<I")
HOLDER_OFFSET: Final = 1024

ALLOCATOR_OFFSET: Final = 1536
ALLOCATOR_SIZE: Final = 8 + 2 * 64
FREE_EXTENTS_OFFSET: Final = ALLOCATOR_OFFSET
FRESH_EXTENT_OFFSET: Final = ALLOCATOR_OFFSET + 2
REBUILDS_OFFSET: Final = ALLOCATOR_OFFSET + 4
CLASS_HEADS_OFFSET: Final = ALLOCATOR_OFFSET + 8
U16: Final = Struct("<H")
U64: Final = Struct("<Q")

# --- directory and extent map ------------------------------------------------------------------

DIRECTORY_OFFSET: Final = EXTENT_SIZE
DIRECTORY_BITS: Final = 15
DIRECTORY_ENTRIES: Final = 1 << DIRECTORY_BITS
DIRECTORY_SIZE: Final = 2 * DIRECTORY_ENTRIES
MIN_DEPTH: Final = 4
MAX_DEPTH: Final = DIRECTORY_BITS

EXTENT_MAP_OFFSET: Final = 2 * EXTENT_SIZE
EXTENT_MAP_ENTRIES: Final = 16_384
MAP_ENTRY_SHIFT: Final = 4  # an entry has 16 bytes
EXTENT_MAP_SIZE: Final = EXTENT_MAP_ENTRIES << MAP_ENTRY_SHIFT
FIXED_EXTENTS: Final = 6
FIRST_FILE_SIZE: Final = 2 * 1024 * 1024

KIND_FREE, KIND_FIXED, KIND_SEGMENT, KIND_SLAB = 0, 1, 2, 3  # on disk: add, never renumber
SLAB_ENTRY: Final = Struct("<BBHHHHHHH")
SLAB_ENTRY_FIELDS: Final = (
    "kind", "size_class", "live", "first_free", "fresh", "previous", "next", "retired", "zero",
)  # fmt: skip
SEGMENT_ENTRY: Final = Struct("<BBHHHQ")
SEGMENT_EARLIEST_OFFSET: Final = 8  # in the entry
SEGMENT_ENTRY_FIELDS: Final = ("kind", "zero", "live", "used", "zero", "earliest_expiry")
SLAB_PREVIOUS_OFFSET: Final = 8  # in the entry
SLAB_NEXT_OFFSET: Final = 10  # in the entry
SLAB_RETIRED_OFFSET: Final = 12  # in the entry
NO_BLOCK: Final = 0xFFFF

# An entry's first eight bytes as one word, for code that changes it in one step.
ENTRY_KIND_MASK: Final = 0xFF
ENTRY_CLASS_SHIFT: Final = 8  # slab
ENTRY_LIVE_SHIFT: Final = 16
ENTRY_LIVE_ONE: Final = 1 << ENTRY_LIVE_SHIFT
ENTRY_USED_SHIFT: Final = 32  # segment
ENTRY_USED_ONE: Final = 1 << ENTRY_USED_SHIFT
ENTRY_FIRST_FREE_SHIFT: Final = 32  # slab
ENTRY_FRESH_SHIFT: Final = 48  # slab
ENTRY_FRESH_ONE: Final = 1 << ENTRY_FRESH_SHIFT

# --- segment -----------------------------------------------------------------------------------

BUCKET_COUNT: Final = 16
BUCKET_SIZE: Final = 4096
BUCKET_SHIFT: Final = 12
BUCKET_HEADER_SIZE: Final = 256
BUCKET_HEADER: Final = Struct("<QQBxHHH8x80s")
BUCKET_HEADER_FIELDS: Final = (
    "marker", "earliest_expiry", "depth", "prefix", "rebuilds", "rewrites", "control",
)  # fmt: skip
BUCKET_WORDS: Final = Struct("<QQQ8x80s")  # the same, with the shape as one word
BUCKET_MARKER: Final = 0x4B425630 << 32
EARLIEST_OFFSET: Final = 8  # in the bucket
SHAPE_OFFSET: Final = 16  # in the bucket
SHAPE_DEPTH_MASK: Final = 0xFFFF  # with the zero after it
SHAPE_PREFIX_SHIFT: Final = 16
SHAPE_REBUILDS_SHIFT: Final = 32
SHAPE_REWRITES_SHIFT: Final = 48
CONTROL_OFFSET: Final = 32  # in the bucket
SLOT_COUNT: Final = 80
SEGMENT_SLOTS: Final = BUCKET_COUNT * SLOT_COUNT
SPLIT_AT: Final = SEGMENT_SLOTS * 7 // 8

CONTROL_EMPTY, CONTROL_TOMBSTONE = 0, 1  # on disk: add, never renumber
EMPTY_BYTE: Final = bytes([CONTROL_EMPTY])
TOMBSTONE_BYTE: Final = bytes([CONTROL_TOMBSTONE])
# The control byte of a live slot, by the low byte of `key_hash >> FINGERPRINT_SHIFT`.
FINGERPRINT_CODES: Final = bytes(byte if byte > 1 else byte + 2 for byte in range(256))
FINGERPRINTS: Final = tuple(bytes([code]) for code in FINGERPRINT_CODES)

SLOT: Final = Struct("<32sQIHBx")
SLOT_FIELDS: Final = ("key", "expires_at", "record", "value_size", "key_size")
SLOT_SIZE: Final = 48
SLOT_WHOLE: Final = Struct("48s")  # for going through the slots of a bucket, as is the next
SLOT_EXPIRY: Final = Struct("<32xQ8x")
SLOT_KEY_SIZE: Final = 32
SLOT_EXPIRES_OFFSET: Final = 32  # in the slot
SLOT_RECORD_OFFSET: Final = 40  # in the slot
SLOT_KEY_SIZE_OFFSET: Final = 46  # in the slot
# SLOT with its last eight bytes as one word, and from expires_at on.
SLOT_WORDS: Final = Struct("<32sQQ")
SLOT_ENDING: Final = Struct("<QQ")
SLOT_RECORD_MASK: Final = 0xFFFF_FFE0
SLOT_OLDER: Final = 1  # in the slot's last word: there may be older records on the disk
SLOT_OLDER_UNDATED: Final = 2  # likewise, whatever the stamp
SLOT_FLAGS: Final = SLOT_OLDER | SLOT_OLDER_UNDATED
SLOT_VALUE_SIZE_SHIFT: Final = 32
SLOT_KEY_SIZE_SHIFT: Final = 48

DIRECTORY_SHIFT: Final = 64 - DIRECTORY_BITS
STRIPE_SHIFT: Final = 60
STRIPE_COUNT: Final = 16
FINGERPRINT_SHIFT: Final = 4

# --- slab --------------------------------------------------------------------------------------

BLOCK_SHIFT: Final = 5
BLOCK_ALIGNMENT: Final = 1 << BLOCK_SHIFT
RECORD: Final = Struct("<IHBBQQQ")
RECORD_FIELDS: Final = (
    "magic", "value_size", "key_size", "generation", "stamp", "expires_at", "checksum",
)  # fmt: skip
RECORD_HEADER_SIZE: Final = 32
RECORD_KEY_SIZE_OFFSET: Final = 6  # in the record
RECORD_STAMP_OFFSET: Final = 8  # in the record
RECORD_EXPIRES_OFFSET: Final = 16  # in the record
RECORD_CHECKSUM_OFFSET: Final = 24  # in the record
RECORD_MAGIC: Final = 0x524B_FEFF
RECORD_MAGIC_BYTES: Final = b"\xff\xfeKR"
RECORD_MAGIC_SIZE: Final = len(RECORD_MAGIC_BYTES)
MARKED_MAGIC: Final = 0x444B_FEFF
MARKED_MAGIC_BYTES: Final = b"\xff\xfeKD"
GENERATION_SHIFT: Final = 56  # in the record's first word
MOST_GENERATIONS: Final = 255
STAMP_SHIFT: Final = 16  # a stamp is milliseconds << this, or a little later
STAMP_LIMIT: Final = 2**64 - 2**48
EXPIRY_SEED_SHIFT: Final = 16  # of expires_at in the seed of the checksum
MAX_RECORD_SIZE: Final = RECORD_HEADER_SIZE + MAX_KEY_SIZE + MAX_VALUE_SIZE
# The header as four words. In the first, the sizes are where a slot's last word has them.
RECORD_WORDS: Final = Struct("<4Q")

FREE_BLOCK: Final = Struct("<IHH")
FREE_BLOCK_FIELDS: Final = ("magic", "next", "zero")
FREE_MAGIC: Final = 0x464B_FEFF
FREE_NEXT_SHIFT: Final = 32  # in the block as one word

BLOCK_SIZES: Final[tuple[int, ...]] = (
    *range(64, 513, 32),
    *(base + base // 8 * step for base in (512, 1024, 2048, 4096, 8192) for step in range(1, 9)),
    MAX_RECORD_SIZE,
)
BLOCKS_PER_EXTENT: Final = tuple(EXTENT_SIZE // size for size in BLOCK_SIZES)
# The size class of a record, by its size in steps of 32 bytes, rounded up.
SIZE_CLASSES: Final = bytes(
    size_class
    for size_class, (below, size) in enumerate(pairwise((-32, *BLOCK_SIZES)))
    for _ in range(below, size, 32)
)

# --- a found record ----------------------------------------------------------------------------

# Not in the file: how recovery keeps a record in one word; see `found_words`.
FOUND_PLACE_BITS: Final = 25  # 1 << 25 steps of 32 bytes are 1 GiB
FOUND_HOME_BITS: Final = FINGERPRINT_SHIFT + 8
FOUND_UPPER_SHIFT: Final = FOUND_HOME_BITS + FOUND_PLACE_BITS
FOUND_OFFSET_SHIFT: Final = FOUND_HOME_BITS - (BLOCK_ALIGNMENT.bit_length() - 1)
FOUND_OFFSET_MASK: Final = (1 << FOUND_PLACE_BITS) * BLOCK_ALIGNMENT - BLOCK_ALIGNMENT
FOUND_HASH_MASK: Final = 2**64 - 1 ^ FOUND_OFFSET_MASK << FOUND_OFFSET_SHIFT


# --- what a store keeps of versions ------------------------------------------------------------

# Not in the file: places in an array of 64-bit words; see `kvstore.index.versions`.
LAST_STAMPS: Final = 0
PROMISED_STAMPS: Final = STRIPE_COUNT
SETTLED_STAMPS: Final = 2 * STRIPE_COUNT
GENERATION_WORD: Final = 3 * STRIPE_COUNT
RETIRED_SIZE_WORD: Final = GENERATION_WORD + 1
MARKS_WORD: Final = GENERATION_WORD + 2
ALWAYS_PROMISED_WORD: Final = GENERATION_WORD + 3
RELEASED_WORD: Final = GENERATION_WORD + 4
UNDONE_WORD: Final = GENERATION_WORD + 5
VERSION_WORDS: Final = GENERATION_WORD + 6
LEAST_RECLAIMED: Final = 4 * 1024 * 1024  # bytes


def key_hash(key: bytes, hash_seed: int) -> int:
    """Return the 64-bit hash that places `key` (UTF-8) in a file with that seed."""
    return xxh3_64_intdigest(key, hash_seed)


def record_checksum(value: bytes, key_hash: int, stamp: int, expires_at: int, offset: int) -> int:
    """Return the checksum that a record of these contents carries at file offset `offset`."""
    # xxhash takes the seed modulo 2**64.
    return xxh3_64_intdigest(value, key_hash ^ stamp ^ expires_at << EXPIRY_SEED_SHIFT ^ offset)


def segment_run(depth: int) -> int:
    """Return how many directory entries a segment of this depth owns."""
    return 1 << (DIRECTORY_BITS - depth)


def map_entry_offset(extent: int) -> int:
    """Return the file offset of the extent map's entry for `extent`."""
    return EXTENT_MAP_OFFSET + (extent << MAP_ENTRY_SHIFT)


def class_head_offset(size_class: int) -> int:
    """Return the file offset of the head of the list of extents of a class with room."""
    return CLASS_HEADS_OFFSET + 2 * size_class


def bucket_marker(bucket: int) -> int:
    """Return the marker of the bucket that begins at file offset `bucket`."""
    return BUCKET_MARKER | bucket >> BUCKET_SHIFT


def bucket_shape(depth: int, prefix: int, rebuilds: int, rewrites: int) -> int:
    """Return the word that all buckets of such a segment have in their headers."""
    return (
        depth
        | prefix << SHAPE_PREFIX_SHIFT
        | (rebuilds & 0xFFFF) << SHAPE_REBUILDS_SHIFT
        | (rewrites & 0xFFFF) << SHAPE_REWRITES_SHIFT
    )


def slot_offset(bucket: int, index: int) -> int:
    """Return the file offset of slot `index` in the bucket that begins at file offset `bucket`."""
    return bucket + BUCKET_HEADER_SIZE + index * SLOT_SIZE
