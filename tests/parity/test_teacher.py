"""The teacher against diffusers' `WanTransformer3DModel`: outputs and gradients, float32, weights through the table."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.source import TreeSource
from greedy_distill_jax.weights.write import write

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'greedy_distill_jax[parity]'")

TOLERANCE = 2e-5
FIELDS = dict(channels=4, freq_dim=16, dtype="float32", remat="none")
SIZES = {
    "narrow": WanConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=12, text_len=5, **FIELDS),
    "wan_heads": WanConfig(dim=256, ffn_dim=96, num_heads=2, num_layers=3, text_dim=32, text_len=512, **FIELDS),
    "one_layer": WanConfig(dim=60, ffn_dim=64, num_heads=3, num_layers=1, text_dim=12, text_len=9, **FIELDS),
}
GRIDS = {"narrow": (3, 6, 10), "wan_heads": (2, 10, 6), "one_layer": (4, 2, 14)}  # frames and latent rows, columns


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Per size: (configuration, parameters, the folder exported for diffusers)."""
    out = {}
    for name, cfg in SIZES.items():
        params = tiny.random_params(Teacher(cfg), latent_shape=(1, 2, 2, 4))
        folder = tmp_path_factory.mktemp(name) / "out"
        write(TreeSource(cfg, params), folder, "diffusers")
        out[name] = cfg, params, folder
    return out


def inputs(cfg, grid, rows, per_frame):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *grid, cfg.channels), jnp.float32)
    sigma = jnp.asarray([[0.937], [0.25]], jnp.float32)
    if per_frame:
        sigma = jax.random.uniform(keys[1], (2, grid[0]), jnp.float32)
    return x, sigma, jax.random.normal(keys[2], (2, rows, cfg.text_dim), jnp.float32)


def other_call(model, cfg, x, sigma, text):
    """[B, T, H, W, C] of the diffusers model at the same noise levels."""
    timestep = torch.from_numpy(np.array(sigma * 1000.0))
    if sigma.shape[1] > 1:  # it takes one timestep per token
        timestep = timestep.repeat_interleave(x.shape[2] * x.shape[3] // cfg.patch**2, dim=1)
    else:
        timestep = timestep[:, 0]
    latents = torch.from_numpy(np.array(x)).permute(0, 4, 1, 2, 3)
    out = model(latents, timestep, torch.from_numpy(np.array(text)), return_dict=False)[0]
    return out.permute(0, 2, 3, 4, 1)


def loaded(folder):
    model, report = diffusers.WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("rows", [3, None], ids=["short_text", "full_text"])
@pytest.mark.parametrize("per_frame", [False, True], ids=["scalar", "per_frame"])
@pytest.mark.parametrize("size", list(SIZES))
def test_forward(folders, size, per_frame, rows):
    cfg, params, folder = folders[size]
    x, sigma, text = inputs(cfg, GRIDS[size], rows or cfg.text_len, per_frame)
    ours = jax.jit(Teacher(cfg).__call__)(params, x, sigma, text)
    with torch.no_grad():
        theirs = other_call(loaded(folder), cfg, x, sigma, text).numpy()
    assert 0.3 < np.asarray(ours).std() < 3
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("per_frame", [False, True], ids=["scalar", "per_frame"])
def test_gradients(folders, per_frame):
    cfg, params, folder = folders["narrow"]
    x, sigma, text = inputs(cfg, GRIDS["narrow"], 4, per_frame)
    target = jax.random.normal(jax.random.key(5), x.shape, jnp.float32)

    def loss(params, x):
        return jnp.mean((Teacher(cfg)(params, x, sigma, text) - target) ** 2)

    ours, grad_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    model = loaded(folder)
    out = other_call(model, cfg, x, sigma, text)
    ((out - torch.from_numpy(np.array(target))) ** 2).mean().backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    for path, leaf in leaf_paths(ours):
        for layer, name in enumerate(names.foreign_names(path, leaf.shape, "diffusers")):
            one = np.asarray(leaf[layer] if names.split_path(path)[1].stacked else leaf)
            got = names.to_foreign(path, one, patch=cfg.patch)
            np.testing.assert_allclose(got, theirs.pop(name), atol=TOLERANCE, rtol=0, err_msg=name)
    assert not theirs


def test_loads_without_a_word_about_names(folders, caplog, capsys):
    _, params, folder = folders["narrow"]
    diffusers.utils.logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        warnings.simplefilter("error")
        model = loaded(folder)
    words = " ".join([*(r.getMessage() for r in caplog.records if r.levelname != "INFO"), capsys.readouterr().err])
    assert not [word for word in ("not used", "newly initialized", "not expected", "unexpected") if word in words], (
        words
    )
    assert model.config.num_layers == 2


@pytest.mark.parametrize("shard", [None, "20KB"], ids=["one_file", "sharded"])
def test_what_diffusers_saves_is_read_back(folders, tmp_path, shard):
    cfg, params, folder = folders["narrow"]
    options = {"max_shard_size": shard} if shard else {}
    loaded(folder).save_pretrained(tmp_path / "saved", **options)
    assert bool(list((tmp_path / "saved").glob("*.index.json"))) == bool(shard)
    source = open_source(tmp_path / "saved", text_len=5)
    assert source.format == "diffusers"
    assert source.cfg == WanConfig(**{**tiny.dataclasses.asdict(cfg), "dtype": "bfloat16", "remat": "full"})
    for path, leaf in leaf_paths(params):
        whole = (slice(None),) * leaf.ndim
        np.testing.assert_array_equal(source.read(path, whole, np.float32), np.asarray(leaf), err_msg=path)
