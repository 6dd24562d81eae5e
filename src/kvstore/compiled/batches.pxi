# Part of `_fast_path`: the operations on many keys, a group at a time.
#
# Looked up one by one, a key of a large store costs the processor a wait for each line of memory on
# its way: page of the table, slot, record. So of a group's keys all pages are fetched first, then
# all slots, then all records; what follows finds them at hand. It is done key by key, in order, as
# the operations on one key do it: that what was fetched may have changed by then does not matter.
#
# Each function takes keys off an iterator, which may run Python, until it has a group of them. It
# ends with what is not for it: that is for `rare`, as whatever turns out to be so amid the group,
# in its turn. Between two groups the caller, in Python, has other threads and signals get theirs.

cdef enum:
    MOST_IN_GROUP = 32
    MOST_BYTES_IN_GROUP = 65536  # of values that are to be stored


cdef struct Expected:
    # A key of a group.
    const uint8_t *text
    uint64_t size
    uint64_t key_hash
    uint64_t bucket  # its home's offset; 0 where that cannot be followed
    int64_t slot  # as `find` gives it
    uint64_t expires_at


cdef inline bint take_key(FastPath path, object key, Expected *expected) noexcept:
    """Set what is known of a key by itself, and fetch its entry in the directory; False for RARE."""
    expected.text = text_of(key, &expected.size)
    if expected.text is NULL:
        return False
    expected.key_hash = xxh3(expected.text, expected.size, path.seed)
    return True


cdef void fetch_buckets(FastPath path, Expected *keys, Py_ssize_t count) noexcept:
    """Fetch the pages and the slots where a group's keys are looked for."""
    cdef const uint8_t *memory = path.base
    cdef const uint8_t *control
    cdef const uint8_t *place
    cdef uint64_t extent
    cdef Py_ssize_t index
    cdef int fingerprint
    for index in range(count):
        extent = load_short(
            memory + DIRECTORY_OFFSET + 2 * (keys[index].key_hash >> DIRECTORY_SHIFT)
        )
        keys[index].bucket = 0
        if path.is_extent(extent):
            keys[index].bucket = (
                extent << EXTENT_SHIFT | (keys[index].key_hash & BUCKET_COUNT - 1) << BUCKET_SHIFT
            )
            prefetch(memory + keys[index].bucket)
            prefetch(memory + keys[index].bucket + 64)
            prefetch(memory + map_entry_of(extent))
    for index in range(count):
        if not keys[index].bucket:
            continue
        control = memory + keys[index].bucket + CONTROL_OFFSET
        fingerprint = FINGERPRINT_CODES[keys[index].key_hash >> FINGERPRINT_SHIFT & 0xFF]
        place = <const uint8_t *>memchr(control, fingerprint, SLOT_COUNT)
        if place is NULL:
            place = <const uint8_t *>memchr(control, CONTROL_EMPTY, SLOT_COUNT)
        while place is not NULL:
            fetch_slot(memory + keys[index].bucket + BUCKET_HEADER_SIZE + <uint64_t>(place - control) * SLOT_SIZE)
            place += 1
            place = <const uint8_t *>memchr(place, fingerprint, SLOT_COUNT - (place - control))


cdef inline void fetch_slot(const uint8_t *slot) noexcept:
    prefetch(slot)
    prefetch(slot + SLOT_SIZE - 1)


cdef void fetch_records(FastPath path, Expected *keys, Py_ssize_t count) noexcept:
    """Find a group's keys, whose pages are at hand, and fetch the records that they have."""
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


cdef void fetch(FastPath path, Expected *keys, Py_ssize_t count) noexcept:
    """Have the processor fetch what is needed for a group's keys; set their slots.

    Nothing of Python's runs: until something does, what may be read now stays as it is.
    """
    cdef Py_ssize_t index
    if path.is_open:
        fetch_buckets(path, keys, count)
        fetch_records(path, keys, count)
    else:
        for index in range(count):
            keys[index].slot = 0


