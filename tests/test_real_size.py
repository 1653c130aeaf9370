"""The real width through the real configs: two updates of both stages at 1536, 12 heads, 2 layers, text 512 x 4096."""

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.config_cli import read_config
from greedy_distill_jax.data.text import HashWordEncoder
from greedy_distill_jax.train import build_network, make_state, make_step, optimizer_of

FRAMES, LATENT = 3, (4, 4, 16)


def _two_updates(path, start=None):
    config = read_config(path).lock()
    config.model.num_layers, config.data.frames, config.optimizer.learning_rate = 2, FRAMES, 1e-4
    assert (config.model.size, config.data.batch) == ("wan1_3b", 64)
    model, make_net = build_network(config)
    wan = getattr(model.cfg, "base", model.cfg)
    assert (wan.dim, wan.ffn_dim, wan.num_heads, wan.text_len, wan.text_dim) == (1536, 8960, 12, 512, 4096)
    assert wan.dtype == "bfloat16" and wan.remat == "full" and wan.prediction == "velocity"
    encoder, optimizer = HashWordEncoder(512, 4096), optimizer_of(config)
    shape = (FRAMES, *LATENT)
    if start is None:
        params = jax.jit(lambda k: model.init(k, shape))(jax.random.key(0))
    else:
        params = jax.jit(lambda k, p: model.from_teacher(k, p, shape))(jax.random.key(0), start)
    state = make_state(params, optimizer)
    before = np.asarray(
        params["embed"]["patch"]["kernel"] if start is None else params["sdd"]["embed"]["patch"]["kernel"]
    )
    step = jax.jit(make_step(config, make_net, optimizer, encoder([""])[0]), donate_argnums=0)
    rng = np.random.default_rng(0)
    batch = {
        "latents": jnp.asarray(rng.standard_normal((1, *shape)), jnp.float32),
        "text": jnp.asarray(encoder(["a red square moving left"])),
    }
    values = []
    for _ in range(2):
        state, metrics = step(state, batch)
        values.append({name: float(x) for name, x in metrics.items()})
    assert int(state.step) == 2 and all(np.isfinite(x) for v in values for x in v.values())
    assert all(v["grad_norm"] > 0 for v in values)
    after = (
        state.params["embed"]["patch"]["kernel"] if start is None else state.params["sdd"]["embed"]["patch"]["kernel"]
    )
    assert np.abs(np.asarray(after) - before).max() > 0
    return jax.device_get(state.params)


def test_two_updates_of_both_stages_at_width_1536():
    teacher = _two_updates("configs/wan1_3b/teacher.py")
    student = _two_updates("configs/wan1_3b/teacher_forcing.py", start=teacher)
    kernels = [student[part]["blocks"]["self_attn"]["q"]["kernel"] for part in ("etm", "sdd")]
    assert [k.shape for k in kernels] == [(1, 1536, 1536)] * 2  # "interleaved": one block each of the two
