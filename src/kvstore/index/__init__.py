"""Where each record is: an index that can be rebuilt from the records."""
