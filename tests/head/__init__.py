"""Tests of the head; a package, so that its oracle is not taken for `bench/head.py`."""
