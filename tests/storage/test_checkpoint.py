"""Checkpoints: bit-exact round trips, other device counts, kills, messages."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import path

from greedy_distill_jax.errors import Lost, UserError
from greedy_distill_jax.storage import background, checkpoint
from greedy_distill_jax.storage.checkpoint import Checkpointer, Damaged, load_meta, load_params


class State(NamedTuple):
    step: jax.Array
    params: dict
    ema: dict
    opt_state: tuple
    key: jax.Array


def make_state(seed=0, width=16):
    k1, k2 = jax.random.split(jax.random.key(seed))
    params = {
        "blocks": {"q": jax.random.normal(k1, (2, width, 8)), "bias": jnp.full((2, 8), 0.1, jnp.bfloat16)},
        "head": jax.random.normal(k2, (width, 4)).at[0, 0].set(jnp.nan),
    }
    labels = {"blocks": {"q": "adam", "bias": "sgd"}, "head": "adam"}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.partition({"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)}, labels)
    )
    opt_state = optimizer.init(params)
    assert any(isinstance(x, optax.MaskedNode) for x in jax.tree.leaves(opt_state, is_leaf=_is_masked))
    return State(jnp.int32(seed), params, jax.tree.map(jnp.copy, params), opt_state, jax.random.split(k1, 3))


def _is_masked(x):
    return isinstance(x, optax.MaskedNode)


def shapes_of(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def meta(step, **more):
    return {"data_position": step * 32, "stage": "teacher", "config": {"lr": 0.1}, **more}


def test_a_round_trip_is_bit_exact(workdir):
    states = {step: make_state(step) for step in (1, 2, 5)}
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() is None
        for step, state in states.items():
            assert checkpointer.save(step, state, meta(step))
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2, 5]
        for step in (1, 5):
            assert_same_bits(checkpointer.restore(step, shapes_of(states[5])), states[step])
        assert_same_bits(checkpointer.restore(None, states[1]), states[5])  # arrays do as a target
        stored = checkpointer.meta()
    assert stored["data_position"] == 160 and stored["versions"]["jax"] == jax.__version__
    restored_key = Checkpointer(workdir / "checkpoints", read_only=True).restore(1, shapes_of(states[1])).key
    assert jax.random.key_impl(restored_key) == jax.random.key_impl(states[1].key)


@pytest.mark.parametrize("async_save", [True, False])
def test_a_saved_state_may_be_donated(workdir, async_save):
    update = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    x = update(jnp.zeros((512, 1024)))
    with Checkpointer(workdir, async_save=async_save) as checkpointer:
        for step in range(1, 4):
            checkpointer.save(step, {"x": x}, meta(step))
            x = update(x)
        checkpointer.wait()
        for step in range(1, 4):
            back = checkpointer.restore(step, {"x": jax.ShapeDtypeStruct((512, 1024), jnp.float32)})["x"]
            assert (np.asarray(back) == step).all()


def test_eight_devices_to_one_and_back(workdir):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    state = make_state(3)

    def shard(x):
        divides = x.ndim >= 2 and x.shape[-2] % 2 == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 2), "a", "b") if divides else PartitionSpec())

    wide = jax.tree.map(lambda x: jax.device_put(x, shard(x)), state)
    target_8 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wide)
    target_1 = shapes_of(state, SingleDeviceSharding(jax.devices()[0]))
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(1, wide, meta(1))
        narrow = checkpointer.restore(1, target_1)
        assert_same_bits(narrow, state)
        assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(narrow))
        checkpointer.save(2, narrow, meta(2))
        again = checkpointer.restore(2, target_8)
    assert_same_bits(again, state)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(wide), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_a_part_is_read_without_the_rest(workdir):
    state = make_state(4)
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(9, state, meta(9))
    assert_same_bits(load_params(workdir, "ema"), state.ema)
    assert_same_bits(load_params(workdir, "params/blocks", step=9), state.params["blocks"])
    assert_same_bits(load_params(workdir, "params/head"), state.params["head"])
    low = load_params(workdir, "ema", dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(low)} == {jnp.dtype(jnp.bfloat16)}
    everywhere = NamedSharding(jax.make_mesh((8,), ("a",)), PartitionSpec())
    assert load_params(workdir, "ema", sharding=everywhere)["head"].sharding == everywhere
    by_tree = load_params(workdir, "ema", sharding=lambda tree: jax.tree.map(lambda _: everywhere, tree))
    assert by_tree["blocks"]["q"].sharding == everywhere
    assert load_meta(workdir)["data_position"] == 288
    with pytest.raises(UserError, match="holds no 'nothing'; it holds ema, key, opt_state, params, step"):
        load_params(workdir, "nothing")


def test_old_steps_go_and_existing_ones_stay(workdir):
    with Checkpointer(workdir, max_to_keep=2) as checkpointer:
        for step in (1, 2, 3, 4):
            checkpointer.save(step, make_state(step), meta(step))
        checkpointer.wait()
        assert checkpointer.steps() == [3, 4]
        assert not checkpointer.save(4, make_state(0), meta(0))
        assert checkpointer.meta(4)["data_position"] == 128
        assert checkpointer.save(4, make_state(0), meta(0), force=True)
        assert checkpointer.meta(4)["data_position"] == 0


def test_a_reader_sees_what_a_writer_adds(workdir):
    with Checkpointer(workdir) as writer:
        writer.save(1, make_state(1), meta(1))
        writer.wait()
        with Checkpointer(workdir, read_only=True) as reader:
            assert reader.latest_step() == 1
            writer.save(2, make_state(2), meta(2))
            writer.wait()
            assert reader.latest_step() == 2


@pytest.mark.parametrize("damage", ["no_state", "no_meta", "empty", "temporary"])
def test_a_half_written_step_is_skipped_and_written_again(workdir, capsys, damage):
    state = make_state(1)
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(1, state, meta(1))
        checkpointer.save(2, state, meta(2))
    broken = workdir / "2"
    if damage == "temporary":
        broken.rename(workdir / "2.orbax-checkpoint-tmp-1700000000")
    else:
        remove = {"no_state": [broken / "state"], "no_meta": [broken / "meta"], "empty": list(broken.iterdir())}[damage]
        for path in remove:
            subprocess.run(["rm", "-rf", path], check=True)
    assert load_meta(workdir)["data_position"] == 32
    with Checkpointer(workdir) as checkpointer:
        missing = "meta/metadata" if damage == "no_meta" else "state/_METADATA"
        told = f"step 2 is not whole (it has no {missing}); it is passed over, and moved to {workdir}-damaged-2\n"
        assert capsys.readouterr().err.endswith(told if damage != "temporary" else "")
        assert checkpointer.latest_step() == 1
        assert_same_bits(checkpointer.restore(None, shapes_of(state)), state)
        assert checkpointer.save(2, state, meta(2))
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]


def _spoil(step, what):
    files = {"state": step.rglob("d/*"), "shapes": [step / "state" / "_METADATA"], "meta": [step / "meta" / "metadata"]}
    for file in files[what]:
        file.write_bytes(b"\xff\x00{")


def test_a_chunk_that_does_not_decode_is_damage(workdir, monkeypatch):
    """Orbax raises a bare Exception for it; other exceptions of ours pass."""
    with Checkpointer(workdir / "checkpoints", async_save=False) as checkpointer:
        checkpointer.save(1, {"x": jnp.arange(5.0)}, meta(1))
        for raised, expected in ((Exception("no frame"), Damaged), (RuntimeError("ours"), RuntimeError)):

            def restore(*args, raised=raised, **kwargs):
                raise raised

            monkeypatch.setattr(checkpointer._handlers["meta"], "restore", restore)
            with pytest.raises(expected, match=str(raised)):
                checkpointer.meta(1)


def test_a_configuration_that_is_no_json_is_damage(workdir):
    with Checkpointer(workdir / "checkpoints", async_save=False) as checkpointer:
        checkpointer.save(1, {"x": jnp.arange(5.0)}, meta(1) | {"config": '{"stage": '})
        with pytest.raises(Damaged, match="step 1 is damaged"):
            checkpointer.meta(1)


@pytest.mark.parametrize("what", ["state", "shapes", "meta"])
def test_a_damaged_step_is_told_and_the_last_good_one_taken(workdir, capsys, what):
    state = {"x": jnp.arange(5.0)}  # of several leaves, TensorStore reports into a loop that the first has closed
    folder, target = workdir / "checkpoints", shapes_of(state)
    with Checkpointer(folder, async_save=False) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, meta(step))
    _spoil(folder / "2", what)

    def read(step):
        return checkpointer.meta(step)["data_position"], checkpointer.restore(step, target)

    with Checkpointer(folder, read_only=True) as checkpointer:
        with pytest.raises(Damaged, match="checkpoints step 2 is damaged .*; name another step, of 1$") as error:
            read(2)
        assert error.value.field == "step" and "\n" not in str(error.value)
        assert checkpointer.newest(read)[0] == 1 and (folder / "2").exists(), "a reader changed the run"
    assert "warning: " in (told := capsys.readouterr().err) and "; step 1 is taken instead\n" in told
    with Checkpointer(folder, async_save=False) as checkpointer:
        step, (position, found) = checkpointer.newest(read)
        assert (step, position) == (1, 32) and checkpointer.steps() == [1]
        assert_same_bits(found, state)
        assert checkpointer.save(2, state, meta(2)) and read(2)[0] == 64
        assert (
            f"moved to {folder}-damaged-2" in capsys.readouterr().err and (workdir / "checkpoints-damaged-2").exists()
        )
        for step in (1, 2):
            _spoil(folder / str(step), what)
        with pytest.raises(UserError, match="step 2 is damaged .*, and no other step can be read"):
            checkpointer.newest(read)
        assert checkpointer.steps() == [1, 2]


def test_a_remote_step_is_not_moved(workdir):
    for step in (1, 2):
        for item, name in (("state", "_METADATA"), ("meta", "metadata")):
            (file := workdir / str(step) / item / name).parent.mkdir(parents=True)
            file.write_text("{}")
    with Checkpointer(workdir) as checkpointer:
        checkpointer.directory = "gs://" + checkpointer.directory

        def read(step):
            if step == 2:
                raise Damaged("run step 2 is damaged (x)", [1])
            return step

        with pytest.raises(UserError, match=f"^run step 2 is damaged .x.; move {workdir}/2 away, then run the same"):
            checkpointer.newest(read)
        assert checkpointer.steps() == [1, 2] and not list(workdir.parent.glob("*-damaged-*"))


def test_a_disk_that_refuses_is_no_damage(workdir, monkeypatch):
    state = {"x": jnp.arange(5.0)}
    with Checkpointer(workdir, async_save=False) as checkpointer:
        checkpointer.save(1, state, meta(1))
        full = ValueError("RESOURCE_EXHAUSTED: Error writing \"x\": No space left on device [os_error_code='28']")
        (workdir / "2.orbax-checkpoint-tmp").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(checkpointer._manager, "save", mock.Mock(side_effect=full))
            with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); step 1 is kept"):
                checkpointer.save(2, state, meta(2))
        assert [path.name for path in workdir.iterdir()] == ["1"], "a half-written step stays"
        (workdir / "2.orbax-checkpoint-tmp").mkdir()
        reader = Checkpointer(workdir, read_only=True)
        with pytest.raises(UserError, match="cannot be written"), reader, reader._writing():
            raise OSError(errno.ENOSPC, "No space left on device")
        assert (workdir / "2.orbax-checkpoint-tmp").exists(), "a reader removed what the run is writing"
        with monkeypatch.context() as patch:
            denied = PermissionError(errno.EACCES, "Permission denied")
            patch.setattr(checkpointer._handlers["meta"], "restore", mock.Mock(side_effect=denied))
            with pytest.raises(UserError, match=r"step 1 cannot be read \(Permission denied\)") as error:
                checkpointer.newest(checkpointer.meta)
            assert not isinstance(error.value, Damaged)
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="^a mistake of ours$"):
            patch.setattr(checkpointer._manager, "save", mock.Mock(side_effect=ValueError("a mistake of ours")))
            checkpointer.save(2, state, meta(2))


def test_a_write_that_fails_in_the_background_is_told_at_once_and_costs_no_step(workdir):
    big = {"x": jnp.asarray(np.random.default_rng(0).standard_normal(2**18))}  # does not compress
    told = r"cannot be written \(File too large\); step 1 is kept"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match=told), Checkpointer(workdir, max_to_keep=1) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(2)}, meta(1))
        checkpointer.wait()
        checkpointer.check()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
            checkpointer.save(2, big, meta(2))
            until = time.monotonic() + 60
            with pytest.raises(UserError, match=told):
                while time.monotonic() < until:
                    checkpointer.check()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(workdir) == ["1"]


def test_a_commit_that_fails_in_the_background_is_told_at_once(workdir, monkeypatch):
    """As the rename to the step's name does where a quota is used up."""
    full, renamed = OSError(errno.EDQUOT, "Disk quota exceeded"), path.atomicity.async_path.rename

    async def rename(source, target):
        if target.name == "2":
            raise full
        await renamed(source, target)

    told = r"cannot be written \(Disk quota exceeded\); step 1 is kept"
    monkeypatch.setattr(path.atomicity.async_path, "rename", rename)
    with pytest.raises(UserError, match=told), Checkpointer(workdir) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"x": jnp.ones(2)}, meta(step))
        until = time.monotonic() + 60
        with pytest.raises(UserError, match=told):
            while time.monotonic() < until:
                checkpointer.check()
    assert os.listdir(workdir) == ["1"]


