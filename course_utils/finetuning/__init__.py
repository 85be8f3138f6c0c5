"""Training through quantized layers."""
