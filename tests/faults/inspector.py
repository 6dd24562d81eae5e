"""kvstore-inspect on damaged files: every command ends, tells the truth, and changes nothing.

The truth is known without the tool: where each record of the undamaged file is, and which of them
the damage left as they were.
"""

import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from support.damage import KINDS, Damage, Original, build
from support.inspecting import DONE, PROBLEMS, WRONG_USAGE, Result, inspect
from support.truth import Truth, live_places

from kvstore import KVStore
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    BUCKET_SIZE,
    DIRECTORY_OFFSET,
    DIRECTORY_SIZE,
    EXTENT_MAP_OFFSET,
    EXTENT_SIZE,
    HOLDER,
    HOLDER_OFFSET,
    IDENTITY,
    IDENTITY_OFFSETS,
    STATE,
    STATE_OFFSET,
)
from kvstore.recovery.check import check_file
from kvstore_inspect.command_line import group

from .laboratory import Experiment

Kind = Callable[[Original, random.Random], tuple[bytes, Damage]]


# --- more kinds of damage ----------------------------------------------------------------------


def garble_all_but_records(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Write zeros, ones, random bytes over anything but records and one copy of the identity."""
    damaged, damage = bytearray(original.contents), Damage()
    places = list(live_places(original.contents).values())
    spared = IDENTITY_OFFSETS[rng.randrange(2)]
    other = next(offset for offset in IDENTITY_OFFSETS if offset != spared)
    segments = sorted({bucket // EXTENT_SIZE * EXTENT_SIZE for bucket in original.buckets})
    targets = [
        (other, IDENTITY.size),
        (STATE_OFFSET, STATE.size),
        (HOLDER_OFFSET, HOLDER.size),
        (ALLOCATOR_OFFSET, ALLOCATOR_SIZE),
        (DIRECTORY_OFFSET, DIRECTORY_SIZE),
        (EXTENT_MAP_OFFSET, 16 * (len(original.contents) // EXTENT_SIZE)),
        *((segment, EXTENT_SIZE) for segment in segments),
        *((bucket, BUCKET_SIZE) for bucket in rng.sample(original.buckets, 4)),
        *gaps(places),
    ]
    for start, size in rng.sample(targets, rng.choice((1, 2, 4, len(targets)))):
        length = min(size, rng.choice((1, 8, 48, 512, 4096, size)))
        offset = start + rng.randrange(size - length + 1)
        garbage = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
        damaged[offset : offset + length] = garbage
        damage.add("garbage in", offset, offset + length)
    return bytes(damaged), damage


def gaps(places: list[slice]) -> list[tuple[int, int]]:
    """Return offset and size of what is between records: padding, and free blocks."""
    between = itertools.pairwise(places)
    return [(one.stop, two.start - one.stop) for one, two in between if two.start > one.stop]


def hit_the_superblock(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Hit the first page twice, or both identities, where the other kinds rarely do."""
    damaged, damage = bytearray(original.contents), Damage()
    for _ in range(rng.choice((1, 2, 4))):
        offset = rng.choice((0, 0, STATE_OFFSET, ALLOCATOR_OFFSET, 4096)) + rng.randrange(40)
        size = rng.choice((1, 1, 4, 16))
        damaged[offset : offset + size] = rng.randbytes(size)
        damage.add("bytes", offset, offset + size)
    return bytes(damaged), damage


ALL_KINDS: Final[dict[str, Kind]] = {
    **KINDS,
    "all_but_records": garble_all_but_records,
    "superblock": hit_the_superblock,
}


# --- running the commands -----------------------------------------------------------------------


class Trying:
    """A damaged file, and every command on it."""

    def __init__(self, truth: Truth, contents: bytes, folder: Path, rng: random.Random) -> None:
        self.truth = truth
        self.contents = contents
        self.rng = rng
        self.folder = folder
        self.path = folder / "damaged.kvs"
        self.other = folder / "other"
        self.whole = truth.whole(contents)
        self.path.write_bytes(contents)
        self.fine = not check_file(self.path) if contents else False

    def everything(self) -> None:
        for name in group.list_commands(None):  # type: ignore[arg-type]
            for old in self.folder.glob("other*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            try:
                COMMANDS[name](self)
                if name not in ("load", "repair", "compact"):
                    assert self.path.read_bytes() == self.contents, "the file was changed"
            except BaseException as error:
                error.add_note(f"command {name}")
                raise
            self.path.write_bytes(self.contents)

    def run(self, *arguments: str | Path) -> Result:
        ran = inspect(*arguments)
        assert ran.status in (DONE, PROBLEMS, WRONG_USAGE), ran
        if self.truth.has_identity(self.contents):
            assert ran.status != WRONG_USAGE, ran
        return ran

    # --- one command each

    def info(self) -> None:
        self.run("info", self.path)
        ran = self.run("info", "--json", self.path)
        if ran.out:
            ran.json()

    def keys(self) -> None:
        self.run("keys", "--unlocked", self.path)
        ran = self.run("keys", "--json", self.path)
        listed = [line["key"] for line in ran.lines()]
        assert len(listed) == len(set(listed)), "a key came twice"
        assert self.whole <= set(listed) <= self.truth.live.keys()
        if ran.status == 0:
            assert set(listed) == self.truth.live.keys(), "keys are missing, exit status 0"

    def get(self) -> None:
        for key in self.rng.sample(sorted(self.truth.live), 3):
            self.run("get", self.path, key)
            ran = self.run("get", "--json", self.path, key)
            if ran.status == 0:
                assert ran.json()["value"] == self.truth.live[key]

    def dump(self) -> None:
        ran = self.run("dump", self.path)
        dumped = {}
        for record in ran.lines():
            assert record["key"] not in dumped, f"{record['key']!r} came twice"
            dumped[record["key"]] = record["value"]
            assert self.truth.live[record["key"]] == record["value"]
        assert self.whole <= dumped.keys(), f"not dumped: {sorted(self.whole - dumped.keys())[:5]}"
        if ran.status == 0:
            assert dumped.keys() == self.truth.live.keys(), "records are missing, exit status 0"
        self.run("dump", "--format", "resp", self.path)

    def load(self) -> None:
        source = self.folder / "other.jsonl"
        source.write_text(inspect("dump", self.truth.path).out, "utf-8")
        ran = self.run("load", "--on-exists", "skip", self.path, source)
        if ran.status == 0:
            with KVStore(self.path) as store:
                assert dict(store) == self.truth.live

    def copy(self) -> None:
        ran = self.run("copy", self.path, self.other)
        if ran.status == 0:
            with KVStore(self.other) as store:
                assert dict(store) == self.truth.live, "an incomplete copy, exit status 0"
        if self.other.exists():
            assert not check_file(self.other)

    def compact(self) -> None:
        self.run("compact", self.path)
        self.dump()

    def diff(self) -> None:
        ran = self.run("diff", self.path, self.truth.path)
        if ran.status == 0:
            assert self.whole == self.truth.live.keys()

    def slots(self) -> None:
        key = self.rng.choice(sorted(self.truth.live))
        segment = self.rng.choice(Original(self.truth.contents).buckets) // EXTENT_SIZE
        self.run("slots", "--key", key, self.path)
        ran = inspect("slots", "--segment", segment, self.path)
        assert ran.status in (DONE, PROBLEMS, WRONG_USAGE)

    def verify(self) -> None:
        self.run("verify", "--all", self.path)
        ran = self.run("verify", "--json", *self.rng.choice(((), ("--all",))), self.path)
        assert (ran.status == 0) == self.fine, ran
        if self.rng.random() < 0.3:
            unlocked = self.run("verify", "--unlocked", self.path)
            assert (unlocked.status == 0) == self.fine, unlocked
        if ran.status < 2 and self.truth.has_identity(self.contents):
            found = ran.json()
            assert found["fine"] == self.fine
            assert found["counts"]["keys"] >= len(self.whole), found["counts"]
            if found["closed"]:
                lost = len(self.truth.live) - len(self.whole)
                assert found["counts"]["damaged"] >= 0
                if lost == 0 and found["index_trusted"]:
                    assert found["counts"]["damaged"] == 0, found["counts"]

    def repair(self) -> None:
        ran = self.run("repair", "--json", *self.rng.choice(((), ("--no-backup",))), self.path)
        if not self.truth.has_identity(self.contents):
            assert ran.status, ran
            assert self.path.read_bytes() == self.contents, "it was changed, and not repaired"
        else:
            self.check_repaired(ran.json(), ran.status)
        for backup in self.folder.glob("damaged.kvs.backup-*"):
            assert backup.read_bytes() == self.contents, "the copy of the old file is another"
            backup.unlink()

    def check_repaired(self, outcome: dict[str, object], status: int) -> None:
        problems = [str(problem) for problem in check_file(self.path)]
        assert not problems, problems[:5]
        assert outcome["changed"] == (self.path.read_bytes() != self.contents)
        with KVStore(self.path) as store:
            after = dict(store)
            assert all(store.ttl(key) for key in after if self.truth.live[key]["mark"] % 3 == 0)
        for key, value in after.items():
            assert self.truth.live[key] == value
        assert self.whole <= after.keys(), f"not kept: {sorted(self.whole - after.keys())[:5]}"
        assert outcome["kept"] == len(after)
        if status == 0:
            assert after.keys() == self.truth.live.keys(), "records were dropped, exit status 0"

    def report(self) -> None:
        if self.rng.random() < 0.2:  # it takes ten times as long as the others
            self.run("report", self.path, "-o", self.other)


COMMANDS: Final[dict[str, Callable[[Trying], None]]] = {
    "info": Trying.info,
    "keys": Trying.keys,
    "get": Trying.get,
    "dump": Trying.dump,
    "load": Trying.load,
    "copy": Trying.copy,
    "compact": Trying.compact,
    "diff": Trying.diff,
    "slots": Trying.slots,
    "verify": Trying.verify,
    "repair": Trying.repair,
    "report": Trying.report,
    "completion": lambda _: None,  # looks at no file
}


def inspect_damaged_files(folder: Path, rng: random.Random) -> int:
    """Damage a store in each way, once, and use each command on it; return how many."""
    path = folder / "whole.kvs"
    truth = Truth(path, build(path, rng, keys=120))
    original = Original(truth.contents)
    for kind, do_damage in ALL_KINDS.items():
        contents, damage = do_damage(original, rng)
        try:
            Trying(truth, contents, folder, rng).everything()
        except BaseException as error:
            error.add_note(f"{kind}: {'; '.join(damage.said)}"[:2_000])
            raise
    return len(ALL_KINDS)


EXPERIMENTS = (
    Experiment(
        "inspector", "any of them, seen with kvstore-inspect", "files", inspect_damaged_files
    ),
)
