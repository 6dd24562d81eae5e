"""Write src/REFERENCE.md, the reference of the API, from the docstrings.

griffe reads the sources and griffe2md makes Markdown of each object. What is done here: the choice
of what is public, its order, fences around examples, and no links to what has no place on the page.

    pip install '.[test]' && python tools/build_reference.py
"""

import logging
import re
from pathlib import Path
from typing import Any, Final, cast

import griffe
import griffe2md

SOURCES: Final = Path(__file__).resolve().parent.parent / "src"
PAGE: Final = SOURCES / "REFERENCE.md"

HEAD: Final = """\
# Reference

Every call, made from the docstrings by `python tools/build_reference.py`; a test keeps it true. How
they are used: [guide](GUIDE.md). `Value` stands for a `dict` of what JSON can say, `Items` for a
mapping or an iterable of pairs, `MAX_FILE_SIZE` for 1,000,000,000. `store[key]` is `read`,
`store[key] = value` is `put`, `del store[key]` is `delete`, and `keys()` is as of any mapping.

"""
_CONFIG: Final[dict[str, Any]] = {
    **griffe2md.default_config,
    "docstring_section_style": "list",
    "inherited_members": False,
    "line_length": 100,
    "members_order": "source",
    "show_bases": False,
    "show_object_full_path": False,
    "show_root_full_path": False,
    "show_root_members_full_path": False,
    "show_signature_annotations": True,
    "summary": False,
}
_SESSION: Final = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
_CODE: Final = re.compile(r"<code>(.*?)</code>")
_LINK: Final = re.compile(r"\[([^][]*)\]\(#[^)]*\)")
_SIGNATURE: Final = re.compile(r"```python\n.*?\n```", re.DOTALL)


def main() -> None:
    """Write the page."""
    PAGE.write_text(reference(), "utf-8")
    print(f"wrote {PAGE}")


def reference() -> str:
    """Return the text of the page."""
    logging.getLogger("griffe").setLevel(logging.ERROR)  # arguments of errors are those of `args`
    package = griffe.load("kvstore", search_paths=[SOURCES], docstring_parser="google")
    store, stats = _target(package["KVStore"]), _target(package["StoreStats"])
    exported = map(str, package.exports or ())
    errors = [_target(package[name]) for name in exported if name.endswith("Error")]
    base = next(error for error in errors if error.name == "KVStoreError")
    errors.sort(key=lambda error: (error is not base, cast(int, error.lineno)))
    parts = [_of_class(store), _of_class(stats), "## Errors\n", *map(_of_error, errors)]
    members = " · ".join(f"[`{each.name}`](#{each.name})" for each in _members(store))
    parts.insert(0, f"{members} · [`StoreStats`](#storestats) · [Errors](#errors)\n")
    return HEAD + re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _target(member: Any) -> griffe.Class:
    return cast(griffe.Class, member.final_target if member.is_alias else member)


def _of_class(of: griffe.Class) -> str:
    own = [_rendered(each, level=3) for each in _members(of)]
    return "\n".join([_rendered(of, level=2, members=False), *own])


def _members(of: griffe.Class) -> list[Any]:
    return [each for each in of.members.values() if each.is_public and each.docstring]


def _of_error(error: griffe.Class) -> str:
    text = _rendered(error, level=3, members=False)
    bases = " and ".join(f"`{base}`" for base in error.bases)
    head, _, rest = text.partition("\n\n")
    return f"{head}\n\nDerives from {bases}.\n\n{_SIGNATURE.sub('', rest)}"


def _rendered(what: Any, level: int, members: bool | None = None) -> str:
    """Return the Markdown of an object, its overloads in place of the signature that has them."""
    if what.docstring:
        what.docstring.value = _SESSION.sub(_fenced, what.docstring.value)
    text = griffe2md.render_object_docs(
        what, cast(Any, {**_CONFIG, "heading_level": level, "members": members})
    )
    overloads = what.overloads if what.is_function else None
    if overloads:
        shown = "\n".join(str(each.signature(name=what.name)) for each in overloads)
        text = _SIGNATURE.sub(lambda _: f"```python\n{shown}\n```", text, count=1)
    return _CODE.sub(lambda code: f"`{_LINK.sub(_text, code[1]).strip('()')}`", text)


def _text(link: re.Match[str]) -> str:
    return link[1]


def _fenced(session: re.Match[str]) -> str:
    return f"```pycon\n{session[0].rstrip()}\n```"


if __name__ == "__main__":
    main()
