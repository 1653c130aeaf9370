"""The exported PyTorch student against the JAX one: same noise in, same frames out, in both forms."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.base import History
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.streaming.etm_sdd import Streamer
from greedy_distill_jax.streaming.loop import CONTEXT_FOLD, draw_noise, initial_noise, split_key
from greedy_distill_jax.streaming.session import Session
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.pairwise import pairwise
from greedy_distill_jax.weights.source import TreeSource
from greedy_distill_jax.weights.write import write

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")

LATENT, FRAMES, TOLERANCE = (4, 6, 4), 24, 2e-5
OPTIONS = {
    "fusion": ["selfkv", "xattn2", "replace", "add", "concat", "adaln"],
    "split": [((0, 1), (0, 1, 2)), ((0,), (1, 2)), ((0, 2, 1), (1,))],
    "window": [3, 1],
    "rope_mode": ["clamped", "absolute", "fixed"],
    "context": ["clean", "fused", "last_step_kv"],
    "chunk": [1, 2],
    "sink": [0, 2],
    "sampler": ["euler", "renoise"],
    "prediction": ["velocity", "x0"],
}
SIGMAS = ((1.0, 0.8, 0.4), (1.0, 0.7, 0.5), (1.0, 0.6))


def exported(folder, cfg, params, **meta):
    """The PyTorch student of a freshly exported folder, loaded from the file in that folder."""
    write(TreeSource(cfg, params, meta), folder, "torch-student")
    return loaded(folder)


def loaded(folder):
    """The student of an exported folder, by the file in that folder."""
    spec = importlib.util.spec_from_file_location("torch_student", folder / "torch_student.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Student.from_pretrained(folder).eval()


def to_torch(x):
    """[B, T, H, W, C] -> [B, T, C, H, W]."""
    return torch.from_numpy(np.array(x)).permute(0, 1, 4, 2, 3)


def from_torch(x):
    """[B, T, C, H, W] -> [B, T, H, W, C]."""
    return x.detach().float().permute(0, 1, 3, 4, 2).numpy()


def jax_stream(student, params, text, plan, latent=LATENT, length=FRAMES):
    """(frames, all noise a step may use [chunks, 1 + steps + 1, B, g, H, W, C])."""
    streamer, steps = Streamer(student, plan), max(map(len, plan.sigmas))

    def body(state, _):
        _, key = jax.random.split(state.key)
        more = [jax.random.normal(jax.random.fold_in(key, n + 1), state.last.shape, jnp.float32) for n in range(steps)]
        context = jax.random.normal(jax.random.fold_in(key, CONTEXT_FOLD), state.last.shape, jnp.float32)
        noise = jnp.stack([initial_noise(key, state.last.shape), *more, context])
        state, x = streamer.step(params, state)
        return state, (x, noise)

    def run(params, text):
        state = streamer.init(params, text, jax.random.key(7), latent)
        return jax.lax.scan(body, state, length=length // student.cfg.chunk)[1]

    frames, noise = jax.jit(run)(params, text)
    return jnp.concatenate(list(frames), axis=1), noise


def step_noise(plan, noise):
    """Of ``jax_stream``'s noise what every step of the PyTorch student takes."""
    for i, row in enumerate(np.asarray(noise)):
        sigmas, level = plan.sigmas[: i + 1][-1], plan.context_sigmas[: i + 1][-1]
        taken = [*row[: len(sigmas) if plan.sampler == "renoise" else 1], *([row[-1]] if level else [])]
        yield [to_torch(x) for x in taken]


