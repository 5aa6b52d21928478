"""`python -m gradfilter`, the same as the command."""

import sys

from gradfilter.cli import main

sys.exit(main())
