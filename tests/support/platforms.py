"""What the tests need of an operating system that not every one has: marks that say so."""

import os
import sys
import tempfile
from contextlib import suppress
from typing import Final

import pytest

from . import MAX_MAX_BYTES, MIB, fakes

PLATFORM: Final = fakes.platform()

# The limit of a store where a test says none. On Windows an open file is as long as it may become,
# and tests read and copy such files.
USUAL_MAX_BYTES: Final = 64 * MIB if PLATFORM == "win32" else MAX_MAX_BYTES


def _has_symbolic_links() -> bool:
    """Return whether this user may make one, which Windows does not allow everybody."""
    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, "link")
        with suppress(OSError):
            os.symlink(folder, link)
        return os.path.islink(link)


needs_linux: Final = pytest.mark.skipif(
    PLATFORM != "linux", reason="what it looks at, or has fail, is as on Linux"
)
needs_posix: Final = pytest.mark.skipif(
    PLATFORM == "win32", reason="Windows has other users, modes and kinds of files than POSIX"
)
needs_real_system: Final = pytest.mark.skipif(
    sys.platform != PLATFORM, reason="other libraries need what the imitated system has not"
)
needs_symbolic_links: Final = pytest.mark.skipif(
    not _has_symbolic_links(), reason="this user can make no symbolic links here"
)
needs_free_names: Final = pytest.mark.skipif(
    PLATFORM == "win32", reason="Windows keeps an open file from being removed or renamed"
)
needs_fork: Final = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
needs_signals: Final = pytest.mark.skipif(
    os.name != "posix", reason="sends signals as POSIX has them"
)
needs_shell: Final = pytest.mark.skipif(
    os.name != "posix", reason="redirects standard streams in a shell of POSIX"
)
needs_full_device: Final = pytest.mark.skipif(
    os.name != "posix" or not os.path.exists("/dev/full"),
    reason="has no device that is always full",
)
needs_pwrite: Final = pytest.mark.skipif(
    not hasattr(os, "pwrite"), reason="the system has no pwrite, so all changes go through the map"
)
# The ways that changes go: through the map, and where there is such a thing by pwrite.
IN_PLACE: Final = (True, False) if hasattr(os, "pwrite") else (True,)
needs_fallocate: Final = pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="the system cannot reserve blocks"
)
needs_windows: Final = pytest.mark.skipif(
    PLATFORM != "win32", reason="an open file is as on Windows"
)
