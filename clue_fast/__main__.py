"""``python -m clue_fast`` is the command ``clue-fast``."""

from __future__ import annotations

import sys

from clue_fast.cli import main

sys.exit(main())
