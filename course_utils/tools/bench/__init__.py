"""Benchmarks, `course bench`: never run as tests, since their seconds are a machine's at a moment."""
