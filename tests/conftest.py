"""Settings for the whole suite."""

from __future__ import annotations

import torch
from hypothesis import settings

# The networks here are small: a second thread gains nothing and, beside other programs, costs much.
torch.set_num_threads(1)

# Examples fail by what they find, not by how long a busy machine takes to find it.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
