"""Benchmarks against simpler ways to do the same; `jobs/benchmark.py` runs them."""
