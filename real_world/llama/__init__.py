"""The Llama example."""

import os

# Before PyTorch is imported: OpenMP's threads wait for each other in a loop, and if another process
# has taken a core, for long. Now they sleep after 1,000 rounds. The README has the speeds.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
