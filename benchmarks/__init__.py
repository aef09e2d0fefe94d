"""dlkern's benchmarks under pytest-benchmark, and what makes README's tables of their results."""
