"""What the recipes promise: for threads, for clocks, and for a process or a machine that dies."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from support.clock import FakeClock
from support.inspecting import flip, killed_copy
from support.pages import names_of
from support.processes import PATIENCE_SECONDS

from kvstore import KVStore, StoreFullError

MANY: Final = 8  # threads


@pytest.fixture
def recipe() -> Callable[[str], Any]:
    """A function that runs a recipe and returns its names."""
    return lambda heading: names_of("RECIPES", heading)


def in_threads(function: Callable[[int], Any], count: int = MANY) -> list[Any]:
    """Call it in so many threads that start together; return what it returned in each."""
    start = threading.Barrier(count)

    def run(number: int) -> Any:
        start.wait()
        return function(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def full(*_: object) -> None:
    """Stand for what stores something, where there is no room."""
    raise StoreFullError("full")


# --- sessions ----------------------------------------------------------------------------------


def test_a_session_lives_on_with_every_request_and_ends_on_the_second(
    recipe: Callable[[str], Any], store: KVStore, clock: FakeClock
) -> None:
    sessions = recipe("Sessions").Sessions(store, lifetime=60)
    session_id = sessions.start({"user": "ada"})
    for _ in range(5):
        clock.advance(59)
        assert sessions.load(session_id) == {"user": "ada"}
    clock.advance(60)
    assert sessions.load(session_id) is None
    assert sessions.change(session_id, user="eve") is None
    assert len(store) == 0


@pytest.mark.parametrize("cookie", ["", "x" * 5_000, "\ud800", "other", "s:", "\0\n"])
def test_a_cookie_that_somebody_made_up_is_no_session(
    recipe: Callable[[str], Any], store: KVStore, cookie: str
) -> None:
    store["other"] = {"secret": True}
    sessions = recipe("Sessions").Sessions(store)
    assert sessions.load(cookie) is None
    assert sessions.change(cookie, user="eve") is None
    sessions.end(cookie)
    assert dict(store) == {"other": {"secret": True}}


def test_the_file_tells_no_session_id(recipe: Callable[[str], Any], store: KVStore) -> None:
    session_id = recipe("Sessions").Sessions(store).start({"user": "ada"})
    store.sync()
    assert session_id.encode() not in store.path.read_bytes()


def test_no_change_of_a_session_is_lost_among_threads_and_none_revives_it(
    recipe: Callable[[str], Any], store: KVStore, frequent_switches: None
) -> None:
    sessions = recipe("Sessions").Sessions(store)
    session_id = sessions.start({})
    in_threads(lambda number: sessions.change(session_id, **{f"field{number}": number}))
    assert len(sessions.load(session_id)) == MANY

    def use(session_id: str, number: int) -> None:
        if number:
            sessions.change(session_id, n=number)
        else:
            sessions.end(session_id)

    for _ in range(50):
        session_id = sessions.start({})
        in_threads(partial(use, session_id), 3)
        assert sessions.load(session_id) is None


def test_sessions_are_there_in_a_full_store_but_do_not_live_longer(
    recipe: Callable[[str], Any],
    store: KVStore,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sessions = recipe("Sessions").Sessions(store, lifetime=60)
    session_id = sessions.start({"user": "ada"})
    monkeypatch.setattr(store, "touch", full)
    clock.advance(59)
    assert sessions.load(session_id) == {"user": "ada"}
    clock.advance(1)
    assert sessions.load(session_id) is None


# --- a cache -----------------------------------------------------------------------------------


def test_threads_that_miss_one_url_fetch_it_once_and_again_when_it_has_expired(
    recipe: Callable[[str], Any], store: KVStore, clock: FakeClock
) -> None:
    fetched: list[str] = []
    looked: list[str] = []
    all_have_looked = threading.Event()

    def fetch(url: str) -> dict[str, str]:
        fetched.append(url)
        assert all_have_looked.wait(PATIENCE_SECONDS)  # so each of them has found nothing
        return {"of": url}

    answers = recipe("Cache of API answers").Answers(store, fetch, seconds=30)
    find = answers._find

    def find_and_tell(key: str) -> Any:
        found = find(key)
        looked.append(key)
        if len(looked) >= MANY:
            all_have_looked.set()
        return found

    answers._find = find_and_tell
    urls = ["https://example.org/" + "long/" * 50 + str(number) for number in range(3)]
    got = in_threads(lambda number: answers.get(urls[number % 3]))
    assert got == [{"of": urls[number % 3]} for number in range(MANY)]
    assert sorted(fetched) == urls
    clock.advance(30)
    answers.get(urls[0])
    assert len(fetched) == 4
    assert len(answers._locks) == 0


def test_an_answer_of_none_is_kept_and_an_error_is_not(
    recipe: Callable[[str], Any], store: KVStore
) -> None:
    results: list[Any] = [OSError("down"), None]

    def fetch(_: str) -> Any:
        result = results.pop(0)
        if result:
            raise result
        return result

    answers = recipe("Cache of API answers").Answers(store, fetch)
    with pytest.raises(OSError, match="down"):
        answers.get("u")
    assert answers.get("u") is None
    assert answers.get("u") is None
    assert results == []


def test_an_answer_that_cannot_be_kept_is_returned(
    recipe: Callable[[str], Any], store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = recipe("Cache of API answers").Answers(store, lambda url: url * 20_000)
    assert answers.get("u") == "u" * 20_000
    monkeypatch.setattr(store, "put", full)
    answers = recipe("Cache of API answers").Answers(store, lambda url: url)
    assert answers.get("u") == "u"
    assert len(store) == 0


def test_an_answer_that_is_damaged_in_the_file_is_fetched_again(
    recipe: Callable[[str], Any], path: Path
) -> None:
    with KVStore(path) as store:
        recipe("Cache of API answers").Answers(store, lambda _: "first").get("u")
    flip(path, path.read_bytes().index(b"first"))
    with KVStore(path) as store:
        answers = recipe("Cache of API answers").Answers(store, lambda _: "second")
        assert [answers.get("u"), answers.get("u")] == ["second", "second"]


# --- settings ----------------------------------------------------------------------------------


def test_settings_follow_the_defaults_where_nobody_chose(
    recipe: Callable[[str], Any], store: KVStore
) -> None:
    names = recipe("Settings")
    settings = names.Settings(store)
    settings.change("ada", theme="dark")
    names.DEFAULTS.update(font_size=14, language="en")
    assert settings.of("ada") == {"theme": "dark", "font_size": 14, "language": "en"}
    del names.DEFAULTS["theme"]
    assert settings.of("ada") == {"font_size": 14, "language": "en"}
    with pytest.raises(ValueError, match="no such setting: colour, theme"):
        settings.change("ada", theme="dark", colour=1)


def test_no_change_of_settings_is_lost_among_threads(
    recipe: Callable[[str], Any], store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading and storing are so close that no other thread would come between by chance."""
    names = recipe("Settings")
    settings = names.Settings(store)
    guarded = []

    def watched(member: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            guarded.append(settings._lock.locked())
            return member(*arguments)

        return call

    for name in ("get", "put"):
        monkeypatch.setattr(store, name, watched(getattr(store, name)))
    settings.change("ada", theme="dark")
    assert guarded == [True, True]
    names.DEFAULTS.update({f"s{number}": None for number in range(MANY)})
    in_threads(lambda number: settings.change("ada", **{f"s{number}": number}))
    assert [settings.of("ada")[f"s{number}"] for number in range(MANY)] == list(range(MANY))


# --- a queue -----------------------------------------------------------------------------------


def test_ids_come_in_their_order_and_what_a_dead_process_had_taken_comes_again(
    recipe: Callable[[str], Any], store: KVStore, tmp_path: Path
) -> None:
    names = recipe("Queue of ids")
    ids = names.IdQueue(store)
    for number in range(120):
        ids.add(f"id {number}")
    for _ in range(100):
        ids.done(ids.take()[0])
    assert [ids.take()[1] for _ in range(2)] == ["id 100", "id 101"]
    with KVStore(killed_copy(store, tmp_path / "killed.kvs")) as later:
        ids = names.IdQueue(later)
        ids.add("new")
        assert [ids.take()[1] for _ in range(21)] == [
            *(f"id {number}" for number in range(100, 120)),
            "new",
        ]
        with pytest.raises(queue.Empty):
            ids.take(timeout=0)


def test_of_threads_that_take_each_gets_another_id_and_again_puts_one_last(
    recipe: Callable[[str], Any], store: KVStore, frequent_switches: None
) -> None:
    ids = recipe("Queue of ids").IdQueue(store)
    in_threads(lambda number: [ids.add(f"{number}/{step}") for step in range(20)])

    def work(_: int) -> list[str]:
        taken = [ids.take() for _ in range(20)]
        for ticket, _ in taken:
            ids.done(ticket)
        return [item_id for _, item_id in taken]

    taken = list(itertools.chain.from_iterable(in_threads(work)))
    assert sorted(taken) == sorted(f"{n}/{step}" for n in range(MANY) for step in range(20))
    assert len(store) == 0
    for item_id in "ab":
        ids.add(item_id)
    ids.again(ids.take()[0])
    assert [ids.take()[1] for _ in range(2)] == ["b", "a"]


# --- counters, locks, messages -----------------------------------------------------------------


def test_no_count_is_lost_among_threads_and_one_of_a_minute_expires(
    recipe: Callable[[str], Any], store: KVStore, clock: FakeClock, frequent_switches: None
) -> None:
    counters = recipe("Counters").Counters(store)
    in_threads(lambda _: [counters.add("n", by=2) for _ in range(100)])
    assert store["n"] == {"n": MANY * 200}
    assert [counters.add("minute", ttl=120) for _ in range(3)] == [1, 2, 3]
    clock.advance(120)
    assert counters.add("minute", ttl=120) == 1


def test_of_threads_that_want_a_lock_one_gets_it_until_it_is_released_or_expires(
    recipe: Callable[[str], Any], store: KVStore, clock: FakeClock
) -> None:
    locks = recipe("Expiring lock").ExpiringLocks(store)
    (first,) = filter(None, in_threads(lambda _: locks.acquire("l", 60)))
    assert not locks.release("l", "somebody else's")
    clock.advance(59)
    assert locks.extend("l", first, 60)
    clock.advance(59)
    assert locks.acquire("l", 60) is None
    clock.advance(1)
    second = locks.acquire("l", 60)
    assert second is not None
    assert not locks.release("l", first)
    assert not locks.extend("l", first, 60)
    assert locks.acquire("l", 60) is None
    assert locks.release("l", second)
    assert not locks.release("l", second)
    assert locks.acquire("l", 60) is not None


def test_a_lock_outlasts_the_process_that_held_it(
    recipe: Callable[[str], Any], store: KVStore, tmp_path: Path, clock: FakeClock
) -> None:
    names = recipe("Expiring lock")
    names.ExpiringLocks(store).acquire("l", 60)
    with KVStore(killed_copy(store, tmp_path / "killed.kvs")) as later:
        locks = names.ExpiringLocks(later)
        assert locks.acquire("l", 60) is None
        clock.advance(60)
        assert locks.acquire("l", 60) is not None


def test_a_message_is_new_once_among_threads_and_again_a_day_later(
    recipe: Callable[[str], Any], store: KVStore, clock: FakeClock
) -> None:
    is_new = recipe("Each message once").is_new
    assert sum(in_threads(lambda _: is_new(store, "m"))) == 1
    clock.advance(86_400)
    assert is_new(store, "m")


def test_a_name_of_any_length_has_a_key_of_its_own(
    recipe: Callable[[str], Any], store: KVStore
) -> None:
    key_of = recipe("Long keys").key_of
    names = ["", "a", "ä" * 5_000, "ä" * 4_999, *map(str, range(1_000))]
    for name in names:
        store.create(key_of(name), {"name": name})
    assert {len(key) for key in store} == {32}
    assert all(store[key_of(name)]["name"] == name for name in names)


# --- large values ------------------------------------------------------------------------------


class Dying:
    """A store whose process dies before the call of this number that changes or flushes it."""

    def __init__(self, store: Any, calls: float) -> None:
        self._store = store
        self._calls = calls
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._store, name)
        if name not in ("put", "put_many", "delete_many", "pop", "sync"):
            return member

        def call(*arguments: Any) -> Any:
            self.dead = self.dead or self._calls <= 0
            if self.dead:  # and so is what a program does then
                raise KeyboardInterrupt
            self._calls -= 1
            return member(*arguments)

        return call

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)


