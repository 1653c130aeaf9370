"""The same causal stream in PyTorch with the same weights, eager and compiled (``benchmarks/stream_torch.py``)."""

import importlib.util

import jax
import stream_torch
from sizes import SIZES

from device_items.record import NotHere, Record

STEPS, REPEATS = 4, 7


def run(record: Record) -> None:
    """Frames that are the same, then times."""
    size = record.data["size"]
    record.row("float32, tiny", float32)
    record.row("eager", lambda: peer(size, stream_torch.EAGER), needs=40)
    # 30 layers unrolled take Inductor over a minute: only where this item is run by itself.
    record.row("compiled", lambda: peer(size, stream_torch.COMPILED), needs=120)


def _device() -> str:
    if importlib.util.find_spec("torch") is None:
        raise NotHere("PyTorch is not installed")
    return stream_torch._torch_device()


def float32() -> dict:
    """Frames of the peer and of ours where they can be the same."""
    device = _device()
    with jax.default_matmul_precision("highest"):
        found = stream_torch.measure(SIZES["tiny"], STEPS, 1, (stream_torch.EAGER,), device)["largest_difference"]
    return {
        "figures": {"largest difference": found},
        "checks": {"largest difference": (found, stream_torch.TOLERANCE["float32"])},
    }


def peer(size: str, name: str) -> dict:
    """Times in turns; every chunk of the peer is compared with ours."""
    device = _device()
    if device == "cpu" and name == stream_torch.COMPILED:
        raise NotHere("torch.compile is measured on a GPU")
    found = stream_torch.measure(SIZES[size], STEPS, REPEATS if device != "cpu" else 1, (name,), device)
    ms = found["ms_per_latent_frame"]
    short = {name: "PyTorch", stream_torch.CAUSAL: "ours, causal", stream_torch.ETM_SDD: "ours, ETM + SDD"}
    figures = {f"{short[key]} ms/frame": value for key, value in ms.items()}
    figures |= {f"PyTorch / {short[ours]}": ms[name] / ms[ours] for ours in (stream_torch.CAUSAL, stream_torch.ETM_SDD)}
    dtype = found["config"]["dtype"]
    checks = {"largest difference of a chunk": (found["largest_difference"], stream_torch.TOLERANCE[dtype])}
    return {"figures": figures, "checks": checks, "config": found["config"], "steps": STEPS}
