"""The exported PyTorch student as torch users treat it: other dtypes, `torch.compile`, batches, wrong inputs."""

import dataclasses

import pytest

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.weights.source import TreeSource
from greedy_distill_jax.weights.write import write
from tests.parity.test_torch_student import LATENT, loaded

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")

PLAN = StepPlan(((1.0, 0.8, 0.4), (1.0, 0.5)), "renoise", context_sigmas=(0.1,))
WINDOW, ROWS, NOISE = 3, 3, (4, 3)  # noise tensors of chunk 0, and of all others
FLOAT32 = ("norm", "modulation", "time_", "head", "bos", "z_gate")  # in the names of what stays float32


def folder_of(folder, **options):
    base = dataclasses.replace(tiny.BASE, dtype="float32", remat="none")
    split = dict(etm_layers=(0,), sdd_layers=(1, 2))
    cfg = tiny.student_config(base=base, **{"window": WINDOW, "fusion": "xattn2"} | split | options)
    params = tiny.random_params(Student(cfg), latent_shape=(1, *LATENT))
    write(TreeSource(cfg, params, {"plan": dataclasses.asdict(PLAN)}), folder, "torch-student")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("exported") / "student")


def text(batch=1, seed=1):
    return torch.randn(batch, ROWS, tiny.BASE.text_dim, generator=torch.Generator().manual_seed(seed))


def frames(student, chunks=6, batch=1, switch=None):
    """[B, chunks, C, H, W] of a stream whose prompts change at chunk ``switch``."""
    stream = student.stream(text(batch), LATENT[:2], generator=torch.Generator().manual_seed(0))
    made = []
    for i in range(chunks):
        if i == switch:
            stream.switch_prompt(text(batch, seed=2))
        made.append(stream.step())
    return torch.cat(made, dim=1)


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda student: student.half(), torch.float16),
        (lambda student: student.bfloat16(), torch.bfloat16),
        (lambda student: student.to(torch.bfloat16), torch.bfloat16),
        (lambda student: student.to("cpu", torch.float16), torch.float16),
        (lambda student: student.half().float(), torch.float32),
    ],
    ids=["half", "bfloat16", "to", "device", "back"],
)
def test_another_dtype(convert, dtype, folder):
    whole, student = loaded(folder), convert(loaded(folder))
    for name, parameter in student.named_parameters():
        held = whole.get_parameter(name)
        if any(part in name for part in FLOAT32):
            assert parameter.dtype == torch.float32 and torch.equal(parameter, held), name
        else:
            assert parameter.dtype == dtype, name
    made, exact = frames(student), frames(whole)
    assert made.dtype == torch.float32 and student.etm.blocks[0].self_attn.q.weight.dtype == dtype
    error = float((made - exact).abs().max() / exact.std())
    assert 0 < error < (0.3 if dtype == torch.bfloat16 else 0.05), error
    if dtype == torch.bfloat16:
        as_loaded = type(student).from_pretrained(folder, dtype=dtype)
        assert torch.equal(frames(as_loaded), made)
    noisy, sigma = torch.randn(1, 3, LATENT[2], *LATENT[:2]).to(dtype), torch.full((1, 3), 0.5, dtype=dtype)
    with torch.no_grad():
        assert student(noisy, sigma, text().to(dtype), noisy).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "chunks", "graphs"),
    [
        ({"context": "clean", "sink": 1}, 30, 4),
        ({"context": "fused", "fusion": "selfkv", "rope_mode": "absolute"}, 10, 4),
        ({"context_weights": "own", "fusion": "adaln", "anchor": False}, 10, 6),
        ({"window": 1, "fusion": "replace"}, 10, 3),  # an ETM that sees its own slot alone has no first chunks
    ],
    ids=["sink", "fused", "own", "narrow"],
)
def test_compiles_a_fixed_number_of_graphs(options, chunks, graphs, tmp_path):
    student, switch = loaded(folder_of(tmp_path / "out", **options)), chunks // 2
    eager, compiled = frames(student, chunks, switch=switch), []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    student.compile(backend=backend)
    stream = student.stream(text(), LATENT[:2], generator=torch.Generator().manual_seed(0))
    for i in range(chunks):
        if i == switch:
            stream.switch_prompt(text(seed=2))
        torch.testing.assert_close(stream.step(), eager[:, i : i + 1], atol=1e-5, rtol=1e-5)
    assert len(compiled) == graphs
    transposed = [torch.randn(1, *LATENT[:2], LATENT[2], 1).permute(0, 4, 3, 1, 2) for _ in range(NOISE[1])]
    stream.step(transposed)
    stream.give(torch.cat(transposed, dim=1))
    for _ in range(NOISE[1] + 1):
        stream.step()
    frames(student, 3)
    assert len(compiled) == graphs


