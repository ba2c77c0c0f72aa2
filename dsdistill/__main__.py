"""``python -m dsdistill``: the command line."""

import sys

from dsdistill.cli.main import main

sys.exit(main())
