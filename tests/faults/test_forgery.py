"""The memory that a trial with forged files may take."""

import pytest
from support import MIB
from support.forgery import MAX_BYTES
from support.platforms import needs_linux
from support.processes import Child


@needs_linux
@pytest.mark.parametrize(("factor", "most"), [("1", 64 * MIB), ("4", 256 * MIB)])
def test_trial_gets_as_much_memory_as_the_setting_says_and_no_more(factor: str, most: int) -> None:
    """With sanitizers 64 MiB were too few, and orjson crashes where it gets none."""
    script = """
        from faults.forgery import limit_memory
        limit_memory()
        for size in map(int, sys.argv[1:]):
            try:
                say(len(bytearray(size)))
            except MemoryError:
                say("no memory")
    """
    with Child(script, most, most + 2 * MAX_BYTES, KVSTORE_TEST_MEMORY=factor) as child:
        assert child.end().splitlines() == [str(most), "no memory"]
