"""Losses of reinforcement learning on problems whose answer is known."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import asked, check_options, resolve
from greedy_distill_jax.losses.dmd import dmd
from greedy_distill_jax.losses.pair import Pair
from greedy_distill_jax.losses.rl.advantage import group_advantages
from greedy_distill_jax.losses.rl.cm_grpo import cm_grpo
from greedy_distill_jax.losses.rl.direct import direct
from greedy_distill_jax.losses.rl.dpo_chunk import dpo_chunk
from greedy_distill_jax.losses.rl.episode import Episode
from greedy_distill_jax.losses.rl.kl import kl
from greedy_distill_jax.losses.rl.neighbor import neighbor
from greedy_distill_jax.losses.rl.nft import check_gap, nft
from greedy_distill_jax.losses.rl.re_dmd import re_dmd
from greedy_distill_jax.losses.rl.self_teacher import self_teacher

SHAPE = (6, 4, 2, 1, 3)  # B T H W C; two groups of three
SIGMA, NEXT = jnp.asarray([1.0, 0.9, 0.6, 0.4]), jnp.asarray([0.9, 0.6, 0.4, 0.0])
WEIGHT = np.asarray([[0.5, 1.5, 0.8, 1.2]], np.float32)
ADVANTAGE = jnp.asarray([1.2, -0.7, -0.5, 0.3, 0.9, -1.2])
KEY = jax.random.key(5)
ON_PREDICTIONS = (cm_grpo, kl, nft, dpo_chunk, neighbor, self_teacher)


def episode_of(seed=0, **changes):
    x0, x, following, predicted = jax.random.normal(jax.random.key(seed), (4, *SHAPE))
    ones = jnp.ones(SHAPE[:1])
    made = Episode(
        x0,
        x,
        SIGMA,
        following,
        NEXT,
        predicted,
        ADVANTAGE + 0.5,
        ADVANTAGE,
        ones,
        judged_B=ones,
        weight_T=jnp.asarray(WEIGHT[0]),
        group=3,
    )
    return made._replace(**changes)


def drawn(seed):
    return jax.random.normal(jax.random.key(seed), SHAPE)


def always(x0):
    """A policy that predicts this whatever it sees."""
    return lambda x, sigma: x0


def linear(shift, gain=0.5):
    """A student of one parameter per channel."""
    shift = jnp.broadcast_to(jnp.asarray(shift, jnp.float32), (1, 1, 1, 1, 3))
    return lambda x, sigma: shift + gain * x * (1.0 - sigma[None, :, None, None, None])


def pair_of(seed=0):
    x_sigma, real, fake = jax.random.normal(jax.random.key(seed), (3, 1, *SHAPE))
    return Pair(x_sigma, jnp.full((1, SHAPE[0], 1), 0.5), real, fake, jnp.ones(SHAPE[:2]))


def applied(loss, episode, current, key=KEY, **options):
    """What the loss says of this student, given whatever else it asks for."""
    offered = dict(
        episode=episode,
        current=current,
        old=linear(0.3),
        reference=linear(-0.2),
        corrected=linear(0.1),
        rewarded=lambda x0: -jnp.sum(jnp.square(x0), axis=(1, 2, 3, 4)),
        pair=pair_of(),
    )
    taken = {name: offered[name] for name in asked(loss)} | {k: v for k, v in options.items() if k in offered}
    rest = {k: v for k, v in options.items() if k not in offered}
    return loss(None, {"action": episode.x0_BTHWC}, key, **taken, **rest)


def gradient(loss, episode, x0, **options):
    """Of the loss, summed over the videos, in the student's prediction."""
    return jax.grad(lambda x0: jnp.sum(applied(loss, episode, always(x0), **options)[0]))(x0)


def pair(metric):
    """(sum, count) as numbers."""
    return tuple(map(float, metric))


def close(found, expected, tolerance=1e-6):
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(np.asarray(expected)).max()


# cm_grpo


def log_density(x0, episode):
    """log N(next; (1 - s) x0, s^2) of frames whose step drew something: a mean over elements, [B, T - 1]."""
    s = NEXT[None, :-1, None, None, None]
    x0, following = x0[:, :-1], episode.next_BTHWC[:, :-1]
    return jnp.mean(-0.5 * jnp.square((following - (1.0 - s) * x0) / s), axis=(2, 3, 4))


