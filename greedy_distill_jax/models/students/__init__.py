"""The streaming students made from it."""
