"""``python -m dlkern`` is the ``dlkern`` command."""

from __future__ import annotations

import sys

from dlkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
