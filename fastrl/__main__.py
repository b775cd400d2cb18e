"""`python -m fastrl`: the `fastrl` command."""

import sys

from fastrl.cli import main

sys.exit(main())
