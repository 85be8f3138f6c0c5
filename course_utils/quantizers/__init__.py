"""Quantization methods, one module each, named as the method: `get_method` imports what is asked for."""
