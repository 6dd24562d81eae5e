"""Small disks of several file systems, mounted under a test's own folder, and what fills them."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Final

import pytest

from . import MIB
from .platforms import PLATFORM

# The smallest that each can be made, with a margin. Images are sparse.
SIZES: Final = {"tmpfs": 24 * MIB, "ext4": 48 * MIB, "btrfs": 160 * MIB, "xfs": 320 * MIB}
_MAKE: Final = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0"),
    "btrfs": ("mkfs.btrfs", "-q"),
    "xfs": ("mkfs.xfs", "-q"),
}
# File systems that may share a file's blocks with a copy of it.
SHARING: Final = ("btrfs", "xfs")
# File systems that need room even to overwrite what is reserved.
COPY_ON_WRITE: Final = ("btrfs",)

_FICLONE: Final = 0x4004_9409
_FS_IOC_GETFLAGS = 0x8008_6601
_FS_IOC_SETFLAGS = 0x4008_6602


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """Mount a new, empty disk with that file system under `folder`, and unmount it at the end.

    Skips the test where that cannot be done: elsewhere than on Linux, not as root, without the
    tools, or in a container that may not mount.
    """
    if PLATFORM != "linux":
        pytest.skip("mounts a disk, which is written for Linux only")
    if os.geteuid() != 0:
        pytest.skip("mounts a disk, which takes root")
    mount_point = folder / f"{kind}-disk"
    mount_point.mkdir()
    if kind == "tmpfs":
        _run_or_skip("mount", "-t", "tmpfs", "-o", f"size={SIZES[kind]}", "none", str(mount_point))
    else:
        image = folder / f"{kind}.image"
        with image.open("wb") as file:
            file.truncate(SIZES[kind])
        _run_or_skip(*_MAKE[kind], str(image))
        _run_or_skip("mount", "-o", "loop", str(image), str(mount_point))
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", str(mount_point)], check=True, capture_output=True)


def mount_privately() -> None:
    """Have mounts of this process's namespace, which is its own, not be seen in others."""
    subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)


@contextmanager
def quick_folder(otherwise: Path) -> Iterator[Path]:
    """Give a folder in memory, where the system has one: for tests that flush very often."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK):
        with tempfile.TemporaryDirectory(dir=memory) as name:
            yield Path(name)
    else:
        yield otherwise


def _run_or_skip(*command: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")


def fill(disk: Path, leave: int = 0) -> None:
    """Fill the disk with a file that is no store, but for about `leave` bytes."""
    descriptor = os.open(_filler(disk), os.O_RDWR | os.O_CREAT)
    try:
        size = os.fstat(descriptor).st_size
        step = 1 << 30
        while step >= 4096:
            try:
                os.posix_fallocate(descriptor, size, step)
                size += step
            except OSError as error:
                if error.errno not in (ENOSPC, EDQUOT):
                    raise
                os.ftruncate(descriptor, size)
                step //= 2
        os.ftruncate(descriptor, max(0, size - leave))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def empty(disk: Path) -> None:
    """Take away what `fill` put there, and wait until its room is free."""
    filler = _filler(disk)
    descriptor = os.open(filler, os.O_RDWR)
    try:
        os.ftruncate(descriptor, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    filler.unlink()


def _filler(disk: Path) -> Path:
    return disk / "filler"


def copy_with_holes(source: Path, target: Path) -> None:
    """Copy a file as `cp --sparse=always` does: what is zero takes no room."""
    with source.open("rb") as original, target.open("wb") as copy:
        while block := original.read(4096):
            if any(block):
                copy.write(block)
            else:
                copy.seek(len(block), os.SEEK_CUR)
        copy.truncate(original.tell())
        os.fsync(copy.fileno())


def replace_by_copy(file: Path) -> None:
    """Have a plain copy, written anew, take the file's place."""
    copy = file.with_suffix(".copy")
    with copy.open("wb") as written:
        written.write(file.read_bytes())
        os.fsync(written.fileno())
    copy.replace(file)


def share_blocks(source: Path, target: Path) -> None:
    """Copy a file as `cp --reflink=always` does: both share the blocks until one is changed."""
    import fcntl

    with source.open("rb") as original, target.open("wb") as copy:
        with contextlib.suppress(OSError):  # btrfs shares only between files of the same flags
            flags = fcntl.ioctl(original.fileno(), _FS_IOC_GETFLAGS, bytes(8))
            fcntl.ioctl(copy.fileno(), _FS_IOC_SETFLAGS, flags)
        fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())
        os.fsync(copy.fileno())
