"""Any tree of names, behind any wrapper, in any container and dtypes: out bit for bit, or refused for its cause."""

import dataclasses
import json
import tempfile
from pathlib import Path

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.weights.names import STUDENT_PARTS
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.source import TreeSource
from greedy_distill_jax.weights.torch_files import to_torch
from greedy_distill_jax.weights.write import tensors_of, write

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")

BASE = dataclasses.replace(tiny.BASE, num_layers=2)
SOURCE = TreeSource(BASE, tiny.random_params(Teacher(BASE)))
STATES = {naming: dict(tensors_of(SOURCE, naming, "keep")) for naming in ("original", "diffusers")}
DTYPES = (np.float32, np.float16, jnp.bfloat16, np.float64)
ADDED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")  # by FSDP, checkpointing, torch.compile
CONTAINERS = ("file", "shards", "index", "shards.bin", "index.bin", "bare.pt", "part.pt", "nested.pt", "old.pt")
FAULTS = ("", "", "", "missing", "unexpected", "shape", "int8", "twice")
SIZING = ("patch_embedding", "text_embed", "time_embed", "ffn.0", "ffn.net.0", "head.head", "proj_out")

pieces = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8).filter(lambda p: p not in STUDENT_PARTS)
wrappers = st.one_of(
    st.sampled_from(("", "model.", "model.diffusion_model.", "module.", "transformer.", "net.")),
    st.lists(pieces, min_size=1, max_size=3).map(lambda found: ".".join(found) + "."),
)


@st.composite
def files(draw):
    """(naming, wrapper, {name: tensor}, what parallel training adds to which names, container, fault, its tensor)."""
    naming = draw(st.sampled_from(("original", "diffusers")))
    dtypes = {}  # one for all layers of a parameter, as the tensors of one of our leaves share theirs
    state = {}
    for name, x in STATES[naming].items():
        kind = name.replace("blocks.1.", "blocks.0.")
        dtypes[kind] = dtypes.get(kind) or draw(st.sampled_from(DTYPES))
        state[name] = x.astype(dtypes[kind])
    added = draw(st.dictionaries(st.sampled_from(sorted(state)), st.sampled_from(ADDED), max_size=4))
    fault, target = draw(st.sampled_from(FAULTS)), draw(st.sampled_from(sorted(state)))
    if fault == "shape":
        hypothesis.assume(not any(sizing in target for sizing in SIZING))
    return naming, draw(wrappers), state, added, draw(st.sampled_from(CONTAINERS)), fault, target


def stored(wrapper, state, added):
    """The state dict under the names in which a file has it."""
    found = {}
    for name, x in state.items():
        first, dot, rest = name.partition(".")
        name = f"{first}.{added[name]}{dot}{rest}" if name in added else name
        found[wrapper + name] = x
    return found


def faulty(fault, target, wrapper, state):
    """(the state dict with a fault, what the error must say)."""
    out = dict(state)
    key = next(name for name in state if name.removeprefix(wrapper) == target or _plain(name) == wrapper + target)
    if fault == "missing":
        del out[key]
        return out, [f"tensor {target} is missing"]
    if fault == "unexpected":
        out[f"{wrapper}blocks.0.more.weight"] = np.ones(3, np.float32)
        return out, ["unexpected tensor", "blocks.0.more.weight"]
    if fault == "shape":
        out[key] = np.ones((*out[key].shape[:-1], out[key].shape[-1] + 1), np.float32)
        return out, [f"tensor {target} has shape {list(out[key].shape)}"]
    if fault == "int8":
        out[key] = np.ones(out[key].shape, np.int8)
        return out, [key, "has dtype int8"]
    if fault == "twice":
        out[f"_orig_mod.{key}"] = out[key]
        return out, [key, f"are the same parameter {target}"]
    return out, []


def _plain(name):
    return ".".join(piece for piece in name.split(".") if piece not in ADDED)


def put(folder, container, state):
    """Writes a state dict; returns what is to be opened."""
    items = list(state.items())
    if container == "file":
        save_file(state, folder / "x.safetensors")
        return folder / "x.safetensors"
    if container.endswith(".pt"):
        tensors = dict(as_torch(items))
        top = {"bare.pt": tensors, "nested.pt": {"a": {"weights": tensors, "step": 3}}}.get(container)
        top = {"state_dict": tensors, "step": 3} if top is None else top
        torch.save(top, folder / "x.pt", _use_new_zipfile_serialization=container != "old.pt")
        return folder / "x.pt"
    kind, _, suffix = container.partition(".")
    suffix = suffix or "safetensors"
    cut = [items[:7], items[7:40], items[40:]]
    places = [f"x-{number:05d}-of-00003.{suffix}" for number in (1, 2, 3)]
    for place, part in zip(places, cut, strict=True):
        if suffix == "bin":
            torch.save(dict(as_torch(part)), folder / place)
        else:
            save_file(dict(part), folder / place)
    if kind == "index":
        weight_map = {name: place for place, part in zip(places, cut, strict=True) for name, _ in part}
        (folder / f"x.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def as_torch(items):
    """The same bits as torch tensors, by name."""
    return ((name, torch.from_numpy(x) if x.dtype == np.int8 else to_torch(x)) for name, x in items)


@hypothesis.settings(max_examples=80)
@hypothesis.given(files())
def test_out_bit_for_bit_or_refused_for_its_cause(made):
    naming, wrapper, state, added, container, fault, target = made
    content, said = faulty(fault, target, wrapper, stored(wrapper, state, added))
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder), container, content)
        if fault:
            with pytest.raises(UserError) as refused:
                open_source(path, heads=2, text_len=3)
            assert all(word in str(refused.value) for word in said), (said, str(refused.value))
            return
        source = open_source(path, heads=2, text_len=3)
        assert source.meta["wrapper"] == wrapper
        write(source, Path(folder) / "out", naming)
        back = load_file(Path(folder) / "out" / "diffusion_pytorch_model.safetensors")
    assert {n: (x.dtype, x.shape, x.tobytes()) for n, x in back.items()} == {
        n: (x.dtype, x.shape, x.tobytes()) for n, x in state.items()
    }
