"""Generating from a distribution that was changed on purpose: transforms, the loop, strategies."""
