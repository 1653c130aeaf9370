"""LoRA weights merged at import: in every naming the weights are W + scale alpha / rank B A, what is not, is named."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from greedy_distill_jax import convert
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.weights.lora import Adapter, parse_lora
from greedy_distill_jax.weights.open import open_source
from tests.conftest import exit_code
from tests.weights.test_source import SIZES, tensors

run = functools.partial(exit_code, convert.main)

RANK = 2
MODULES = {  # Wan's name -> diffusers'
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.2.cross_attn.o": "blocks.2.attn2.to_out.0",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}


def factors(seed=0, dtype=np.float32):
    """{Wan's name: (A [rank, in], B [out, rank])}."""
    rng, weights = np.random.default_rng(seed), tensors()

    def one(*shape):
        return np.asarray(rng.standard_normal(shape), dtype)

    shapes = {module: weights[f"{module}.weight"].shape for module in MODULES}
    return {module: (one(RANK, inputs), one(outputs, RANK)) for module, (outputs, inputs) in shapes.items()}


def named(a, b, prefix, *, diffusers=False, kohya=False, alpha=None, seed=0):
    """An adapter of the factors under names; the kohya way has underscores."""
    found = {}
    for module, pair in factors(seed).items():
        module = MODULES[module] if diffusers else module
        module = prefix + (module.replace(".", "_") if kohya else module)
        found |= {f"{module}.{name}.weight": x for name, x in zip((a, b), pair)}
        if alpha is not None:
            found[f"{module}.alpha"] = np.asarray(alpha, np.float32)
    return found


def merged(scale, seed=0):
    """The weights that a merge by hand gives."""
    state = tensors()
    for module, (a, b) in factors(seed).items():
        state[f"{module}.weight"] = state[f"{module}.weight"] + np.float32(scale) * (b @ a)
    return state


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(tensors(), path)
    return path


def after(base, tmp_path, capsys, *loras):
    """(weights after `import --lora`, what was printed)."""
    capsys.readouterr()
    given = [word for lora in loras for word in ("--lora", lora)]
    assert run("import", base, tmp_path / "merged", *SIZES, *given) == 0, capsys.readouterr()
    assert run("export", tmp_path / "merged", tmp_path / "out", "--format", "original") == 0
    return load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), capsys.readouterr().out


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, rtol=1e-6, err_msg=name)


