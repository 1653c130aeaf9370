"""Every configuration key with its default; ``greedy_distill_jax/config/keys.py`` has their types and comments.

python -m greedy_distill_jax.train --config=configs/base.py --workdir=runs/teacher
"""

from greedy_distill_jax.config import base


def get_config():
    """The defaults: a tiny teacher on moving shapes."""
    return base()
