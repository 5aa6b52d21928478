"""`python -m diswot`, the same as the command."""

import sys

from diswot.cli import main

sys.exit(main())