@pytest.mark.parametrize("clip", [0.0, 1e-4])
@pytest.mark.parametrize("step_weight", ["none", "snr"])
def test_the_gradient_is_that_of_the_gaussian_policy(step_weight, clip):
    x0 = drawn(7)
    episode = episode_of(predicted_BTHWC=x0)
    found = gradient(cm_grpo, episode, x0, step_weight=step_weight, clip=clip)
    s = np.asarray(NEXT[None, :-1])
    weight = WEIGHT[:, :-1] * (s / (1 - s) if step_weight == "snr" else 1)
    expected = jax.grad(lambda x0: jnp.sum(-ADVANTAGE[:, None] * weight * log_density(x0, episode)) / SHAPE[1])(x0)
    close(found, expected)
    np.testing.assert_array_equal(found[:, -1], 0.0)  # its step was the last
    assert float(jnp.abs(found[:, :-1]).min()) > 0


@pytest.mark.parametrize("loss", [cm_grpo, neighbor])
def test_the_ratio_is_one_before_the_first_update(loss):
    episode = episode_of()
    _, metrics = jax.jit(lambda x0: applied(loss, episode, always(x0), clip=1e-4))(episode.predicted_BTHWC)
    assert metrics["ratio"][0] == metrics["ratio"][1] > 0
    assert metrics["ratio_deviation"] == metrics["clipped"][0] == metrics["gap"][0] == 0


