# SPDX-License-Identifier: Apache-2.0
"""``python -m kdengine.cli``."""

import sys

from kdengine.cli import main

if __name__ == "__main__":
    sys.exit(main())
