"""Step plans: what a value means, which plans are the same, what is refused."""

import numpy as np
import pytest

from greedy_distill_jax.config.settings import read_settings
from greedy_distill_jax.diffusion.noise_levels import shift_sigma, uniform_steps
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.testing import tiny

LISTS = ((1.0, 0.9333, 0.8333, 0.357), (1.0, 0.9333, 0.357), (1.0, 0.357))


@pytest.mark.parametrize(
    "value, lengths",
    [(2, [2]), ("2", [2]), ("4,3,2,2", [4, 3, 2]), ((4, 3, 2, 2), [4, 3, 2]), ([3, 1], [3, 1]), ("4, 2", [4, 2])],
    ids=str,
)
def test_numbers_of_steps(value, lengths):
    plan = StepPlan.parse(value, shift=5.0)
    assert plan.lengths.tolist() == lengths
    assert plan.sigmas == tuple(uniform_steps(n, 5.0) for n in lengths)
    assert plan == StepPlan.parse(plan.values(5.0)["steps"], shift=5.0)


def test_levels_as_text_lists_and_beside_numbers():
    text = ",".join("/".join(map(str, row)) for row in LISTS)
    assert StepPlan.parse(text, shift=8.0).sigmas == StepPlan.parse([*map(list, LISTS)], shift=8.0).sigmas == LISTS
    mixed = StepPlan.parse("1.0/0.5,3,1.0/0.9", shift=5.0)
    assert mixed.sigmas == ((1.0, 0.5), uniform_steps(3, 5.0), (1.0, 0.9))
    assert mixed.values(5.0)["steps"] == ((1.0, 0.5), 3, (1.0, 0.9))


@pytest.mark.parametrize("context_sigma", [0.0, 0.357, (0.1, 0.2, 0.357)])
def test_values_read_back_are_the_same_plan(context_sigma):
    plan = StepPlan.parse("1/.5,3", shift=5.0, sampler="renoise", context_sigma=context_sigma)
    again = StepPlan.parse(**plan.values(5.0), shift=5.0)
    assert again == plan and hash(again) == hash(plan)


