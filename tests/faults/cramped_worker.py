"""The worker, whose rank 1 may take next to nothing of its device's memory."""

from __future__ import annotations

import os
import sys

import torch

from bench import worker

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        torch.cuda.set_per_process_memory_fraction(1e-4, int(os.environ["LOCAL_RANK"]))
    sys.exit(worker.main())
