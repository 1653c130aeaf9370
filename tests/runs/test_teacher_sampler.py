"""A teacher's whole videos: what they need, what is refused, programs that samplers share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs import teacher_sampler
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.runs.teacher_sampler import TeacherSampler, check_memory, least_bytes
from greedy_distill_jax.testing import tiny

SHAPE = (3, 4, 4, 4)


def sampler(**changes):
    cfg = tiny.BASE
    params = tiny.random_params(Teacher(cfg))
    options = dict(solver="euler", steps=2, shift=3.0, guidance=2.0) | changes
    return TeacherSampler(cfg, params, tiny.text_rows(1, jax.random.key(5)), **options)


def test_what_a_teacher_needs_at_the_least():
    cfg = WanConfig(**WAN_SIZES["wan1_3b"])
    assert 0.5 < least_bytes(cfg, (21, 60, 104, 16), 1) / 2**30 < 1.5  # 81 frames of 480 x 832
    assert least_bytes(cfg, (25_000, 60, 104, 16), 1) / 2**30 > 500


def test_what_cannot_fit_is_refused(monkeypatch):
    cfg = WanConfig(**WAN_SIZES["wan1_3b"])
    monkeypatch.setattr(teacher_sampler, "memory_bytes", lambda: 2**30)
    check_memory(cfg, (6, 60, 104, 16), videos=1, frames=21)
    with pytest.raises(UserError, match="81 frames need more than 2 GiB at this size, and there are 1; use") as error:
        check_memory(cfg, (21, 60, 104, 16), videos=3, frames=81)
    assert error.value.field == "frames"


def test_samplers_of_the_same_network_share_their_programs():
    text = tiny.text_rows(2, jax.random.key(1))
    first = sampler().sample(text, SHAPE, seed=3)
    compiled = teacher_sampler._solve._cache_size()
    np.testing.assert_array_equal(first, sampler().sample(text, SHAPE, seed=3))
    assert teacher_sampler._solve._cache_size() == compiled
    assert (sampler(guidance=1.0).sample(text, SHAPE, seed=3) != first).any()


def test_trajectories_keep_the_levels_asked_for():
    noise, text = jax.random.normal(jax.random.key(0), (1, *SHAPE)), tiny.text_rows(1, jax.random.key(1))
    latents, states = sampler(steps=4).trajectories(noise, text, (1.0, 0.5))
    assert latents.shape == (1, *SHAPE) and states.shape == (2, 1, *SHAPE)
    np.testing.assert_array_equal(states[0], noise)
    assert jnp.isfinite(states).all() and (states[1] != latents).any()


def test_prompts_are_a_list(tiny_teacher):
    run = Run.load(tiny_teacher)
    with pytest.raises(TypeError, match=r"prompts is the single text 'a red square'; give a list of them"):
        run.text("a red square")
    with pytest.raises(ValueError, match="there are no prompts"):
        run.text([])
    assert len(run.text(["a red square", ""])) == 2