def test_rows_of_a_batch_are_the_videos_alone(folder):
    student = loaded(folder)
    noise = [[torch.randn(2, 1, LATENT[2], *LATENT[:2]) for _ in range(NOISE[i > 0])] for i in range(5)]
    prompts = text(2), text(2, seed=2)

    def made(rows):
        stream, chunks = student.stream(prompts[0][rows], LATENT[:2]), []
        for i, row in enumerate(noise):
            if i == 3:
                stream.switch_prompt(prompts[1][rows])
            chunks.append(stream.step([x[rows] for x in row]))
        return torch.cat(chunks, dim=1)

    both = made(slice(None))
    for row in range(2):
        torch.testing.assert_close(made(slice(row, row + 1)), both[row : row + 1], atol=1e-5, rtol=1e-5)


def test_wrong_inputs_are_named(folder):
    student = loaded(folder)
    stream = student.stream(text(2), LATENT[:2])
    noise = [torch.randn(2, 1, LATENT[2], *LATENT[:2]) for _ in range(NOISE[0])]
    for given, said in (
        (noise[:2], r"noise has 2 tensors; chunk 0 takes 4 of \[2, 1, 4, 4, 6\]"),
        ([*noise, *noise], "noise has 8 tensors; chunk 0 takes 4"),
        ([], "noise has 0 tensors; chunk 0 takes 4"),
        ([noise[0], noise[1][:1], *noise[2:]], r"noise\[1\] is of shape \[1, 1, 4, 4, 6\]; give \[2, 1, 4, 4, 6\]"),
    ):
        with pytest.raises(ValueError, match=said):
            stream.step(given)
    stream.step(noise)  # refused noise has changed nothing
    with pytest.raises(ValueError, match="noise has 4 tensors; chunk 1 takes 3"):
        stream.step(noise)
    for latents in (noise[0][:1], noise[0][..., :-1], noise[0][0], noise[0][:, :0]):
        with pytest.raises(ValueError, match=r"latents are of shape .*; give \[2, T, 4, 4, 6\], T a multiple of 1"):
            stream.give(latents)
    stream.give(noise[0])
    with pytest.raises(ValueError, match="noise has 3 tensors; chunk 1 takes 1"):
        stream.step(noise[:3])
    assert torch.equal(stream.step(noise[:1]), noise[0])  # and it is still there
    for prompts in (text(1), text(2)[..., :-1], text(2)[0]):
        with pytest.raises(ValueError, match=rf"text is of shape .*; give \[2, any, {tiny.BASE.text_dim}\]"):
            stream.switch_prompt(prompts)
    with pytest.raises(ValueError, match="text is of shape"):
        student.stream(text()[0], LATENT[:2])
    with pytest.raises(ValueError, match="latents of 5x6 do not divide into patches of 2"):
        student.stream(text(), (5, 6))
    noisy, sigma = torch.randn(2, 3, LATENT[2], *LATENT[:2]), torch.zeros(2, 3)
    for args, said in (
        ((noisy, sigma, text(1), noisy), "text is of shape"),
        ((noisy, sigma[:, :2], text(2), noisy), r"sigma is of shape \[2, 2\]; give \[2, 3\]"),
        ((noisy, sigma, text(2), noisy[:1]), "history is of shape"),
    ):
        with pytest.raises(ValueError, match=said):
            student(*args)
