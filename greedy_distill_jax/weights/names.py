"""The one mapping table between our parameter tree and the names of other programs, both directions.

Our linears are [in, out] and stacked over layers; the others' are [out, in], one tensor per layer. Everything is a
rename plus one of four reshapes, so nothing is lost or rounded. Verified facts: original and diffusers names differ by
renaming alone; the original `norm3` (affine, before cross-attention) is diffusers' `norm2`.
"""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

PLAIN, LINEAR, TABLE, PATCH = "plain", "linear", "table", "patch"


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter; "{}" stands for the layer.

    Attributes:
      ours: path of the leaf, below one of ``STUDENT_PARTS`` in a student.
      original: name in Wan's repository and in everything derived from it; the exported student uses it too.
      diffusers: name in `WanTransformer3DModel`; None for what only a student has.
      kind: PLAIN (as it is), LINEAR ([in, out] against [out, in]), TABLE ([n, D] against [1, n, D]) or PATCH
        ([p * p * C, D] against a [D, C, 1, p, p] convolution).
    """

    ours: str
    original: str
    diffusers: str | None
    kind: str = PLAIN

    @property
    def stacked(self) -> bool:
        """Whether our leaf has a leading layers axis."""
        return "{}" in self.original


def _linear(ours: str, original: str, diffusers: str | None, kind: str = LINEAR) -> tuple[Row, Row]:
    return (
        Row(f"{ours}/kernel", f"{original}.weight", diffusers and f"{diffusers}.weight", kind),
        Row(f"{ours}/bias", f"{original}.bias", diffusers and f"{diffusers}.bias"),
    )


def _norm(ours: str, original: str, diffusers: str | None) -> Row:
    return Row(f"{ours}/scale", f"{original}.weight", diffusers and f"{diffusers}.weight")


def _attention(ours: str, diffusers: str) -> Iterable[Row]:
    path, name, other = f"blocks/{ours}", f"blocks.{{}}.{ours}", f"blocks.{{}}.{diffusers}"
    for letter in "qkv":
        yield from _linear(f"{path}/{letter}", f"{name}.{letter}", f"{other}.to_{letter}")
    yield from _linear(f"{path}/o", f"{name}.o", f"{other}.to_out.0")
    for letter in "qk":
        yield _norm(f"{path}/norm_{letter}", f"{name}.norm_{letter}", f"{other}.norm_{letter}")
    for letter in "kv":
        yield from _linear(f"{path}/z_{letter}", f"{name}.z_{letter}", None)
    yield _norm(f"{path}/norm_z", f"{name}.norm_z", None)


ROWS: tuple[Row, ...] = (
    *_linear("embed/patch", "patch_embedding", "patch_embedding", PATCH),
    *_linear("embed/text_in", "text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    *_linear("embed/text_out", "text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    *_linear("embed/time_in", "time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    *_linear("embed/time_out", "time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    *_linear("embed/time_projection", "time_projection.1", "condition_embedder.time_proj"),
    Row("blocks/modulation", "blocks.{}.modulation", "blocks.{}.scale_shift_table", TABLE),
    *_attention("self_attn", "attn1"),
    _norm("blocks/norm3", "blocks.{}.norm3", "blocks.{}.norm2"),
    Row("blocks/norm3/bias", "blocks.{}.norm3.bias", "blocks.{}.norm2.bias"),
    *_attention("cross_attn", "attn2"),
    *_linear("blocks/ffn/up", "blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    *_linear("blocks/ffn/down", "blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
    Row("blocks/z_gate", "blocks.{}.z_gate", None),
    Row("head/modulation", "head.modulation", "scale_shift_table", TABLE),
    *_linear("head/projection", "head.head", "proj_out"),
    *_linear("z_in", "z_in", None),
    Row("bos", "bos", None),
    _norm("norm", "norm", None),
    Row("norm/bias", "norm.bias", None),
)
BY_PATH = {row.ours: row for row in ROWS}
STUDENT_PARTS = ("etm", "sdd", "sdd_context")

_PARALLEL = re.compile(r"(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?=\.)")
# What every model here has once, and what stands in front of it; the second where a file lacks the first.
_OF_A_MODEL = tuple(
    re.compile(rf"((?:[^.]+\.)*?)(?:(?:{'|'.join(STUDENT_PARTS)})\.)?{name}\.weight")
    for name in (r"patch_embedding", r"blocks\.0\.(?:self_attn\.q|attn1\.to_q)")
)


def plain(name: str) -> str:
    """The name without what FSDP, checkpointing and `torch.compile` add to it, anywhere."""
    return _PARALLEL.sub("", name).lstrip(".")


def wrappers(names: Iterable[str]) -> list[str]:
    """What stands in front of the models that plain names belong to, such as "model.diffusion_model."; "" is nothing.

    Empty for names of something else than a Wan DiT or a student.
    """
    names = list(names)
    for pattern in _OF_A_MODEL:
        if found := dict.fromkeys(match[1] for name in names if (match := pattern.fullmatch(name))):
            return list(found)
    return []


def naming_of(names: Iterable[str]) -> str | None:
    """ "original", "diffusers" or "student", by the (clean) tensor names; None for something else."""
    names = set(names)
    if any(name.partition(".")[0] in STUDENT_PARTS for name in names):
        return "student"
    if any(name.startswith("condition_embedder.") or ".attn1." in name for name in names):
        return "diffusers"
    if any(name.startswith(("text_embedding.", "time_projection.")) or ".self_attn." in name for name in names):
        return "original"
    return None


def split_path(path: str) -> tuple[str, Row]:
    """("" or "etm." and the like, row) of a leaf of our tree; KeyError for a leaf without a row."""
    part, slash, rest = path.partition("/")
    if slash and part in STUDENT_PARTS:
        return part + ".", BY_PATH[rest]
    return "", BY_PATH[path]


def foreign_names(path: str, shape: tuple[int, ...], naming: str) -> list[str]:
    """The names, one per layer for a stacked leaf, under which a leaf of ours is stored."""
    prefix, row = split_path(path)
    template = row.diffusers if naming == "diffusers" else row.original
    if template is None:
        raise KeyError(path)
    return [prefix + template.format(i) for i in range(shape[0])] if row.stacked else [prefix + template]


def layer_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one layer of a leaf of ours."""
    return shape[1:] if split_path(path)[1].stacked else shape


