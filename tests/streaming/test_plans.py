"""Plans with a step list and a context level per chunk: streams against the parallel form, for every student."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.streaming.loop import initial_noise
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.pairwise import pairwise
from greedy_distill_jax.training import rollout as rollouts

LATENT, FRAMES = (4, 4, 4), 12
OPTIONS = {
    "plan": ("2", "diagonal-4322222", "diagonal-5333333", "diagonal-4222222"),
    "context": ("clean", "renoise", "renoise, ETM clean", "last_step_kv"),
    "student": ("etm_sdd", "etm_sdd in chunks of 3", "causal", "causal in chunks of 3"),
}
STUDENTS = {
    "etm_sdd": (Student, {}),
    "etm_sdd in chunks of 3": (Student, dict(chunk=3, rope_mode="absolute", sink=1, fusion="xattn2")),
    "causal": (CausalStudent, dict(window=3, rope_mode="relative")),
    "causal in chunks of 3": (CausalStudent, dict(chunk=3, window=9, sink=3)),
}
EULER = {"plan": StepPlan(((1.0, 0.8, 0.5), (1.0,)), "euler", (0.1, 0.2, 0.357)), "context": "", "student": "etm_sdd"}


def _setup(case):
    model, changes = STUDENTS[case["student"]]
    context, plan = case["context"], case["plan"]
    if isinstance(plan, str):
        level = 0.357 if context.startswith("renoise") else 0.0
        plan = StepPlan.parse(plan, shift=5.0, sampler="renoise", context_sigma=level)
    changes = changes | {"context": "last_step_kv" if context == "last_step_kv" else "clean"}
    if context == "renoise, ETM clean" and model is Student:
        changes["etm_input"] = "clean"
    config = tiny.causal_config if model is CausalStudent else tiny.student_config
    student = model(config(**changes))
    return make_streamer(student, plan), tiny.random_params(student), tiny.text_rows(1, jax.random.key(3))


def _all_at_once(streamer, params, text, history, keys):
    """Every chunk denoised from its noise together, each by its own list, given what the stream kept."""
    student, plan, g = streamer.student, streamer.plan, streamer.cfg.chunk
    table = jnp.asarray([plan.table[min(i, len(plan.sigmas) - 1)] for i in range(len(keys))])
    table = jnp.repeat(table, g, axis=0).T  # [steps + 1, T]

    def noise(draw):
        return jnp.concatenate([draw(key, (1, g, *LATENT)) for key in keys], axis=1)

    @jax.jit
    def call(x, sigma):
        return student(params, x, sigma[None], text, history)

    x = noise(initial_noise)
    for n, (sigma, after) in enumerate(itertools.pairwise(table)):
        s, a = (y[None, :, None, None, None] for y in (sigma, after))
        v = call(x, sigma)
        if plan.sampler == "euler":
            new = x + (a - s) * v
        else:
            fresh = noise(lambda key, shape, n=n: jax.random.normal(jax.random.fold_in(key, n + 1), shape))
            new = (1 - a) * (x - s * v) + a * fresh
        x = jnp.where(s > 0, new, x)  # a shorter list is at its end
    return x


@pytest.mark.parametrize(
    "case", [*pairwise(OPTIONS), EULER], ids=lambda c: f"{c['student']}-{c['context']}-{c['plan']}"
)
def test_streaming_equals_the_parallel_form(case):
    streamer, params, text = _setup(case)
    key = jax.random.key(7)
    drawn = jax.jit(lambda p: rollouts.roll_out(streamer, p, text, key, (FRAMES, *LATENT), "last"))(params)

    @jax.jit
    def stream(params):
        def step(before, _):
            state, x = streamer.step(params, before)
            return state, (x, state.last, jax.random.split(before.key)[1])

        state = streamer.init(params, text, jax.random.split(key)[1], LATENT)
        return jax.lax.scan(step, state, length=FRAMES // streamer.cfg.chunk)[1]

    *streamed, keys = stream(params)
    made, kept = (jnp.concatenate(list(x), axis=1) for x in streamed)
    scale = max(1.0, float(jnp.abs(made).max()))
    np.testing.assert_allclose(drawn.x0_BTHWC, made, atol=1e-5 * scale)
    np.testing.assert_allclose(drawn.context_BTHWC, kept, atol=1e-5 * scale)
    full = _all_at_once(streamer, params, text, rollouts.history(streamer.student, drawn), keys)
    np.testing.assert_allclose(full, made, atol=1e-5 * scale)


def test_a_recache_reads_the_frames_as_they_are_kept():
    """Three frames, no sink: the keys after a switch are those of one pass over the kept frames at their levels."""
    student = CausalStudent(tiny.causal_config(window=4, sink=0, recache=True))
    streamer = make_streamer(student, StepPlan(((1.0, 0.5),), "renoise", (0.0, 0.357)))
    params, (a, b) = tiny.random_params(student), (tiny.text_rows(1, jax.random.key(i)) for i in (3, 4))
    state, step = streamer.init(params, a, jax.random.key(7), LATENT), jax.jit(streamer.step)
    for _ in range(3):
        state, _ = step(params, state)
    np.testing.assert_allclose(streamer._kept_sigma(state.slots, 1)[0], [0.0, 0.357, 0.357], atol=1e-7)
    np.testing.assert_array_equal(state.frames[:, 2:], state.last)
    other = step(params, streamer.switch_prompt(params, state, b))[1]
    clean = streamer.switch_prompt(params, state._replace(slots=jnp.zeros_like(state.slots)), b)  # all told level 0
    told = step(params, clean._replace(slots=state.slots))[1]
    assert float(jnp.abs(other - told).max()) > 1e-3
