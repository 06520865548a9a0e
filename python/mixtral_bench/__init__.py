"""Kernel benchmarks of mixtral_ext, and the case lists they share with the tests."""