def test_the_ratio_afterwards_and_where_it_is_clipped():
    episode, clip = episode_of(), 0.05
    x0 = episode.predicted_BTHWC + 0.1 * drawn(7)
    ratio = np.asarray(jnp.exp(log_density(x0, episode) - log_density(episode.predicted_BTHWC, episode)))
    loss, metrics = applied(cm_grpo, episode, always(x0), clip=clip)
    a = np.asarray(ADVANTAGE)[:, None]
    each = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - clip, 1 + clip))
    np.testing.assert_allclose(loss, (each * WEIGHT[:, :-1]).sum(axis=1) / 4, rtol=1e-4, atol=1e-6)
    stopped = (a * (ratio - 1) > 0) & (abs(ratio - 1) > clip)
    assert 0 < stopped.sum() < stopped.size
    assert pair(metrics["clipped"]) == (stopped.sum(), stopped.size)
    np.testing.assert_allclose(metrics["ratio"][0], ratio.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_deviation"], abs(ratio - 1).max(), rtol=1e-4)
    np.testing.assert_allclose(metrics["gap"][0], 0.01 * jnp.sum(jnp.mean(drawn(7) ** 2, (1, 2, 3, 4))), rtol=1e-4)
    found = np.abs(gradient(cm_grpo, episode, x0, clip=clip)[:, :-1]).max(axis=(2, 3, 4))
    np.testing.assert_array_equal(found == 0, stopped)


@pytest.mark.parametrize("loss, options", [(cm_grpo, {}), (cm_grpo, {"clip": 1e-4}), (neighbor, {})])
def test_equal_advantages_have_no_gradient(loss, options):
    episode = episode_of(advantage_B=jnp.zeros(6))
    np.testing.assert_array_equal(gradient(loss, episode, drawn(7), **options), 0.0)


@pytest.mark.parametrize("loss", [cm_grpo, nft, neighbor, dpo_chunk])
def test_a_shift_of_all_rewards_changes_nothing(loss):
    def of(reward):
        advantage, counts = group_advantages(reward, 3)
        return gradient(loss, episode_of(advantage_B=advantage, counts_B=counts), drawn(7))

    reward = jnp.asarray([0.0, 4.0, 2.0, -1.0, 0.25, 0.75])
    np.testing.assert_array_equal(of(reward + 8.0), of(reward))


# nft and neighbor


@pytest.mark.parametrize(
    "loss, options", [(nft, {"beta": 0.7, "old": always(drawn(8))}), (neighbor, {"clip": 0.9, "tau": 1.0})]
)
def test_finite_differences(loss, options):
    episode, x0 = episode_of(), drawn(7)
    x0 = episode.predicted_BTHWC + 0.1 * x0
    found = gradient(loss, episode, x0, **options)
    assert float(jnp.abs(found).max()) > 0
    value = jax.jit(lambda x0: applied(loss, episode, always(x0), **options)[0])
    for seed in range(3):
        step = 0.01 * drawn(20 + seed)
        difference = np.sum(np.float64(value(x0 + step)) - np.float64(value(x0 - step))) / 2.0
        np.testing.assert_allclose(difference, np.sum(found * step), rtol=2e-3, atol=1e-5)


def test_nft_goes_to_what_is_better_than_the_middle_and_away_from_the_rest():
    o = drawn(7)
    episode = episode_of(advantage_B=jnp.asarray([9.0, 2.5, 0.0, -2.5, -5.0, -9.0]), weight_T=jnp.ones(4))
    found = gradient(nft, episode, o, old=always(o)) * o[0].size
    good = flow.expand(jnp.asarray([1.0, 0.75, 0.5, 0.25, 0.0, 0.0]), o)
    np.testing.assert_allclose(found, 2 * 0.1 * (2 * good - 1) * (o - episode.x0_BTHWC), atol=1e-5)


def test_nft_noises_the_finished_frames_to_the_levels_of_the_episode():
    seen, episode = [], episode_of()

    def student(x, sigma):
        seen.append((x, sigma))
        return x

    applied(nft, episode, student, old=student)
    noise = jax.random.normal(KEY, SHAPE)
    expected = flow.add_noise(episode.x0_BTHWC, noise, jnp.broadcast_to(SIGMA, SHAPE[:2]))
    for x, sigma in seen:
        np.testing.assert_array_equal(x, expected)
        np.testing.assert_array_equal(sigma, SIGMA)


def test_a_contrast_of_a_policy_with_itself_is_an_error():
    episode = episode_of(counts_B=jnp.zeros(6))  # measured whether or not anything counts
    _, metrics = applied(nft, episode, linear(0.3), old=linear(0.3))
    check_gap(float(metrics["gap"]), 0)
    with pytest.raises(UserError, match="after 3 updates, so that .* let it lag behind"):
        check_gap(float(metrics["gap"]), 3)
    _, metrics = applied(nft, episode, linear(0.31), old=linear(0.3))
    assert float(metrics["gap"]) == pytest.approx(1e-4, rel=1e-3)
    check_gap(float(metrics["gap"]), 3)


def test_neighbor_is_the_clipped_ratio_of_softmaxes():
    episode, tau, clip = episode_of(advantage_B=ADVANTAGE), 0.3, 0.15
    x0 = episode.predicted_BTHWC + 0.1 * drawn(7)

    def log_policy(centres):
        square = jnp.square(
            episode.predicted_BTHWC.reshape(2, 3, *SHAPE[1:])[:, 1:] - centres.reshape(2, 3, *SHAPE[1:])[:, :1]
        )
        return jax.nn.log_softmax(-jnp.mean(WEIGHT[None] * jnp.mean(square, axis=(3, 4, 5)), axis=2) / tau, axis=1)

    ratio = np.exp(np.asarray(log_policy(x0) - log_policy(episode.predicted_BTHWC)))
    a = np.asarray(ADVANTAGE).reshape(2, 3)[:, 1:]
    loss, metrics = applied(neighbor, episode, always(x0), tau=tau, clip=clip)
    expected = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - clip, 1 + clip))
    np.testing.assert_allclose(loss, np.pad(expected, ((0, 0), (1, 0))).reshape(-1), rtol=1e-4)
    stopped = (a * (ratio - 1) > 0) & (abs(ratio - 1) > clip)
    assert 0 < stopped.sum() < 4 and pair(metrics["clipped"]) == (stopped.sum(), 4)


def test_neighbor_draws_the_centre_to_the_better_neighbour():
    episode = episode_of(advantage_B=jnp.asarray([0.0, 1.0, -1.0, 5.0, 0.0, 0.0]), weight_T=jnp.ones(4))
    predicted = episode.predicted_BTHWC
    found = gradient(neighbor, episode, predicted, tau=0.5) * predicted[0].size
    # -(grad log pi(1) - grad log pi(2)): the means under pi cancel.
    np.testing.assert_allclose(found[0], -2.0 / 0.5 * (predicted[1] - predicted[2]), atol=1e-4)
    np.testing.assert_array_equal(
        found[1:], 0.0
    )  # the others are not the centre; the second's own advantage has no say
    uncounted = episode._replace(counts_B=jnp.asarray([0.0, 1, 1, 1, 1, 1]))
    np.testing.assert_array_equal(gradient(neighbor, uncounted, predicted)[0], 0.0)


# re_dmd


