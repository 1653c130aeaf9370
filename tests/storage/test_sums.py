"""Sums of what a checkpoint holds: what is read is what was saved, or it is told."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from greedy_distill_jax.storage import checkpoint, sums as module
from greedy_distill_jax.storage.checkpoint import Checkpointer, load_meta, load_params
from greedy_distill_jax.storage.messages import Damaged
from greedy_distill_jax.storage.sums import sums, taken_apart, with_sums
from tests.conftest import exit_code
from tests.storage.test_checkpoint import assert_same_bits, meta, shapes_of

DTYPES = [
    *(np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float16, np.float32, np.complex64),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4),
]


def _array(dtype, shape, seed=0):
    """Any bits, NaNs among them."""
    rng, size = np.random.default_rng(seed), int(np.prod(shape))
    if dtype in (np.bool_, ml_dtypes.int4):
        return rng.integers(0, 2 if dtype == np.bool_ else 7, shape).astype(dtype)
    return np.frombuffer(rng.bytes(size * np.dtype(dtype).itemsize), dtype).reshape(shape)


def _flipped(array, number, bit):
    changed = np.array(array)
    if changed.dtype in (np.bool_, ml_dtypes.int4):
        changed.reshape(-1)[number] = (int(changed.reshape(-1)[number]) + 1) % 2
    else:
        changed.reshape(-1)[number : number + 1].view(np.uint8)[bit // 8] ^= 1 << bit % 8
    return changed


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_a_sum_is_the_same_everywhere_and_changes_with_every_bit(dtype, monkeypatch):
    array, empty = _array(dtype, (4, 6, 8)), _array(dtype, (0, 3))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("a", None, "b"), (None, "a"), (("b", "a"),), ())]
    leaves = {("host",): array, ("one",): jnp.asarray(array), ("empty",): empty, ("scalar",): array[0, 0, 0]}
    # int4 is not laid out over devices on a CPU by every version of jaxlib
    if dtype is not ml_dtypes.int4:
        leaves |= {(str(n),): jax.device_put(array, s) for n, s in enumerate(placed) if n != 2}
    on_host = sums(leaves)
    monkeypatch.setattr(module, "_is_of_host", lambda leaf: not isinstance(leaf, jax.Array))
    assert sums(leaves) == on_host and list(on_host) == list(leaves)
    expected = on_host[("host",)]
    assert on_host[("empty",)] == 0
    assert all(value == expected for path, value in on_host.items() if path not in (("empty",), ("scalar",)))
    rng = np.random.default_rng(1)
    monkeypatch.undo()
    for _ in range(20):
        number, bit = rng.integers(array.size), rng.integers(8 * np.dtype(dtype).itemsize)
        assert sums({("x",): _flipped(array, number, bit)})[("x",)] != expected
    swapped = np.array(array)
    swapped[0], swapped[1] = array[1], array[0]
    assert sums({("x",): swapped})[("x",)] != expected


def test_an_array_on_devices_is_summed_where_it_lies():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    array = _array(np.float32, (64, 2048))
    wide = jax.device_put(array, NamedSharding(mesh, PartitionSpec(None, "a")))
    program = module._on_devices.lower([wide]).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program
    assert array.size > module._BLOCK and int(module._on_devices([wide])[0]) == module._on_host(array)


# A process of its own: where a chunk cannot be decoded, TensorStore reports into a loop that Orbax has closed, whenever
# Python finds the coroutine.
FLIPS = """
import json, sys
from pathlib import Path
import numpy as np
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.checkpoint import Checkpointer
from tests.storage.test_checkpoint import assert_same_bits, make_state, meta, shapes_of
from tests.storage.test_sums import _with_bit

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
state, rng = make_state(3, width=64), np.random.default_rng(0)

def read():
    with Checkpointer(folder, read_only=True) as checkpointer:
        return checkpointer.meta(1), checkpointer.restore(1, shapes_of(state)), checkpointer.restore_subtree(1, "ema")

with Checkpointer(folder, async_save=False, **options) as checkpointer:
    checkpointer.save(1, state, meta(1))
expected, noticed = read(), []
for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
    data = file.read_bytes()
    for place in {*np.linspace(0, len(data) - 1, 5, dtype=int), *rng.integers(len(data), size=3)}:
        file.write_bytes(_with_bit(data, place, rng.integers(8)))
        try:
            found = read()
        except UserError as error:
            noticed.append([str(file.relative_to(folder)), str(error)])
        else:
            assert_same_bits(found[1:], expected[1:])
            assert found[0] == expected[0]
    file.write_bytes(data)