NAMINGS = {
    "peft": dict(a="lora_A", b="lora_B", prefix="base_model.model."),
    "peft named": dict(a="lora_A.default", b="lora_B.default", prefix="base_model.model.model."),
    "diffusers": dict(a="lora_A", b="lora_B", prefix="transformer.", diffusers=True),
    "diffusers old": dict(a="lora.down", b="lora.up", prefix="transformer.", diffusers=True),
    "comfy": dict(a="lora_A", b="lora_B", prefix="diffusion_model."),
    "lightx2v": dict(a="lora_down", b="lora_up", prefix="diffusion_model.", alpha=RANK),
    "kohya": dict(a="lora_down", b="lora_up", prefix="lora_unet_", kohya=True, alpha=RANK / 4),
    "lycoris": dict(a="lora_down", b="lora_up", prefix="lycoris_", kohya=True, diffusers=True, alpha=4),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming(naming, base, tmp_path, capsys):
    form = NAMINGS[naming]
    save_file(named(**form), tmp_path / "lora.safetensors")
    found, said = after(base, tmp_path, capsys, f"{tmp_path / 'lora.safetensors'}:0.5")
    close(found, merged(0.5 * form.get("alpha", RANK) / RANK))
    how = ", scale 0.5" + ("" if "alpha" in form else ", alpha taken as the rank")
    assert f"lora.safetensors: {len(MODULES)} of {len(MODULES)} modules merged{how}\n" in said
    assert run("inspect", tmp_path / "lora.safetensors") == 0
    out = capsys.readouterr().out
    alpha = f"{form['alpha']:g}" if "alpha" in form else "not said (taken as the rank)"
    assert "rank          2 (5 modules)" in out and f"alpha         {alpha} (5 modules)" in out
    assert ("to_q" if form.get("diffusers") and not form.get("kohya") else "q") in out


def test_longlives_pt(base, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    form = dict(a="lora_A", b="lora_B", prefix="base_model.model.")
    parts = {"generator_lora": named(**form), "critic_lora": named(**form, seed=1)}
    parts = {name: {key: torch.from_numpy(x) for key, x in part.items()} for name, part in parts.items()}
    torch.save({**parts, "step": 7}, tmp_path / "lora.pt")
    found, said = after(base, tmp_path, capsys, tmp_path / "lora.pt")
    close(found, merged(1.0))
    assert "lora.pt#generator_lora: 5 of 5 modules merged" in said
    (tmp_path / "critic").mkdir()
    found, said = after(base, tmp_path / "critic", capsys, f"{tmp_path / 'lora.pt'}#critic_lora:0.5")
    close(found, merged(0.5, seed=1))
    assert "lora.pt#critic_lora: 5 of 5 modules merged, scale 0.5" in said
    loras = open_source(tmp_path / "critic" / "merged").meta["source"]["loras"]
    assert loras == [{"name": "lora.pt#critic_lora", "scale": 0.5}]
    torch.save({"a": parts["generator_lora"], "b": parts["critic_lora"]}, tmp_path / "two.pt")
    for given, told in (
        ("", "holds several dictionaries of tensors: a (10), b (10); choose one"),
        ("#c", "no part 'c'"),
    ):
        assert run("import", base, tmp_path / "no", *SIZES, "--lora", f"{tmp_path / 'two.pt'}{given}") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --lora FILE#PART: ") and told in error, error
    assert run("inspect", tmp_path / "lora.pt") == 0
    assert "format        LoRA weights, part generator_lora\n" in capsys.readouterr().out
    assert run("inspect", tmp_path / "lora.pt", "--part", "critic_lora") == 0
    assert "part critic_lora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (dict(r=RANK, lora_alpha=3), 1.5),
        (dict(r=RANK, lora_alpha=3, use_rslora=True), 3 / 2**0.5),
        (dict(r=RANK, lora_alpha=3, alpha_pattern={"q": 8, "0": 8, "o": 8, "1": 8, "head": 8}), 4.0),
    ],
)
def test_the_scale_of_pefts_configuration(config, scale, base, tmp_path, capsys):
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(named("lora_A", "lora_B", "base_model.model."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    close(after(base, tmp_path, capsys, folder)[0], merged(scale))


@pytest.mark.parametrize(
    ("prefix", "key", "hit"),
    [
        ("base_model.model.", "^blocks.0.self_attn.q", ["blocks.0.self_attn.q"]),
        ("base_model.model.model.", "model.blocks.0.self_attn.q", ["blocks.0.self_attn.q"]),
        ("base_model.model.", "head|self_attn.q", ["head.head", "blocks.0.self_attn.q"]),
        ("base_model.model.", "self_attn.q|head", ["head.head", "blocks.0.self_attn.q"]),
        ("base_model.model.", "ffn", []),
        ("base_model.model.", "elf_attn.q", []),
    ],
)
def test_a_pattern_of_alphas_matches_as_in_peft(prefix, key, hit, tmp_path):
    save_file(named("lora_A", "lora_B", prefix), tmp_path / "adapter_model.safetensors")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(dict(lora_alpha=RANK, alpha_pattern={key: 8})))
    found = Adapter(tmp_path).modules
    assert {name.removeprefix("base_model."): module.factor for name, module in found.items()} == {
        name: 4.0 if name in hit else 1.0 for name in MODULES
    }
    config.write_text(json.dumps(dict(alpha_pattern={"(": 8})))
    with pytest.raises(UserError, match="its alpha_pattern .* is none"):
        Adapter(tmp_path)


def test_pefts_folder_of_pickles(base, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    (tmp_path / "peft").mkdir()
    state = {name: torch.from_numpy(x) for name, x in named("lora_A", "lora_B", "base_model.model.").items()}
    torch.save(state, tmp_path / "peft" / "adapter_model.bin")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6}))
    close(after(base, tmp_path, capsys, tmp_path / "peft")[0], merged(3.0))


