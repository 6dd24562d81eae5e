"""kvstore-inspect: see into a store, check it, carry it elsewhere, repair it.

Modules, low to high: `file_view` (the bytes of a file, and what its superblock says), `table` (its
pages and slots), `records` (every record, by the index or by itself), `contents` (what the
keys are), `survey` (all of it in numbers), `check_result` (what the checker finds, and the records
counted), `explanations` (what each problem means, and what to do about it), `repair`, `describe`
(structures with every field named), `jsonl` (a record as a line), `terminal` (what is printed, and
how), `commands` (one module each), `start` (what is said where none was given), `command_line`. The
format is `kvstore.format.layout`'s alone.
"""
