# Part of `_fast_path`: the operations on many keys, a group at a time.
#
# Looked up one by one, a key of a large store costs the processor a wait for each line of memory on
# its way: page of the table, slot, record. So of a group's keys all pages are fetched first, then
# all slots, then all records; then each is read, put or deleted, in order, as by the operations on
# one key, and finds them at hand.
#
# Each of the last three functions takes items off an iterator, which may run Python, until it has a
# group of them. `rare` is called with what is for Python: the item that a group ends with, and
# whatever turns out to be so amid the others, in its turn. Where the iterator raises, those before
# come first. Between two groups the caller, in Python, has other threads and signals get theirs.

cdef enum:
    MOST_IN_GROUP = 32
    MOST_BYTES_IN_GROUP = 65536  # of values that are to be stored

cdef enum Ending:
    # How a group ended. Is its last item ODD, it is none of the group but for Python; is it an
    # ERROR, it is the one that the iterator raised.
    FULL
    LAST
    ODD
    ERROR


cdef struct Expected:
    # A key of a group.
    const uint8_t *text
    uint64_t size
    uint64_t key_hash
    uint64_t bucket  # the offset of its home; 0 where the directory is damaged
    int64_t slot  # as `find` gives it
    uint64_t expires_at


# --- what is fetched -----------------------------------------------------------------------------


cdef void fetch(FastPath path, Expected *keys, Py_ssize_t count) noexcept:
    """Have the processor fetch what is needed for a group's keys; set their slots, 0 for RARE.

    Nothing of Python's runs: until something does, what may be read now stays as it is.
    """
    cdef Py_ssize_t index
    if path.is_open:
        fetch_buckets(path, keys, count)
        fetch_slots(path, keys, count)
        fetch_records(path, keys, count)
    else:
        for index in range(count):
            keys[index].slot = 0


cdef inline void fetch_buckets(FastPath path, Expected *keys, Py_ssize_t count) noexcept:
    cdef const uint8_t *memory = path.base
    cdef uint64_t extent, position
    cdef Py_ssize_t index
    for index in range(count):
        position = keys[index].key_hash >> DIRECTORY_SHIFT
        extent = load_short(memory + DIRECTORY_OFFSET + 2 * position)
        keys[index].bucket = 0
        if path.is_extent(extent):
            keys[index].bucket = (
                extent << EXTENT_SHIFT | (keys[index].key_hash & BUCKET_COUNT - 1) << BUCKET_SHIFT
            )
            prefetch(memory + keys[index].bucket)
            prefetch(memory + keys[index].bucket + 64)
            prefetch(memory + map_entry_of(extent))


cdef inline void fetch_slots(FastPath path, Expected *keys, Py_ssize_t count) noexcept:
    """Fetch those that a key may be in; where there is none, the one that is free for it."""
    cdef const uint8_t *bucket
    cdef const uint8_t *control
    cdef const uint8_t *place
    cdef Py_ssize_t index
    cdef int fingerprint
    for index in range(count):
        if not keys[index].bucket:
            continue
        bucket = path.base + keys[index].bucket
        control = bucket + CONTROL_OFFSET
        fingerprint = FINGERPRINT_CODES[keys[index].key_hash >> FINGERPRINT_SHIFT & 0xFF]
        place = <const uint8_t *>memchr(control, fingerprint, SLOT_COUNT)
        if place is NULL:
            place = <const uint8_t *>memchr(control, CONTROL_EMPTY, SLOT_COUNT)
        while place is not NULL:
            prefetch(bucket + BUCKET_HEADER_SIZE + (place - control) * SLOT_SIZE)
            prefetch(bucket + BUCKET_HEADER_SIZE + (place - control + 1) * SLOT_SIZE - 1)
            place += 1
            place = <const uint8_t *>memchr(place, fingerprint, SLOT_COUNT - (place - control))


