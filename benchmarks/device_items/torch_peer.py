"""The same causal stream in PyTorch with the same weights, eager and compiled (``benchmarks/stream_torch.py``).

Compiled in three modes of ``torch.compile``; "reduce-overhead" replays CUDA graphs.
"""

import importlib.util

import jax
import stream_torch
from sizes import SIZES

from device_items.record import NotHere, Record

STEPS, REPEATS = 4, 7
PEER = stream_torch.Peer(stream_torch.CAUSAL)


def run(record: Record) -> None:
    """Frames that are the same, then times."""
    size = record.data["size"]
    record.row("float32, tiny", float32)
    record.row("eager", lambda: peer(size, None), needs=40)
    # 30 layers unrolled take Inductor over a minute: only where this item is run by itself.
    for mode in stream_torch.MODES:
        record.row(f"compiled, {mode}", lambda mode=mode: peer(size, mode), needs=240 if "autotune" in mode else 120)


def _device() -> str:
    if importlib.util.find_spec("torch") is None:
        raise NotHere("PyTorch is not installed")
    return stream_torch._torch_device()


def float32() -> dict:
    """Frames of the peer and of ours where they can be the same."""
    device = _device()
    with jax.default_matmul_precision("highest"):
        found = stream_torch.measure(SIZES["tiny"], STEPS, 1, (PEER,), device)["largest_difference"]
    return {
        "figures": {"largest difference": found},
        "checks": {"largest difference": (found, stream_torch.TOLERANCE["float32"])},
    }


def peer(size: str, mode: str | None) -> dict:
    """Times in turns; every chunk of the peer is compared with ours."""
    device, of_mode = _device(), PEER._replace(mode=mode)
    if device == "cpu" and mode is not None:
        raise NotHere("torch.compile is measured on a GPU")
    found = stream_torch.measure(SIZES[size], STEPS, REPEATS if device != "cpu" else 1, (of_mode,), device)
    ms = found["ms_per_latent_frame"]
    name = of_mode.name
    short = {name: "PyTorch", stream_torch.CAUSAL: "ours, causal", stream_torch.ETM_SDD: "ours, ETM + SDD"}
    figures = {f"{short[key]} ms/frame": value for key, value in ms.items()}
    figures |= {f"PyTorch / {short[ours]}": ms[name] / ms[ours] for ours in (stream_torch.CAUSAL, stream_torch.ETM_SDD)}
    dtype = found["config"]["dtype"]
    checks = {"largest difference of a chunk": (found["largest_difference"], stream_torch.TOLERANCE[dtype])}
    return {"figures": figures, "checks": checks, "config": found["config"], "steps": STEPS}
