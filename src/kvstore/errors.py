"""Every exception of the store. All derive from `KVStoreError`.

Where a built-in class says what a caller expects (a bad argument is a `ValueError`, an absent key
a `KeyError`), the exception is that as well. Trouble with the path itself, and what the operating
system reports of a write or a flush, stays the `OSError` it is.
"""

from errno import EDQUOT


class KVStoreError(Exception):
    """Anything that this library raises of its own.

    >>> try:
    ...     store.read("user:1")
    ... except KVStoreError as error:
    ...     print(error)
    key 'user:1': not in the store
    """


class InvalidKeyError(KVStoreError, ValueError):
    """The key is not a string of 1 to 32 characters, or holds a lone surrogate.

    >>> store.put("", {"name": "Ada"})
    Traceback (most recent call last):
        ...
    kvstore.errors.InvalidKeyError: key '': 0 characters, allowed are 1 to 32
    """


class InvalidValueError(KVStoreError, ValueError):
    """The value is not a dict that JSON gives back equal. The message says where in it.

    >>> store.put("user:1", {"born": {1815, 1852}})
    Traceback (most recent call last):
        ...
    kvstore.errors.InvalidValueError: key 'user:1': value['born']: ...
    """


class ValueTooLargeError(InvalidValueError):
    """The value takes more than 16,384 bytes as compact JSON. Split it over several keys.

    >>> store.put("user:1", {"name": "A" * 20_000})
    Traceback (most recent call last):
        ...
    kvstore.errors.ValueTooLargeError: key 'user:1': value is 20,011 bytes of JSON, limit 16,384
    """


class InvalidTTLError(KVStoreError, ValueError):
    """The time-to-live is not a whole number of seconds from 1 to 10**10.

    >>> store.put("user:1", {"name": "Ada"}, ttl=0)
    Traceback (most recent call last):
        ...
    kvstore.errors.InvalidTTLError: key 'user:1': time-to-live is 0 (int), ...
    """


class KeyExistsError(KVStoreError):
    """`create` of a key that is there. Put it instead, which replaces the value, or read it.

    >>> store.create("user:1", {"name": "Ada"})
    >>> store.create("user:1", {"name": "Alan"})
    Traceback (most recent call last):
        ...
    kvstore.errors.KeyExistsError: key 'user:1': ...
    """


class KeyNotFoundError(KVStoreError, KeyError):
    """Nothing is stored under the key, or what was has passed its time-to-live.

    >>> store["user:1"]
    Traceback (most recent call last):
        ...
    kvstore.errors.KeyNotFoundError: key 'user:1': not in the store

    Args:
        key: as it was asked for; the first of `args`.
        why: what is said of it.
    """

    # Most are caught unseen, so the sentence is not made before it is asked for.
    def __str__(self) -> str:
        key, why = (*self.args, "not in the store")[:2]
        return f"key {key!r}: {why}"


class StoreFullError(KVStoreError):
    """No room for the record: the file is at its limit, or the disk is full.

    Where the disk refused, its `OSError` is the `__cause__`. Nothing was lost; deleting makes room.

    >>> with KVStore("small.kvs", max_bytes=4 * 2**20) as small:
    ...     small.put_many((str(number), {"text": "x" * 16_000}) for number in range(1_000))
    Traceback (most recent call last):
        ...
    kvstore.errors.StoreFullError: key '...
    """


class QuotaError(StoreFullError, OSError):
    """The user's quota on the disk is used up: a full disk, and the `OSError` EDQUOT as well."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = EDQUOT


class StoreLockedError(KVStoreError):
    """Another process, or another `KVStore` of this one, has the file open.

    >>> KVStore(store.path)
    Traceback (most recent call last):
        ...
    kvstore.errors.StoreLockedError: ...

    Args:
        what: who has it; the first of `args`.
        advice: what a program can do about it, which is another thing on a command line.
    """

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


class StoreBusyError(KVStoreError):
    """This thread is inside an operation on the store already, and would wait for itself.

    Raised at once, with nothing changed, where a signal handler, a finalizer or a trace function
    calls a store amid an operation that it has interrupted. Try again once that has ended.

    >>> def on_signal(number, frame):
    ...     try:
    ...         store.put("signal", {"number": number})
    ...     except StoreBusyError:
    ...         missed.append(number)
    """


class StoreClosedError(KVStoreError):
    """The store was closed, or belongs to the parent of this forked process. Open it anew.

    >>> store.close()
    >>> store.read("user:1")
    Traceback (most recent call last):
        ...
    kvstore.errors.StoreClosedError: ...
    """


class CorruptStoreError(KVStoreError):
    """Bytes of the file are not what was written. The message names the structure and offset.

    >>> from pathlib import Path
    >>> with KVStore("data.kvs") as store:
    ...     store.put("user:1", {"name": "Ada"})
    >>> contents = Path("data.kvs").read_bytes()
    >>> _ = Path("data.kvs").write_bytes(contents.replace(b"Ada", b"Eve"))
    >>> with KVStore("data.kvs") as store:
    ...     store.read("user:1")
    Traceback (most recent call last):
        ...
    kvstore.errors.CorruptStoreError: ...
    """


class UnsupportedFormatError(KVStoreError):
    """The file is no kvstore file, or is of a newer format. It was left as it is.

    >>> from pathlib import Path
    >>> _ = Path("notes.txt").write_text("no store")
    >>> KVStore("notes.txt")
    Traceback (most recent call last):
        ...
    kvstore.errors.UnsupportedFormatError: ...
    """
