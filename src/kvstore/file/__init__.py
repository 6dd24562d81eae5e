"""One locked, mapped file, written and flushed safely, and what differs by platform."""
