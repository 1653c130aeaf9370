"""Training: networks, updates, self-rollout, metrics."""
