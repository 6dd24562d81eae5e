"""Everything at once: rebuild the index, check it, judge what was found."""
