"""What the bytes of the file mean: pure, no I/O."""
