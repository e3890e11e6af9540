"""One thread a test: the tensors are tiny, and threads that wait for each other on a busy machine are far slower."""

import torch

torch.set_num_threads(1)
