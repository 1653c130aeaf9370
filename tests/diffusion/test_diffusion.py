"""Flow arithmetic, noise levels, guidance and the solver against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion import flow, guidance, noise_levels, solvers

SHAPE = (3, 4, 2, 2, 5)


def _normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("sigma_shape", [(3,), (3, 1), (3, 4)])
def test_flow_conversions_invert_each_other(sigma_shape):
    x0, noise = _normal(0), _normal(1)
    sigma = jax.random.uniform(jax.random.key(2), sigma_shape, jnp.float32, 0.1, 1.0)
    x, v = flow.add_noise(x0, noise, sigma), flow.velocity(x0, noise)
    s = np.asarray(sigma).reshape(sigma_shape + (1,) * (5 - len(sigma_shape)))
    np.testing.assert_allclose(x, (1 - s) * np.asarray(x0) + s * np.asarray(noise), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(flow.x0_from_velocity(x, v, sigma), x0, atol=1e-5)
    np.testing.assert_allclose(flow.velocity_from_x0(x, x0, sigma), v, atol=1e-4)
    # The score of N((1 - sigma) x0, sigma^2) at x is -noise / sigma.
    np.testing.assert_allclose(flow.score_from_x0(x, x0, sigma), -np.asarray(noise) / s, atol=1e-3)


def test_flow_ends_are_data_and_noise():
    x0, noise = _normal(0), _normal(1)
    np.testing.assert_array_equal(flow.add_noise(x0, noise, jnp.zeros((3, 1))), x0)
    np.testing.assert_array_equal(flow.add_noise(x0, noise, jnp.ones((3, 1))), noise)


def test_flow_arithmetic_is_float32():
    half = _normal(0).astype(jnp.bfloat16)
    sigma = jnp.full((3, 1), 0.3, jnp.bfloat16)
    results = (flow.add_noise(half, half, sigma), flow.velocity(half, half), flow.x0_from_velocity(half, half, sigma))
    results += (flow.velocity_from_x0(half, half, sigma), flow.score_from_x0(half, half, sigma))
    assert {x.dtype for x in results} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "shift, raw, expected",
    [
        (5.0, (1000, 750, 500, 250), (1000, 937.5, 833.333, 625)),
        (5.0, (100,), (357.143,)),
        (8.0, (1000, 750, 500, 250), (1000, 960, 888.889, 727.273)),
        (8.0, (100,), (470.588,)),
        (1.0, (1000, 333), (1000, 333)),
    ],
)
def test_warped_step_lists_are_the_published_ones(shift, raw, expected):
    np.testing.assert_allclose(1000 * np.asarray(noise_levels.warp_steps(raw, shift)), expected, atol=1e-3)


def test_the_table_runs_from_one_down_to_its_published_end_without_a_zero():
    table = noise_levels.sigma_table(5.0)
    assert table.shape == (1000,) and table[0] == 1.0 and (np.diff(table) < 0).all()
    assert 1000 * table[-1] == pytest.approx(4.98, abs=5e-3)
    np.testing.assert_allclose(table[[0, 250, 500, 750]], noise_levels.warp_steps((1000, 750, 500, 250), 5.0))


def test_uniform_steps():
    np.testing.assert_allclose(noise_levels.uniform_steps(4, 5.0), noise_levels.warp_steps((1000, 750, 500, 250), 5.0))
    assert noise_levels.uniform_steps(1, 8.0) == (1.0,)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        noise_levels.uniform_steps(0, 5.0)


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_the_bell_weight_has_mean_one_and_its_peak_at_half(shift):
    table = noise_levels.sigma_table(shift)
    weight = np.asarray(noise_levels.bell_weight(jnp.asarray(table, jnp.float32), shift))
    assert weight.mean() == pytest.approx(1.0, rel=1e-4) and weight.min() == pytest.approx(0.0, abs=1e-4)
    assert table[weight.argmax()] == pytest.approx(0.5, abs=0.01)


def _unshifted(sigma, shift):
    sigma = np.asarray(sigma, np.float64)
    return sigma / (shift - (shift - 1) * sigma)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_uniform_draws_are_uniform_over_the_table(shift):
    sigma = noise_levels.draw_sigma(jax.random.key(0), (200, 100), shift=shift)
    assert sigma.shape == (200, 100) and sigma.dtype == jnp.float32
    steps = 1000 * _unshifted(sigma, shift)
    np.testing.assert_allclose(steps, np.rint(steps), atol=0.02)
    assert steps.min() >= 0.98 and steps.max() <= 1000.02
    np.testing.assert_allclose(np.quantile(steps, [0.1, 0.25, 0.5, 0.75, 0.9]), [100, 250, 500, 750, 900], atol=15)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_logit_normal_draws_are_normal_before_the_shift(shift):
    sigma = noise_levels.draw_sigma(jax.random.key(0), (20000,), distribution="logit_normal", shift=shift)
    assert sigma.dtype == jnp.float32 and sigma.min() > 0 and sigma.max() <= 1
    raw = _unshifted(sigma, shift)
    logit = np.log(raw / (1 - raw))
    assert logit.mean() == pytest.approx(0, abs=0.03) and logit.std() == pytest.approx(1, abs=0.03)


def test_an_unknown_distribution_names_itself():
    with pytest.raises(ValueError, match="'cauchy' is unknown"):
        noise_levels.draw_sigma(jax.random.key(0), (2,), distribution="cauchy")


def test_guidance_is_the_standard_formula_in_one_call():
    calls = []

    def net(x, sigma, text):
        calls.append((x.shape, sigma.shape, text.shape))
        return x * sigma + text.mean(axis=(1, 2))[:, None]

    x, sigma, text, null = _normal(0, (2, 3)), jnp.full((2, 1), 0.5), _normal(1, (2, 4, 6)), _normal(2, (2, 4, 6))
    got = guidance.guided(net, text, null, 2.5)(x, sigma)
    assert calls == [((4, 3), (4, 1), (4, 4, 6))]
    conditional, unconditional = net(x, sigma, text), net(x, sigma, null)
    np.testing.assert_allclose(got, unconditional + 2.5 * (conditional - unconditional), rtol=1e-5, atol=1e-6)
    # Self-Forcing's w = 3 on top of the conditional branch is standard guidance 4.
    other = guidance.guided(net, text, null, 4.0)(x, sigma)
    np.testing.assert_allclose(other, conditional + 3.0 * (conditional - unconditional), rtol=1e-5, atol=1e-6)


def test_guidance_of_one_calls_the_conditional_branch_alone():
    calls = []

    def net(x, sigma, text):
        calls.append(x.shape[0])
        return x + text

    x, text = _normal(0, (2, 3)), _normal(1, (2, 3))
    np.testing.assert_array_equal(guidance.guided(net, text, jnp.zeros((2, 3)), 1.0)(x, None), x + text)
    assert calls == [2]


def _gaussian_velocity(mean, spread):
    """E[noise - x0 | x] when x0 is N(mean, spread^2) and noise N(0, 1)."""

    def velocity(x, sigma):
        variance = jnp.square((1 - sigma) * spread) + jnp.square(sigma)
        gain = (sigma - (1 - sigma) * spread**2) / variance
        return gain * (x - (1 - sigma) * mean) - mean

    return velocity


def test_euler_transports_noise_to_gaussian_data():
    """Along the exact flow x_sigma = (1 - sigma) mean + sqrt(variance) noise; the error of Euler's method halves."""
    mean, spread, noise = 1.5, 0.4, _normal(0, (64, 8))

    def error(steps):
        x = solvers.euler(_gaussian_velocity(mean, spread), noise, noise_levels.uniform_steps(steps, 1.0))
        return float(jnp.abs(x - (mean + spread * noise)).max())

    coarse, fine = error(200), error(400)
    assert fine < 0.02 and coarse / fine == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("steps", [1, 3])
