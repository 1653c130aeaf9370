"""A trained run, loaded, and the teacher's sampler."""
