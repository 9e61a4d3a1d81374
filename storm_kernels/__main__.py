"""``python -m storm_kernels`` is the command line, ``storm-kernels``."""

import sys

from .cli import main

sys.exit(main())