def test_euler_is_exact_when_the_data_is_one_point(steps):
    x = solvers.euler(_gaussian_velocity(1.5, 0.0), _normal(0, (4, 8)), noise_levels.uniform_steps(steps, 8.0))
    np.testing.assert_allclose(x, np.full((4, 8), 1.5), atol=1e-5)


def test_euler_passes_levels_and_ends_in_float32():
    seen = []

    def velocity(x, sigma):
        jax.debug.callback(lambda s: seen.append(np.asarray(s)), sigma)
        return jnp.ones_like(x)

    x = solvers.euler(velocity, jnp.zeros((2, 3), jnp.bfloat16), (1.0, 0.7, 0.2))
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert x.dtype == jnp.float32 and all(s.shape == (2, 1) for s in seen)
    np.testing.assert_allclose(sorted(s[0, 0] for s in seen), [0.2, 0.7, 1.0], rtol=1e-6)
    np.testing.assert_allclose(x, -np.ones((2, 3)), rtol=1e-6)  # the levels sum up to the way from 1 to 0


def test_guided_scores_differ_by_the_text_alone():
    noise_of = []

    def score(x, sigma, batch):
        noise = jax.random.normal(jax.random.key(5), x.shape)  # as a score that noises its history does
        noise_of.append(noise.shape)
        return x + noise + jnp.mean(batch["text"], axis=(1, 2)).reshape(-1, 1)

    x, text = jnp.ones((3, 4)), jnp.arange(3.0).reshape(3, 1, 1)
    null = jnp.full((1, 1), 7.0)
    sigma = jnp.ones((3, 1))
    plain = score(x, sigma, {"text": text})
    guided = guidance.guided_score(score, null, 3.0)(x, sigma, {"text": text})
    np.testing.assert_allclose(guided - plain, 2.0 * (text[:, 0] - 7.0) + jnp.zeros((3, 4)), atol=1e-5)
    assert guidance.guided_score(score, null, 1.0) is score


