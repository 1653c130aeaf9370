"""Losses of reinforcement learning on a streaming student's own videos (stage "rl")."""
