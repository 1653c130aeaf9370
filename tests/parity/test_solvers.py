"""Solvers against the schedulers of diffusers that Wan's pipeline uses: the input of every network call and the end.

The schedulers run in float64 (samples and noise levels), so that what is compared is our float32 rounding alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion import noise_levels, solvers

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'greedy_distill_jax[parity]'")

TOLERANCE = 1e-6  # of values of about 1; relative beyond


def velocity(x, sigma, m):
    """Of data that is about x / 2 at high noise and bends with x: nothing a solver integrates exactly. `m`: sin."""
    return 0.9 * x - 0.4 * m(3.0 * x + 2.0 * sigma)


def ours(name, noise, steps, shift):
    inputs = []

    def net(x, sigma):
        jax.debug.callback(lambda x: inputs.append(np.asarray(x)), x, ordered=True)
        return velocity(x, sigma, jnp.sin)

    end = jax.jit(lambda noise: solvers.solve(name, net, noise, steps=steps, shift=shift))(noise)
    jax.block_until_ready(end)
    jax.effects_barrier()
    return [*inputs, np.asarray(end)]


def theirs(scheduler, noise):
    x, states = torch.from_numpy(noise).double(), []
    scheduler.sigmas = scheduler.sigmas.double()
    for t in scheduler.timesteps:
        states.append(x.numpy())
        v = velocity(x, float(t) / 1000, torch.sin)
        x = scheduler.step(v, t, x, return_dict=False)[0].double()
    return [*states, x.numpy()]


def compare(ours, theirs):
    assert len(ours) == len(theirs) and 0.2 < np.std(theirs[-1]) < 3
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        gap = np.abs(mine - other) / np.maximum(1, np.abs(other))
        assert gap.max() <= TOLERANCE, f"state {number}: {gap.max()}"


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 50])
def test_unipc(noise, steps, shift):
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(noise_levels.diffusers_steps(steps, shift), scheduler.sigmas[:-1], atol=1.1e-6)
    compare(ours("unipc", noise, steps, shift), theirs(scheduler, noise))


@pytest.mark.parametrize("steps", [2, 10])
def test_unipc_at_the_levels_of_wans_own_program(noise, steps):
    """Wan's own program has a copy of this scheduler, with levels and thousandths of its own."""
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(steps)
    levels = np.linspace(0.999, 0.0, steps + 1)[:-1]
    levels = 5.0 * levels / (1 + 4.0 * levels)
    scheduler.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float32)
    scheduler.timesteps = torch.tensor(levels * 1000, dtype=torch.int64)
    compare(ours("unipc_wan", noise, steps, 5.0), theirs(scheduler, noise))


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_euler(noise, steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    np.testing.assert_allclose(noise_levels.uniform_steps(steps, shift), scheduler.sigmas[:-1], atol=1e-7)
    compare(ours("euler", noise, steps, shift), theirs(scheduler, noise))
