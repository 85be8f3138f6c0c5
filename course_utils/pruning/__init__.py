"""Pruning: which weights go (`masks`), how the others are stored (`sparse`), and methods, a module each."""
