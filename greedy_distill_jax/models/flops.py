"""Floating-point operations of every network and step, in closed form (docs/method.md, section 11).

Counted are matmuls and convolutions, two operations per multiply-add; attention on visible pairs only. Normalisation,
rotation and activations are left out. ``cost_analysis()`` of a compiled step cannot give these numbers: it counts the
body of a scan once and knows nothing of kernels.
"""

import dataclasses
import itertools
from typing import NamedTuple

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.motion_head import MotionHeadConfig
from greedy_distill_jax.models.students import patterns
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.layers import Layout
from greedy_distill_jax.ops.attention.backends.record import FLASH_BACKWARD

TRAINED = 3.0  # forward, and backward twice: with respect to inputs and to parameters


class Flops(NamedTuple):
    """Operations of one example."""

    linear: float = 0.0
    attention: float = 0.0  # self-attention, logits and weighted values; text is in there, too

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, times: float | int) -> "Flops":
        return Flops(self.linear * times, self.attention * times)

    __rmul__ = __mul__

    def executed(self, remat: str, backward: float = FLASH_BACKWARD) -> "Flops":
        """What one update makes of this forward pass, recomputation included.

        Args:
          remat: "full" repeats the forward pass of every block, "dots" keeps its matmuls and repeats the attention.
          backward: attention's backward pass over its forward pass, see ``Backend.backward_flops``.
        """
        again = {"none": (0, 0), "dots": (0, 1), "full": (1, 1)}[remat]
        return Flops(self.linear * (TRAINED + again[0]), self.attention * (1 + backward + again[1]))


def text_projection(cfg: WanConfig, depth: int) -> Flops:
    """Text rows to keys and values of every layer."""
    rows = cfg.text_len
    return Flops(2.0 * rows * (cfg.text_dim * cfg.dim + cfg.dim**2) + 2.0 * depth * 2 * rows * cfg.dim**2)


def z_projection(cfg: WanConfig, depth: int, tokens: int) -> Flops:
    """ETM's output to keys and values of every layer (fusions "selfkv", "xattn2", "replace")."""
    return Flops(2.0 * depth * 2 * tokens * cfg.dim**2)


def blocks(cfg: WanConfig, depth: int, tokens: int, pairs: int, text: bool = True) -> Flops:
    """Self-attention over ``pairs`` visible pairs of tokens, cross-attention to the text, MLP; ``depth`` of them.

    Args:
      cfg, depth: width and number of blocks.
      tokens: of the queries.
      pairs: visible pairs of tokens.
      text: False for a block that attends to no text.
    """
    linear = 2.0 * tokens * cfg.dim * (6 * cfg.dim + 2 * cfg.ffn_dim)
    attention = 4.0 * cfg.dim * (pairs + (tokens * cfg.text_len if text else 0))
    return Flops(linear, attention) * depth


def ends(cfg: WanConfig, tokens: int, levels: int, head: bool = True) -> Flops:
    """Patch and time embedding (of ``levels`` noise levels), and the head."""
    patch = cfg.patch**2 * cfg.channels
    time = 2.0 * levels * cfg.dim * (cfg.freq_dim + 7 * cfg.dim)
    return Flops(2.0 * tokens * patch * cfg.dim * (2 if head else 1) + time)


def teacher(cfg: WanConfig, frames: int, tokens: int, levels: int = 1) -> Flops:
    """One bidirectional forward pass over ``frames`` frames of ``tokens`` tokens, at ``levels`` noise levels."""
    length = frames * tokens
    return (
        blocks(cfg, cfg.num_layers, length, length**2)
        + ends(cfg, length, levels)
        + text_projection(cfg, cfg.num_layers)
    )


def _sdd(cfg: StudentConfig, layout: Layout, own: int, z_chunks: int, levels: int, head: bool, text: bool) -> Flops:
    """One call of the decoder for ``own`` chunks; ``text`` and z projected within the call."""
    base, depth, length = cfg.base, len(cfg.sdd_layers), own * layout.tokens
    out = blocks(base, depth, length, layout.pattern.pairs, cfg.fusion != "replace") + ends(base, length, levels, head)
    if cfg.fusion in ("selfkv", "xattn2", "replace"):
        out += z_projection(base, depth, z_chunks * layout.tokens)
    if cfg.fusion in ("xattn2", "replace"):
        out += Flops(0.0, 4.0 * base.dim * length * layout.tokens * depth)
    if cfg.fusion in ("add", "concat", "adaln"):
        rows = levels if cfg.fusion == "adaln" else length
        out += Flops(2.0 * rows * base.dim**2 * (2 if cfg.fusion == "concat" else 1))
    return out + (text_projection(base, depth) if text and cfg.fusion != "replace" else Flops())


def student(cfg: StudentConfig | CausalConfig, frames: int, tokens: int, draws: int = 1) -> Flops:
    """One teacher-forced pass over a video (all chunks at once)."""
    chunks, length, base = frames // cfg.chunk, tokens * cfg.chunk, cfg.base
    if isinstance(cfg, CausalConfig):
        layout = patterns.causal_parallel(cfg, chunks, length, draws)
        own = layout.pattern.num_q_chunks
        return (
            blocks(base, base.num_layers, own * length, layout.pattern.pairs)
            + ends(base, own * length, own * cfg.chunk)
            + text_projection(base, base.num_layers)
            + _apart(cfg, base.num_layers, chunks, length)
        )
    layout, depth = patterns.etm_parallel(cfg, chunks, length), len(cfg.etm_layers)
    etm = blocks(base, depth, chunks * length, layout.pattern.pairs) + ends(base, chunks * length, frames, head=False)
    layout = patterns.sdd_parallel(cfg, chunks, length, draws)
    own = layout.pattern.num_q_chunks
    sdd = _sdd(cfg, layout, own, chunks, own * cfg.chunk, head=True, text=True)
    return etm + text_projection(base, depth) + sdd + _apart(cfg, len(cfg.sdd_layers), chunks, length)