def test_unipc_comes_closer_than_euler_with_the_same_number_of_calls():
    """The exact flow of Gaussian data again; a point is reached but for the level, told in whole thousandths."""
    mean, spread, noise = 1.5, 0.4, _normal(0, (64, 8))

    def error(name, steps):
        x = solvers.solve(name, _gaussian_velocity(mean, spread), noise, steps=steps, shift=3.0)
        return float(jnp.abs(x - (mean + spread * noise)).max())

    assert error("unipc", 20) < 0.5 * error("euler", 20)
    point = solvers.unipc(_gaussian_velocity(1.5, 0.0), noise, noise_levels.diffusers_steps(1, 5.0))
    np.testing.assert_allclose(point, noise - (1 - 1e-6) * (noise - 1.5) / 0.999, atol=1e-4)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_solvers_take_bfloat16_noise_and_tell_one_level_per_video(name):
    seen = []

    def velocity(x, sigma):
        seen.append((x.dtype, sigma.shape))
        return jnp.ones_like(x)

    assert solvers.solve(name, velocity, jnp.zeros((2, 3), jnp.bfloat16), steps=3, shift=2.0).dtype == jnp.float32
    assert set(seen) == {(jnp.dtype("float32"), (2, 1))}


def test_unknown_solvers_and_bad_step_counts_name_themselves():
    with pytest.raises(ValueError, match="'heun' is unknown; choose from euler, unipc, unipc_wan"):
        solvers.solve("heun", _gaussian_velocity(0.0, 1.0), jnp.zeros((1, 2)), steps=2, shift=1.0)
    for steps in (noise_levels.wan_steps, noise_levels.diffusers_steps):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            steps(0, 5.0)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_levels_of_wans_own_program_and_of_diffusers(shift):
    def shifted(raw):
        return [shift * x / (1 + (shift - 1) * x) for x in raw]

    wans, theirs = shifted([0.999, 0.74925, 0.4995, 0.24975]), shifted([1.0, 0.75025, 0.5005, 0.25075])
    np.testing.assert_allclose(noise_levels.wan_steps(4, shift), wans, rtol=1e-12)
    np.testing.assert_allclose(noise_levels.diffusers_steps(4, shift), theirs, rtol=1e-12)


def test_states_of_euler_are_those_it_passes():
    mean, spread, noise = 1.5, 0.4, _normal(0, (4, 8))
    levels = noise_levels.uniform_steps(12, 5.0)
    kept = noise_levels.uniform_steps(4, 5.0)
    net = _gaussian_velocity(mean, spread)
    end, states = jax.jit(lambda noise: solvers.euler_states(net, noise, levels, kept))(noise)
    np.testing.assert_array_equal(states[0], noise)
    x = noise
    for number, (a, b) in enumerate(zip(levels, (*levels[1:], 0.0), strict=True)):
        if a in kept:
            np.testing.assert_allclose(states[kept.index(a)], x, atol=1e-5, err_msg=str(number))
        x = x + np.float32(b - a) * net(x, jnp.full((4, 1), a, jnp.float32))
    np.testing.assert_allclose(end, x, atol=1e-5)
    with pytest.raises(ValueError, match=r"\[0.5\] are not among"):
        solvers.euler_states(net, noise, levels, (0.5,))
