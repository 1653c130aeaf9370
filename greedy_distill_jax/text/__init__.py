"""Text encoders and stores of their rows."""
