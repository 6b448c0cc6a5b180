"""Tiny models compute faster on one thread, and much faster where the machine has other work."""

import torch

torch.set_num_threads(1)
