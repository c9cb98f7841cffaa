"""`python -m tutti`, which is `tutti`."""

import sys

from tutti.cli import main

sys.exit(main())
