"""The command of ``benchmarks/gpu``, by the name of a file: ``python benchmarks/gpu_check.py --minutes 10``."""

import sys
from pathlib import Path

# In place of this folder, whose `kernels` would come before Hugging Face's package of that name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.gpu.__main__ import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
