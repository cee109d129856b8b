"""How much a refinement improves masks on real photographs, and how long it takes: `python -m benchmarks.quality`."""
