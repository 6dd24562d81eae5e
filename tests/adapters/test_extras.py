"""Without its extra an adapter says what it needs, and the store works on."""

import pytest
from support import processes


@pytest.mark.parametrize(
    ("adapter", "needed", "told"),
    [
        ("cachelib", "cachelib", "KVStoreCache needs cachelib: pip install 'cachelib>="),
        (
            "py_key_value",
            "key_value",
            "KVStoreStore needs py-key-value-aio: pip install 'py-key-value-aio>=",
        ),
    ],
)
def test_an_adapter_without_its_library_says_what_to_install(
    adapter: str, needed: str, told: str
) -> None:
    code = (
        "import sys\n"
        f"sys.modules[{needed!r}] = None\n"  # as if it were not installed
        "import kvstore\n"
        "try:\n"
        f"    import kvstore.adapters.{adapter}\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert processes.run_python(code).startswith(told)
