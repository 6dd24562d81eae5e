"""What keys, times-to-live and values become, and what is said of those refused.

What the store gives back of all kinds of values is in `test_values`.
"""

import sys
from typing import Any

import pytest
from support.processes import run_script

from kvstore import (
    CorruptStoreError,
    InvalidKeyError,
    InvalidTTLError,
    InvalidValueError,
    ValueTooLargeError,
)
from kvstore.format.codec import MAX_DEPTH, check_ttl, decode_value, encode_key, encode_value


@pytest.mark.parametrize("key", ["a", "a\0", "é" * 32, "🐍" * 32, "\ud7ff\ue000"])
def test_key_becomes_its_utf8(key: str) -> None:
    assert encode_key(key) == key.encode()


def test_key_of_a_subclass_is_taken_for_the_text_it_holds() -> None:
    class Loud(str):
        __slots__ = ()

        def encode(self, *_: object) -> bytes:
            return b"something else"

        def __len__(self) -> int:
            return 1_000

    assert encode_key(Loud("a")) == b"a"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "key '': 0 characters, allowed are 1 to 32"),
        ("x" * 33, f"key '{'x' * 33}': 33 characters, allowed are 1 to 32"),
        ("x" * 5_000, f"key '{'x' * 40}'…: 5,000 characters, allowed are 1 to 32"),
        (
            "a\ud800",
            "key 'a\\ud800': character 1 is a lone surrogate (U+D800), which UTF-8 cannot express",
        ),
        (7, "key 7: int, allowed is a str of 1 to 32 characters"),
        (b"a", "key b'a': bytes, allowed is a str of 1 to 32 characters"),
    ],
)
def test_refused_key_is_told_with_what_is_allowed(key: object, message: str) -> None:
    with pytest.raises(InvalidKeyError) as error:
        encode_key(key)
    assert str(error.value) == message


def test_ttl_becomes_milliseconds() -> None:
    assert check_ttl("a", 1) == 1000
    assert check_ttl("a", 10**10) == 10**13


@pytest.mark.parametrize(
    ("ttl", "shown"),
    [
        (0, "0 (int)"),
        (-1, "-1 (int)"),
        (10**10 + 1, "10000000001 (int)"),
        (True, "True (bool)"),
        (1.5, "1.5 (float)"),
        ("1", "'1' (str)"),
    ],
)
def test_refused_ttl_is_told_with_what_is_allowed(ttl: object, shown: str) -> None:
    with pytest.raises(InvalidTTLError) as error:
        check_ttl("a", ttl)
    assert str(error.value) == (
        f"key 'a': time-to-live is {shown}, allowed is an int of 1 to 10,000,000,000 seconds, "
        f"or None"
    )


def test_value_becomes_compact_json_in_the_order_of_its_keys() -> None:
    assert encode_value("a", {"b": [1, 2.5, None, True], "a": {"é": "\0"}}) == (
        '{"b":[1,2.5,null,true],"a":{"é":"\\u0000"}}'.encode()
    )


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ([], "value: []"),
        ({"a": float("nan")}, "value['a']: nan"),
        ({"a": [0, {"b": 2**64}]}, "value['a'][1]['b']: an integer of 65 bits"),
        ({"a": {1: 2}}, "value['a']: its key 1 is a int"),
        ({"a": (0, b"x")}, "value['a'][1]: b'x' is a bytes"),
        ({"a": "\ud800"}, "value['a']: character 0 of '\\ud800' is a lone surrogate"),
    ],
)
def test_refused_value_is_told_with_the_way_to_what_is_wrong(value: Any, place: str) -> None:
    with pytest.raises(InvalidValueError) as error:
        encode_value("the key", value)
    assert str(error.value).startswith(f"key 'the key': {place}")


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_value_nests_to_the_limit_and_no_deeper(kind: type) -> None:
    item: Any = kind()
    for _ in range(MAX_DEPTH - 2):
        item = {"n": item} if kind is dict else kind([item])
    encode_value("a", {"n": item})
    with pytest.raises(InvalidValueError, match=f"nested more than {MAX_DEPTH} deep"):
        encode_value("a", {"n": [item]})


def test_value_of_the_largest_size_is_taken_and_one_byte_more_is_not() -> None:
    padding = "x" * (16_384 - len('{"n":""}'))
    assert len(encode_value("a", {"n": padding})) == 16_384
    with pytest.raises(ValueTooLargeError) as error:
        encode_value("a", {"n": padding + "x"})
    assert str(error.value) == "key 'a': value is 16,385 bytes of JSON, limit 16,384"


def test_bytes_that_are_no_json_are_damage() -> None:
    assert decode_value("a", b'{"b":[1]}') == {"b": [1]}
    with pytest.raises(CorruptStoreError, match="key 'a': its value is not JSON"):
        decode_value("a", b'{"b":[1]')


def test_bytes_of_another_kind_or_no_text_are_damage() -> None:
    for encoded in (b"", b"x", b'{"b":"\xff"}', b"{", b'{"b":1}}'):
        with pytest.raises(CorruptStoreError, match="key 'a': its value is not JSON"):
            decode_value("a", encoded)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS as on Linux")
def test_too_little_memory_to_parse_a_value_is_no_damage() -> None:
    """Then orjson says that the text is wrong: it wants 12 bytes for each of its own."""
    script = """
        import resource
        from pathlib import Path
        from kvstore.format.codec import decode_value
        encoded = b'{"text":"' + b"x" * 10_000_000 + b'"}'
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 64_000_000,) * 2)
        try:
            decode_value("a", encoded)
        except MemoryError as error:
            say(error)
    """
    said = run_script(script)
    assert said == "too little memory to parse 10,000,011 bytes\n"
