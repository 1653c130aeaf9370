"""Advantages of groups, and what several rewards say together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.losses.rl.advantage import COMBINATIONS, MODES, combine, group_advantages

NAN = float("nan")
REWARD = jnp.asarray([1.0, 2.0, 4.0, 5.0, -3.0, 0.0, 8.0, 7.0])  # two groups of four
D = np.asarray([[-2, -1, 1, 2], [-6, -3, 5, 4]], np.float64)


def advantages(reward, group=4, **options):
    found = jax.jit(lambda r: group_advantages(r, group, **options))(jnp.asarray(reward, jnp.float32))
    return [np.asarray(x) for x in found]


@pytest.mark.parametrize(
    "mode, size",
    [
        ("std", D.std(axis=1, keepdims=True)),
        ("global_std", np.std(REWARD)),
        ("mean_only", 1.0),
        ("quasi_norm", (np.abs(D) ** 0.8).sum(axis=1, keepdims=True) ** 1.25 / 2.0),
    ],
)
def test_what_the_difference_to_the_mean_is_divided_by(mode, size):
    found, counts = advantages(REWARD, mode=mode, clip=100.0)
    np.testing.assert_allclose(found, (D / size).reshape(-1), rtol=1e-5)
    np.testing.assert_array_equal(counts, 1.0)
    np.testing.assert_allclose(
        advantages(REWARD, mode=mode, clip=0.5)[0], np.clip(D / size, -0.5, 0.5).reshape(-1), 1e-5
    )


@pytest.mark.parametrize("mode", MODES)
def test_neither_a_shift_of_the_rewards_nor_their_order_matters(mode):
    found, _ = advantages(REWARD, mode=mode)
    np.testing.assert_array_equal(advantages(REWARD + 64.0, mode=mode)[0], found)
    order = np.asarray([3, 1, 0, 2, 6, 7, 5, 4])
    np.testing.assert_allclose(advantages(REWARD[order], mode=mode)[0], found[order], rtol=1e-6)
    groups = np.asarray([4, 5, 6, 7, 0, 1, 2, 3])
    np.testing.assert_allclose(advantages(REWARD[groups], mode=mode)[0], found[groups], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_without_a_reward_is_left_out(mode):
    reward = np.asarray([1.0, NAN, 2.0, 4.0, 5.0, 5.0 + 5e-5, 5.0, 5.0, NAN, 3.0, NAN, NAN, NAN, NAN, NAN, NAN])
    found, counts = advantages(reward, mode=mode)
    # Alike, one reward, none: dead.
    np.testing.assert_array_equal(counts, [1, 0, 1, 1] + [0] * 12)
    np.testing.assert_array_equal(found == 0, counts == 0)
    if mode != "global_std":
        alone, _ = advantages([1.0, 2.0, 4.0], 3, mode=mode)
        np.testing.assert_allclose(found[[0, 2, 3]], alone, rtol=1e-6)


def test_ways_to_combine_two_rewards():
    rewards = {"a": REWARD, "b": 10.0 * REWARD[::-1] ** 2}
    weights = {"a": 2.0, "b": 1.0}
    z = {name: advantages(reward, clip=100.0)[0] for name, reward in rewards.items()}
    z_sum, raw_sum = 2.0 * z["a"] + z["b"], 2.0 * rewards["a"] + rewards["b"]
    expected = {
        "normalise_then_sum": advantages(z_sum)[0],
        "sum_then_normalise": advantages(raw_sum)[0],
        "advantage_sum": z_sum,
    }
    assert set(expected) == set(COMBINATIONS)
    for how, advantage in expected.items():
        found = combine(rewards, weights, 4, how)
        np.testing.assert_allclose(found.advantage_B, advantage, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.reward_B, raw_sum)
        np.testing.assert_array_equal(found.counts_B, 1.0)
    one = combine({"a": REWARD}, {"a": 3.0}, 4)
    np.testing.assert_allclose(one.advantage_B, z["a"], rtol=1e-5)


@pytest.mark.parametrize("how", COMBINATIONS)
def test_masked_by_one_weighted_reward_is_masked_by_all_and_judges_mask_nothing(how):
    a = REWARD.at[1].set(NAN)
    b = (-(REWARD**2)).at[6].set(jnp.inf)
    judge = jnp.full((8,), NAN)
    found = jax.jit(lambda a, b, judge: combine({"a": a, "b": b, "judge": judge}, {"a": 1.0, "b": 0.1}, 4, how))(
        a, b, judge
    )
    mask = np.asarray([1, 0, 1, 1, 1, 1, 0, 1])
    np.testing.assert_array_equal(found.judged_B, mask)
    np.testing.assert_array_equal(found.counts_B, mask)
    left = np.asarray([0, 2, 3, 4, 5, 7])
    rest = combine({"a": REWARD[left], "b": -(REWARD[left] ** 2)}, {"a": 1.0, "b": 0.1}, 3, how)
    np.testing.assert_allclose(found.advantage_B[left], rest.advantage_B, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.advantage_B[np.asarray([1, 6])], 0.0)
    np.testing.assert_array_equal(found.reward_B[np.asarray([1, 6])], 0.0)
    assert found.metrics["masked"] == (2, 8)
    assert all(np.isfinite(x) for pair in found.metrics.values() for x in pair)


def test_a_group_judged_alike_is_dead_but_judged():
    found = combine({"a": jnp.asarray([2.0, 2.0, 1.0, 3.0])}, {"a": 1.0}, 2)
    np.testing.assert_array_equal(found.counts_B, [0, 0, 1, 1])
    np.testing.assert_array_equal(found.judged_B, 1.0)
    np.testing.assert_array_equal(found.reward_B, [2, 2, 1, 3])
    assert found.metrics["dead"] == (1, 2)


def test_what_is_logged_of_rewards():
    rewards = {"a": REWARD, "same": REWARD * 3.0 + 1.0, "opposed": -REWARD, "tied": jnp.asarray([0.0, 0, 1, 1] * 2)}
    found = {k: x[0] / x[1] for k, x in combine(rewards, {"a": 1.0}, 4).metrics.items()}
    assert found["a/mean"] == pytest.approx(3.0)
    assert found["same/spread"] == pytest.approx(3.0 * D.std(axis=1).mean(), rel=1e-5)
    assert found["agreement/a/same"] == 1.0 and found["agreement/a/opposed"] == -1.0
    assert found["agreement/a/tied"] == 1.0  # of the pairs that both tell apart
    crossed = combine({"a": jnp.asarray([1.0, 2, 3]), "b": jnp.asarray([2.0, 1, 3])}, {"a": 1.0}, 3).metrics
    assert crossed["agreement/a/b"] == (2, 6)  # one of three pairs, seen from both of its ends


def test_what_is_refused():
    with pytest.raises(ValueError, match="8 streams do not divide into groups of 3"):
        group_advantages(REWARD, 3)
    with pytest.raises(ValueError, match="mode is 'max'"):
        group_advantages(REWARD, 4, "max")
    with pytest.raises(ValueError, match="how is 'sum'"):
        combine({"a": REWARD}, {"a": 1.0}, 4, "sum")
    for weights in ({}, {"b": 1.0}):
        with pytest.raises(ValueError, match="weigh at least one of them"):
            combine({"a": REWARD}, weights, 4)
