"""The default file: where a store is kept when no path was given."""

import os
import stat
import tempfile
import warnings
from pathlib import Path
from typing import Final

import platformdirs

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
    folder = platformdirs.user_data_path("kvstore", appauthor=False)
    if folder.is_absolute() and _is_usable(folder):
        return folder / _FILE_NAME
    fallback = _temporary_folder()
    warnings.warn(
        f"{folder} cannot be created or written, so the store is {fallback / _FILE_NAME}; data in "
        f"a temporary directory may not last. Give a path, or set {PATH_VARIABLE}",
        RuntimeWarning,
        stacklevel=4,  # the line that made the store
    )
    return fallback / _FILE_NAME


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
    user = os.getuid() if hasattr(os, "getuid") else None
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
            raise PermissionError(
                f"{folder}: must be a folder (no link) that belongs to user {user} with mode 0700 "
                f"for the store to be kept in it; it is {stat.filemode(status.st_mode)} of user "
                f"{status.st_uid}. Give a path, or set {PATH_VARIABLE}"
            ) from None
    return folder
