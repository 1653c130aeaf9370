"""The training that faults happen to: a tiny teacher with an average, on four devices whatever the processes.

In a process whose environment has FAULT=nan, latents are not finite once the file FAULT_AT is there.
"""

import os
from pathlib import Path

import numpy as np

from greedy_distill_jax.data import loader
from greedy_distill_jax.testing.tiny import train_config

latents_of = loader.latents_of


def _broken(*args):
    found = latents_of(*args)
    return np.full_like(found, np.nan) if Path(os.environ["FAULT_AT"]).exists() else found


if os.environ.get("FAULT") == "nan":
    loader.latents_of = _broken


def get_config():
    """Of a run whose steps do not depend on how many there are."""
    return train_config("teacher", mesh__data=2, mesh__fsdp=2, model__dim=48, model__ffn_dim=96, ema__decay=0.9)
