"""Every loss of reinforcement learning raises the reward of the smallest policy there is."""

import jax
import jax.numpy as jnp
import pytest

from greedy_distill_jax.losses import asked
from greedy_distill_jax.losses.pair import draw_pair
from greedy_distill_jax.losses.rl.advantage import combine
from greedy_distill_jax.losses.rl.cm_grpo import cm_grpo
from greedy_distill_jax.losses.rl.direct import direct
from greedy_distill_jax.losses.rl.dpo_chunk import dpo_chunk
from greedy_distill_jax.losses.rl.episode import Episode
from greedy_distill_jax.losses.rl.neighbor import neighbor
from greedy_distill_jax.losses.rl.nft import nft
from greedy_distill_jax.losses.rl.re_dmd import re_dmd
from greedy_distill_jax.testing.gaussian import gaussian

GROUPS, GROUP, UPDATES = 8, 8, 200
SHAPE = (GROUPS * GROUP, 1, 1, 1, 2)  # B T H W C
TARGET = jnp.asarray([1.5, -1.0])
GAIN, NEXT = 0.5, 0.3


def predict(mean, x):
    """x0 of a policy whose parameter is a point: N(mean, GAIN^2) over the noise x."""
    return mean[None, None, None, None] + GAIN * x


def reward(x0):
    return -jnp.sum(jnp.square(x0 - TARGET[None, None, None, None]), axis=(1, 2, 3, 4))


def episode_of(mean, key):
    """One denoising step and one re-noising step; a group's noises are neighbours of its first one."""
    key_centre, key_own, key_next, key_lost = jax.random.split(key, 4)
    centre = jax.random.normal(key_centre, (GROUPS, 1, *SHAPE[1:]))
    own = jax.random.normal(key_own, (GROUPS, GROUP, *SHAPE[1:]))
    x = jnp.concatenate([centre, 0.6 * centre + 0.8 * own[:, 1:]], axis=1).reshape(SHAPE)
    predicted = predict(mean, x)
    following = (1.0 - NEXT) * predicted + NEXT * jax.random.normal(key_next, SHAPE)
    finished = following / (1.0 - NEXT)
    lost = jax.random.uniform(key_lost, SHAPE[:1]) < 0.1  # by the judge
    combined = combine({"near": jnp.where(lost, jnp.nan, reward(finished))}, {"near": 1.0}, GROUP)
    levels = jnp.ones((1,)), jnp.full((1,), NEXT)
    return Episode(
        x0_BTHWC=finished,
        x_BTHWC=x,
        sigma_T=levels[0],
        next_BTHWC=following,
        next_sigma_T=levels[1],
        predicted_BTHWC=predicted,
        reward_B=combined.reward_B,
        advantage_B=combined.advantage_B,
        counts_B=combined.counts_B,
        judged_B=combined.judged_B,
        weight_T=jnp.ones((1,)),
        group=GROUP,
    )


@pytest.mark.parametrize(
    "loss, options",
    [
        (cm_grpo, {}),
        (cm_grpo, {"clip": 1e-4}),
        (nft, {}),
        (neighbor, {}),
        (dpo_chunk, {}),
        (direct, {}),
        (re_dmd, {"beta": 0.5, "baseline": "batch", "normalizer": "none"}),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_it_raises_the_expected_reward(loss, options):
    start = jnp.zeros(2)

    def update(carry, key):
        mean, average = carry
        key_episode, key_pair, key_loss = jax.random.split(key, 3)
        episode = episode_of(mean, key_episode)
        # A teacher that likes all videos alike: what is left of distribution matching spreads the student's.
        scores = gaussian(0.0, 10.0), gaussian(mean[None, None, None, None], GAIN)
        pair = draw_pair(key_pair, episode.predicted_BTHWC, *scores, {}, shift=1.0, high=0.3)

        def value(mean):
            offered = dict(
                episode=episode,
                current=lambda x, sigma: predict(mean, x),
                old=lambda x, sigma: predict(average, x),
                reference=lambda x, sigma: predict(start, x),
                rewarded=reward,
                pair=pair,
            )
            given = {name: offered[name] for name in asked(loss)}
            batch = {"action": predict(mean, episode.x_BTHWC)}
            return jnp.mean(loss(None, batch, key_loss, **given, **options)[0])

        found = jax.grad(value)(mean)
        mean = mean - 0.02 * found / (jnp.linalg.norm(found) + 1e-12)
        return (mean, 0.9 * average + 0.1 * mean), None

    keys = jax.random.split(jax.random.key(0), UPDATES)
    (mean, _), _ = jax.jit(lambda: jax.lax.scan(update, (start, start), keys))()
    # E[r] is minus the squared distance of the mean to the target, less a constant.
    before, after = (float(jnp.sum(jnp.square(at - TARGET))) for at in (start, mean))
    assert after < 0.2 * before
