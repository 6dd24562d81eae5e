"""kvstore-inspect: see into a store, check it, carry it elsewhere, mend it.

Modules, low to high: `image` (the bytes of a file, and what its superblock says), `records` (every
record of it, by the index or by itself), `findings` (what the checker finds, and the records
counted), `explanations` (what each problem means, and what mends it), `mending` (how), `terminal`
(what is printed, and how), `commands` (one module each), `command_line`. The format is
`kvstore.format.layout`'s alone.
"""