class Disk:
    """A store as the disk sees it: each change that was not flushed may be there or not."""

    def __init__(self) -> None:
        self._changes: list[tuple[str, Any]] = []
        self._flushed: dict[str, Any] = {}
        self._current: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        return self._current.get(key, default)

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        return {key: self._current[key] for key in keys if key in self._current}

    def __iter__(self) -> Iterator[str]:
        return iter(self._current)

    def put(self, key: str, value: Any, _ttl: int | None = None) -> None:
        self._change(key, value)

    def put_many(self, items: Iterable[tuple[str, Any]], _ttl: int | None = None) -> None:
        for key, value in items:
            self._change(key, value)

    def pop(self, key: str, default: Any) -> Any:
        value = self._current.get(key, default)
        self._change(key, None)
        return value

    def delete_many(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._change(key, None)

    def sync(self) -> None:
        self._flushed, self._changes = dict(self._current), []

    def after_power_loss(self) -> "Iterator[Disk]":
        """Yield what may be found: each set of the changes that were not flushed."""
        for kept in itertools.product((False, True), repeat=len(self._changes)):
            found = Disk()
            found._current = dict(self._flushed)
            for change, is_kept in zip(self._changes, kept, strict=True):
                if is_kept:
                    _apply(found._current, *change)
            yield found

    def _change(self, key: str, value: Any) -> None:
        self._changes.append((key, value))
        _apply(self._current, key, value)


def _apply(pairs: dict[str, Any], key: str, value: Any) -> None:
    if value is None:
        pairs.pop(key, None)
    else:
        pairs[key] = value


OLD, NEW, LONGER = b"old" * 9_000, b"new" * 5_000, b"longer" * 9_000
STEPS: Final = range(8)  # more calls than there are


def _keys(store: Any) -> int:
    return len([*store])


def _changed(large: Any, step: str) -> None:
    large.put("v", NEW) if step == "put" else large.delete("v")


@pytest.mark.parametrize("change", ["put", "delete"])
@pytest.mark.parametrize("calls", STEPS)
def test_a_process_that_dies_amid_a_large_value_leaves_the_old_or_the_new_and_no_rest(
    recipe: Callable[[str], Any], store: KVStore, tmp_path: Path, calls: int, change: str
) -> None:
    names = recipe("Large values")
    names.LargeValues(store).put("v", OLD)
    dying = Dying(store, 1 + calls)  # after the one at its start
    large = names.LargeValues(dying)
    try:
        _changed(large, change)
    except KeyboardInterrupt:
        assert dying.dead
    with KVStore(killed_copy(store, tmp_path / "killed.kvs")) as later:
        large = names.LargeValues(later)
        found = large.get("v")
        assert found in (OLD, NEW if change == "put" else None)
        assert found == OLD or calls
        assert dying.dead or found != OLD
        parts = {OLD: 3, NEW: 2}.get(found, -1)
        assert _keys(later) == parts + 1


@pytest.mark.parametrize("change", ["put", "delete"])
@pytest.mark.parametrize("calls", STEPS)
def test_power_lost_amid_a_large_value_leaves_the_old_or_the_new_whatever_the_disk_had_taken(
    recipe: Callable[[str], Any], calls: int, change: str
) -> None:
    names = recipe("Large values")
    disk = Disk()
    names.LargeValues(disk).put("v", OLD)
    disk.sync()
    dying = Dying(disk, 1 + calls)
    large = names.LargeValues(dying)
    try:
        _changed(large, change)
    except KeyboardInterrupt:
        assert dying.dead
    outcomes = set()
    for found in disk.after_power_loss():
        later = names.LargeValues(found)
        outcomes.add(later.get("v"))
        assert _keys(found) == {OLD: 4, NEW: 3, None: 0}[later.get("v")]
    assert outcomes <= {OLD, NEW if change == "put" else None}


def test_a_reader_of_a_large_value_that_is_being_replaced_sees_one_of_them_whole(
    recipe: Callable[[str], Any], store: KVStore, frequent_switches: None
) -> None:
    large = recipe("Large values").LargeValues(store)
    large.put("v", OLD)

    def use(number: int) -> None:
        for step in range(15):
            if number:
                assert large.get("v") in (OLD, NEW, LONGER)
            else:
                large.put("v", (NEW, LONGER, OLD)[step % 3])

    in_threads(use, 4)
    assert large.get("v") == OLD
    assert _keys(store) == 4


def test_a_large_value_expires_whole_and_its_parts_after_it(
    recipe: Callable[[str], Any], store: KVStore, clock: FakeClock
) -> None:
    large = recipe("Large values").LargeValues(store)
    large.put("v", LONGER, ttl=60)
    ends = {key.split(":")[0]: store.ttl(key) for key in store}
    assert ends == {"big": 60, "part": 3_660}
    clock.advance(59)
    assert large.get("v") == LONGER
    clock.advance(1)
    assert large.get("v") is None
    clock.advance(3_600)
    assert len(store) == 0


@pytest.mark.parametrize("size", [0, 1, 11_999, 12_000, 12_001, 300_000])
def test_a_large_value_of_any_size_comes_back_and_goes(
    recipe: Callable[[str], Any], store: KVStore, size: int
) -> None:
    large = recipe("Large values").LargeValues(store)
    data = bytes(range(256)) * (size // 256 + 1)
    large.put("v", data[:size])
    assert large.get("v") == data[:size]
    large.delete("v")
    large.delete("v")
    assert large.get("v") is None
    assert len(store) == 0


def test_a_large_value_without_room_leaves_the_old_one_and_nothing_of_itself(
    recipe: Callable[[str], Any], open_store: Callable[..., KVStore]
) -> None:
    store = open_store(max_bytes=4 * 1024 * 1024)
    large = recipe("Large values").LargeValues(store)
    large.put("v", OLD)
    with pytest.raises(StoreFullError):
        large.put("v", b"x" * 5_000_000)
    assert large.get("v") == OLD
    assert _keys(store) == 4


def test_a_part_that_is_missing_is_an_error_and_no_endless_search(
    recipe: Callable[[str], Any], store: KVStore
) -> None:
    large = recipe("Large values").LargeValues(store)
    large.put("v", OLD)
    store.delete(next(key for key in store if key.startswith("part:")))
    with pytest.raises(LookupError, match="1 parts are missing"):
        large.get("v")