def test_the_scale_of_diffusers_metadata(base, tmp_path, capsys):
    told = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 5})}
    folder = tmp_path / "diffusers"
    folder.mkdir()
    state = named("lora_A", "lora_B", "transformer.", diffusers=True)
    save_file(state, folder / "pytorch_lora_weights.safetensors", metadata=told)
    close(after(base, tmp_path, capsys, folder)[0], merged(2.5))


def test_differences_of_biases_norms_and_modulations(base, tmp_path, capsys):
    """As lightx2v and Krea write them."""
    wanted, lora = tensors(), {}
    for name, role in [
        ("blocks.0.self_attn.q.bias", "blocks.0.self_attn.q.diff_b"),
        ("blocks.1.norm3.weight", "blocks.1.norm3.diff"),
        ("blocks.1.norm3.bias", "blocks.1.norm3.diff_b"),
        ("blocks.2.cross_attn.norm_k.weight", "blocks.2.cross_attn.norm_k.diff"),
        ("blocks.1.modulation", "blocks.1.diff_m"),
        ("head.modulation", "head.modulation.diff"),
        ("patch_embedding.weight", "patch_embedding.diff"),
        ("text_embedding.0.weight", "text_embedding.0.diff"),
    ]:
        change = np.random.default_rng(len(lora)).standard_normal(wanted[name].shape).astype(np.float32)
        wanted[name] = wanted[name] + 0.5 * change
        lora[f"diffusion_model.{role}"] = change
    save_file(lora, tmp_path / "lora.safetensors")
    found, said = after(base, tmp_path, capsys, f"{tmp_path / 'lora.safetensors'}:0.5")
    close(found, wanted)
    assert "7 of 7 modules merged" in said


def test_factors_of_the_patch_embedding_and_biases_of_peft(base, tmp_path, capsys):
    rng, wanted = np.random.default_rng(3), tensors()
    shape = wanted["patch_embedding.weight"].shape
    a = rng.standard_normal((RANK, *shape[1:])).astype(np.float32)
    b = rng.standard_normal((shape[0], RANK, 1, 1, 1)).astype(np.float32)
    bias = rng.standard_normal(shape[0]).astype(np.float32)
    lora = {"patch_embedding.lora_down.weight": a, "patch_embedding.lora_up.weight": b}
    save_file({**lora, "patch_embedding.lora_B.bias": bias}, tmp_path / "lora.safetensors")
    wanted["patch_embedding.weight"] = wanted["patch_embedding.weight"] + np.einsum("orxyz,rchij->ochij", b, a)
    wanted["patch_embedding.bias"] = wanted["patch_embedding.bias"] + bias
    close(after(base, tmp_path, capsys, tmp_path / "lora.safetensors")[0], wanted)


