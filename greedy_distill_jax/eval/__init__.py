"""Reading videos back: oracle and metrics."""
