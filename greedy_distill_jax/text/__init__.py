"""Text encoders, stores of their rows, and the prompts they encode."""
