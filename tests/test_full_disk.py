"""A full disk is an error and never the end of the process, on each of four file systems."""

import json
import signal
import sys
from pathlib import Path

import pytest
from support import MIB, disks
from support.processes import Child, call_in_child
from support.whole import assert_whole
from support.workload import make_value

from kvstore import KVStore

KINDS = tuple(disks.SIZES)
# What a full disk may make of opening a file; "recovered" and "worked" are as good as each other.
OUTCOMES = ("recovered", "worked", "refused")
on_each_file_system = pytest.mark.parametrize("kind", KINDS)
only_with_limits = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE as on Linux")


def make_store(path: Path, notes: Path, records: int) -> None:
    """Make a closed store, and a file that tells what is in it."""
    live = {}
    with KVStore(path) as store:
        for number in range(records):
            key = f"early {number}"
            live[key] = make_value(key, number, (12_000, 3_000, 700, 100, 10)[number % 5])
            store.create(key, live[key])
    notes.write_text(json.dumps(live))


@pytest.mark.parametrize(
    ("kind", "durable", "copied"),
    [
        ("tmpfs", False, False),
        ("ext4", False, False),
        ("ext4", True, False),
        ("btrfs", False, False),
        ("btrfs", False, True),
        ("btrfs", True, True),
        ("xfs", False, False),
        ("xfs", True, True),
    ],
)
def test_full_disk_is_store_full_and_all_else_works_on(
    tmp_path: Path, kind: str, durable: bool, copied: bool
) -> None:
    """Someone else fills the disk while the store is open. It reads, deletes, closes, opens.

    A file that the store did not make itself, but another program copied, has none of the
    attributes that the store may have given it.
    """
    with disks.mounted(kind, tmp_path) as disk:
        done = call_in_child(
            "support.filling.work_on_full_disk",
            path=str(disk / "data.kvs"),
            copy_on_write=copied and kind in disks.COPY_ON_WRITE,
            durable=durable,
            copied=copied,
        )
    assert done["created"] > 0 or copied


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_store_that_fills_the_disk_by_itself_loses_nothing(tmp_path: Path, kind: str) -> None:
    with disks.mounted(kind, tmp_path) as disk:
        created = call_in_child("support.filling.fill_by_itself", path=str(disk / "data.kvs"))
    assert created * 12_000 > disks.SIZES[kind] / 2


@on_each_file_system
def test_process_that_was_killed_on_a_full_disk_lost_nothing(tmp_path: Path, kind: str) -> None:
    """The file is recovered on the disk that is still full."""
    with disks.mounted(kind, tmp_path) as disk:
        arguments = {
            "path": str(disk / "data.kvs"),
            "notes": str(tmp_path / "notes"),
            "copy_on_write": False,
        }
        script = """
            import json
            from support.filling import die_on_full_disk
            die_on_full_disk(**json.loads(sys.argv[1]))
        """
        with Child(script, json.dumps(arguments)) as child:
            assert child.wait() == -signal.SIGKILL, child.errors()
        outcome = call_in_child("support.filling.recover_on_full_disk", **arguments)
    assert outcome in OUTCOMES


@on_each_file_system
def test_new_file_on_a_full_disk_is_store_full(tmp_path: Path, kind: str) -> None:
    with disks.mounted(kind, tmp_path) as disk:
        call_in_child("support.filling.create_on_full_disk", path=str(disk / "data.kvs"))


@on_each_file_system
@pytest.mark.parametrize("leave", [0, 100_000, MIB])
def test_file_restored_with_holes_onto_a_full_disk_is_refused_or_works(
    tmp_path: Path, kind: str, leave: int
) -> None:
    """A store through the map into a hole that the disk cannot fill would be a SIGBUS."""
    notes, path = tmp_path / "notes", tmp_path / "data.kvs"
    make_store(path, notes, 100)
    with disks.mounted(kind, tmp_path) as disk:
        disks.copy_with_holes(path, disk / "data.kvs")
        disks.fill(disk, leave)
        outcome = call_in_child(
            "support.filling.open_on_full_disk", path=str(disk / "data.kvs"), expected=str(notes)
        )
    assert outcome in OUTCOMES


@pytest.mark.parametrize("kind", disks.SHARING)
def test_file_that_shares_its_blocks_with_a_copy_is_refused_or_works_on_a_full_disk(
    tmp_path: Path, kind: str
) -> None:
    """To overwrite a shared block takes room for another one."""
    notes = tmp_path / "notes"
    with disks.mounted(kind, tmp_path) as disk:
        path = disk / "data.kvs"
        make_store(path, notes, 500)
        disks.share_blocks(path, disk / "copy.kvs")
        disks.fill(disk)
        outcome = call_in_child(
            "support.filling.open_on_full_disk", path=str(path), expected=str(notes)
        )
    assert outcome in OUTCOMES


@pytest.mark.parametrize("kind", disks.SHARING)
def test_copy_that_shares_the_blocks_of_the_open_file_does_not_kill_the_process(
    tmp_path: Path, kind: str
) -> None:
    with disks.mounted(kind, tmp_path) as disk:
        call_in_child(
            "support.filling.share_while_open",
            path=str(disk / "data.kvs"),
            copy=str(disk / "copy.kvs"),
        )


@only_with_limits
def test_limit_on_the_size_of_files_acts_as_max_bytes(path: Path) -> None:
    limit = 8 * MIB
    done = call_in_child("support.filling.fill_under_file_size_limit", path=str(path), limit=limit)
    assert done["created"] > 0
    assert limit - MIB < done["size"] <= limit
    assert_whole(path)


@only_with_limits
def test_limit_on_the_size_of_files_that_is_lowered_while_the_file_is_open(path: Path) -> None:
    call_in_child("support.filling.fill_after_limit_was_lowered", path=str(path))


@only_with_limits
def test_file_larger_than_the_limit_opens_and_does_not_grow(path: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    make_store(path, notes, 1_500)
    call_in_child(
        "support.filling.read_beyond_file_size_limit",
        path=str(path),
        limit=3 * MIB,
        expected=str(notes),
    )


@only_with_limits
def test_limit_too_small_for_any_store_is_refused_as_an_error(path: Path) -> None:
    script = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        for _ in range(2):
            try:
                KVStore(sys.argv[1])
            except (StoreFullError, OSError) as error:
                say(str(sys.argv[1]) in str(error), error)
    """
    with Child(script, path) as child:
        said = child.end().splitlines()
    assert [line.split()[0] for line in said] == ["True", "True"], said
    KVStore(path).close()
    assert_whole(path)
