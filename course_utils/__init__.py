"""Companion package of the course Large Model Quantization: a deep dive."""

__version__ = "0.1.0"
REPOSITORY = "adiel2012/model-size-reduction"
REVISION = "main"  # what the notebooks' badges open and their set-up cells install
