"""`python -m real_world.llama`."""

import os
import sys

from real_world import distributed
from real_world.llama.page import main

status = main()
(distributed.leave if "RANK" in os.environ else sys.exit)(status)
