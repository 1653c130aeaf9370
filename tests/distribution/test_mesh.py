"""The mesh follows a slice's torus, and every process feeds what its devices work on."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from greedy_distill_jax.distribution import mesh as meshes, rows
from greedy_distill_jax.distribution.mesh import AXES, batch_parts, feeding, make_mesh, parts_of
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.pods import topologies


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def _hops(mesh, axis: str) -> float:
    """Links between neighbours on an axis, taken as a ring, on average; of a torus that wraps around."""
    devices = np.moveaxis(mesh.devices, AXES.index(axis), 0).reshape(mesh.shape[axis], -1)
    sizes = [max(d.coords[i] for d in devices.flat) + 1 for i in range(3)]
    coords = np.array([[device.coords for device in line] for line in devices])
    far = np.abs(coords - np.roll(coords, 1, 0))
    return float(np.minimum(far, np.array(sizes) - far).sum(-1).mean())


@pytest.mark.parametrize(
    "topology, shape, hops, alike",
    [
        ("v5e:4x4", {"fsdp": 4, "context": 4}, {"fsdp": (1.0, 3.0), "context": (1.0, 1.5)}, 2),
        ("v6e:4x4", {"fsdp": 16}, {"fsdp": (1.0, 1.5)}, 1),
        ("v5p:4x4x8", {"fsdp": 64, "tensor": 2}, {"fsdp": (1.19, 2.12), "tensor": (1.0, 1.0)}, 1),
    ],
)
def test_neighbours_are_neighbours_in_the_torus(topology, shape, hops, alike):
    """``hops``: here, and with the devices in jax's order. ``alike``: processes that feed the same parts."""
    devices = topologies.devices(topology)
    mesh = make_mesh(shape, devices)
    plain = Mesh(devices.reshape(mesh.devices.shape), AXES)
    for axis, expected in hops.items():
        assert (_hops(mesh, axis), _hops(plain, axis)) == pytest.approx(expected, abs=0.01)
    fed = feeding(mesh)
    assert set(sum(fed.values(), ())) == set(range(batch_parts(mesh)))
    assert all(list(fed.values()).count(parts) == alike for parts in fed.values())


def _slices(count: int) -> list[Device]:
    return [Device(4 * n + i, n, (x, y, 0), n) for n in range(count) for i, (x, y) in enumerate(np.ndindex(2, 2))]


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 4, 2, 1), (2, 4, 1, 1)])
def test_slices_lie_along_the_outer_axes(sizes):
    """Nothing but data and fsdp crosses from one slice to the next."""
    laid = meshes._laid_out(_slices(2), sizes)
    assert laid.shape == sizes
    parts = laid.reshape(2, -1)
    assert [{d.slice_index for d in part} for part in parts] == [{0}, {1}]


def test_slices_that_do_not_divide():
    with pytest.raises(UserError, match="2 slices of TPUs are put along data and fsdp, which are 1 and 1"):
        meshes._laid_out(_slices(2), (1, 1, 8, 1))


def _mesh(processes: list[int], shape: tuple[int, ...]) -> Mesh:
    """Whose devices belong to these processes."""
    devices = np.array([Device(i, process) for i, process in enumerate(processes)])
    return Mesh(devices.reshape(shape), AXES)


@pytest.mark.parametrize(
    "processes, shape, fed",
    [
        ([0, 0, 1, 1], (1, 4, 1, 1), {0: (0, 1), 1: (2, 3)}),
        ([0, 1, 1, 0], (1, 4, 1, 1), {0: (0, 3), 1: (1, 2)}),
        ([0, 1, 0, 1], (1, 2, 2, 1), {0: (0, 1), 1: (0, 1)}),
        ([0, 0, 1, 1], (1, 1, 4, 1), {0: (0,), 1: (0,)}),
    ],
)
def test_parts_of_processes(processes, shape, fed):
    mesh = _mesh(processes, shape)
    assert feeding(mesh) == fed and parts_of(mesh, 1) == fed[1]


@pytest.mark.parametrize("processes, shape", [([0, 0, 0, 1, 1, 1], (1, 3, 2, 1)), ([0, 0, 0, 1], (1, 4, 1, 1))])
def test_parts_that_are_spread_unevenly(processes, shape):
    message = f"the {shape[1]} data and fsdp parts of the mesh are fed unevenly by its 2 processes .0 feeds .0, 1"
    with pytest.raises(UserError, match=message):
        feeding(_mesh(processes, shape))


@pytest.mark.parametrize("shape", [{"fsdp": 4}, {"data": 2, "context": 2}, {"context": 4}])
def test_rows_become_a_batch_again(shape, monkeypatch):
    """Also where a process has parts that are not neighbours."""
    mesh = make_mesh(shape, jax.devices()[:4])
    whole = np.arange(8 * 4 * 3, dtype=np.float32).reshape(8, 4, 3)
    for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp"), "context")):
        got = rows.assembled(whole, NamedSharding(mesh, spec))
        assert got.sharding.spec == spec
        np.testing.assert_array_equal(got, whole)
    np.testing.assert_array_equal(rows.local_rows(rows.global_rows(whole[:, 0], mesh)), whole[:, 0])
