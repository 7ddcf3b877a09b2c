"""Small tensors gain nothing from threads and lose much where cores are shared; first calls may be slow on a busy machine."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("wordless", deadline=None)
settings.load_profile("wordless")
