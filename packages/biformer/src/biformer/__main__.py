"""`python -m biformer`, the same as the command."""

import sys

from biformer.cli import main

if __name__ == "__main__":  # a spawned data loading process imports this module too
    sys.exit(main())
