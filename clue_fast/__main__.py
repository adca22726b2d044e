"""``python -m clue_fast`` is the command ``clue-fast``."""

import sys

from clue_fast.cli import main

sys.exit(main())