def test_several_adapters_and_what_is_not_here(base, tmp_path, capsys):
    image = "diffusion_model.blocks.0.cross_attn.k_img"
    extra = {f"{image}.lora_{name}.weight": np.ones((2, 2), np.float32) for name in "AB"}
    extra[f"{image.replace('k_img', 'norm_q')}.diff_b"] = np.ones(24, np.float32)  # a norm that has no bias
    save_file(named("lora_A", "lora_B", "diffusion_model.") | extra, tmp_path / "a.safetensors")
    save_file(named("lora_A", "lora_B", "diffusion_model.", seed=1), tmp_path / "b.safetensors")
    found, said = after(base, tmp_path, capsys, tmp_path / "a.safetensors", f"{tmp_path / 'b.safetensors'}:2")
    wanted, other = merged(1.0), factors(1)
    for module, (a, b) in other.items():
        wanted[f"{module}.weight"] = wanted[f"{module}.weight"] + 2 * (b @ a)
    close(found, wanted)
    lost = f"{image}, {image.replace('k_img', 'norm_q')}, its bias"
    assert f"a.safetensors: 5 of 7 modules merged, alpha taken as the rank; not in this model: {lost}\n" in said
    assert "b.safetensors: 5 of 5 modules merged, scale 2, alpha taken as the rank\n" in said


def test_factors_and_a_difference_of_one_module_add_up(base, tmp_path, capsys):
    state, wanted = named("lora_A", "lora_B", ""), merged(1.0)
    state["head.head.diff"] = np.ones(wanted["head.head.weight"].shape, np.float32)
    wanted["head.head.weight"] = wanted["head.head.weight"] + 1
    save_file(state, tmp_path / "lora.safetensors")
    found, said = after(base, tmp_path, capsys, tmp_path / "lora.safetensors")
    close(found, wanted)
    assert "5 of 5 modules merged" in said


def test_a_block_of_another_kind_is_not_the_head(base, tmp_path, capsys):
    state = named("lora_A", "lora_B", "transformer.", diffusers=True)
    vace = {f"transformer.vace_blocks.0.proj_out.lora_{name}.weight": np.ones((2, 2), np.float32) for name in "AB"}
    save_file(state | vace, tmp_path / "lora.safetensors")
    found, said = after(base, tmp_path, capsys, tmp_path / "lora.safetensors")
    close(found, merged(1.0))
    assert "5 of 6 modules merged" in said and "not in this model: transformer.vace_blocks.0.proj_out\n" in said


def test_a_target_that_holds_the_adapter_is_not_replaced(base, tmp_path, capsys):
    adapter = tmp_path / "x" / "adapter"
    adapter.mkdir(parents=True)
    save_file(named("lora_A", "lora_B", ""), adapter / "adapter_model.safetensors")
    assert run("import", base, tmp_path / "x", *SIZES, "--lora", adapter, "--overwrite") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: DST: ") and f"holds {adapter}, which it is made of" in error
    assert (adapter / "adapter_model.safetensors").is_file()


def test_a_merge_is_rounded_once(tmp_path, capsys):
    state = {name: x.astype(jnp.bfloat16) for name, x in tensors().items()}
    save_file(state, tmp_path / "base.safetensors")
    save_file(named("lora_A", "lora_B", ""), tmp_path / "lora.safetensors")
    found, _ = after(tmp_path / "base.safetensors", tmp_path, capsys, tmp_path / "lora.safetensors")
    for module, (a, b) in factors().items():
        state[f"{module}.weight"] = (state[f"{module}.weight"].astype(np.float32) + b @ a).astype(jnp.bfloat16)
    assert {name: x.tobytes() for name, x in found.items()} == {name: x.tobytes() for name, x in state.items()}


def elsewhere(name):
    for here in ("blocks", "head", "time"):
        name = name.replace(here, "some")
    return name


def without(part):
    return lambda state: {name: x for name, x in state.items() if part not in name}


def adding(name, *shape):
    return lambda state: {**state, f"blocks.0.self_attn.{name}": np.ones(shape, np.float32)}


