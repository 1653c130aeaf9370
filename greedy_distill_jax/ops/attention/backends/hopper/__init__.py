"""Kernels for NVIDIA Hopper in Pallas, Mosaic GPU; ``backends/mosaic_gpu.py`` is the backend that they make."""
