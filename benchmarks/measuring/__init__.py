"""Rows and how they are measured: workloads, baselines, the harness, one `bench_*.py` a family."""
