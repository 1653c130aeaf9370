"""Streaming inference with caches."""
