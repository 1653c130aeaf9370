"""FP8 weights become numbers, values that cannot be right are named, and a pickle's error gives no bad advice."""

import functools
import hashlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from greedy_distill_jax import convert
from greedy_distill_jax.weights.health import finite
from greedy_distill_jax.weights.open import open_source
from tests.conftest import exit_code
from tests.weights.test_source import SIZES, tensors

run = functools.partial(exit_code, convert.main)

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
NAME = "blocks.1.ffn.0.weight"


def quantised(dtype=E4M3, scale="scale_weight", rows=False):
    """(a state with the matrices of the blocks in FP8, what it stands for)."""
    state, wanted = tensors(), {}
    for name, x in list(state.items()):
        wanted[name] = x
        if not name.startswith("blocks.") or x.ndim != 2:
            continue
        most = np.abs(x).max(axis=1, keepdims=True) if rows else np.abs(x).max(keepdims=True).reshape(())
        by = np.asarray(most / 448.0 if scale else 1.0, np.float32)
        state[name] = (x / by).astype(dtype)
        wanted[name] = state[name].astype(np.float32) * by
        if scale:
            state[name.replace("weight", scale)] = by
            state[name.replace("weight", "scale_input")] = np.ones((), np.float32)
    if scale == "scale_weight":
        state["scaled_fp8"] = np.zeros(2, dtype)
    return state, wanted


def read_back(path, tmp_path, *options):
    assert run("import", path, tmp_path / "ours", *SIZES, *options) == 0
    assert run("export", tmp_path / "ours", tmp_path / "out", "--format", "original") == 0
    return load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("rows", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize(("dtype", "scale"), [(E4M3, "scale_weight"), (E5M2, "weight_scale"), (E4M3, "")])
def test_fp8(dtype, scale, rows, tmp_path, capsys):
    state, wanted = quantised(dtype, scale, rows)
    save_file({f"model.diffusion_model.{name}": x for name, x in state.items()}, tmp_path / "in.safetensors")
    found = read_back(tmp_path / "in.safetensors", tmp_path)
    how = f"times their {scale}, float32" if scale else "without a scale, bfloat16"
    assert f"precision: 30 tensors of {np.dtype(dtype)} {how}\n" in capsys.readouterr().out
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == (np.float32 if scale or state[name].dtype != dtype else jnp.bfloat16)
        np.testing.assert_array_equal(found[name].astype(np.float32), x, err_msg=name)
    original = tensors()
    for name in (NAME, "blocks.0.self_attn.q.weight"):  # and near what was quantised
        if scale:
            step = 2.0 ** (-3 if dtype == E4M3 else -2)
            np.testing.assert_allclose(found[name], original[name], rtol=step, atol=2e-3 * np.abs(original[name]).max())
    assert run("inspect", tmp_path / "in.safetensors", *SIZES) == 0
    assert f"precision     30 tensors of {np.dtype(dtype)} {how}\n" in capsys.readouterr().out


def test_fp8_of_a_pt_and_by_slices(tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    state, wanted = quantised(E4M3, "weight_scale", rows=True)
    made = {
        name: torch.from_numpy(x.view(np.uint8)).view(torch.float8_e4m3fn) if x.dtype == E4M3 else torch.tensor(x)
        for name, x in state.items()
    }
    torch.save({"model": made}, tmp_path / "in.pt")
    save_file(state, tmp_path / "in.safetensors")
    for name in ("in.pt", "in.safetensors"):
        source = open_source(tmp_path / name, heads=2, text_len=3)
        found = source.read("blocks/ffn/up/kernel", (slice(1, 2), slice(5, 9), slice(7, 30)), np.float32)
        np.testing.assert_array_equal(found[0], wanted[NAME].T[5:9, 7:30])


def test_scales_that_are_not_read(tmp_path, capsys):
    state, _ = quantised()
    for scale in (np.ones((4, 3), np.float32), np.ones(24, np.uint8)):
        save_file({**state, NAME.replace("weight", "scale_weight"): scale}, tmp_path / "in.safetensors")
        assert run("import", tmp_path / "in.safetensors", tmp_path / "no", *SIZES) == 2
        error = capsys.readouterr().err
        assert f"blocks.1.ffn.0.scale_weight has shape {list(scale.shape)} and dtype {scale.dtype}" in error


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_finite(dtype):
    value = np.asarray([0.0, -1.0, 3e4, 6e-5], dtype)
    assert finite(value) and finite(np.asarray(np.finfo(np.float16).max, dtype))
    for bad in (np.nan, np.inf, -np.inf):
        assert not finite(np.asarray([1.0, bad], dtype))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_values_that_are_not_finite(dtype, tmp_path, capsys):
    state = {name: x.astype(dtype) for name, x in tensors().items()}
    state[NAME][2, 3:5], state[NAME][7, 0] = np.nan, -np.inf
    save_file(state, tmp_path / "in.safetensors")
    assert run("import", tmp_path / "in.safetensors", tmp_path / "no", *SIZES) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --allow-nonfinite: ") and not (tmp_path / "no").exists()
    assert f"tensor {NAME} holds 2 NaN and 1 infinite values; use another file" in error
    found = read_back(tmp_path / "in.safetensors", tmp_path, "--allow-nonfinite")
    assert found[NAME].tobytes() == state[NAME].tobytes()


def test_values_beyond_the_dtype_that_is_asked_for(tmp_path, capsys):
    state = {name: x.copy() for name, x in tensors().items()}
    state["blocks.1.norm3.bias"][2] = 1e5
    save_file(state, tmp_path / "in.safetensors")
    assert run("import", tmp_path / "in.safetensors", tmp_path / "no", *SIZES, "--dtype", "float16") == 2
    error = capsys.readouterr().err
    assert "tensor blocks.1.norm3.bias holds 0 NaN and 1 infinite values" in error and "than float16" in error


def test_inspect_says_what_cannot_be_right(tmp_path, capsys):
    state, path = {name: x.copy() for name, x in tensors().items()}, tmp_path / "in.safetensors"
    save_file(state, path)
    assert run("inspect", path, *SIZES) == 0
    out = capsys.readouterr().out
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"file          in.safetensors, {path.stat().st_size:,} bytes, sha256 {digest}\n" in out
    assert "values        all finite, none beyond 10000, no tensor all zero\n" in out
    state["head.head.weight"][:], state["blocks.0.norm3.bias"][:] = 0, 0
    state[NAME][0, 0], state["blocks.2.ffn.2.weight"][1, 1] = np.nan, -2e4
    save_file(state, path)
    assert run("inspect", path, *SIZES) == 0
    out = capsys.readouterr().out
    assert f"NaN or inf    1 tensors: {NAME}\n" in out
    assert "all zero      2 tensors: blocks.0.norm3.bias, head.head.weight\n" in out
    assert "beyond 10000  1 tensors: blocks.2.ffn.2.weight (2e+04)\n" in out


# --- pickles ----------------------------------------------------------------------------------------------------------


class Foreign:
    """Of a class that torch does not trust."""


@pytest.mark.parametrize(
    "content", [{"model": Foreign()}, {"a": [Foreign]}, {"f": len}, b"\x80\x04}.", b"\x80\x02cos\nsystem\n."]
)
def test_no_error_repeats_torchs_advice(content, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    path = tmp_path / "bad.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert run("inspect", path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.pt" in error
    assert not [word for word in ("weights_only", "safe_globals", "only if you") if word in error], error
