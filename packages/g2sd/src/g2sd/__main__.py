"""`python -m g2sd`, the same as the command."""

import sys

from g2sd.cli import main

sys.exit(main())
