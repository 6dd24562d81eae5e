"""The default file: where a store is kept when no path was given."""

import os
import stat
import tempfile
import warnings
from errno import EPERM
from pathlib import Path
from typing import Final

import platformdirs

from .file.caller import levels_to_caller
from .file.platform import system

PATH_VARIABLE: Final = "KVSTORE_PATH"
_FILE_NAME: Final = "default.kvs"
_OWNER_ONLY: Final = 0o700


def default_path() -> Path:
    """Return the absolute path of the default file, whose folder exists and can be written.

    The environment variable ``KVSTORE_PATH`` where it is set; else ``default.kvs`` in the user's
    data folder for kvstore; else, with a RuntimeWarning, in a folder of the user's own under the
    temporary directory.

    Raises:
        OSError: not even that folder can be had.
    """
    wanted = os.environ.get(PATH_VARIABLE)
    if wanted:
        return Path(os.path.abspath(wanted))
    folder = _data_folder()
    if folder is not None and _is_usable(folder):
        return folder / _FILE_NAME
    what = "the user's data folder" if folder is None else str(folder)
    try:
        fallback = _temporary_folder()
    except OSError as error:
        # Of the same class, for that follows from the number.
        raise OSError(
            error.errno,
            f"{what} cannot be found, created or written, nor is there a temporary folder for the "
            f"store ({error.strerror}). Give a path, or set {PATH_VARIABLE}",
            error.filename,
        ) from error
    warnings.warn(
        f"{what} cannot be found, created or written, so the store is {fallback / _FILE_NAME}; "
        f"data in a temporary directory may not last. Give a path, or set {PATH_VARIABLE}",
        RuntimeWarning,
        stacklevel=levels_to_caller(),
    )
    return fallback / _FILE_NAME


def expected_path() -> Path | None:
    """Return where the default file is, or would be made if the user's data folder can be used.

    Makes nothing, for whoever only looks. None: there is no such folder.
    """
    wanted = os.environ.get(PATH_VARIABLE)
    if wanted:
        return Path(os.path.abspath(wanted))
    folder = _data_folder()
    return None if folder is None else folder / _FILE_NAME


def _data_folder() -> Path | None:
    """Return the user's data folder for kvstore; None where there is no telling.

    A user without a home and without an entry among the system's users has none. What the look-up
    then raises has changed from version to version; whatever it is, the store does without it.
    """
    try:
        folder = platformdirs.user_data_path("kvstore", appauthor=False)
    except Exception:
        return None
    return folder if folder.is_absolute() else None


def _is_usable(folder: Path) -> bool:
    """Make the folder if it is missing; tell whether the default file in it can be written."""
    try:
        folder.mkdir(mode=_OWNER_ONLY, parents=True, exist_ok=True)
    except OSError:
        return False
    file = folder / _FILE_NAME
    if os.path.lexists(file) and not os.access(file, os.R_OK | os.W_OK):
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary_folder() -> Path:
    """Make or find a folder under the temporary directory that nobody else can have prepared."""
    user = system.user_id()
    folder = Path(tempfile.gettempdir()).absolute() / (
        "kvstore" if user is None else f"kvstore-{user}"
    )
    try:
        folder.mkdir(mode=_OWNER_ONLY)
    except FileExistsError:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or (
            user is not None
            and (status.st_uid != user or stat.S_IMODE(status.st_mode) & ~_OWNER_ONLY)
        ):
            owner = "" if user is None else f" that belongs to user {user} with mode 0700"
            raise PermissionError(
                EPERM,
                f"must be a folder (no link){owner} for the store to be kept in it; it is "
                f"{stat.filemode(status.st_mode)} of user {status.st_uid}",
                str(folder),
            ) from None
    return folder
