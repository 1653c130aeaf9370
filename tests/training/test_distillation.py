"""Stage 2: every choice of scores and gradients, alone and through the training command."""

import collections
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedy_distill_jax import losses
from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses.dmd import dmd
from greedy_distill_jax.losses.pair import draw_pair
from greedy_distill_jax.models.students.base import History
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.checkpoint import load_meta
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.gaussian import gaussian
from greedy_distill_jax.train import train
from greedy_distill_jax.training import loop, nets, policy_gradient
from greedy_distill_jax.training.job import prepare_job
from greedy_distill_jax.training.metrics import read_scalars
from greedy_distill_jax.training.stages import dmd as stage2, scores as of_scores
from greedy_distill_jax.training.stages.teacher_forcing import looking_back
from greedy_distill_jax.training.state import Net, TrainState
from tests.training.start import begin

LATENT = (4, 4, 4, 16)
CONTEXTS = ("clean", "fused", "last_step_kv")
OWN = dict(loss="flow_matching", weight=0.3, options={})


def config_of(**changes):
    own = changes.pop("own", False)
    still = dict(optimizer__warmup=0, critic__optimizer__warmup=0)
    config = tiny.train_config("dmd", sample__sampler="renoise", **still, **changes)
    if config.distill.fake != "critic":
        config.distill.generator_every = 1
    if own:
        config.losses.own = OWN
    read_settings(config)
    return config


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "latents": jnp.asarray(rng.standard_normal((2, *LATENT)), jnp.float32),
        "text": jnp.asarray(rng.standard_normal((2, 6, 8)), jnp.float32),
    }


def changed(before, after):
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [float(np.abs(np.asarray(a) - np.asarray(b)).max()) > 0 for a, b in pairs]


@pytest.mark.parametrize(
    "changes",
    [
        dict(student__context_weights="own", distill__context_grad_sdd="params"),
        dict(
            distill__real="autoregressive",
            distill__fake="self_fm",
            own=True,
            distill__pg="actor_critic",
            distill__epochs=2,
            distill__anchor=1.0,
            student__context="last_step_kv",
        ),
        dict(
            distill__real="per_frame",
            distill__fake="stage1",
            distill__pg="rollout_full",
            distill__exit="last",
            distill__context_grad_sdd="params",
            student__context="fused",
            student__chunk=2,
        ),
    ],
    ids=str,
)
def test_a_step_trains_what_it_should(changes):
    stage, params = tiny.stage_of(config_of(**changes), LATENT)
    assert [part.name for part in stage.parts] == ["dmd", *(["critic"] if "critic" in params else [])]
    start = jax.jit(stage.state)(params)
    state, metrics = jax.jit(tiny.call_of(stage.parts[0]))(start, stage.frozen, batch_of())
    assert all(np.isfinite(float(x)) for x in metrics.values()) and float(metrics["grad_norm"]) > 0
    assert {"loss", "dmd", "dmd/gradient", "dmd/distance", "grad_norm", "param_norm"} <= set(metrics)
    assert np.mean(changed(start.nets["student"], state.nets["student"])) > 0.9
    if "critic" not in params:
        return
    assert not any(changed(start.nets["critic"], state.nets["critic"]))
    after, metrics = jax.jit(tiny.call_of(stage.parts[1]))(state, stage.frozen, batch_of())
    assert not any(changed(state.nets["student"], after.nets["student"]))
    assert np.mean(changed(state.nets["critic"].params, after.nets["critic"].params)) > 0.9
    assert all(name.startswith("critic/") for name in metrics)


