# Part of `_fast_path`: keys, values and times-to-live as callers give them, or "see Python".

cdef inline const uint8_t *text_of(object key, uint64_t *size) noexcept:
    """Return the UTF-8 of a key and set its size in bytes; NULL for what `encode_key` must see."""
    cdef Py_ssize_t length
    cdef const char *text
    if not PyUnicode_CheckExact(key) or not 0 < PyUnicode_GET_LENGTH(key) <= <Py_ssize_t>MAX_KEY_CHARACTERS:
        return NULL
    text = PyUnicode_AsUTF8AndSize(key, &length)
    if text is NULL:
        PyErr_Clear()  # a lone surrogate
    size[0] = length
    return <const uint8_t *>text


cdef inline int64_t lifetime_of(object ttl) except -1:
    """Return a time-to-live in ms, 0 for None; -2 for what `check_ttl` must see."""
    cdef int overflow = 0
    cdef long long seconds
    if ttl is None:
        return 0
    if PyLong_CheckExact(ttl):
        seconds = PyLong_AsLongLongAndOverflow(ttl, &overflow)
        if not overflow and 1 <= seconds <= most_seconds:
            return seconds * 1000
    return -2


cdef bytes json_of(object value):
    """Return a value as JSON; None for one that `encode_value` must see."""
    cdef bytes encoded
    if PyDict_CheckExact(value) and is_plain_json(value, 1):
        try:
            encoded = dumps(value, None, json_options)
        except (TypeError, RecursionError):
            return None
        if <uint64_t>PyBytes_GET_SIZE(encoded) <= MAX_VALUE_SIZE:
            return encoded
    return None


cdef bint is_plain_json(object container, int depth) noexcept:
    """Return whether `codec` would walk through a container's members without a halt."""
    if PyDict_CheckExact(container):
        for member in (<dict>container).values():
            if not is_plain_member(member, depth):
                return False
    elif PyList_CheckExact(container):
        for member in <list>container:
            if not is_plain_member(member, depth):
                return False
    else:
        for member in <tuple>container:
            if not is_plain_member(member, depth):
                return False
    return True


cdef inline bint is_plain_member(object member, int depth) noexcept:
    if (
        PyUnicode_CheckExact(member)
        or PyLong_CheckExact(member)
        or member is None
        or member is True
        or member is False
    ):
        return True
    if PyFloat_CheckExact(member):
        return isfinite(PyFloat_AS_DOUBLE(member)) != 0
    if PyDict_CheckExact(member) or PyList_CheckExact(member) or PyTuple_CheckExact(member):
        return depth < max_depth and is_plain_json(member, depth + 1)
    return False
