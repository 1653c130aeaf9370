"""Values that several read have one place; what a run would not do as its configuration says is told."""

import re

import jax.numpy as jnp
import pytest

from greedy_distill_jax import losses
from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.config.settings import stored_settings
from greedy_distill_jax.diffusion import noise_levels
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.training import job


def test_one_noise_shift_for_training_scores_and_sampling():
    config = tiny.train_config("dmd", shift=3.0, sample__steps=4)
    settings = read_settings(config)
    assert settings.sample.shift == settings.own["distill"].shift == 3.0
    (critic,) = (term for term in settings.kind.all_terms(settings) if term.name == "flow_matching")
    assert critic.options["shift"] == 3.0
    assert settings.plan.sigmas == (tuple(noise_levels.uniform_steps(4, 3.0)),)
    assert stored_settings(settings.text).sample.shift == 3.0
    config.sample.shift, config.distill.shift = 8.0, 2.0
    config.critic.losses.flow_matching.options.shift = 1.0
    settings = read_settings(config)
    (critic,) = (term for term in settings.kind.all_terms(settings) if term.name == "flow_matching")
    assert (settings.sample.shift, settings.own["distill"].shift, critic.options["shift"]) == (8.0, 2.0, 1.0)


def test_a_loss_of_ones_own_takes_the_shift_too():
    def noisy(net, batch, key, *, shift=2.0):
        return jnp.zeros(len(batch["latents"])), {}

    losses.register("noisy", noisy)
    config = tiny.train_config(shift=3.0)
    config.losses.noisy = dict(loss="noisy", weight=1.0, options={})
    assert {term.name: term.options["shift"] for term in read_settings(config).terms} == dict(
        flow_matching=3.0, noisy=3.0
    )


@pytest.mark.parametrize(
    "stage, changes, said",
    [
        ("teacher", dict(steps=300, ema__decay=0.99, ema__start=100), None),
        ("teacher", dict(steps=300, ema__decay=0.999, ema__start=100), "some 1000 updates, but the teacher has 200"),
        ("teacher", dict(steps=100, ema__decay=0.999, ema__start=100), None),
        ("dmd", dict(steps=300, ema__decay=0.99, ema__start=100, distill__generator_every=2), None),
        # The steps without an update are those before the average begins: 80 after it, not 80 of all.
        (
            "dmd",
            dict(steps=180, ema__decay=0.99, ema__start=100, distill__generator_every=1, distill__critic_warmup=100),
            None,
        ),
        (
            "dmd",
            dict(
                steps=300,
                ema__decay=0.99,
                ema__start=100,
                distill__generator_every=4,
                distill__pg="actor_critic",
                distill__epochs=9,
            ),
            "the student has 50 after",
        ),
        (
            "dmd",
            dict(steps=300, ema__decay=0.99, ema__start=100, distill__generator_every=5),
            r"config\.ema\.decay = 0\.99 averages over some 100 updates, but the student has 40 after",
        ),
    ],
)
def test_an_average_that_reaches_back_before_the_run_is_told(stage, changes, said):
    settings = read_settings(tiny.train_config(stage, **changes))
    found = job.averages(settings, tiny.stage_of(tiny.train_config(stage, **changes), (4, 4, 4, 16))[0])
    assert len(found) == (said is not None)
    assert not found or re.search(said, found[0])


@pytest.mark.parametrize(
    "config",
    [
        *(
            f"quickstart.py:{stage}{speed}"
            for stage in ("teacher", "student", "stage2", "greedy_distill_paper")
            for speed in ("", ",fast")
        ),
        *(f"wan1_3b/{name}.py" for name in ("teacher", "teacher_forcing", "causal", "dmd")),
        "wan14b/dmd.py",
    ],
)
def test_no_configuration_here_is_warned_of_its_average(config):
    config = read_config(f"configs/{config}")
    config.model.update(dim=24, ffn_dim=32, num_heads=2, freq_dim=8, text_dim=8, text_len=6)  # layers are what they are
    settings = read_settings(config, imagine_runs=True)
    stage, _ = tiny.stage_of(config, (settings.data.frames, 4, 4, settings.wan.channels))
    assert job.averages(settings, stage) == []
