"""The Llama example."""

import os

# Before PyTorch is imported. OpenMP's threads wait for each other in a loop, and if another process
# has taken a core, for long: on one of two cores, each token takes three times as long. They sleep
# after 1,000 rounds instead: twice as fast then, and 3% slower on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
