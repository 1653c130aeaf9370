"""Chunk attention in PyTorch: exact slices by its fused attention, and FlexAttention with the table as block mask."""

import importlib.util
from collections.abc import Callable

import jax
import numpy as np

from device_items.record import NotHere
from greedy_distill_jax.ops.attention import Pattern

Calls = tuple[Callable[[], object], Callable[[], tuple]]  # forward; (output, dq, dk, dv)


def _tensors(inputs):
    """q, k, v, g as [B, N, S, K] on the device of jax's backend."""
    if importlib.util.find_spec("torch") is None:
        raise NotHere("PyTorch is not installed")
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise NotHere("PyTorch sees no GPU")
    if jax.default_backend() == "cpu":
        torch.set_num_threads(1)
    return torch, [torch.from_dlpack(x).transpose(1, 2).clone() for x in inputs]


def _calls(torch, attend, tensors) -> Calls:
    q, k, v, g = tensors

    def forward():
        with torch.no_grad():
            return attend(q, k, v).transpose(1, 2)

    def both():
        leaves = [x.detach().requires_grad_(True) for x in (q, k, v)]
        out = attend(*leaves)
        gradients = torch.autograd.grad(out, leaves, g)
        return tuple(x.detach().transpose(1, 2) for x in (out, *gradients))

    return forward, both


def to_jax(tensor) -> jax.Array:
    """A result of the calls."""
    return jax.numpy.from_dlpack(tensor.contiguous())


def synchronised(call: Callable) -> Callable:
    """``call`` that returns when its work is done."""
    import torch

    def run():
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def sdpa(pattern: Pattern, inputs, *, backward: bool) -> Calls:
    """All queries to all keys."""
    del backward
    if not pattern.is_full:
        raise ValueError("a table that hides nothing is needed")
    torch, tensors = _tensors(inputs)
    return _calls(torch, torch.nn.functional.scaled_dot_product_attention, tensors)


def slices(pattern: Pattern, inputs, *, backward: bool) -> Calls:
    """Query chunks with equally long lists as one batch, their keys gathered, as our cuDNN backend has them."""
    del backward
    torch, tensors = _tensors(inputs)
    lengths = np.array([len(row) for row in pattern.table])
    groups = [np.flatnonzero(lengths == n) for n in np.unique(lengths)]
    device = tensors[0].device
    picks = [torch.as_tensor([sorted(pattern.table[i]) for i in group], device=device) for group in groups]
    members = [torch.as_tensor(group, device=device) for group in groups]
    back = torch.as_tensor(np.argsort(np.concatenate(groups)), device=device)

    def attend(q, k, v):
        q = q.unflatten(2, (-1, pattern.q_chunk))  # [B, N, C, L, K]
        k, v = (x.unflatten(2, (-1, pattern.k_chunk)) for x in (k, v))
        parts = []
        for group, pick in zip(members, picks):
            mine = q[:, :, group].transpose(1, 2).flatten(0, 1)
            keys, values = (x[:, :, pick].flatten(3, 4).transpose(1, 2).flatten(0, 1) for x in (k, v))
            out = torch.nn.functional.scaled_dot_product_attention(mine, keys, values)
            parts.append(out.unflatten(0, (len(q), -1)))
        return torch.cat(parts, 1)[:, back].transpose(1, 2).flatten(2, 3)

    return _calls(torch, attend, tensors)


def flex(pattern: Pattern, inputs, *, backward: bool) -> Calls:
    """FlexAttention, compiled."""
    del backward
    torch, tensors = _tensors(inputs)
    if tensors[0].device.type != "cuda":
        raise NotHere("FlexAttention is measured on a GPU: it has no backward pass on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    visible = torch.as_tensor(pattern.chunk_mask(), device="cuda")

    def mask(b, h, i, j):
        return visible[i // pattern.q_chunk, j // pattern.k_chunk]

    sizes = tensors[0].shape[2], tensors[1].shape[2]
    blocks = create_block_mask(mask, None, None, *sizes, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)
    return _calls(torch, lambda q, k, v: attend(q, k, v, block_mask=blocks), tensors)