@pytest.mark.parametrize("options", [{}, {"normalizer": "none", "weighting": "score"}])
def test_re_dmd_without_beta_is_dmd_bit_for_bit(options):
    episode = episode_of(judged_B=jnp.asarray([1.0, 0, 1, 1, 1, 1]))

    def of(loss, **given):
        def summed(x):
            loss_B, metrics = loss(None, {"action": x}, None, pair=pair_of(), **given, **options)
            return jnp.sum(loss_B), (loss_B, metrics)

        (_, (loss_B, metrics)), found = jax.value_and_grad(summed, has_aux=True)(drawn(7))
        return loss_B, metrics, found

    plain, metrics, plain_gradient = of(dmd)
    weighted, more, weighted_gradient = of(re_dmd, episode=episode, beta=0.0, baseline="batch")
    np.testing.assert_array_equal(weighted, plain)
    np.testing.assert_array_equal(weighted_gradient, plain_gradient)
    assert metrics.items() <= more.items()


@pytest.mark.parametrize("baseline", ["none", "batch"])
def test_re_dmd_weighs_by_the_reward(baseline):
    reward = jnp.asarray([0.0, 0.5, -0.3, 5.0, -5.0, jnp.nan])
    episode = episode_of(reward_B=reward, judged_B=jnp.asarray([1.0, 1, 1, 1, 1, 0]))
    loss, metrics = applied(re_dmd, episode, None, beta=2.0, baseline=baseline)
    plain, _ = dmd(None, {"action": episode.x0_BTHWC}, None, pair=pair_of())
    less = 0.04 if baseline == "batch" else 0.0
    expected = np.asarray([*np.exp(2.0 * (np.asarray([0.0, 0.5, -0.3]) - less)), 10.0, 0.1, 1.0])
    np.testing.assert_allclose(loss / plain, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["weight"], (expected[:5].sum(), 5), rtol=1e-5)
    assert metrics["clipped"] == (2, 5)


# The others


def test_kl_is_that_of_gaussians_and_half_the_square_where_nothing_was_drawn():
    x0, x0_reference = drawn(7), drawn(8)
    found, _ = applied(kl, episode_of(), always(x0), reference=always(x0_reference))
    s = np.asarray([*NEXT[:-1], 1.0])
    alpha = np.asarray([*(1 - NEXT[:-1]), 1.0])
    square = np.asarray(jnp.mean(jnp.square(x0 - x0_reference), axis=(2, 3, 4)))
    np.testing.assert_allclose(found, np.mean(WEIGHT * alpha**2 / (2 * s**2) * square, axis=1), rtol=1e-5)


def test_direct_is_minus_the_reward_of_the_prediction():
    episode, shift = episode_of(), jnp.asarray(0.2)

    def value(shift):
        return jnp.sum(applied(direct, episode, linear(shift), rewarded=lambda x0: jnp.sum(x0**3, (1, 2, 3, 4)))[0])

    x0 = linear(shift)(episode.x_BTHWC, SIGMA)
    np.testing.assert_allclose(jax.grad(value)(shift), -3.0 * jnp.sum(x0**2), rtol=1e-5)


def test_dpo_prefers_the_best_counted_stream_to_the_worst():
    counts = jnp.asarray([0.0, 1, 1, 1, 1, 1])
    episode, x0 = episode_of(counts_B=counts), drawn(7)
    seen = []

    def student(x, sigma):
        seen.append(x)
        return x0

    loss, metrics = applied(dpo_chunk, episode, student, reference=student)
    noise = (seen[0] - (1 - flow.expand(SIGMA[None], x0)) * episode.only(counts).x0_BTHWC) / flow.expand(
        SIGMA[None], x0
    )
    np.testing.assert_allclose(noise[0], noise[1], atol=1e-5)  # one noise for the group
    assert float(jnp.abs(noise[0] - noise[3]).max()) > 0.1
    per_velocity = WEIGHT / np.asarray(SIGMA[None]) ** 2
    error = np.mean(per_velocity * jnp.mean(jnp.square(x0 - episode.x0_BTHWC), axis=(2, 3, 4)), axis=1)
    first, second = 1.5 * (np.log(2) + 0.5 * error[2]), 1.5 * (np.log(2) + 0.5 * error[4])
    np.testing.assert_allclose(loss, [0, first, first, 0, second, second], rtol=1e-5)
    assert metrics["margin"] == (0, 2)

    # At the reference the sigmoid's slope is 1/2: the errors' gradients weigh beta / 4, and alpha that of the better.
    found = gradient(dpo_chunk, episode, x0, reference=always(x0)) * x0[0].size / 3.0
    each = 2 * flow.expand(jnp.asarray(per_velocity), x0) * (x0 - episode.x0_BTHWC)
    np.testing.assert_allclose(found[4], (25 + 0.5) * each[4], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[5], -25 * each[5], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[np.asarray([0, 3])], 0.0)
    closer = x0.at[4].set(episode.x0_BTHWC[4])
    _, metrics = applied(dpo_chunk, episode, always(closer), reference=always(x0))
    assert metrics["preferred"] == (1, 2)


