"""Small tensors gain nothing from threads and lose much where cores are shared; first calls may be slow on a busy machine."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # other workers are on the same cores; OpenMP looks at this once, when it is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("wordless", deadline=None)
settings.load_profile("wordless")
