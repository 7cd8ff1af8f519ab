"""Without a GPU, Triton kernels run in its interpreter; the variable must be set before triton is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
