"""What a process may import to measure its own memory; see `peak_memory`."""