cdef inline void fetch_records(FastPath path, Expected *keys, Py_ssize_t count) noexcept:
    """Find the keys, and fetch the records that they have."""
    cdef uint64_t tail, offset, end
    cdef Py_ssize_t index
    for index in range(count):
        keys[index].slot = 0
        if not path.may_read(keys[index].key_hash):
            continue
        keys[index].slot = path.find(keys[index].key_hash, keys[index].text, keys[index].size)
        if keys[index].slot > 0:
            tail = load(path.base + keys[index].slot + SLOT_RECORD_OFFSET)
            offset = tail & SLOT_RECORD_MASK
            prefetch(path.base + map_entry_of(offset >> EXTENT_SHIFT))
            end = RECORD_HEADER_SIZE + keys[index].size + (tail >> SLOT_VALUE_SIZE_SHIFT & 0xFFFF)
            end = offset + min(end, <uint64_t>MOST_PREFETCHED)
            offset += 128  # `find` has fetched the lines before
            while offset < end + 63:
                prefetch(path.base + offset)
                offset += 64


cdef inline int64_t slot_of(FastPath path, Expected *key, bint is_stale) noexcept:
    """Return the slot of a key as `find` does: the one that `fetch` has found, if it still is.

    It is unless another of the group was stored in it, or removed from it; or a segment was split,
    or Python has run since, of which `is_stale` tells.
    """
    cdef int64_t slot = key.slot
    cdef bint is_live
    if slot and not is_stale:
        is_live = path.base[control_of(<uint64_t>(slot if slot > 0 else -slot))] > CONTROL_TOMBSTONE
        if is_live == (slot > 0):
            return slot
    return path.find(key.key_hash, key.text, key.size)


# --- the operations ------------------------------------------------------------------------------


cdef inline bint take_key(FastPath path, object key, Expected *expected) noexcept:
    """Set what a key says by itself; False for RARE."""
    expected.text = text_of(key, &expected.size)
    if expected.text is NULL:
        return False
    expected.key_hash = xxh3(expected.text, expected.size, path.seed)
    return True


cdef Ending take_keys(FastPath path, object iterator, Expected *keys, list group) except *:
    """Append the keys of a group; return how it ended."""
    cdef Py_ssize_t count = 0
    try:
        for key in iterator:
            group.append(key)
            if not take_key(path, key, &keys[count]):
                return ODD
            count += 1
            if count == MOST_IN_GROUP:
                return FULL
    except BaseException as error:
        group.append(error)
        return ERROR
    return LAST


cdef bint read_group(
    FastPath path, object iterator, dict found, object parse, object rare
) except -1:
    """Set the values of a group of keys in `found`, as `parse` makes them of JSON.

    `rare` is called with a key, and sets its value itself.

    Returns:
        Whether there may be more.
    """
    cdef Expected keys[MOST_IN_GROUP]
    cdef list group = [], values = []
    cdef Ending ending = take_keys(path, iterator, keys, group)
    cdef Py_ssize_t count = len(group) - (ending == ODD or ending == ERROR), index
    cdef bint expires = False
    cdef uint64_t now_ms = 0
    fetch(path, keys, count)
    for index in range(count):
        value = RARE
        if keys[index].slot > 0:
            keys[index].expires_at = load(path.base + keys[index].slot + SLOT_EXPIRES_OFFSET)
            expires |= keys[index].expires_at != 0
            value = path.value_in(keys[index].slot, keys[index].key_hash, keys[index].size)
        elif keys[index].slot:
            value = ABSENT
        values.append(value)
    # From here on Python may run.
    if expires:
        now_ms = path.now_ms()
    for index in range(count):
        value = values[index]
        if value is ABSENT:
            continue
        if value is not RARE and not 0 < keys[index].expires_at <= now_ms:
            try:
                found[group[index]] = parse(value)
                continue
            except ValueError:
                pass
        rare(group[index])
    if ending == ODD:
        rare(group[count])
    elif ending == ERROR:
        raise group[count]
    return ending != LAST