def test_a_save_that_another_process_does_not_end_is_waited_for_a_bounded_time(workdir, monkeypatch):
    with Checkpointer(workdir, async_save=False) as checkpointer, monkeypatch.context() as patch:
        patch.setattr(checkpoint.jax, "process_count", lambda: 2)
        patch.setattr(background, "LONGEST", 0.0)
        patch.setattr(checkpointer._manager, "is_saving_in_progress", lambda: True)
        with pytest.raises(Lost, match=f"^{workdir}: the step before is not written by all processes in 0 s; look"):
            checkpointer.wait()


KILLED = """
import sys
import jax.numpy as jnp
from greedy_distill_jax.storage.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], max_to_keep=3)
start = (checkpointer.latest_step() or 0) + 1
for step in range(start, 100_000):
    state = {"big": [jnp.full((64, 1024), step, jnp.float32) for _ in range(16)], "step": jnp.int32(step)}
    checkpointer.save(step, state, {"data_position": step})
    print(step, flush=True)
"""


@pytest.mark.subprocesses
def test_kill_9_during_saves_leaves_only_complete_steps(workdir, subprocess_env):
    rng, last = np.random.default_rng(0), 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(workdir)], env=subprocess_env, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3):
            assert child.stdout.readline()
        time.sleep(rng.uniform(0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with Checkpointer(workdir, read_only=True) as checkpointer:
            step = checkpointer.latest_step()
            assert step > last
            target = {
                "big": [jax.ShapeDtypeStruct((64, 1024), jnp.float32) for _ in range(16)],
                "step": jax.ShapeDtypeStruct((), jnp.int32),
            }
            for complete in checkpointer.steps():
                state = checkpointer.restore(complete, target)
                assert int(state["step"]) == complete == checkpointer.meta(complete)["data_position"]
                assert all((np.asarray(x) == complete).all() for x in state["big"])
        last = step
    with Checkpointer(workdir) as checkpointer:  # the next writer clears the remains
        assert checkpointer.latest_step() == last
        checkpointer.save(last + 1, {"step": jnp.int32(0)}, {})
    assert all(name.isdigit() for name in os.listdir(workdir))


def test_another_architecture_names_the_leaves(workdir):
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(3, make_state(0, width=16), meta(3, architecture={"dim": 16, "layers": 2}))
        with pytest.raises(UserError, match=r"step 3 holds another architecture: .* is float32\[2, 16, 8\], not") as e:
            checkpointer.restore(3, shapes_of(make_state(0, width=32)))
        assert "and 5 more" in str(e.value) and "\n" not in str(e.value)
        with pytest.raises(UserError, match=r"another architecture: a is absent, not int32\[\]"):
            checkpointer.restore(3, {"a": jnp.int32(0)})
        with pytest.raises(UserError, match="another architecture: dim 16, not 32; use"):
            checkpointer.restore(3, shapes_of(make_state(0)), architecture={"dim": 32, "layers": 2})
        checkpointer.restore(3, shapes_of(make_state(0)), architecture={"layers": 2, "dim": 16})
        newer, defaults = {"layers": 2, "dim": 16, "sink": 0}, {"layers": 9, "dim": 9, "sink": 0}
        checkpointer.restore(3, shapes_of(make_state(0)), architecture=newer, defaults=defaults)
        with pytest.raises(UserError, match="another architecture: sink 0, not 1"):
            checkpointer.restore(3, shapes_of(make_state(0)), architecture={**newer, "sink": 1}, defaults=defaults)


def test_no_checkpoint_is_a_user_error(workdir):
    for read in (lambda folder: load_params(folder, "ema"), load_meta):
        with pytest.raises(UserError, match="nowhere holds no complete checkpoint"):
            read(workdir / "nowhere")
    assert not (workdir / "nowhere").exists()
    with Checkpointer(workdir) as checkpointer:
        with pytest.raises(UserError, match="holds no complete checkpoint"):
            checkpointer.restore(None, make_state())
        checkpointer.save(2, make_state(), meta(2))
        with pytest.raises(UserError, match="has no checkpoint of step 7; it has 2"):
            checkpointer.restore(7, make_state())


def test_an_unwritable_directory_is_a_user_error(workdir):
    (workdir / "file").write_text("")
    with pytest.raises(UserError, match=r"file/checkpoints cannot be written \(Not a directory\)"):
        Checkpointer(workdir / "file" / "checkpoints")


def test_meta_must_be_json(workdir):
    with Checkpointer(workdir) as checkpointer:
        with pytest.raises(TypeError):
            checkpointer.save(1, make_state(), {"array": jnp.ones(2)})
        assert checkpointer.latest_step() is None
        checkpointer.save(1, make_state(), {"list": [1, {"a": None}], "text": "é"})
        assert json.dumps(checkpointer.meta(1)["list"]) == '[1, {"a": null}]'
