"""The Wan2.1 DiT."""
