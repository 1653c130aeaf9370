"""ETM, the Efficient Temporal Module: a causal transformer over past clean frames (docs/method.md, section 3.2).

Slot j reads chunk j - 1 (slot 0 a learned vector) and conditions chunk j; it sees slots j - window + 1 .. j and the
sink. Its time position is j.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int32

from greedy_distill_jax.models.parameter import parameter
from greedy_distill_jax.models.students.config import StudentConfig
from greedy_distill_jax.models.wan.dit import grid_of
from greedy_distill_jax.models.wan.layers import Embeddings, Emitted, Layer, Layout, Shared, block_stack, layer_norm
from greedy_distill_jax.models.wan.rope import Rope


class ETM(nn.Module):
    """Wan blocks with t = 0 modulation and a final LayerNorm."""

    cfg: StudentConfig
    layout: Layout | None = None
    emit: tuple[str, ...] = ()
    project_only: bool = False

    def setup(self):
        base = self.cfg.base
        self.embed = Embeddings(base)
        self.bos = parameter(self, "bos", nn.initializers.normal(0.02), (base.dim,))
        self.blocks = block_stack(
            base, len(self.cfg.etm_layers), layout=self.layout, emit=self.emit, project_only=self.project_only
        )
        self.norm = layer_norm(base.eps, affine=True)

    def __call__(
        self,
        previous_BTHWC: Float[Array, "B T H W C"],
        is_first_Q: Bool[Array, " Q"],
        sigma_BT: Float[Array, "B _"],
        text_BMC: Float[Array, "B M text_dim"] | None = None,
        *,
        rope_q: Rope,
        rope_k: Rope | None = None,
        lengths: Int32[Array, " Q"] | None = None,
        layer: Layer = Layer(),  # noqa: B008 (an immutable NamedTuple)
    ) -> tuple[Float32[Array, "B S D"], Emitted]:
        """z [B, slots * tokens, D] float32 for the given slots.

        Args:
          previous_BTHWC: the chunk before each slot's chunk (ignored where ``is_first_Q``).
          is_first_Q: bool per slot: this is slot 0.
          sigma_BT: noise level of the history, [B, 1] or per frame; 0 for clean.
          text_BMC, rope_q, rope_k, lengths, layer: as for ``dit.Dit``.
        """
        grid_of(previous_BTHWC, self.cfg.base)
        x = rearrange(self.embed.tokens(previous_BTHWC), "b (q l) d -> b q l d", l=self.layout.tokens)
        x = jnp.where(is_first_Q[None, :, None, None], self.bos[None, None, None], x)
        _, e0 = self.embed.time(sigma_BT)
        text = None if text_BMC is None else self.embed.text(text_BMC)
        shared = Shared(modulation=e0, rope_q=rope_q, rope_k=rope_k, lengths=lengths, text=text)
        x, emitted = self.blocks(rearrange(x, "b q l d -> b (q l) d"), shared, layer)
        return self.norm(x), emitted

    def project(self, text_BMC: Float[Array, "B M C"]) -> Emitted:
        """Per-layer keys and values of the text."""
        base = self.cfg.base
        batch = text_BMC.shape[0]
        rope = Rope(jnp.ones((1, base.head_dim // 2)), jnp.zeros((1, base.head_dim // 2)))
        modulation = jnp.zeros((batch, 1, 6, base.dim), jnp.float32)
        shared = Shared(modulation=modulation, rope_q=rope, text=self.embed.text(text_BMC))
        return self.blocks(jnp.zeros((batch, 1, base.dim), jnp.float32), shared, Layer())[1]
