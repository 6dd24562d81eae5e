"""Calls of Windows that none of Python's own modules has."""

import _winapi
import ctypes
import mmap
import msvcrt
import sys
from ctypes import wintypes
from typing import Final

from .interface import address_of

if sys.platform != "win32":  # for type checkers, which know of Windows by this
    raise ImportError("only Windows has these")

# minwinbase.h, winioctl.h, winerror.h, winnt.h
_LOCKFILE_FAIL_IMMEDIATELY: Final = 1
_LOCKFILE_EXCLUSIVE_LOCK: Final = 2
_FSCTL_SET_SPARSE: Final = 0x0009_00C4
_ERROR_ACCESS_DENIED: Final = 5
_ERROR_LOCK_VIOLATION: Final = 33
_ERROR_IO_PENDING: Final = 997
_SYNCHRONIZE: Final = 0x0010_0000
_WAIT_TIMEOUT: Final = 0x102

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
    size = wintypes.DWORD()
    if not _kernel32.DeviceIoControl(
        msvcrt.get_osfhandle(fd), _FSCTL_SET_SPARSE, None, 0, None, 0, ctypes.byref(size), None
    ):
        raise _last_error()


def flush_view(mapped: mmap.mmap) -> None:
    """Hand to the system all that was stored through a mapping. Other threads run meanwhile.

    Raises:
        OSError: the disk did not take it.
    """
    if not _kernel32.FlushViewOfFile(address_of(mapped), 0):
        raise _last_error()


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