def test_actor_critic_is_the_truncated_gradient_with_epochs_and_an_anchor(monkeypatch):
    tiny.descend(monkeypatch, 1e-2)
    moves = []
    for pg, epochs, anchor in (
        ("rollout_trunc", 1, 0.0),
        *(("actor_critic", *x) for x in ((1, 3.0), (3, 0.0), (3, 50.0))),
    ):
        config = config_of(
            distill__pg=pg, distill__epochs=epochs, distill__anchor=anchor, distill__fake="self_fm", own=True
        )
        stage, params = tiny.stage_of(config, LATENT)
        state = jax.jit(tiny.call_of(stage.parts[0]))(stage.state(params), stage.frozen, batch_of())[0]
        moves.append(jax.tree.map(jnp.subtract, state.nets["student"].params, params["student"]))
    truncated, once, thrice, held = moves
    size = jax.jit(optax.tree.norm)  # one program instead of some for every shape of a leaf
    distance = jax.jit(lambda a, b: optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))
    assert distance(truncated, once) / size(truncated) < 1e-5  # in the first epoch the action is the rollout's
    assert size(thrice) > 1.5 * size(once)
    assert distance(held, thrice) / size(thrice) > 0.05


@pytest.mark.parametrize("fake", stage2.FAKE)
def test_every_fake_is_the_reverse_kl_gradient_at_a_perfect_score(fake, monkeypatch):
    # The student's distribution is N(.3, .7^2) whatever network is asked for it, the teacher's N(-.5, .7^2): the two
    # scores differ by a constant, so that one draw is the expectation.
    m, mean, std, sigma = 0.3, -0.5, 0.7, 0.5
    asked = []

    def net_of(which):
        return lambda *args, **options: asked.append(which) or gaussian(m if which != "teacher" else mean, std)

    def teacher_net(teacher, params):
        return net_of("teacher" if params == "teacher" else "fake")()

    monkeypatch.setattr(nets, "teacher_net", teacher_net)
    monkeypatch.setattr(nets, "student_net", lambda student, params: net_of(params)())
    config = config_of(distill__fake=fake, own=fake == "self_fm")
    settings = read_settings(config)
    make_scores = of_scores.score_nets(settings, settings.kind.model(settings), jnp.zeros((6, 8)))
    state = TrainState(0, {"student": Net("params", "ema", None), "critic": Net("critic", None, None)})
    scores = make_scores(state, {"teacher": "teacher", "stage1": "stage1"})
    expected = {"critic": "fake", "self_ema": "ema", "stage1": "stage1"}.get(fake, "params")
    assert asked == ["teacher", expected]

    action = m + std * jax.random.normal(jax.random.key(1), (2, *LATENT))
    options = dict(normalizer="none", weighting="score")

    def loss(action):
        videos = {"action": action, "text": jnp.zeros((2, 6, 8))}
        pair = draw_pair(jax.random.key(2), action, **scores, batch=videos, low=sigma, high=sigma)
        return jnp.sum(dmd(None, videos, None, pair=pair, **options)[0])

    g = jax.grad(loss)(action) * action[0].size
    kl = jax.grad(lambda m: (1 - sigma) ** 2 * (m - mean) ** 2 / (2 * ((1 - sigma) ** 2 * std**2 + sigma**2)))(m)
    np.testing.assert_allclose(jnp.mean(g), kl, rtol=1e-4)


def test_the_per_frame_teacher_sees_the_history_before_and_noise_after():
    teacher = Teacher(tiny.BASE)
    params = tiny.random_params(teacher)
    shape = (1, 4, 4, 4, 4)
    keys = jax.random.split(jax.random.key(0), 3)
    x, frames = (jax.random.normal(k, shape) for k in keys[:2])
    noise, kept = jax.random.normal(keys[0], shape), jnp.full((1, 1), 0.1)
    batch = {"text": tiny.text_rows(1, keys[2]), "history": History(frames, kept), "later": noise}
    sigma = jnp.asarray([[0.9, 0.7, 0.5, 0.3]])
    v, two = (jax.jit(nets.given_history_net(teacher, n, params))(x, sigma, batch) for n in (1, 2))
    ask = jax.jit(teacher)
    for i in range(4):
        inputs = jnp.concatenate([frames[:, :i], x[:, i : i + 1], noise[:, i + 1 :]], axis=1)
        levels = jnp.concatenate([jnp.full((1, i), 0.1), sigma[:, i : i + 1], jnp.ones((1, 3 - i))], axis=1)
        np.testing.assert_allclose(v[:, i], ask(params, inputs, levels, batch["text"])[:, i], atol=1e-5)
    assert two.shape == shape and float(jnp.abs(two - v).max()) > 1e-3