print(json.dumps(noticed))
"""


@pytest.mark.subprocesses
@pytest.mark.parametrize("options", [{}, {"write_bytes": 2**20}], ids=["compressed", "plain"])
def test_a_flipped_bit_is_noticed_or_changes_nothing(workdir, subprocess_env, options):
    """In every file of a step, all over it."""
    command = [sys.executable, "-c", FLIPS, str(workdir), json.dumps(options)]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    noticed = json.loads(done.stdout.splitlines()[-1])
    assert all("\n" not in told for _, told in noticed)
    data_files = [told for name, told in noticed if "/d/" in name]
    assert len(data_files) > 10 and len(noticed) > len(data_files)
    if options:  # nothing else knows
        assert any("is not what was saved" in told for told in data_files)


def _with_bit(data, place, bit):
    return data[:place] + bytes([data[place] ^ 1 << int(bit)]) + data[place + 1 :]


def _damage(folder, array):
    """Flips a bit of the stored numbers of an array, wherever its bytes lie."""
    (file,) = [file for file in folder.rglob("d/*") if array.tobytes() in file.read_bytes()]
    data = file.read_bytes()
    file.write_bytes(_with_bit(data, data.index(array.tobytes()) + array.nbytes // 2, 3))


def test_a_damaged_leaf_is_named_by_every_way_of_reading(workdir, capsys):
    array = _array(np.int32, (64, 64))
    state = {"nets": {"a": {"ema": {"x": jnp.asarray(array), "y": jnp.arange(5.0)}}}}
    with Checkpointer(workdir, async_save=False, write_bytes=2**20) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, meta(step))
    _damage(workdir / "2", array)
    line = r"step 2 is damaged \(nets/a/ema/x is not what was saved\); name another step, of 1$"
    with Checkpointer(workdir, read_only=True) as checkpointer:
        wanted = checkpointer.shapes(2, "nets/a/ema")
        for read in (
            lambda: checkpointer.restore(2, shapes_of(state)),
            lambda: checkpointer.restore_subtree(2, "nets", dtype=jnp.bfloat16),
            lambda: list(checkpointer.read_groups(2, "nets/a/ema", wanted)),
        ):
            with pytest.raises(Damaged, match=line) as error:
                read()
            assert error.value.field == "step"
        (rest,) = checkpointer.read_groups(2, "nets/a/ema", {"y": wanted["y"]})
    assert rest.keys() == {"y"}, "what is not damaged can be read"
    assert_same_bits(load_params(workdir, "nets"), state["nets"])
    assert "x is not what was saved); step 1 is taken instead" in capsys.readouterr().err
    assert exit_code(lambda _: load_params(workdir, "nets", step=2)) == 2
    assert "error: " in (said := capsys.readouterr().err) and "nets/a/ema/x is not what was saved" in said


def test_a_step_without_sums_is_read_as_before(workdir, monkeypatch):
    """It was written by an older version; that its numbers are damaged is not noticed."""
    array = _array(np.int32, (64, 64))
    monkeypatch.setattr(checkpoint, "with_sums", lambda meta, leaves: dict(meta))
    with Checkpointer(workdir, async_save=False, write_bytes=2**20) as checkpointer:
        checkpointer.save(1, {"x": jnp.asarray(array)}, meta(1))
    stored = json.loads((workdir / "1" / "meta" / "metadata").read_text())
    assert not stored.keys() & {"sum", "sums"}
    assert_same_bits(load_params(workdir, "x"), jnp.asarray(array))
    assert load_meta(workdir).items() >= meta(1).items()
    _damage(workdir, array)
    assert (np.asarray(load_params(workdir, "x")) != array).sum() == 1


def test_numbers_wider_than_jax_has_are_saved_as_it_reads_them(workdir):
    state = {"count": 7, "rate": 0.1, "many": np.arange(5)}
    with Checkpointer(workdir, async_save=False) as checkpointer:
        checkpointer.save(1, state, meta(1))
        found = checkpointer.restore(1, state)
    assert [x.dtype.name for x in jax.tree.leaves(found)] == ["int32", "int32", "float32"]
    assert found["count"] == 7 and found["rate"] == np.float32(0.1) and (found["many"] == np.arange(5)).all()


def test_a_leaf_that_is_lost_or_new_is_told(workdir):
    with Checkpointer(workdir, async_save=False) as checkpointer:
        checkpointer.save(1, {"a": {"x": jnp.zeros(3), "y": jnp.ones(3)}}, meta(1))
        file = Path(workdir, "1", "meta", "metadata")
        given, saved = taken_apart(json.loads(file.read_text()))
        assert saved.keys() == {("a", "x"), ("a", "y")}
        for leaves in (("x",), ("x", "y", "z")):
            file.write_text(json.dumps(with_sums(given, {("a", name): jnp.zeros(3) for name in leaves})))
            with pytest.raises(Damaged, match=rf"damaged \(a/{'y' if len(leaves) == 1 else 'z'} was not saved, or is"):
                checkpointer.restore_subtree(1, "a")


def test_meta_is_what_was_given(workdir):
    given = {"text": "é", "tuple": (1, 2.5), 3: None}
    stored = with_sums(given, {("a", "b"): np.ones(3)})
    assert taken_apart(json.loads(json.dumps(stored)))[0] == {"text": "é", "tuple": [1, 2.5], "3": None}
    with pytest.raises(ValueError, match="meta is not what was saved"):
        taken_apart(stored | {"text": "e"})