cdef inline int64_t slot_of(FastPath path, Expected *key, bint is_stale) noexcept:
    """Return the slot of a key as `find` does: the one that `fetch` has found, if it still is.

    It is unless another of the group was stored in it, or removed from it, or Python has run since,
    of which `is_stale` tells.
    """
    cdef int64_t slot = key.slot
    if slot and not is_stale:
        if (path.base[control_of(slot if slot > 0 else -slot)] > CONTROL_TOMBSTONE) == (slot > 0):
            return slot
    return path.find(key.key_hash, key.text, key.size)


cdef bint read_group(FastPath path, object iterator, dict found, object parse, object rare) except -1:
    """Set the values of a group of keys in `found`, as `parse` makes them of JSON.

    `rare` is called with a key that is for Python, amid the others, and sets its value itself.

    Returns:
        Whether there may be more.
    """
    cdef Expected keys[MOST_IN_GROUP]
    cdef Py_ssize_t count = 0, index
    cdef list group = [], values = []
    cdef bint is_last = False, ends_rare = False, expires = False
    cdef uint64_t now_ms = 0
    cdef object key = None
    for key in iterator:
        if not take_key(path, key, &keys[count]):
            ends_rare = True
            break
        group.append(key)
        count += 1
        if count == MOST_IN_GROUP:
            break
    else:
        is_last = True
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
    if ends_rare:
        rare(key)
    return not is_last


cdef bint put_group(FastPath path, object iterator, object ttl, object written, object rare) except -1:
    """Put a group of pairs.

    `rare` is called with a pair that is for Python, amid the others, and its value as JSON where
    that was made already; then the pair has it instead of the value.

    Args:
        written: where the bytes begin and end that all records are in; extended.

    Returns:
        Whether there may be more.
    """
    cdef Expected keys[MOST_IN_GROUP]
    cdef Py_ssize_t count = 0, index, size = 0
    cdef list names = [], values = []
    cdef int64_t lifetime = lifetime_of(ttl)
    cdef bint is_last = False, ends_rare = False, is_stale = False
    cdef uint64_t now_ms = 0, done, start = written[0], end = written[1]
    cdef object pair = None, failure = None
    cdef bytes encoded
    try:
        for pair in iterator:
            ends_rare = True
            if lifetime < 0 or not PyTuple_CheckExact(pair) or len(<tuple>pair) != 2:
                break
            if not take_key(path, (<tuple>pair)[0], &keys[count]):
                break
            # At once: whoever gives the pairs may use the same dict for the next one.
            encoded = json_of((<tuple>pair)[1])
            if encoded is None:
                break
            ends_rare = False
            names.append((<tuple>pair)[0])
            values.append(encoded)
            count += 1
            size += PyBytes_GET_SIZE(encoded)
            if count == MOST_IN_GROUP or size >= MOST_BYTES_IN_GROUP:
                break
        else:
            is_last = True
    except BaseException as error:
        failure = error  # those before it first
    try:
        if count:
            now_ms = path.now_ms()
        fetch(path, keys, count)
        for index in range(count):
            encoded = stored = values[index]
            if path.may_change(keys[index].key_hash):
                stored = path.store_record(
                    slot_of(path, &keys[index], is_stale),
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
        if ends_rare:
            rare(pair, None)
    finally:
        # What `rare` has written is there already.
        written[0] = min(start, <uint64_t>written[0])
        written[1] = max(end, <uint64_t>written[1])
    if failure is not None:
        raise failure
    return not is_last


cdef tuple delete_group(FastPath path, object iterator, object rare):
    """Delete a group of keys; `rare` deletes one that is for Python, and returns whether it was there.

    Returns:
        How many were there, and whether there may be more.
    """
    cdef Expected keys[MOST_IN_GROUP]
    cdef Py_ssize_t count = 0, index, deleted = 0
    cdef uint64_t now_ms = 0, expires_at
    cdef int64_t slot
    cdef list group = []
    cdef bint is_last = False, ends_rare = False, is_stale = False
    cdef object key = None, failure = None
    try:
        for key in iterator:
            if not take_key(path, key, &keys[count]):
                ends_rare = True
                break
            group.append(key)
            count += 1
            if count == MOST_IN_GROUP:
                break
        else:
            is_last = True
    except BaseException as error:
        failure = error  # those before it first
    if count:
        now_ms = path.now_ms()
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
    if ends_rare:
        deleted += bool(rare(key))
    if failure is not None:
        raise failure
    return deleted, not is_last
