"""Settings for the whole suite."""

from __future__ import annotations

import torch

# The networks here are small: a second thread gains nothing and, beside other programs, costs much.
torch.set_num_threads(1)