def test_the_last_entry_repeats():
    plan = StepPlan((*LISTS, LISTS[-1]), "renoise", (0.0, 0.357, 0.357))
    same = StepPlan(LISTS, "renoise", (0.0, 0.357))
    assert plan == same and hash(plan) == hash(same)
    assert plan.steps_of(1) == LISTS[1] and plan.steps_of(9) == LISTS[2]
    np.testing.assert_array_equal(plan.ends, [3, 2, 1])
    np.testing.assert_allclose(plan.table[2], [1.0, 0.357, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(plan.context_sigma(np.arange(4)), [0.0, 0.357, 0.357, 0.357])
    np.testing.assert_allclose(StepPlan(((1.0, 0.5), (1.0, 0.9))).last_sigmas(3), [0.5, 0.9, 0.9])
    assert not plan.keeps_clean and StepPlan(LISTS, context_sigmas=(0.0, 0.0)).keeps_clean


@pytest.mark.parametrize(
    "steps, message",
    [
        ([[1.0, 0.5], [0.5, 0.5]], r"chunk 1 are \[0.5, 0.5\].*decrease from 1"),
        ("1/0.5/0.7", "steps of chunk 0 are .*decrease"),
        ([[1.2, 0.5]], "decrease from 1"),
        ([[0.9, 0.5]], "decrease from 1"),
        ([[1.0, 0.0]], "decrease from 1"),
        ([[1.0, float("nan")]], "decrease from 1"),
        ([[]], "steps of chunk 0 are"),
        ([], "there are no steps"),
        (0, "steps of a chunk are 0"),
        ("4,0", "steps of a chunk are 0"),
        ("4,", "steps of a chunk are ''"),
        ("four", "steps of a chunk are 'four'"),
        (2.5, "steps of a chunk are 2.5"),
        ([1.0, 0.5], "steps of a chunk are 1.0"),
        (True, "steps of a chunk are True"),
    ],
    ids=str,
)
def test_refused_steps(steps, message):
    with pytest.raises(UserError, match=message) as refused:
        StepPlan.parse(steps, shift=5.0)
    assert refused.value.field == "steps" and "\n" not in str(refused.value)


def test_diagonal_plans_are_the_published_ones_at_shift_5():
    plan = StepPlan.parse("diagonal-4322222", shift=5.0, sampler="renoise")
    published = [[1000, 933.3, 833.3, 357.1], [1000, 933.3, 357.1], [1000, 357.1]]
    assert [np.round(1000 * np.asarray(row), 1).tolist() for row in plan.sigmas] == published
    assert plan.steps_of(6) == plan.steps_of(2) and plan.lengths.tolist() == [4, 3, 2]
    assert StepPlan.parse("diagonal-432", shift=5.0, sampler="renoise") == plan
    assert StepPlan.parse("diagonal-5333333", shift=5.0).lengths.tolist() == [5, 3]
    assert StepPlan.parse(**plan.values(5.0), shift=5.0) == plan
    other = StepPlan.parse("diagonal-42", shift=8.0).sigmas[1][1]
    assert other == pytest.approx(shift_sigma(0.1, 8.0)) and other > plan.sigmas[2][1]


@pytest.mark.parametrize("name", ["diagonal", "diagonal-", "diagonal-41", "diagonal-46", "diagonal-4,3", "diagonal-x"])
def test_refused_diagonals(name):
    with pytest.raises(UserError, match="number of steps of every chunk, 2 to 5, such as diagonal-4322222") as refused:
        StepPlan.parse(name, shift=5.0)
    assert refused.value.field == "steps"


@pytest.mark.parametrize("context_sigma, chunk", [(0.4, 1), ((0.36, 0.3), 0), ((0.0, 0.3, 0.3, 0.36), 3)])
def test_a_context_above_the_last_steps_level_is_refused(context_sigma, chunk):
    with pytest.raises(UserError, match=f"chunk {chunk} is kept at noise level .*, above 0.35") as refused:
        StepPlan.parse("1/.35,1/.9/.35", shift=5.0, context_sigma=context_sigma)
    assert refused.value.field == "context_sigma"
    StepPlan.parse("1/.35,1/.9/.35", shift=5.0, context_sigma=0.35)


@pytest.mark.parametrize("context_sigma", [-0.1, 1.0, (0.0, 1.0), (), "deep", None], ids=str)
def test_refused_context_levels(context_sigma):
    with pytest.raises(UserError, match="the context's noise level is .*; give") as refused:
        StepPlan.parse(2, shift=5.0, context_sigma=context_sigma)
    assert refused.value.field == "context_sigma"


def test_refused_sampler():
    with pytest.raises(UserError, match="sampler 'ddim' is unknown; choose from euler, renoise"):
        StepPlan(((1.0,),), "ddim")


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        ("teacher_forcing", dict(sample__steps="4,0"), "config.sample.steps: the steps of a chunk are 0"),
        ("teacher_forcing", dict(sample__steps=((1.0, 1.0),)), "config.sample.steps: the steps of chunk 0"),
        ("teacher_forcing", dict(sample__context_sigma=1.0), "config.sample.context_sigma: .* level is 1.0"),
        (
            "teacher_forcing",
            dict(sample__context_sigma=0.4, student__context="last_step_kv"),
            "config.sample.context_sigma: .* 'last_step_kv'",
        ),
        ("teacher_forcing", dict(sample__context_sigma=0.4, student__context_noise=0.2), "set one of them to 0"),
        (
            "teacher",
            dict(sample__steps=(4, 2)),
            "config.sample.steps is .4, 2.; of a teacher it must be a whole",
        ),
        ("teacher", dict(sample__steps=0), "config.sample.steps is 0; of a teacher it must be from 1 to 1000"),
        ("teacher", dict(sample__context_sigma=0.4), "context_sigma is 0.4, but a teacher"),
    ],
    ids=str,
)
def test_refused_configurations(stage, changes, message):
    with pytest.raises(UserError, match=message):
        read_settings(tiny.train_config(stage, **changes), imagine_runs=True)
