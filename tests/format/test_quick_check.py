"""An index that contradicts itself under a right checksum is not used, but built anew."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.consistency import assert_consistent
from support.corruptions import Corruption
from support.damage import build
from support.disks import quick_folder
from support.workload import make_value

from kvstore import KVStore
from kvstore.format.layout import (
    DIRECTORY_OFFSET,
    EXTENT_SIZE,
    FREE_EXTENTS_OFFSET,
    FRESH_EXTENT_OFFSET,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    SLAB_NEXT_OFFSET,
    class_head_offset,
    map_entry_offset,
)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as folder:
        yield folder / "test.kvs"


def first(plant: Corruption, kind: int) -> int:
    """Return the first extent of a kind."""
    return next(n for n in range(6, plant.extent_count) if plant.slab_entry(n)["kind"] == kind)


def slab_with_room(plant: Corruption) -> int:
    """Return an extent that a list of those with room begins with."""
    return next(filter(None, (plant.u16(class_head_offset(n)) for n in range(55))))


def change_slab(**fields: int) -> Callable[[Corruption], None]:
    return lambda plant: plant.change_slab(slab_with_room(plant), **fields)


def change_segment(**counts: int) -> Callable[[Corruption], None]:
    return lambda plant: plant.change_segment(first(plant, KIND_SEGMENT), **counts)


def put(offset: int, number: int) -> Callable[[Corruption], None]:
    return lambda plant: plant.put_u16(offset, number)


def circle(plant: Corruption) -> None:
    extent = slab_with_room(plant)
    plant.change_slab(extent, previous=extent, next=extent)


def circle_of_free_extents(plant: Corruption) -> None:
    extent = plant.u16(FREE_EXTENTS_OFFSET)
    plant.put_u16(map_entry_offset(extent) + SLAB_NEXT_OFFSET, extent)


def forget_a_free_extent(plant: Corruption) -> None:
    extent = plant.u16(FREE_EXTENTS_OFFSET)
    plant.put_u16(FREE_EXTENTS_OFFSET, plant.slab_entry(extent)["next"])


def one_segment_in_two_places(plant: Corruption) -> None:
    plant.put_u16(DIRECTORY_OFFSET + 2 * 100, plant.u16(DIRECTORY_OFFSET + 2 * 5_000))


def uneven_run(plant: Corruption) -> None:
    plant.put_u16(DIRECTORY_OFFSET + 2 * 2_047, plant.u16(DIRECTORY_OFFSET + 2 * 2_048))


FORGERIES: dict[str, Callable[[Corruption], None]] = {
    "fresh extent 0": put(FRESH_EXTENT_OFFSET, 0),
    "fresh extent in the directory": put(FRESH_EXTENT_OFFSET, 1),
    "fresh extent in use": put(FRESH_EXTENT_OFFSET, 10),
    "fresh extent far past the end": put(FRESH_EXTENT_OFFSET, 65_535),
    "free extents begin in the superblock's neighbour": put(FREE_EXTENTS_OFFSET, 1),
    "free extents begin past the end": put(FREE_EXTENTS_OFFSET, 40_000),
    "free extents in a circle": circle_of_free_extents,
    "a free extent on no list": forget_a_free_extent,
    "class head in the directory": put(class_head_offset(3), 1),
    "class head past the end": put(class_head_offset(3), 40_000),
    "class head at a segment": lambda plant: plant.put_u16(
        class_head_offset(3), first(plant, KIND_SEGMENT)
    ),
    "class head at another class": lambda plant: plant.put_u16(
        class_head_offset(54), slab_with_room(plant)
    ),
    "class list in a circle": circle,
    "class list with a wrong link back": change_slab(previous=7),
    "a class that there is not": change_slab(**{"class": 200}),
    "no live block": change_slab(live=0),
    "more live blocks than there are": change_slab(live=65_535),
    "fresh block past the extent's end": change_slab(fresh=65_535, live=1, first_free=0xFFFF),
    "free list past the fresh block": change_slab(first_free=65_534),
    "a retired block": change_slab(retired=1),
    "a kind that there is not": change_slab(kind=9),
    "a fixed extent where none is": change_slab(kind=1),
    "a slab said to be free": change_slab(kind=KIND_FREE),
    "a segment said to be a slab": lambda plant: plant.change_slab(
        first(plant, KIND_SEGMENT), kind=KIND_SLAB
    ),
    "superblock said to be free": lambda plant: plant.change_slab(0, kind=KIND_FREE),
    "fewer used slots than live ones": change_segment(live=1_000),
    "more used slots than there are": change_segment(used=5_000),
    "directory leads to the superblock": put(DIRECTORY_OFFSET + 2 * 100, 0),
    "directory leads past the end": put(DIRECTORY_OFFSET + 2 * 100, 65_535),
    "directory leads to a slab": lambda plant: plant.put_u16(
        DIRECTORY_OFFSET + 2 * 100, first(plant, KIND_SLAB)
    ),
    "directory leads to a segment twice": one_segment_in_two_places,
    "directory has an uneven run": uneven_run,
}


def make_plant(path: Path) -> tuple[Corruption, dict[str, dict[str, object]]]:
    """Make a closed store with something of everything; return its bytes and what it holds."""
    live = build(path, random.Random(5), 300)
    with KVStore(path) as store:
        for number in range(30):
            store.create(f"large {number}", make_value("large", number, 16_000))
        for number in range(12):
            store.delete(f"large {number}")
        live |= {key: store[key] for key in store if key.startswith("large")}
    plant = Corruption(path.read_bytes())
    assert plant.u16(FREE_EXTENTS_OFFSET)
    return plant, live


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_index_with_right_checksums_is_built_anew_from_the_records(
    path: Path, forgery: str
) -> None:
    plant, live = make_plant(path)
    FORGERIES[forgery](plant)
    path.write_bytes(plant.sign())
    with KVStore(path, max_bytes=8 << 20) as store:
        assert dict(store) == live
        for number in range(100):
            store.create(f"new {number}", make_value("new", number, 100 * number))
        assert live.items() <= dict(store).items()
    assert path.stat().st_size <= 8 << 20
    assert_consistent(path)


@pytest.mark.parametrize("count", [0, 1, 2, 6, 31])
@pytest.mark.parametrize("clean", [True, False])
def test_state_with_fewer_extents_than_any_file_has_is_damage_to_the_state_alone(
    path: Path, count: int, clean: bool
) -> None:
    """Believed, it would have the file cut off to that length."""
    plant, live = make_plant(path)
    path.write_bytes(plant.sign_state(clean=clean, count=count, durable=0))
    with KVStore(path) as store:
        assert dict(store) == live
    assert path.stat().st_size == plant.extent_count * EXTENT_SIZE
    assert_consistent(path)


def test_sound_index_is_used_as_it_is(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plant, live = make_plant(path)
    path.write_bytes(plant.sign())
    with KVStore(path) as store:
        assert dict(store) == live
    assert not caplog.records
    assert os.path.getsize(path) == len(plant.image)
