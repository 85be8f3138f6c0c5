"""What codes stand for: uniform grids, the observers that find their ranges, fake quantization."""
