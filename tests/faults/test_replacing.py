"""What was replaced, deleted or purged stays so, whatever part of the changes a disk has taken.

Each test works with one store, and looks at what power loss at any moment after that may leave: by
sector and by page, and again where power is lost while that is being recovered.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import scaled, seeded_random
from support.disks import quick_folder
from support.images import PAGE, SECTOR, write_image
from support.platforms import needs_linux
from support.stores import after_death
from support.workload import Value

from faults.hot_keys import count_retired
from faults.power import MAX_BYTES, Clock, Disk, Outage, recording
from kvstore import KVStore

pytestmark = needs_linux

KEY = "the key"
# Their first 32 bytes are the same.
LONG_KEYS = [f"{'é' * 16}{number}" for number in range(5)]
OLD, NEW, NEWER = {"value": "old"}, {"value": "new", "x": "x" * 3_000}, {"value": "newer"}

Seen = dict[str, Value]


class Scene:
    """A store whose disk is recorded, and what may be left of it."""

    def __init__(self, folder: Path, *, in_place: bool) -> None:
        self.disk = Disk(b"", {})
        self.clock = Clock()
        self.in_place = in_place
        self._folder = folder
        self._rng = seeded_random()

    @contextmanager
    def store(self, *, durable: bool) -> Iterator[KVStore]:
        """Open the store, and have it die in the end, its files unflushed."""
        path = write_image(self._folder / "scene.kvs", b"")
        with recording(self.disk, self.clock, in_place=self.in_place):
            store = KVStore(path, max_bytes=MAX_BYTES, durable=durable)
            store.create("another", {})
            yield store
        self.disk.is_told = False
        store.close()

    def moment(self) -> tuple[int, int]:
        """Return the epoch, and how many changes were made in it by now."""
        return len(self.disk.epochs) - 1, len(self.disk.epochs[-1].changes)

    def assert_after_power_loss(
        self, since: tuple[int, int], is_right: Callable[[Seen], bool], *, later: int = 0
    ) -> None:
        """Assert what any image of a moment since then holds, in a recovery `later` seconds on.

        And what is left where power is lost in that, recovered with the clock as it was.
        """
        start_ns = self.clock.now_ns
        for image in self._images(self.disk, since, scaled(8)):
            recovery = Disk(image, {})
            found = self._recover(recovery, start_ns + later * 10**9)
            assert is_right(found), f"found {found}"
            for number, left in enumerate(self._images(recovery, (0, 0), 2)):
                found = self._recover(Disk(left, {}), start_ns + number % 2 * later * 10**9)
                assert is_right(found), f"found {found} after power loss in recovery"
        self.clock.now_ns = start_ns

    def _images(self, disk: Disk, since: tuple[int, int], count: int) -> Iterator[bytes]:
        rng = self._rng
        outages: dict[tuple[int, int], Outage] = {}
        for _ in range(count):
            epoch, unit = rng.randrange(since[0], len(disk.epochs)), rng.choice((SECTOR, PAGE))
            if (epoch, unit) not in outages:
                outages[epoch, unit] = Outage(disk.epochs[epoch], unit)
            first = since[1] if epoch == since[0] else 0
            moment = rng.randint(first, len(disk.epochs[epoch].changes))
            yield outages[epoch, unit].image(moment, rng, 0.1)

    def _recover(self, disk: Disk, now_ns: int) -> Seen:
        """Open the file that a disk has; return what is in it."""
        path = write_image(self._folder / "image.kvs", bytes(disk.contents))
        self.clock.now_ns = now_ns
        with (
            recording(disk, self.clock, in_place=self.in_place),
            KVStore(path, max_bytes=4 * MAX_BYTES) as store,
        ):
            return dict(store.items())


@pytest.fixture(params=[True, False], ids=["through the map", "by pwrite"])
def scene(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    with quick_folder(tmp_path) as folder:
        yield Scene(folder, in_place=request.param)


def test_a_durable_delete_after_a_durable_put_does_not_bring_the_old_value_back(
    scene: Scene,
) -> None:
    with scene.store(durable=True) as store:
        store.create(KEY, OLD)
        store.put(KEY, NEW)
        was_put = scene.moment()
        store.delete(KEY)
        was_deleted = scene.moment()
        store.put("another", NEWER)
        store.create("yet another", NEW)
        store.purge_expired()
        store.sync()
    scene.assert_after_power_loss(was_put, lambda found: found.get(KEY) in (None, NEW))
    scene.assert_after_power_loss(was_deleted, lambda found: KEY not in found)


def test_a_synced_delete_does_not_bring_back_what_was_replaced_before_it(scene: Scene) -> None:
    with scene.store(durable=False) as store:
        store.create(KEY, OLD)
        store.sync()
        store.put(KEY, NEW)
        store.put(KEY, NEWER)
        store.delete(KEY)
        store.sync()
        was_synced = scene.moment()
        store._parts.reclaimer.reclaim()
        store.create("yet another", NEW)
    scene.assert_after_power_loss(was_synced, lambda found: KEY not in found)


def test_a_value_that_was_synced_is_there_or_a_later_one(scene: Scene) -> None:
    with scene.store(durable=False) as store:
        store.create(KEY, OLD)
        store.sync()
        was_synced = scene.moment()
        for value in (NEW, NEWER, NEW):
            store.put(KEY, value)
            store._parts.reclaimer.reclaim()
            store.put(KEY, NEWER)
    scene.assert_after_power_loss(was_synced, lambda found: found[KEY] in (OLD, NEW, NEWER))


def test_an_expired_replacement_does_not_bring_back_what_it_replaced(scene: Scene) -> None:
    with scene.store(durable=False) as store:
        store.create(KEY, OLD)
        store.sync()
        store.put(KEY, NEW, ttl=1_000)
        store.sync()
        was_synced = scene.moment()
        store.create("yet another", NEW)
    scene.assert_after_power_loss(
        was_synced, lambda found: found.get(KEY) in (None, NEW), later=2_000
    )


@pytest.mark.parametrize("durable", [False, True])
def test_a_purge_a_clock_set_back_and_a_delete_do_not_bring_back_what_was_purged(
    scene: Scene, durable: bool
) -> None:
    with scene.store(durable=durable) as store:
        store.create(KEY, OLD, ttl=1_000)
        store.put(KEY, NEW, ttl=1_000)
        store.sync()
        scene.clock.jump(2_000)
        assert store.purge_expired() == 1
        scene.clock.jump(-1_900)
        store.create(KEY, NEWER)
        store.delete(KEY)
        if not durable:
            store.sync()
        was_deleted = scene.moment()
        store.create("yet another", NEW)
        store._parts.reclaimer.reclaim()
    scene.assert_after_power_loss(was_deleted, lambda found: KEY not in found)


@pytest.mark.parametrize("durable", [False, True])
def test_keys_that_share_their_first_32_bytes_have_their_own_older_records(
    scene: Scene, durable: bool
) -> None:
    with scene.store(durable=durable) as store:
        for key in LONG_KEYS:
            store.create(key, OLD)
        store.sync()
        for number, key in enumerate(LONG_KEYS):
            store.put(key, {**NEW, "of": key})
            if number % 2:
                store.delete(key)
        store.sync()
        was_synced = scene.moment()
        store.create("yet another", NEW)
        store._parts.reclaimer.reclaim()
    expected = {key: {**NEW, "of": key} for key in LONG_KEYS[::2]}

    def is_right(found: Seen) -> bool:
        return {key: found[key] for key in LONG_KEYS if key in found} == expected

    scene.assert_after_power_loss(was_synced, is_right)


def test_a_hot_key_holds_one_retired_record_however_often_it_is_written(store: KVStore) -> None:
    store.create(KEY, OLD)
    store.sync()
    store.put(KEY, NEW)
    before = store.stats()
    for number in range(scaled(20_000)):
        store.put(KEY, {"number": number, "x": NEW["x"]})
    assert count_retired(store) == 1
    assert store.stats() == before
    assert after_death(store)[KEY]["number"] == scaled(20_000) - 1