DIAGONAL = (("clean", (0.0,)), ("clean", (0.0, 0.357)), ("last_step_kv", (0.0,)))
CASES = pairwise(OPTIONS)
CASES += [
    {**CASES[0], "context": context, "sampler": sampler, "context_sigmas": (0.0, 0.357)}
    for context, sampler in (("clean", "renoise"), ("fused", "euler"))
]
CASES += [{**CASES[-1], "etm_input": "clean"}]
CASES += [{**case, "anchor": False} for case in CASES[:2]]
CASES += [{**CASES[0], "steps": "diagonal-4322222", "context": c, "context_sigmas": s} for c, s in DIAGONAL]
CASES += [
    {**case, "context": "clean", "context_weights": "own", "context_sigmas": (0.0, sigma)}
    for case, sigma in zip(CASES[:3], (0.0, 0.357, 0.0), strict=True)
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_parallel_and_streamed(case, tmp_path):
    case = dict(case)
    case["etm_layers"], case["sdd_layers"] = case.pop("split")
    steps, sampler = case.pop("steps", SIGMAS), case.pop("sampler")
    plan = StepPlan.parse(steps, shift=5.0, sampler=sampler, context_sigma=case.pop("context_sigmas", (0.0,)))
    base = dict(prediction=case.pop("prediction"), dtype="float32", remat="none")
    cfg = tiny.student_config(base=tiny.dataclasses.replace(tiny.BASE, **base), **case)
    student = Student(cfg)
    params = tiny.random_params(student, latent_shape=(1, *LATENT))
    text = tiny.text_rows(2, jax.random.key(1))
    other = exported(tmp_path / "out", cfg, params, plan=dataclasses.asdict(plan))
    text_t = torch.from_numpy(np.array(text))

    frames, noise = jax_stream(student, params, text, plan)
    stream = other.stream(text_t, LATENT[:2])
    made = [from_torch(stream.step(row)) for row in step_noise(plan, noise)]
    scale = max(1.0, float(np.abs(frames).std()))
    np.testing.assert_allclose(np.concatenate(made, axis=1) / scale, np.asarray(frames) / scale, atol=TOLERANCE, rtol=0)

    keys = jax.random.split(jax.random.key(3), 4)
    noisy, clean, last = (jax.random.normal(k, (2, FRAMES, *LATENT), jnp.float32) for k in keys[:3])
    sigma = jax.random.uniform(keys[3], (2, FRAMES), jnp.float32)
    history = History(clean, 0.1 * sigma, last, 0.5 * sigma)
    ours = jax.jit(student.__call__)(params, noisy, sigma, text, history)
    levels = [torch.from_numpy(np.array(x)) for x in (sigma, 0.1 * sigma, 0.5 * sigma)]
    with torch.no_grad():
        theirs = other(to_torch(noisy), levels[0], text_t, to_torch(clean), levels[1], to_torch(last), levels[2])
    scale = max(1.0, float(np.abs(ours).std()))
    np.testing.assert_allclose(from_torch(theirs) / scale, np.asarray(ours) / scale, atol=TOLERANCE, rtol=0)


GIVEN = [
    dict(context="clean", sampler="renoise", context_sigmas=(0.0, 0.357), etm_input="clean", anchor=False, chunk=2),
    dict(context="clean", sampler="euler", context_weights="own", rope_mode="absolute"),
    dict(context="fused", sampler="renoise", context_sigmas=(0.1,), sink=2),
    dict(context="last_step_kv", sampler="euler", window=1),
]


@pytest.mark.parametrize("case", GIVEN, ids=lambda case: "-".join(map(str, case.values())))
def test_goes_on_behind_given_chunks(case, tmp_path):
    """A first frame, then after some made chunks two others; noise by number as ``Streamer.observe`` takes it."""
    case = dict(case)
    plan = StepPlan(SIGMAS, case.pop("sampler"), context_sigmas=case.pop("context_sigmas", (0.0,)))
    cfg = tiny.student_config(base=dataclasses.replace(tiny.BASE, dtype="float32", remat="none"), **case)
    student = Student(cfg)
    params = tiny.random_params(student, latent_shape=(1, *LATENT))
    text, g = np.array(tiny.text_rows(2, jax.random.key(1))), cfg.chunk
    given = np.array(jax.random.normal(jax.random.key(5), (2, 3 * g, *LATENT), jnp.float32))
    key, options = jax.random.key(7), dict(seed=jax.random.key(7), latent_shape=LATENT)
    session = Session(Streamer(student, plan), params, None, lambda prompts: jnp.asarray(text), ["", ""], **options)
    stream = exported(tmp_path / "out", cfg, params, plan=dataclasses.asdict(plan)).stream(
        torch.from_numpy(text), LATENT[:2]
    )
    made = []
    for i in range(10):
        for chunks in {0: [given[:, :g]], 4: [given[:, g:]]}.get(i, []):
            session.give(chunks)
            held = to_torch(chunks)
            stream.give(held)
            held.zero_()  # it was copied
        key, own = split_key(key)
        sigmas, level = plan.sigmas[: i + 1][-1], plan.context_sigmas[: i + 1][-1]
        numbers = range(len(sigmas) if plan.sampler == "renoise" else 1)
        if i in (0, 4, 5):
            numbers = [len(sigmas) - 1] if cfg.context == "last_step_kv" else []
        noise = [draw_noise(own, n, (2, g, *LATENT)) for n in (*numbers, *([CONTEXT_FOLD] if level else []))]
        made.append([from_torch(stream.step([to_torch(x) for x in noise])), np.asarray(session.next_latents())])
    theirs, ours = (np.concatenate(chunks, axis=1) for chunks in zip(*made, strict=True))
    np.testing.assert_array_equal(np.concatenate([theirs[:, :g], theirs[:, 4 * g : 6 * g]], axis=1), given)
    scale = max(1.0, float(ours.std()))
    np.testing.assert_allclose(theirs / scale, ours / scale, atol=1e-5, rtol=0)
