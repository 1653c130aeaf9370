"""The configuration of a run: keys (``keys``), one reading into frozen ``Settings``, the registry of stages.

config = base()                    # a ConfigDict of every key, typed; files and command lines change it
settings = read_settings(config)   # once, at the edge; below it nobody sees a ConfigDict
"""

from greedy_distill_jax.config.settings import Settings, read_settings
from greedy_distill_jax.config.stages import register as register_stage
from greedy_distill_jax.config.tree import base, open_keys

__all__ = ["Settings", "base", "open_keys", "read_settings", "register_stage"]