def foreign_shape(path: str, shape: tuple[int, ...], *, patch: int) -> tuple[int, ...]:
    """Shape of the foreign tensor(s) of a leaf of ours; ``patch`` is the side of a patch."""
    one, kind = layer_shape(path, shape), split_path(path)[1].kind
    if kind == LINEAR:
        return one[::-1]
    if kind == TABLE:
        return (1, *one)
    if kind == PATCH:
        return (one[1], one[0] // patch**2, 1, patch, patch)
    return one


Index = tuple[slice, ...]


def foreign_index(path: str, index: Index) -> Index:
    """What to read of the foreign tensor for a slice of one layer of ours (more than needed for a patch)."""
    kind = split_path(path)[1].kind
    if kind == LINEAR:
        return index[::-1]
    if kind == TABLE:
        return (slice(None), *index)
    if kind == PATCH:
        return (index[1], slice(None), slice(None), slice(None), slice(None))
    return index


def from_foreign(path: str, value: np.ndarray, index: Index) -> np.ndarray:
    """The slice of one layer of ours out of what ``foreign_index`` read."""
    kind = split_path(path)[1].kind
    if kind == LINEAR:
        return value.T
    if kind == TABLE:
        return value[0]
    if kind == PATCH:
        return value[:, :, 0].transpose(2, 3, 1, 0).reshape(-1, value.shape[0])[index[0]]
    return value


def to_foreign(path: str, value: np.ndarray, *, patch: int) -> np.ndarray:
    """The foreign tensor of one whole layer of ours, contiguous."""
    kind = split_path(path)[1].kind
    if kind == LINEAR:
        value = value.T
    elif kind == TABLE:
        value = value[None]
    elif kind == PATCH:
        value = value.reshape(patch, patch, -1, value.shape[-1]).transpose(3, 2, 0, 1)[:, :, None]
    return np.ascontiguousarray(value)
