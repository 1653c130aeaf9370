"""Kernels and the reference code that defines them."""
