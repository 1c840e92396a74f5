"""python -m bench in a checkout, python -m fused_rlhf.bench anywhere."""

from fused_rlhf.bench.command import main

if __name__ == "__main__":
    raise SystemExit(main())
