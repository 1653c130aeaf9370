"""Sizes of the Wan2.1 DiT."""

import dataclasses


def check_choice(owner: object, field: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the value of ``owner.field`` is one of ``choices``."""
    if getattr(owner, field) not in choices:
        raise ValueError(
            f"{type(owner).__name__}.{field} is {getattr(owner, field)!r}; choose from {', '.join(map(str, choices))}."
        )


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """The bidirectional teacher (docs/method.md, section 2) and everything its blocks share with the student.

    ``gate_init`` is added to both residual gates at initialisation and ``text_init`` / ``time_init`` are the
    standard deviations of the embedding MLPs: 0 and .02 in Wan, larger for short training from
    scratch. ``prediction``: what the head predicts; Wan weights predict "velocity".
    ``remat``: "none", "full" (recompute each block) or "dots" (keep matmul results). ``gradient_dtype``: "float32", or
    "compute" for gradients of kernels that are made, and summed over devices, in ``dtype``: with bfloat16 half of what
    is sent and held, and an error that grows with the number of devices.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    channels: int = 16
    patch: int = 2
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    prediction: str = "velocity"
    dtype: str = "bfloat16"
    gradient_dtype: str = "float32"
    remat: str = "full"
    gate_init: float = 0.0
    text_init: float = 0.02
    time_init: float = 0.02

    def __post_init__(self):
        check_choice(self, "prediction", ("velocity", "x0"))
        check_choice(self, "dtype", ("bfloat16", "float32"))
        check_choice(self, "gradient_dtype", ("float32", "compute"))
        check_choice(self, "remat", ("none", "full", "dots"))
        if self.num_heads < 1 or self.num_layers < 1 or self.dim % self.num_heads:
            raise ValueError(
                f"WanConfig: dim {self.dim} must be a multiple of num_heads {self.num_heads}, num_layers "
                f"{self.num_layers} at least 1."
            )

    def differentiated(self, derivative: str) -> "WanConfig":
        """The config for a way of differentiation: tangents ("jvp") cannot pass gradients of our own making."""
        return dataclasses.replace(self, gradient_dtype="compute") if derivative == "jvp" else self

    @property
    def head_dim(self) -> int:
        """K."""
        return self.dim // self.num_heads


WAN_SIZES: dict[str, dict] = {
    "wan1_3b": dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan14b": dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "tiny": dict(
        dim=96,
        ffn_dim=480,
        num_heads=2,
        num_layers=4,
        freq_dim=64,
        text_dim=32,
        text_len=16,
        dtype="float32",
        remat="none",
        prediction="x0",
        gate_init=0.3,
        text_init=0.1,
        time_init=0.1,
    ),
}
