"""Networks of the learned scores, kept apart because they import torch."""
