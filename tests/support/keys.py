"""Keys that are easy to get wrong, and strategies that draw them."""

from typing import Final

from hypothesis import strategies as st

# Lone surrogates are the only characters that a key may not hold.
CHARACTERS: Final = st.characters(exclude_categories=["Cs"])

# The slot of a key holds its first 32 bytes and its length; many of these agree in either.
TRICKY: Final = (
    "a",
    "A",
    "a\0",
    "a\0\0",
    "\0",
    "\0" * 32,
    "\0a",
    " ",
    "a ",
    "\n",
    "..",
    "/etc/passwd",
    '"',
    "\\",
    "x" * 31,
    "x" * 32,
    "x" * 31 + "\0",
    "é",  # one character
    "e\u0301",  # the same to the eye, two characters
    "é" * 16,  # 32 bytes
    "é" * 16 + "\0",  # 33 bytes, the same first 32
    "é" * 16 + "x",
    "é" * 16 + "xy",
    "é" * 32,
    "🐍" * 8,  # 32 bytes
    "🐍" * 8 + "1",
    "🐍" * 8 + "2",
    "🐍" * 31,
    "🐍" * 31 + "🐢",  # 128 bytes; differs from the next one in the last of them
    "🐍" * 32,
    "\U0010ffff" * 32,
    "\ufeff",
    "\uffff",
    "\ud7ff",
    "\ue000",
)

any_key = st.text(CHARACTERS, min_size=1, max_size=32)

# Few distinct keys, so that operations meet again on the same one.
contended_key = st.one_of(
    st.sampled_from(TRICKY),
    st.sampled_from(TRICKY),
    st.text("ab\0", min_size=1, max_size=3),
    st.builds(lambda tail: "🐍" * 8 + tail, st.text("é\0", max_size=24)),
)

# What cannot be a key, each with a short name.
IMPOSSIBLE: Final = {
    "empty": "",
    "33 characters": "x" * 33,
    "33 characters of 4 bytes": "🐍" * 33,
    "a million characters": "x" * 1_000_000,
    "a high surrogate": "\ud800",
    "a low surrogate at the end": "key\udfff",
    "a surrogate pair, not joined": "\ud83d\ude00",
    "None": None,
    "int": 7,
    "bool": True,
    "float": 1.5,
    "bytes": b"key",
    "list": ["key"],
    "dict": {},
    "tuple": ("key",),
    "object": object(),
}
