"""SIGKILL at any moment: what was acknowledged stands, what was under way stands or does not."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import scaled, seeded_random
from support.disks import quick_folder
from support.processes import call_in_child
from support.whole import assert_whole
from support.workload import make_value

from kvstore import KVStore

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not hasattr(signal, "SIGKILL"), reason="needs fork and SIGKILL"
)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as folder:
        yield folder / "test.kvs"


def new_seed() -> int:
    return seeded_random().getrandbits(32)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("durable", [False, True], ids=["buffered", "durable"])
def test_operations_acknowledged_before_the_kill_stand(
    path: Path, threads: int, durable: bool
) -> None:
    acknowledged = call_in_child(
        "support.killing.kill_during_operations",
        path=str(path),
        seed=new_seed(),
        rounds=scaled(12 if durable else 25),
        threads=threads,
        durable=durable,
        most_operations=200 if durable else 2_000,
    )
    assert acknowledged > 0


def test_operations_acknowledged_before_a_kill_amid_rewrites_of_segments_stand(
    path: Path,
) -> None:
    """The file begins where its 16 first segments are about to be split, one after the other."""
    with KVStore(path) as store:
        for number in range(1, 85_000, 5):
            store.create(f"0:{number}", make_value(f"0:{number}", number, 20))
    assert call_in_child(
        "support.killing.kill_during_operations",
        path=str(path),
        seed=new_seed(),
        rounds=scaled(4),
        threads=1,
        most_operations=4_000,
        population=85_000,
        grow=0.95,
        largest=40,
    )


def test_operations_acknowledged_before_a_kill_amid_growth_stand(path: Path) -> None:
    assert call_in_child(
        "support.killing.kill_during_operations",
        path=str(path),
        seed=new_seed(),
        rounds=scaled(10),
        threads=3,
        most_operations=1_000,
        population=5_000,
        grow=0.9,
    )


def test_kill_during_creation_leaves_no_file_or_a_store(path: Path) -> None:
    call_in_child(
        "support.killing.kill_during_creation", path=str(path), seed=new_seed(), rounds=scaled(25)
    )


def test_kill_during_recovery_harms_nothing(path: Path) -> None:
    call_in_child(
        "support.killing.kill_during_recovery", path=str(path), seed=new_seed(), rounds=scaled(25)
    )


def test_kill_during_close_harms_nothing(path: Path) -> None:
    call_in_child(
        "support.killing.kill_during_close", path=str(path), seed=new_seed(), rounds=scaled(25)
    )


def test_kill_at_every_flush_of_a_life_harms_nothing(path: Path) -> None:
    assert (
        call_in_child("support.killing.kill_at_every_flush", path=str(path), seed=new_seed()) >= 3
    )
    assert_whole(path)
