"""The two parts of a student's gradient: they add up to the whole, and the command that measures them."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedy_distill_jax import analyze
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval import gradients
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.testing import tiny
from tests.conftest import exit_code
from tests.training.start import begin

LATENT = (4, 4, 4)
PLAN = StepPlan(((1.0, 0.6),), context_sigmas=(0.0, 0.3))


def _setup(causal, **changes):
    model = CausalStudent(tiny.causal_config(**changes)) if causal else Student(tiny.student_config(**changes))
    video = jax.random.normal(jax.random.key(1), (2, 6, *LATENT))
    batch = {"latents": video, "text": tiny.text_rows(2, jax.random.key(2))}
    return model, tiny.random_params(model), batch


size = jax.jit(optax.tree.norm)  # one program instead of some for every shape of a leaf


@pytest.mark.parametrize(
    "case",
    [
        dict(causal=False),
        dict(causal=False, context="fused", fusion="xattn2", chunk=2),
        dict(causal=True, chunk=2, sink=0),
    ],
    ids=["etm_sdd", "fused", "causal"],
)
def test_the_parts_add_up_to_the_whole(case):
    model, params, batch = _setup(**case)
    own, copied = gradients.apart(model, params)
    options = dict(plan=PLAN, shift=3.0)
    key = jax.random.key(3)
    parts = jax.jit(lambda p: gradients.gradient_parts(own, p, batch, key, **options))(copied)
    loss, whole = jax.jit(jax.value_and_grad(lambda p: gradients.held_out_loss(model, p, batch, key, **options)))(
        params
    )
    np.testing.assert_allclose(parts.loss, loss, rtol=1e-5)
    of_network = whole if case["causal"] else whole["sdd"]
    summed = {
        name: jax.tree.map(jnp.add, x, parts.context[name]) if name in parts.context else x
        for name, x in parts.denoise.items()
    }
    pairs = [(summed, of_network)] + ([] if case["causal"] else [(parts.etm, whole["etm"])])
    for found, expected in pairs:
        difference = size(jax.tree.map(jnp.subtract, found, expected))
        assert difference < 1e-5 * size(expected)
    assert size(parts.context) > 1e-2 * size(parts.denoise)


def test_products_by_layer_and_module():
    model, params, _ = _setup(causal=True)
    _, copied = gradients.apart(model, params)
    x, y = copied["dit"], jax.tree.map(lambda leaf: -2.0 * leaf, copied["dit_context"])
    found = gradients.products(x, y)
    assert set(found) == {*gradients.MODULES, gradients.EMBEDDINGS}
    assert found["ffn"].shape == (3, 3) and found["embeddings"].shape == (1, 3)
    for sums in found.values():
        np.testing.assert_allclose(sums[:, 1:], np.asarray(sums[:, :1]) * [[4.0, -2.0]], rtol=1e-5)
    blocks = x["blocks"]
    cross = [*jax.tree.leaves(blocks["cross_attn"]), *jax.tree.leaves(blocks["norm3"])]
    expected = sum(float(jnp.sum(jnp.square(leaf[1]))) for leaf in cross)
    np.testing.assert_allclose(found["cross_attn"][1, 0], expected, rtol=1e-5)
    total = sum(float(sums[:, 0].sum()) for sums in found.values())
    without_head = {name: leaf for name, leaf in x.items() if name != "head"}
    np.testing.assert_allclose(total, float(optax.tree.norm(without_head)) ** 2, rtol=1e-4)


def test_keys_of_denoising_calls_cannot_be_told_apart(monkeypatch, tmp_path):
    run = types.SimpleNamespace(is_student=True, model=_setup(causal=False, context="last_step_kv")[0])
    monkeypatch.setattr(gradients.Run, "load", lambda path: run)
    with pytest.raises(UserError, match="somewhere holds a student of context 'last_step_kv', .* no pass over the"):
        gradients.analyze_gradients(["somewhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_teacher, tiny_student, tiny_causal):
    """Runs of the teacher, of both kinds of student (stage 1), and of stage 2 with weights of the context pass."""
    root = tmp_path_factory.mktemp("runs")
    (root / "teacher").symlink_to(tiny_teacher)
    (root / "student").symlink_to(tiny_student)
    (root / "causal").symlink_to(tiny_causal)
    stage2 = dict(
        teacher_from=str(root / "teacher"),
        student_from=str(root / "student"),
        student__context_weights="own",
        distill__context_grad_sdd="params",
    )
    begin(tiny.train_config("dmd", **stage2), root / "stage2")
    return root


def test_the_command_compares_runs(runs, tmp_path, capsys):
    given = [f"--checkpoint={runs / name}" for name in ("student", "causal", "stage2")]
    output = tmp_path / "out"
    analyze.main(["gradients", *given, f"--output={output}", "--videos=8", "--batches=2", "--seed=3"])
    found = json.loads((output / "gradients.json").read_text())
    assert list(found["runs"]) == ["student", "causal", "stage2"] and "x0" in found["loss"]
    for name, run in found["runs"].items():
        assert (run["videos"], run["batches"], run["seed"]) == (8, 2, 3)
        assert (run["etm"] is None) == (run["kind"] == "causal") == (name == "causal")
        assert run["context_weights"] == ("own" if name == "stage2" else "shared")
        assert [layer["block"] for layer in run["layers"]] == [0, 1]
        last = run["layers"][-1]
        assert last["ffn"]["context"] == 0 and last["ffn"]["cosine"] is None and last["self_attn"]["context"] > 0
        for figures in (run["whole"], run["layers"][0]["all"], *(run["layers"][0][m] for m in gradients.MODULES)):
            assert figures["denoise"] > 0 and figures["context"] > 0 and abs(figures["cosine"]) <= 1
            assert figures["denoise_error"] > 0 and figures["cosine_error"] > 0
    printed, page = capsys.readouterr().out, (output / "gradients.md").read_text()
    assert "layer 1 (block 1)" in printed and "norm of ETM's gradient" in printed
    assert "## causal" in page and (output / "gradients.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_left_of_what_was_not_measured(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "measure", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradients.analyze_gradients([runs / "student"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--checkpoint={runs}/teacher"], "--checkpoint: {runs}/teacher holds a teacher"),
        (["--checkpoint={runs}/none"], "--checkpoint: {runs}/none holds no run"),
        (["--checkpoint={runs}/student"] * 2, "--checkpoint: a run is given twice"),
        (["--checkpoint={runs}/student", "--batches=1"], "--batches: it is 1; it must be at least 2"),
        (["--checkpoint={runs}/student", "--videos=3"], "--videos: 3 videos, of which moving_shapes has"),
        (["--checkpoint={runs}/student", "--videos=0"], "--videos: it is 0"),
        (["--checkpoint={runs}/student", "--output={runs}/student/codec.npz"], "--output: {runs}/student/codec.npz"),
    ],
)
def test_a_mistake_is_one_line(runs, tmp_path, capsys, arguments, message):
    arguments = [argument.format(runs=runs) for argument in arguments]
    code = exit_code(analyze.main, "gradients", f"--output={tmp_path / 'out'}", *arguments)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and message.format(runs=runs) in error
