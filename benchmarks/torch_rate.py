"""What a square matmul reaches in jax and in PyTorch: a ratio of their times is the machine's, too."""

import jax

from greedy_distill_jax.measure import environment


def matmul_rates(dtype: str) -> dict[str, float]:
    """Measures FLOP/s by library on the device of jax's backend; jax alone where torch is not installed.

    Args:
      dtype: of the operands, "bfloat16" or "float32".
    """
    rates = {"jax": environment.ceilings(dtype)["matmul_flops_per_s"]}
    try:
        import torch
    except ModuleNotFoundError:
        return rates
    side, device = environment.matmul_side(), "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cpu":
        torch.set_num_threads(1)
    a, b = torch.randn(2, side, side, dtype=getattr(torch, dtype), device=device)

    def multiply():
        torch.matmul(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    return rates | {"torch": environment.matmul_flops_per_s(multiply, side)}
