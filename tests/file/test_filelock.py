"""The lock on a file, within one process. Between processes: `test_processes`."""

import os
import re
from pathlib import Path

import pytest
from support.files import is_private
from support.platforms import needs_fork, needs_free_names, needs_symbolic_links
from support.processes import run_script

from kvstore import StoreLockedError
from kvstore.file.lock import FileLock


def test_lock_makes_the_file_for_its_owner_alone(path: Path) -> None:
    lock = FileLock(str(path), 0.0)
    try:
        assert path.stat().st_size == 0
        if os.name == "posix":
            assert is_private(path)
    finally:
        lock.release()


@needs_symbolic_links
def test_second_lock_of_this_process_is_refused_whatever_the_timeout(path: Path) -> None:
    lock = FileLock(str(path), 0.0)
    link = path.with_name("link")
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(StoreLockedError, match=f"this very process \\(pid {os.getpid()}\\)"):
            FileLock(str(name), 1e6)
    lock.release()
    FileLock(str(link), 0.0).release()


def test_release_may_be_called_twice_and_leaves_the_next_holder_alone(path: Path) -> None:
    first = FileLock(str(path), 0.0)
    first.release()
    second = FileLock(str(path), 0.0)
    first.release()
    with pytest.raises(StoreLockedError):
        FileLock(str(path), 0.0)
    os.fstat(second.fd)
    second.release()


def test_folder_is_no_file_to_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=re.escape(repr(str(tmp_path)))):
        FileLock(str(tmp_path), 0.0)


@needs_free_names
def test_second_descriptor_is_of_the_locked_file_or_none(path: Path) -> None:
    lock = FileLock(str(path), 0.0)
    try:
        fd = lock.open_again()
        assert os.path.samestat(os.fstat(fd), os.fstat(lock.fd))
        os.close(fd)
        path.rename(path.with_name("moved"))
        path.touch()
        with pytest.raises(OSError, match="replaced"):
            lock.open_again()
    finally:
        lock.release()


@needs_free_names
def test_path_that_names_another_file_or_none_is_an_error(path: Path) -> None:
    lock = FileLock(str(path), 0.0)
    try:
        lock.check_path()
        moved = path.rename(path.with_name("moved"))
        with pytest.raises(OSError, match="removed or replaced"):
            lock.check_path()
        path.touch()
        with pytest.raises(OSError, match="removed or replaced"):
            lock.check_path()
        moved.replace(path)
        lock.check_path()
    finally:
        lock.release()


@needs_free_names
def test_replaced_file_is_another_one_to_lock(path: Path) -> None:
    lock = FileLock(str(path), 0.0)
    path.rename(path.with_name("moved"))
    other = FileLock(str(path), 0.0)
    other.release()
    lock.release()


@needs_fork
def test_forked_child_calls_back_and_holds_nothing(path: Path) -> None:
    said = run_script(
        """
        import os
        from kvstore.file.lock import FileLock

        class Owner:
            def detach_after_fork(self):
                os.write(1, b"abandoned\\n")

        owner = Owner()
        lock = FileLock(sys.argv[1], 0.0)
        lock.call_after_fork(owner.detach_after_fork)
        pid = os.fork()
        if pid == 0:
            try:
                os.fstat(lock.fd)
            except OSError:
                os.write(1, b"descriptor closed\\n")
            lock.release()
            os._exit(0)
        os.waitpid(pid, 0)
        try:
            FileLock(sys.argv[1], 0.0)
        except StoreLockedError:
            say("parent has it still")
        lock.release()
        """,
        path,
    )
    assert said.splitlines() == ["abandoned", "descriptor closed", "parent has it still"]
