"""The configuration of a run: its keys, their checks, and the frozen settings everything below reads."""