cdef bint put_group(
    FastPath path, object iterator, object ttl, object written, object rare
) except -1:
    """Put a group of pairs.

    `rare` is called with a pair, and its value as JSON where that was made already; then the pair
    has it instead of the value.

    Args:
        written: where the bytes begin and end that all records are in; extended.

    Returns:
        Whether there may be more.
    """
    cdef Expected keys[MOST_IN_GROUP]
    cdef list names = [], values = []
    cdef int64_t lifetime = lifetime_of(ttl)
    cdef Ending ending = LAST
    cdef Py_ssize_t count = 0, index, size = 0
    cdef bint is_stale = False
    cdef uint64_t now_ms = 0, done, start = written[0], end = written[1], splits
    cdef object last = None
    cdef bytes encoded
    try:
        for pair in iterator:
            # Encoded at once: whoever gives the pairs may use the same dict for the next one.
            if (
                lifetime < 0
                or not PyTuple_CheckExact(pair)
                or len(<tuple>pair) != 2
                or not take_key(path, (<tuple>pair)[0], &keys[count])
                or (encoded := json_of((<tuple>pair)[1])) is None
            ):
                ending, last = ODD, pair
                break
            names.append((<tuple>pair)[0])
            values.append(encoded)
            count += 1
            size += PyBytes_GET_SIZE(encoded)
            if count == MOST_IN_GROUP or size >= MOST_BYTES_IN_GROUP:
                ending = FULL
                break
    except BaseException as error:
        ending, last = ERROR, error
    try:
        if count:
            now_ms = path.now_ms()  # before it is found where they are: it may run Python
        fetch(path, keys, count)
        splits = path.splits
        for index in range(count):
            encoded = stored = values[index]
            if path.may_change(keys[index].key_hash):
                stored = path.store_record(
                    slot_of(path, &keys[index], is_stale or path.splits != splits),
                    keys[index].key_hash,
                    keys[index].text,
                    keys[index].size,
                    encoded,
                    0,
                    now_ms + lifetime if lifetime else 0,
                    now_ms,
                    True,
                )
            if stored is encoded:
                rare((names[index], encoded), encoded)
                now_ms = path.now_ms()
                is_stale = True
            else:
                done = stored
                start = min(start, done & SLOT_RECORD_MASK)
                end = max(end, (done & SLOT_RECORD_MASK) + (done >> RECORD_SIZE_SHIFT))
        if ending == ODD:
            rare(last, None)
    finally:
        # What `rare` has written is there already.
        start, end = min(start, <uint64_t>written[0]), max(end, <uint64_t>written[1])
        written[0], written[1] = start, end
    if ending == ERROR:
        raise last
    return ending != LAST


cdef tuple delete_group(FastPath path, object iterator, object rare):
    """Delete a group of keys; `rare` is called with a key, and returns whether it was there.

    Returns:
        How many were there, and whether there may be more.
    """
    cdef Expected keys[MOST_IN_GROUP]
    cdef list group = []
    cdef Ending ending = take_keys(path, iterator, keys, group)
    cdef Py_ssize_t count = len(group) - (ending == ODD or ending == ERROR), index, deleted = 0
    cdef bint is_stale = False
    cdef uint64_t now_ms = 0, expires_at
    cdef int64_t slot
    if count:
        now_ms = path.now_ms()  # before it is found where they are: it may run Python
    fetch(path, keys, count)
    for index in range(count):
        done = RARE
        if path.may_change(keys[index].key_hash):
            slot = slot_of(path, &keys[index], is_stale)
            if slot > 0:
                expires_at = load(path.base + slot + SLOT_EXPIRES_OFFSET)
                if not 0 < expires_at <= now_ms and path.delete_(
                    slot, keys[index].text, keys[index].size
                ):
                    done = True
            elif slot:
                done = ABSENT
        if done is RARE:
            done = rare(group[index])
            now_ms = path.now_ms()
            is_stale = True
        deleted += bool(done)
    if ending == ODD:
        deleted += bool(rare(group[count]))
    elif ending == ERROR:
        raise group[count]
    return deleted, ending != LAST