@pytest.mark.parametrize("context", [dict(student__context_noise=0.4), dict(student__context="last_step_kv")], ids=str)
def test_one_network_as_both_scores_gives_no_gradient(context):
    """Both scores are asked about the same noise and the same history, however noisy it is."""
    config = config_of(
        distill__real="autoregressive", distill__fake="self_fm", own=True, distill__guidance=1.0, **context
    )
    stage, params = tiny.stage_of(config, LATENT)
    frozen = {"stage1": params["student"]}

    @jax.jit  # what only the update needs is not compiled
    def found(*args):
        metrics = tiny.call_of(stage.parts[0])(*args)[1]
        return metrics["dmd/gradient"], metrics["dmd/distance"]

    gradient, distance = found(stage.state(params), frozen, batch_of())
    assert float(gradient) < 1e-6 and float(distance) > 1e-2


@pytest.mark.parametrize(
    "real, context, noise",
    [
        ("joint", "clean", 0.0),
        *(("autoregressive", context, noise) for context in CONTEXTS for noise in (0.0, 0.4)),
    ],
)
def test_equal_scores_agree_whatever_they_look_back_on(real, context, noise):
    """Of every real score and a fake one of its kind; they see the same history, drawn once."""
    config = config_of(distill__real=real, distill__guidance=1.0, student__context=context)
    config.student.context_noise = noise
    settings = read_settings(config)
    student = settings.kind.model(settings)
    params = tiny.random_params(Teacher(settings.wan) if real == "joint" else student, latent_shape=LATENT)

    @jax.jit
    def gap(params, videos, key):
        state = TrainState(0, {"student": Net(params, params, None), "critic": Net(params, None, None)})
        scores = of_scores.score_nets(settings, student, jnp.zeros((6, 8)))(
            state, {"teacher": params, "stage1": params}
        )
        videos = looking_back(settings, student)(videos, key)
        pair = draw_pair(key, videos["latents"], **scores, batch=videos, group=of_scores.score_group(settings))
        return jnp.abs(pair.x0_real - pair.x0_fake).max() / jnp.abs(pair.x0_real).max()

    assert gap(params, batch_of(), jax.random.key(1)) < 1e-5


# --- through the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_teacher, tiny_student):
    root = tmp_path_factory.mktemp("sources")
    (root / "teacher").symlink_to(tiny_teacher)
    (root / "student").symlink_to(tiny_student)
    return root


def run_config(sources, **changes):
    names = {"teacher_from": str(sources / "teacher"), "student_from": str(sources / "student")}
    config = tiny.train_config("dmd", **{**names, "steps": 4, "checkpoint__every": 2, **changes})
    if config.distill.fake != "critic":
        config.distill.generator_every = 1
    return config


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_run_resumes_bit_identically_and_samples(sources, tmp_path):
    config = run_config(sources, distill__critic_warmup=1, optimizer__warmup=0)
    whole = train(config, tmp_path / "whole", show_progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")  # as if it had been killed after it saved step 2
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "4")
    halves = train(config, tmp_path / "halves", show_progress=False)
    assert [line["step"] for line in read_scalars(tmp_path / "halves")] == [1, 2, 3, 4]
    assert_same(whole, halves)
    lines = read_scalars(tmp_path / "whole")
    # One warm-up step, then the student is updated in every second one.
    assert ["dmd/loss" in line for line in lines] == [False, True, False, True]
    assert all("dmd/critic/loss" in line for line in lines)
    assert load_meta(tmp_path / "whole" / "checkpoints")["stage"] == "dmd"
    run = Run.load(tmp_path / "whole")
    assert run.sample_videos(["a red square moving left"], frames=5, steps=2).shape == (1, 5, 16, 16, 3)
    with pytest.raises(UserError, match=r"was started with config.distill.fake = 'critic', not 'self_sg'"):
        train(run_config(sources, distill__fake="self_sg", steps=6), tmp_path / "whole", show_progress=False)
    shutil.copytree(sources / "teacher", tmp_path / "another")
    shutil.rmtree(tmp_path / "another" / "checkpoints" / "6")  # what is left is step 3
    config = run_config(sources, distill__critic_warmup=1, teacher_from=str(tmp_path / "another"), steps=6)
    with pytest.raises(UserError, match=r"started with another network than the one now in config\.teacher_from"):
        train(config, tmp_path / "whole", show_progress=False)


