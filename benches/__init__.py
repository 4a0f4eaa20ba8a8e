"""Benchmarks, side by side with peers in one run: python -m benches. Ratios count; times are of one machine."""
