"""`python -m tests.faults`: the laboratory from the command line."""

import sys
from pathlib import Path

# As pytest has it: the helpers are imported as `support`, the laboratory as `faults`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults.command import main

if __name__ == "__main__":
    sys.exit(main())
