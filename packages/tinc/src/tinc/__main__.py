"""`python -m tinc`, the same as the command."""

import sys

from tinc.cli import main

sys.exit(main())
