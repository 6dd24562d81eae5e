"""Where the default file is, what it falls back to, and who may read it."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

import platformdirs
import pytest
from support.platforms import needs_linux, needs_posix
from support.processes import run_script

from kvstore import KVStore, StoreLockedError, UnsupportedFormatError
from kvstore.recovery.check import check_file

pytestmark = needs_posix

LINUX: Final = needs_linux
LASTING: Final = "may not last"


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whose home and temporary directory are in `tmp_path`."""
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home" / "data"))
    monkeypatch.delenv("KVSTORE_PATH", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def no_data_folder(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's data folder cannot be made: a file is in its place."""
    (user / "home" / "file").write_bytes(b"")
    monkeypatch.setenv("HOME", str(user / "home" / "file"))
    monkeypatch.setenv("XDG_DATA_HOME", str(user / "home" / "file"))


@pytest.fixture
def open_umask() -> Iterator[None]:
    """A umask that takes no permission away."""
    before = os.umask(0)
    yield
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def _fall_back() -> Path:
    """Open the default store where it has to fall back, use it, and return its path."""
    with pytest.warns(RuntimeWarning, match=LASTING) as caught, KVStore() as store:
        store.create("k", {"n": 1})
        store.delete("k")
    assert len(caught) == 1
    assert str(store.path) in str(caught[0].message)
    assert caught[0].filename == __file__, "the warning points at the caller's line"
    assert check_file(store.path) == []
    return store.path


def test_the_default_file_is_in_the_users_data_folder(user: Path) -> None:
    with KVStore() as store:
        store.create("k", {"n": 1})
        assert store.path.name == "default.kvs"
        assert store.path.parent.name == "kvstore"
        assert store.path.is_relative_to(user / "home")
    with KVStore(None) as again:
        assert again.path == store.path
        assert again.read("k") == {"n": 1}
    assert os.listdir(store.path.parent) == ["default.kvs"]
    assert os.listdir(user / "tmp") == []
    assert check_file(store.path) == []


@LINUX
def test_the_data_folder_is_the_one_of_the_xdg_specification(user: Path) -> None:
    with KVStore() as store:
        assert store.path == user / "home" / "data" / "kvstore" / "default.kvs"


def test_kvstore_path_names_the_default_file(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_PATH", str(user / "mine.kvs"))
    with KVStore() as store:
        store.create("k", {"n": 1})
        assert store.path == user / "mine.kvs"
    assert os.listdir(user / "home") == []
    assert os.listdir(user / "tmp") == []


def test_kvstore_path_comes_before_the_fallback_too(
    user: Path, monkeypatch: pytest.MonkeyPatch, no_data_folder: None
) -> None:
    monkeypatch.setenv("KVSTORE_PATH", str(user / "mine.kvs"))
    with KVStore() as store:
        assert store.path == user / "mine.kvs"


def test_a_path_given_comes_before_kvstore_path(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_PATH", str(user / "mine.kvs"))
    with KVStore(user / "given.kvs") as store:
        assert store.path == user / "given.kvs"
    assert not (user / "mine.kvs").exists()


def test_a_kvstore_path_that_cannot_be_opened_is_an_error_and_not_passed_over(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_PATH", str(user / "missing" / "mine.kvs"))
    with pytest.raises(FileNotFoundError):
        KVStore()
    assert os.listdir(user / "home") == []
    assert os.listdir(user / "tmp") == []


def test_a_default_file_in_use_is_locked_and_not_passed_over(user: Path) -> None:
    with KVStore(), pytest.raises(StoreLockedError):
        KVStore()
    assert os.listdir(user / "tmp") == []


def test_a_default_file_that_is_no_store_is_refused_and_not_passed_over(user: Path) -> None:
    with KVStore() as store:
        pass
    store.path.write_bytes(b"precious")
    with pytest.raises(UnsupportedFormatError):
        KVStore()
    assert store.path.read_bytes() == b"precious"
    assert os.listdir(user / "tmp") == []


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("open_umask")
def test_files_are_created_for_their_owner_alone(user: Path) -> None:
    with KVStore(user / "given.kvs") as given, KVStore() as default:
        assert _mode(given.path) == 0o600
        assert _mode(default.path) == 0o600


def test_the_mode_of_an_existing_file_is_kept(user: Path) -> None:
    (user / "given.kvs").touch()
    (user / "given.kvs").chmod(0o640)
    with KVStore(user / "given.kvs"):
        pass
    assert _mode(user / "given.kvs") == 0o640


@pytest.mark.usefixtures("open_umask", "no_data_folder")
def test_the_fallback_folder_is_for_its_owner_alone(user: Path) -> None:
    path = _fall_back()
    assert _mode(path) == 0o600
    assert _mode(path.parent) == 0o700
    assert path.parent.lstat().st_uid == os.geteuid()


# --- the fallback ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_data_folder")
def test_without_a_data_folder_the_file_is_in_a_folder_of_the_user_under_the_temporary_one(
    user: Path,
) -> None:
    path = _fall_back()
    assert path.name == "default.kvs"
    assert path.parent.parent == user / "tmp"
    assert os.listdir(user / "tmp") == [path.parent.name]


@pytest.mark.usefixtures("no_data_folder")
def test_the_fallback_is_the_same_the_next_time() -> None:
    with pytest.warns(RuntimeWarning, match=LASTING), KVStore() as store:
        store.create("k", {"n": 1})
    with pytest.warns(RuntimeWarning, match=LASTING), KVStore() as again:
        assert again.path == store.path
        assert again.read("k") == {"n": 1}


@LINUX
def test_a_file_in_the_place_of_the_own_folder_leads_to_the_fallback(user: Path) -> None:
    (user / "home" / "data").mkdir()
    (user / "home" / "data" / "kvstore").write_bytes(b"")
    assert _fall_back().parent.parent == user / "tmp"


@LINUX
def test_a_data_folder_on_a_file_system_that_takes_none_leads_to_the_fallback(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for root, whom no mode of a folder keeps out."""
    monkeypatch.setenv("XDG_DATA_HOME", "/proc")
    assert _fall_back().parent.parent == user / "tmp"


@LINUX
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
@pytest.mark.parametrize("locked", ["data", "data/kvstore"])
def test_a_data_folder_that_cannot_be_written_leads_to_the_fallback(
    user: Path, locked: str
) -> None:
    (user / "home" / "data" / "kvstore").mkdir(parents=True)
    if locked == "data":
        (user / "home" / "data" / "kvstore").rmdir()
    (user / "home" / locked).chmod(0o500)
    try:
        assert _fall_back().parent.parent == user / "tmp"
    finally:
        (user / "home" / locked).chmod(0o700)


# --- a hostile temporary directory ----------------------------------------------------------------


@pytest.fixture
def fallback(no_data_folder: None) -> Path:
    """The folder that the fallback will use; it is not there."""
    path = _fall_back()
    path.unlink()
    path.parent.rmdir()
    return path.parent


def _refused() -> None:
    with pytest.raises(OSError):  # noqa: PT011
        KVStore()


def test_a_link_in_the_place_of_the_fallback_folder_is_refused(fallback: Path, user: Path) -> None:
    (user / "trap").mkdir(mode=0o700)
    fallback.symlink_to(user / "trap")
    _refused()
    assert os.listdir(user / "trap") == []


def test_a_dangling_link_in_the_place_of_the_fallback_folder_is_refused(
    fallback: Path, user: Path
) -> None:
    fallback.symlink_to(user / "nowhere")
    _refused()
    assert not (user / "nowhere").exists()


def test_a_file_in_the_place_of_the_fallback_folder_is_refused(fallback: Path) -> None:
    fallback.write_bytes(b"precious")
    _refused()
    assert fallback.read_bytes() == b"precious"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away"
)
def test_a_fallback_folder_of_another_owner_is_refused(fallback: Path) -> None:
    fallback.mkdir(mode=0o700)
    os.chown(fallback, 12_345, -1)
    _refused()
    assert os.listdir(fallback) == []


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o710, 0o701], ids=oct)
def test_a_fallback_folder_open_to_others_is_refused(fallback: Path, mode: int) -> None:
    fallback.mkdir()
    fallback.chmod(mode)
    _refused()
    assert os.listdir(fallback) == []


# --- a user whom the system does not know ---------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Could not determine home directory."),
        KeyError("getpwuid(): uid not found: 12345"),
        PermissionError(1, "x"),
        ImportError("platformdirs.unix"),
    ],
    ids=repr,
)
def test_whatever_the_look_up_of_the_data_folder_raises_leads_to_the_fallback(
    user: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A container's uid without a home: newer platformdirs raised, and so did the opening."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(platformdirs, "user_data_path", fail)
    assert _fall_back().parent.parent == user / "tmp"
    monkeypatch.setenv("KVSTORE_PATH", str(user / "mine.kvs"))
    with KVStore() as store:
        assert store.path == user / "mine.kvs"


def test_a_data_folder_that_is_not_absolute_leads_to_the_fallback(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions of platformdirs have it for a user without a home."""
    monkeypatch.setattr(platformdirs, "user_data_path", lambda *_, **__: Path("~/data/kvstore"))
    assert _fall_back().parent.parent == user / "tmp"


@LINUX
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0,
    reason="only root can become a user that is not there",
)
@pytest.mark.parametrize("home", [None, "", "/"])
def test_a_user_without_a_home_or_an_entry_among_the_users_gets_the_fallback(
    home: str | None,
) -> None:
    """As in a container that is run by a number of a user."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    script = """
        import pwd, tempfile, warnings
        import kvstore.location, kvstore.recovery.rebuild, platformdirs.unix
        warnings.simplefilter("ignore")
        for name in ("HOME", "XDG_DATA_HOME", "KVSTORE_PATH"):
            os.environ.pop(name, None)
        if sys.argv[2] != "None":
            os.environ["HOME"] = sys.argv[2]
        os.environ["TMPDIR"] = sys.argv[1]
        tempfile.tempdir = None
        os.setuid(54321)
        with KVStore() as store:
            store.create("key", {})
            say(store.path)
    """
    try:
        said = run_script(script, folder, home)
        assert Path(said.strip()) == folder / "kvstore-54321" / "default.kvs"
    finally:
        shutil.rmtree(folder)


# --- no temporary directory either ----------------------------------------------------------------


@pytest.mark.usefixtures("no_data_folder")
def test_without_a_temporary_directory_the_error_says_what_to_do(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> NoReturn:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    with pytest.raises(FileNotFoundError, match="No usable temporary directory") as caught:
        KVStore()
    for fact in (str(user / "home"), "KVSTORE_PATH", "Give a path"):
        assert fact in str(caught.value)


@pytest.mark.usefixtures("no_data_folder")
def test_a_temporary_directory_that_takes_no_folder_is_named_with_what_to_do(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (user / "file").touch()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(user / "file"))
    with pytest.raises(NotADirectoryError) as caught:
        KVStore()
    for fact in (str(user / "file"), "KVSTORE_PATH", "Give a path"):
        assert fact in str(caught.value)


def test_a_hostile_folder_in_the_temporary_directory_is_named_with_what_it_is(
    fallback: Path,
) -> None:
    fallback.mkdir()
    fallback.chmod(0o777)
    with pytest.raises(PermissionError) as caught:
        KVStore()
    for fact in (str(fallback), "0700", "drwxrwxrwx", "KVSTORE_PATH"):
        assert fact in str(caught.value)
