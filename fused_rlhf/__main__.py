"""`python -m fused_rlhf` is the command `fused-rlhf`."""

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.exit(import_module("fused_rlhf.trainers.cli").main())