def test_a_teacher_of_another_size_and_a_critic_of_the_students(sources, tmp_path):
    size = dict(model__dim=96, model__ffn_dim=480, model__num_layers=4, model__freq_dim=64)  # "tiny", but for the text
    begin(tiny.train_config(steps=1, **size), tmp_path / "large")
    changes = dict(teacher_from=str(tmp_path / "large"), distill__teacher_size="tiny")
    with pytest.raises(UserError, match=r"config\.critic_from is empty, and the critic cannot start"):
        begin(run_config(sources, **changes), tmp_path / "run")
    changes |= dict(critic_from=str(sources / "teacher"))
    state = begin(run_config(sources, **changes), tmp_path / "run")
    assert_same(state.nets["critic"].params, Run.load(sources / "teacher").params)
    # What it started from is not needed to go on; the teacher is.
    changes |= dict(student_from="gone", critic_from="gone")
    assert_same(begin(run_config(sources, **changes), tmp_path / "run"), state)
    shutil.rmtree(tmp_path / "large")
    with pytest.raises(UserError, match="large holds no run"):
        begin(run_config(sources, **changes), tmp_path / "run")


def test_no_device_holds_a_whole_network(sources, tmp_path):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    job = prepare_job(read_settings(run_config(sources)), tmp_path, mesh)
    networks = [job.given["teacher"], job.given["student"], job.stage.frozen["teacher"]]
    for network in networks:
        held = collections.Counter()
        for x in jax.tree.leaves(network):
            held.update({shard.device: shard.data.nbytes for shard in x.addressable_shards})
        whole = sum(x.nbytes for x in jax.tree.leaves(network))
        assert len(held) == 8 and max(held.values()) < whole / 4  # biases and norms are whole on every device


def test_generator_and_critic_draw_their_own_prompts(sources, tmp_path):
    config = run_config(sources, distill__critic_warmup=1, data__threads=0)
    job = prepare_job(read_settings(config), tmp_path, make_mesh({"data": -1}))
    feed = loop.Feed(job, 0)
    seen = [{order: np.asarray(batch.arrays["text"]) for order, batch in feed(step).items()} for step in range(1, 7)]
    assert [set(batches) - {""} for batches in seen] == [set(), {"generator"}] * 3
    critics, generators = ([b[order] for b in seen if order in b] for order in ("", "generator"))
    assert not any(np.array_equal(a, b) for a in critics for b in generators)
    for first in range(6):  # a resumed run goes on with what comes next in either order
        resumed = loop.Feed(job, first)(first + 1)
        for order, text in seen[first].items():
            np.testing.assert_array_equal(resumed[order].arrays["text"], text)


