"""`python -m fastrl`: the `fastrl` command."""

import os
import sys

# Python puts the current folder first for -m. It comes last: a file there with the name of a package must not run.
if not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):
    sys.path.append(sys.path.pop(0))

from fastrl.cli import main

sys.exit(main())
