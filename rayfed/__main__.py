"""`python -m rayfed` is `rayfed`."""

import sys

from rayfed.cli import main

sys.exit(main())
