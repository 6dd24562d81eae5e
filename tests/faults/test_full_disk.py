"""Limits of the system on the size of files. Full disks are in the fault laboratory."""

from pathlib import Path

from support.consistency import assert_consistent
from support.platforms import needs_linux
from support.processes import Child

from kvstore import KVStore


@needs_linux
def test_limit_too_small_for_any_store_is_refused_as_an_error(path: Path) -> None:
    script = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        for _ in range(2):
            try:
                KVStore(sys.argv[1])
            except (StoreFullError, OSError) as error:
                say(str(sys.argv[1]) in str(error), error)
    """
    with Child(script, path) as child:
        said = child.end().splitlines()
    assert [line.split()[0] for line in said] == ["True", "True"], said
    KVStore(path).close()
    assert_consistent(path)
