"""Small models and planted problems for tests and notebooks."""
