"""`python -m tutti`, which is `tutti`."""

import sys

from tutti.app.cli import main

sys.exit(main())