def _apart(cfg: StudentConfig | CausalConfig, depth: int, chunks: int, length: int) -> Flops:
    """What a context pass with weights of its own adds to a teacher-forced one: text and z again, and no head."""
    if cfg.context_weights == "shared" or chunks == 1:
        return Flops()
    fusion, base = getattr(cfg, "fusion", ""), cfg.base
    out = Flops() if fusion == "replace" else text_projection(base, depth)
    if fusion in ("selfkv", "xattn2", "replace"):
        out += z_projection(base, depth, chunks * length)
    return out + Flops(-2.0 * (chunks - 1) * length * base.patch**2 * base.channels * base.dim)


def stream_step(cfg: StudentConfig | CausalConfig, tokens: int, calls: float | int, early: bool = False) -> Flops:
    """One chunk from the caches: ``calls`` denoising calls and what makes its keys; the text is projected already.

    A chunk that may leave its steps ``early`` needs a pass for the keys of its last step's level.
    """
    length, base = tokens * cfg.chunk, cfg.base
    clean = cfg.context == "clean" or (early and cfg.context == "last_step_kv")
    if isinstance(cfg, CausalConfig):
        layout = patterns.causal_step(cfg, length)
        call = blocks(base, base.num_layers, length, layout.pattern.pairs)
        clean = clean and cfg.sink_chunks + cfg.ring_chunks > 0
        return (call + ends(base, length, 1)) * calls + (call + ends(base, length, 1, head=False)) * clean
    fused = cfg.context == "fused"
    layout = patterns.etm_step(cfg, length)
    out = blocks(base, len(cfg.etm_layers), length, layout.pattern.pairs) + ends(base, length, 1, head=False)
    if cfg.fusion in ("selfkv", "xattn2", "replace"):
        # Once per chunk and network.
        out += z_projection(base, len(cfg.sdd_layers), length) * (2 if fused or cfg.context_weights == "own" else 1)
    layout = patterns.sdd_step(cfg, length)
    call, last = (_sdd(cfg, layout, 1, 0, 1, head, text=False) for head in (True, False))
    if fused:  # the first call makes the last chunk's keys, too
        return (
            out + _sdd(cfg, patterns.sdd_fused(cfg, length), 2, 0, 2 * cfg.chunk, True, text=False) + call * (calls - 1)
        )
    return out + call * calls + last * clean


def _all_text(cfg: StudentConfig | CausalConfig) -> Flops:
    """The text projected for every network, as at the start of a stream."""
    networks = 2 if cfg.context_weights == "own" else 1
    if isinstance(cfg, CausalConfig):
        return text_projection(cfg.base, cfg.base.num_layers) * networks
    sdd = Flops() if cfg.fusion == "replace" else text_projection(cfg.base, len(cfg.sdd_layers)) * networks
    return text_projection(cfg.base, len(cfg.etm_layers)) + sdd


def _unfused(cfg: StudentConfig | CausalConfig):
    return dataclasses.replace(cfg, context="clean") if cfg.context == "fused" else cfg


def rollout(cfg: StudentConfig | CausalConfig, frames: int, tokens: int, plan: StepPlan, exit: str) -> Flops:
    """A self-made video; the mean over the exits where they are drawn."""
    total = _all_text(cfg)
    for chunk in range(frames // cfg.chunk):
        total += stream_step(_unfused(cfg), tokens, calls_of(plan, chunk, exit), exit != "last")
    return total


def calls_of(plan: StepPlan, chunk: int, exit: str) -> float:
    """Mean denoising calls of a chunk of a self-made video, see ``training.rollout.draw_exits``."""
    steps = len(plan.steps_of(chunk))
    whole = exit == "last" or (exit == "random_but_first" and chunk == 0)
    return float(steps) if whole else (steps + 1) / 2


def replay(cfg: StudentConfig | CausalConfig, frames: int, tokens: int, exit: str) -> Flops:
    """The last denoising calls and the contexts of a self-made video, chunk by chunk."""
    return _all_text(cfg) + stream_step(_unfused(cfg), tokens, 1, exit != "last") * (frames // cfg.chunk)


def contexts(cfg: StudentConfig | CausalConfig, tokens: int) -> tuple[Flops, Flops]:
    """(ETM's call for a chunk, the pass that leaves a finished chunk's keys), both from the caches."""
    cfg = _unfused(cfg)
    etm = stream_step(dataclasses.replace(cfg, context="last_step_kv"), tokens, 0)
    return etm, stream_step(cfg, tokens, 0, early=True) + etm * -1.0


def motion_head(cfg: MotionHeadConfig, pixels: int) -> list[Flops]:
    """Every layer of the motion head, for so many latent pixels of differences of frames."""
    widths = [cfg.channels, *[cfg.width] * cfg.layers]
    convs = [2.0 * pixels * 9 * given * made for given, made in itertools.pairwise(widths)]
    return [Flops(x) for x in (*convs, 2.0 * pixels * widths[-1] * cfg.channels)]
