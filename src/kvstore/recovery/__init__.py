"""Everything at once: rebuild the index, check it, classify what was found."""
