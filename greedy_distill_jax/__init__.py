"""Distil bidirectional video diffusion transformers into streaming students, in JAX and Flax.

Importing the package starts no backend and reads no file; import the modules you need, for example
`from greedy_distill_jax.streaming import session`.
"""

__version__ = "0.1.0"
