"""`python -m real_world.benchmark`."""

import sys

from real_world.benchmark import main

sys.exit(main())
