"""Values that guide: what is to be expected of a text begun so, learnt from the model's own outputs."""
