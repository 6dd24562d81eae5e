"""Calls of Windows that none of Python's own modules has."""

import _winapi
import ctypes
import mmap
import msvcrt
import sys
from ctypes import wintypes
from time import monotonic, sleep
from typing import Final

from .interface import address_of

if sys.platform != "win32":  # for type checkers, which know of Windows by this
    raise ImportError("only Windows has these")

# minwinbase.h, winioctl.h, winerror.h, winnt.h
_LOCKFILE_FAIL_IMMEDIATELY: Final = 1
_LOCKFILE_EXCLUSIVE_LOCK: Final = 2
_FSCTL_SET_SPARSE: Final = 0x0009_00C4
_FSCTL_QUERY_ALLOCATED_RANGES: Final = 0x0009_40CF
_ERROR_ACCESS_DENIED: Final = 5
_ERROR_LOCK_VIOLATION: Final = 33
_ERROR_MORE_DATA: Final = 234
_ERROR_IO_PENDING: Final = 997
_SYNCHRONIZE: Final = 0x0010_0000
_WAIT_TIMEOUT: Final = 0x102
_RANGES_AT_ONCE: Final = 64
_FLUSH_SECONDS: Final = 30.0
_FLUSH_PAUSE: Final = 0.001
_LONGEST_PATH: Final = 1 << 15

_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)


class _Overlapped(ctypes.Structure):
    _fields_ = (
        ("internal", ctypes.c_size_t),
        ("internal_high", ctypes.c_size_t),
        ("offset", wintypes.DWORD),
        ("offset_high", wintypes.DWORD),
        ("event", wintypes.HANDLE),
    )


_kernel32.LockFileEx.argtypes = (
    wintypes.HANDLE,
    wintypes.DWORD,
    wintypes.DWORD,
    wintypes.DWORD,
    wintypes.DWORD,
    ctypes.POINTER(_Overlapped),
)
_kernel32.UnlockFileEx.argtypes = (
    wintypes.HANDLE,
    wintypes.DWORD,
    wintypes.DWORD,
    wintypes.DWORD,
    ctypes.POINTER(_Overlapped),
)
_kernel32.DeviceIoControl.argtypes = (
    wintypes.HANDLE,
    wintypes.DWORD,
    wintypes.LPVOID,
    wintypes.DWORD,
    wintypes.LPVOID,
    wintypes.DWORD,
    wintypes.LPDWORD,
    wintypes.LPVOID,
)
_kernel32.FlushViewOfFile.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
_kernel32.GetFinalPathNameByHandleW.argtypes = (
    wintypes.HANDLE,
    wintypes.LPWSTR,
    wintypes.DWORD,
    wintypes.DWORD,
)


def _last_error() -> OSError:
    return ctypes.WinError(ctypes.get_last_error())


def _at(offset: int) -> _Overlapped:
    return _Overlapped(offset=offset & 0xFFFF_FFFF, offset_high=offset >> 32)


def lock_byte(fd: int, offset: int) -> bool:
    """Lock a byte of a file for this descriptor alone. False: somebody else has it.

    Raises:
        OSError: it cannot be locked.
    """
    flags = _LOCKFILE_EXCLUSIVE_LOCK | _LOCKFILE_FAIL_IMMEDIATELY
    handle = msvcrt.get_osfhandle(fd)
    if _kernel32.LockFileEx(handle, flags, 0, 1, 0, ctypes.byref(_at(offset))):
        return True
    if ctypes.get_last_error() in (_ERROR_LOCK_VIOLATION, _ERROR_IO_PENDING):
        return False
    raise _last_error()


def unlock_byte(fd: int, offset: int) -> None:
    """Release the lock on a byte.

    Raises:
        OSError: this descriptor does not have it.
    """
    handle = msvcrt.get_osfhandle(fd)
    if not _kernel32.UnlockFileEx(handle, 0, 1, 0, ctypes.byref(_at(offset))):
        raise _last_error()


def make_sparse(fd: int) -> None:
    """Have parts of a file that were never written to take no room on the disk.

    Raises:
        OSError: the file system has no such files.
    """
    _control(fd, _FSCTL_SET_SPARSE, None, None, wintypes.DWORD())


def allocated_ranges(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    """Return the parts of a file between two offsets that take room on the disk; zeros else.

    Raises:
        OSError: the file system does not tell.
    """
    ranges: list[tuple[int, int]] = []
    found = (ctypes.c_int64 * (2 * _RANGES_AT_ONCE))()  # offsets and sizes, in turn
    size = wintypes.DWORD()
    is_all = False
    while start < end and not is_all:
        wanted = (ctypes.c_int64 * 2)(start, end - start)
        is_all = _control(fd, _FSCTL_QUERY_ALLOCATED_RANGES, wanted, found, size)
        numbers = found[: size.value // ctypes.sizeof(ctypes.c_int64)]
        for first, length in zip(numbers[::2], numbers[1::2], strict=True):
            begin, start = max(first, start), min(first + length, end)
            ranges.append((begin, start))
    return ranges


def _control(
    fd: int,
    code: int,
    wanted: "ctypes.Array[ctypes.c_int64] | None",
    found: "ctypes.Array[ctypes.c_int64] | None",
    size: wintypes.DWORD,
) -> bool:
    """Have the file system do something with what is `wanted`, and answer in `size` bytes `found`.

    False: there is no room for all of the answer. Raises OSError where it does not know how.
    """
    if _kernel32.DeviceIoControl(
        msvcrt.get_osfhandle(fd),
        code,
        wanted,
        0 if wanted is None else ctypes.sizeof(wanted),
        found,
        0 if found is None else ctypes.sizeof(found),
        ctypes.byref(size),
        None,
    ):
        return True
    if ctypes.get_last_error() == _ERROR_MORE_DATA and size.value:
        return False
    raise _last_error()


def flush_view(mapped: mmap.mmap) -> None:
    """Hand to the system all that was stored through a mapping. Other threads run meanwhile.

    Windows refuses it while it writes some of these pages by itself, so it is asked again.

    Raises:
        OSError: the disk did not take it.
    """
    address, deadline = address_of(mapped), monotonic() + _FLUSH_SECONDS
    while not _kernel32.FlushViewOfFile(address, 0):
        error = _last_error()
        if error.winerror != _ERROR_LOCK_VIOLATION or monotonic() >= deadline:
            raise error
        sleep(_FLUSH_PAUSE)


def final_path(fd: int) -> str:
    """Return the path of an open file, with all links and letters of drives followed.

    Raises:
        OSError: Windows does not tell.
    """
    path = ctypes.create_unicode_buffer(_LONGEST_PATH)
    if not _kernel32.GetFinalPathNameByHandleW(msvcrt.get_osfhandle(fd), path, _LONGEST_PATH, 0):
        raise _last_error()
    return path.value


def is_alive(pid: int) -> bool:
    """Return whether there is a process with that number, which has not ended."""
    try:
        process = _winapi.OpenProcess(_SYNCHRONIZE, False, pid)
    except OSError as error:
        return error.winerror == _ERROR_ACCESS_DENIED
    except OverflowError:
        return False
    try:
        return _winapi.WaitForSingleObject(process, 0) == _WAIT_TIMEOUT
    finally:
        _winapi.CloseHandle(process)