def test_the_self_teacher_is_followed_in_velocities_and_silent_where_the_history_is_real():
    x0, target = drawn(7), drawn(8).at[:, :2].set(drawn(7)[:, :2])
    loss, _ = applied(self_teacher, episode_of(), always(x0), corrected=always(target))
    v, v_target = (
        flow.velocity_from_x0(episode_of().x_BTHWC, p, jnp.broadcast_to(SIGMA, SHAPE[:2])) for p in (x0, target)
    )
    np.testing.assert_allclose(loss, np.mean(WEIGHT * jnp.mean((v - v_target) ** 2, axis=(2, 3, 4)), axis=1), rtol=1e-4)
    found = gradient(self_teacher, episode_of(), x0, corrected=always(target))
    np.testing.assert_array_equal(found[:, :2], 0.0)
    np.testing.assert_array_equal(np.sign(found[:, 2:]), np.sign(x0 - target)[:, 2:])


# All of them


@pytest.mark.parametrize("loss", [*ON_PREDICTIONS, direct], ids=lambda loss: loss.__name__)
def test_a_stream_that_does_not_count_is_as_if_it_were_not_there(loss):
    """Its NaN reach neither the loss nor the gradient; the stage keeps them from the student's inputs."""
    mask = jnp.asarray([1.0, 1, 1, 1, 0, 1])
    clean = episode_of(counts_B=mask, judged_B=mask)
    kept = ("x_BTHWC", "counts_B", "judged_B")
    arrays = [name for name in clean._fields if name.endswith(("_BTHWC", "_B")) and name not in kept]
    broken = clean._replace(**{name: getattr(clean, name).at[4].set(jnp.nan) for name in arrays})

    def of(episode):
        def summed(shift):
            loss_B, metrics = applied(loss, episode, linear(shift))
            return jnp.sum(loss_B), (loss_B, metrics)

        return jax.value_and_grad(summed, has_aux=True)(jnp.full((3,), 0.2))

    (_, (loss_B, metrics)), found = of(broken)
    (_, (expected_B, _)), expected = of(clean)
    assert float(loss_B[4]) == 0.0
    np.testing.assert_array_equal(loss_B, expected_B)
    np.testing.assert_array_equal(found, expected)
    assert float(jnp.abs(found).max()) > 0
    assert all(np.isfinite(x) for x in jax.tree.leaves(metrics))


@pytest.mark.parametrize("loss", ON_PREDICTIONS, ids=lambda loss: loss.__name__)
def test_frames_count_by_their_weight(loss):
    whole = gradient(loss, episode_of(weight_T=jnp.asarray([0.0, 0.0, 2.0, 2.0])), drawn(7))
    np.testing.assert_array_equal(whole[:, :2], 0.0)
    assert float(jnp.abs(whole[:, 2]).max()) > 0


def test_what_they_ask_for_and_refuse():
    for loss in (*ON_PREDICTIONS, direct, re_dmd):
        assert resolve(loss.__name__) is loss
        assert "arXiv" in inspect.getdoc(loss)
    assert asked(self_teacher) == ["episode", "current", "corrected"]
    for name, option, said in (
        ("re_dmd", {"low": 2.0}, "low is 2.0; it must be from 0 to 1"),
        ("re_dmd", {"high": 0.5}, "high is 0.5; it must be at least 1"),
        ("cm_grpo", {"step_weight": "sigma"}, "step_weight is 'sigma'"),
        ("neighbor", {"tau": 0.0}, "tau is 0.0; it must be above 0"),
    ):
        with pytest.raises(UserError, match=said):
            check_options(name, resolve(name), option)
    with pytest.raises(ValueError, match="step_weight is 'sigma'"):
        applied(cm_grpo, episode_of(), linear(0.0), step_weight="sigma")
    with pytest.raises(ValueError, match="baseline is 'ema'"):
        applied(re_dmd, episode_of(), None, baseline="ema")