def test_long_rollouts_need_latents_that_are_all_alike(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(PatchCodec, "temporal_stride", 4)
    with pytest.raises(UserError, match=r"config\.distill\.frames is 8, beyond .* begin with a latent of 4 frames"):
        prepare_job(read_settings(run_config(sources, distill__frames=8)), tmp_path, make_mesh({"data": -1}))


def test_a_student_may_learn_another_context(sources, tmp_path):
    """What it starts from was trained on clean ones; a frozen network would be asked what it never saw."""
    other = dict(student__context="last_step_kv")
    begin(run_config(sources, **other), tmp_path / "run")
    assert Run.load(tmp_path / "run").model.cfg.context == "last_step_kv"
    with pytest.raises(UserError, match="another architecture: context clean against last_step_kv"):
        train(run_config(sources, **other, distill__fake="stage1"), tmp_path / "frozen", show_progress=False)


def test_more_of_stage_1_starts_from_a_student(sources, tmp_path):
    state = begin(tiny.train_config("teacher_forcing", student_from=str(sources / "student")), tmp_path / "run")
    assert_same(state.nets["student"].params, Run.load(sources / "student").params)


@pytest.mark.parametrize("kind, stage", [("etm_sdd", "dmd"), ("causal", "teacher_forcing")])
def test_weights_of_the_context_pass_start_from_a_run_that_shares_them(
    kind, stage, tiny_teacher, request, tmp_path, capsys
):
    source = request.getfixturevalue("tiny_student" if kind == "etm_sdd" else "tiny_causal")
    changes = dict(student__kind=kind, teacher_from=str(tiny_teacher))
    changes |= dict(student_from=str(source), student__context_weights="own")
    if stage == "dmd":  # the frozen stage-1 score is that run, too
        changes |= dict(teacher_from="", distill__real="autoregressive", distill__context_grad_sdd="params")
    else:
        del changes["teacher_from"]
    params = begin(tiny.train_config(stage, **changes), tmp_path / "run").nets["student"].params
    assert "no loss trains" not in capsys.readouterr().err
    shared = Run.load(source).params
    denoise, context = ("sdd", "sdd_context") if kind == "etm_sdd" else ("dit", "dit_context")
    assert set(params[denoise]) - set(params[context]) == {"head"}
    start = shared["sdd"] if kind == "etm_sdd" else shared
    for name in params[context]:
        assert_same(params[context][name], start[name])
    config = tiny.train_config("teacher_forcing", student__kind=kind, student_from=str(tmp_path / "run"))
    with pytest.raises(UserError, match="another architecture: context_weights own against shared"):
        train(config, tmp_path / "other", show_progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(student_from=""), "config.student_from is empty"),
        (dict(student__context_weights="own"), "nothing trains the weights of the context pass; set config.distill"),
        (dict(student__context_weights="own", student__context="fused"), "context 'fused' makes no call of its own"),
        (dict(teacher_from=""), "config.teacher_from is empty, but real 'joint' with fake 'critic' needs"),
        (dict(student__window=3), "has another architecture: window 2 against 3"),
        (dict(student__kind="causal", student__window=4), "holds another kind of student"),
        (dict(distill__real="bidirectional"), "config.distill.real is 'bidirectional'; it must be one of joint"),
        (dict(distill__pg="ppo"), "config.distill.pg is 'ppo'; it must be one of rollout_trunc"),
        (dict(distill__pg="rollout_full"), "differentiates through the contexts"),
        (dict(distill__epochs=0), "config.distill.epochs is 0; it must be at least 1"),
        (dict(distill__frames=3), "config.distill.frames is 3; it must be 0 or a multiple"),
        (dict(distill__frames=8, distill__fake="self_sg"), "only real 'joint' and fake 'critic' can judge a window"),
        (
            dict(distill__segment=3, distill__pg="rollout_full", distill__context_grad_sdd="params"),
            "config.distill.segment is 3, which does not divide the 4 chunks",
        ),
        (
            dict(sample__steps=(6, 5, 4, 3, 2)),
            "config.sample.steps has 5 different lists, but a rollout of 4 frames has 4 chunks of 1",
        ),
        (dict(distill__exit="random_but_first"), "which the first chunk shares with all others"),
        (dict(student__etm_input="clean"), "config.student.etm_input is 'clean', but with config.sample.context_sigma"),
        (
            dict(losses__motion=dict(loss="motion", weight=1.0, options={}), distill__skip=3),
            "config.losses has a loss that compares motions, but a batch has 0",
        ),
        (dict(distill__segment=2), "only config.distill.pg = 'rollout_full' uses it, not 'rollout_trunc'"),
        (dict(distill__anchor=1.0), "only config.distill.pg = 'actor_critic' uses it"),
        (dict(student__context_noise=0.1), "bidirectional scores see no history"),
        (dict(distill__real="per_frame"), "was trained with one noise level per video"),
        (dict(distill__fake="self_fm"), "nothing keeps the student a score of its own videos"),
        (dict(distill__fake="stage1", distill__real="autoregressive"), "are the same network"),
        (dict(distill__fake="self_sg", distill__critic_warmup=3), "there is no critic to update"),
        (dict(distill__critic_warmup=4), "would never be updated"),
        (dict(critic_from="a run", distill__fake="self_sg"), "config.critic_from is 'a run', but stage dmd with"),
        (dict(distill__teacher_size="wan14b", distill__real="autoregressive"), "real 'autoregressive' asks no teacher"),
    ],
    ids=str,
)
def test_what_is_refused(sources, tmp_path, changes, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        train(run_config(sources, **changes), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_scores_are_for_stage_dmd_alone(sources, tmp_path):
    for changes in (dict(critic_from="a run"), dict(distill__teacher_size="wan14b")):
        with pytest.raises(UserError, match=r"but stage teacher_forcing "):
            train(tiny.train_config("teacher_forcing", **changes), tmp_path / "run", show_progress=False)
    config = tiny.train_config("teacher_forcing")
    config.losses = run_config(sources).losses
    with pytest.raises(UserError, match=r"config\.losses\.dmd: 'dmd' asks for 'pair' of stage teacher_forcing"):
        read_settings(config)


def test_every_config_choice_is_named():
    assert set(policy_gradient.PG) == {"rollout_trunc", "rollout_full", "actor_critic"}
    with pytest.raises(UserError, match=r"config\.losses has no loss that asks for scores"):
        config = tiny.train_config("dmd")
        config.losses = {"flow_matching": dict(loss="flow_matching", weight=1.0, options={})}
        read_settings(config)


def test_long_rollouts_are_scored_in_random_windows():
    seen = []

    def loss(net, batch, key, *, real, fake):
        seen.append({name: batch[name].shape for name in ("action", "latents")})
        return jnp.mean(batch["action"], axis=(1, 2, 3, 4)), {}

    losses.register("sees", loss)
    config = config_of(distill__frames=12, student__chunk=2)
    config.losses.dmd.loss = "sees"
    settings = read_settings(config)
    stage, first = tiny.stage_of(config, LATENT)
    own, params = of_scores.self_rollout(settings, stage.model, LATENT), first["student"]
    text = jnp.zeros((2, 6, 8))
    draw = jax.jit(lambda key: own.draw(params, text, key, own.exits(key)))
    starts = set()
    for i in range(12):
        drawn = draw(jax.random.key(i))
        starts.add(int(drawn.start))
        assert drawn.rollout.x0_BTHWC.shape[1] == 12
        window = drawn.rollout.x0_BTHWC[:, int(drawn.start) : int(drawn.start) + 4]
        np.testing.assert_array_equal(drawn.video_BTHWC, window)
    assert starts <= {0, 2, 4, 6, 8} and len(starts) >= 3
    action = jax.jit(lambda p: own.act(p, text, drawn))(params)
    np.testing.assert_allclose(action, drawn.video_BTHWC, atol=1e-5 * float(jnp.abs(action).max()))
    step = jax.jit(tiny.call_of(stage.parts[0]))
    state, metrics = step(stage.state(first), stage.frozen, batch_of())
    assert seen[0]["action"] == seen[0]["latents"] == (2, *LATENT) and float(metrics["grad_norm"]) > 0