def test_a_base_that_was_imported_before(base, tmp_path, capsys):
    save_file(named("lora_A", "lora_B", ""), tmp_path / "lora.safetensors")
    assert run("import", base, tmp_path / "ours", *SIZES) == 0
    assert run("import", tmp_path / "ours", tmp_path / "no") == 2
    assert "in our format already" in capsys.readouterr().err
    assert run("import", tmp_path / "ours", tmp_path / "merged", "--lora", tmp_path / "lora.safetensors") == 0
    assert run("export", tmp_path / "merged", tmp_path / "out", "--format", "original") == 0
    close(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), merged(1.0))
    before, after = (Run.load(tmp_path / name, needs_codec=False) for name in ("ours", "merged"))
    assert after.settings == before.settings and after.latent_shape == before.latent_shape
    assert after.meta["source"]["text"] == before.meta["source"]["text"] == "encoder"
    assert after.meta["source"]["loras"] == [{"name": "lora.safetensors", "scale": 1.0}]
    again = tmp_path / "again.safetensors"
    (tmp_path / "lora.safetensors").rename(again)
    assert run("import", tmp_path / "merged", tmp_path / "twice", "--lora", f"{again}:2") == 0
    both = [{"name": "lora.safetensors", "scale": 1.0}, {"name": "again.safetensors", "scale": 2.0}]
    assert open_source(tmp_path / "twice").meta["source"]["loras"] == both


@pytest.mark.parametrize(
    ("change", "named_"),
    [
        (lambda s: {elsewhere(name): x for name, x in s.items()}, ["none of which is in a Wan DiT", "5 modules"]),
        (without("lora_B"), ["has A and no B"]),
        (adding("k.alpha", 1), ["blocks.0.self_attn.k has an alpha and nothing else"]),
        (adding("q.lora_A.weight", 3, 24), ["blocks.0.self_attn.q has [3, 24] and [24, 2]"]),
        (adding("q.lora_B.weight", 24, 3), ["blocks.0.self_attn.q has [2, 24] and [24, 3]"]),
        (adding("q.lora_A.default.weight", 2, 24), ["q.lora_A.weight", "q.lora_A.default.weight", "are the same"]),
        (lambda s: s | {f"transformer_2.{name}": x for name, x in s.items()}, ["change one parameter", "two experts"]),
        (adding("q.dora_scale", 3), ["DoRA"]),
        (adding("k.lokr_w1", 3), ["LoKr"]),
        (adding("k.weight", 3), ["blocks.0.self_attn.k.weight is neither a factor of LoRA nor a difference"]),
    ],
)
def test_what_cannot_be_merged(change, named_, base, tmp_path, capsys):
    save_file(change(named("lora_A", "lora_B", "")), tmp_path / "lora.safetensors")
    assert run("import", base, tmp_path / "no", *SIZES, "--lora", tmp_path / "lora.safetensors") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --lora: ") and error.count("\n") == 1, error
    assert all(word in error for word in named_), error
    assert not (tmp_path / "no").exists()


def test_a_base_of_another_size_and_files_that_are_none(base, tmp_path, capsys):
    save_file(adding("q.lora_A.weight", 2, 8)(adding("q.lora_B.weight", 8, 2)({})), tmp_path / "l.safetensors")
    for file, said in (
        (tmp_path / "l.safetensors", "do not change a parameter of [24, 24]"),
        (tmp_path / "gone", "does not exist"),
        (base, "is neither a factor of LoRA"),
    ):
        assert run("import", base, tmp_path / "no", *SIZES, "--lora", file) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --lora: ") and said in error, error


def test_how_a_scale_and_a_part_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here#1.pt").touch()
    for value, wanted in (
        ("a.safetensors", ("a.safetensors", "", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", "", 0.5)),
        ("C:a", ("C:a", "", 1.0)),
        ("dir:x/a:-1", ("dir:x/a", "", -1.0)),
        ("a:nan", ("a:nan", "", 1.0)),
        ("a.pt#b.c", ("a.pt", "b.c", 1.0)),
        ("a#1/b.pt", ("a#1/b.pt", "", 1.0)),
        ("a.pt#b:0.5", ("a.pt", "b", 0.5)),
        ("here#1.pt:2", ("here#1.pt", "", 2.0)),
    ):
        assert parse_lora(value) == wanted
