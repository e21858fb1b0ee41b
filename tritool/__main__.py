# SPDX-License-Identifier: Apache-2.0
"""``python -m tritool``: the command line."""

import sys

from tritool.cli import main

if __name__ == "__main__":
    sys.exit(main())
