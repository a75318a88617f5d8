"""`python -m real_world.stable_diffusion`."""

import sys

from real_world.stable_diffusion.page import main

sys.exit(main())
