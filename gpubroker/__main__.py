"""`python -m gpubroker`."""

import sys

from gpubroker.cli import main

sys.exit(main())
