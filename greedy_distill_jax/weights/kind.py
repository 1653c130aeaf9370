"""What a Wan DiT was trained to be, a bidirectional teacher or a causal student: their tensors are the same."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.config import CausalConfig
from greedy_distill_jax.models.wan.config import WanConfig

KINDS = ("teacher", "causal")
# Key of a causal model's config.json -> field; a window of -1 is the whole history.
CAUSAL_KEYS = {"num_frame_per_block": "chunk", "local_attn_size": "window", "sink_size": "sink"}
# What no published file says: kept under our own names, so that a student is the same after it went out and back.
OWN_KEYS = ("rope_mode", "recache", "recache_of", "global_sink")
# Where nothing says it: Self-Forcing's, chunks of 3 latent frames that see the whole video of 21.
_CHUNK, _WINDOW, _SINK, _FRAMES = 3, 0, 0, 21


def causal_json(cfg: CausalConfig) -> dict[str, Any]:
    """What a causal model's config.json says besides the sizes."""
    said = {theirs: getattr(cfg, ours) for theirs, ours in CAUSAL_KEYS.items()}
    return said | {"local_attn_size": cfg.window or -1} | {name: getattr(cfg, name) for name in OWN_KEYS}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the user says of a model where its file cannot; None, or "", for what the file says or is usual.

    Attributes:
      kind: one of `KINDS`.
      chunk, window, sink: of a causal student, in latent frames, see `CausalConfig`.
    """

    kind: str = ""
    chunk: int | None = None
    window: int | None = None
    sink: int | None = None

    @property
    def frames(self) -> dict[str, int]:
        """Those of chunk, window and sink that are given."""
        fields = {name: getattr(self, name) for name in ("chunk", "window", "sink")}
        return {name: value for name, value in fields.items() if value is not None}


def check_asked(path: Path, asked: Asked, held: object) -> None:
    """Raises UserError where a model that says itself what it is says something else than is asked for."""
    kind = "causal" if isinstance(held, CausalConfig) else "teacher" if isinstance(held, WanConfig) else "student"
    for name, given in {"kind": asked.kind, **asked.frames}.items():
        says = kind if name == "kind" else getattr(held, name, "no such thing")
        if given not in ("", says):
            raise UserError(f"{given} is given, but {path} itself says {says}; leave it out.", name)


def with_kind(
    path: Path, wan: WanConfig, asked: Asked, *, part: str, wrapper: str, config: Mapping[str, Any]
) -> tuple[WanConfig | CausalConfig, str]:
    """The architecture of a file whose tensors are a Wan DiT's.

    Args:
      path: what the user named.
      wan: the sizes.
      asked: by the user, which counts most.
      part, wrapper: of `TensorFiles`.
      config: the config.json beside it, {} without one.

    Returns:
      (architecture, what it was chosen by).

    Raises:
      UserError: an unknown kind, frames for a teacher, or frames that do not belong together.
    """
    if asked.kind not in ("", *KINDS):
        raise UserError(f"kind {asked.kind!r} is unknown; choose from {', '.join(KINDS)}.", "kind")
    kind, why = (asked.kind, "as asked for") if asked.kind else _said(part, wrapper, config)
    if kind == "teacher":
        if asked.frames:
            name = next(iter(asked.frames))
            raise UserError(
                f"{asked.frames[name]} is given, but {path} is taken as a teacher ({why}); choose kind causal.", name
            )
        return wan, why
    if config.get("independent_first_frame"):
        raise UserError(
            f"{path}: its config.json has independent_first_frame, a first chunk of one frame; all chunks of a causal "
            f"student here have the same size, so its videos would not be those it was trained for.",
            "kind",
        )
    said = {ours: config[theirs] for theirs, ours in CAUSAL_KEYS.items() if theirs in config}
    fields = {"chunk": _CHUNK, "window": _WINDOW, "sink": _SINK} | said | asked.frames
    if fields["window"] == -1:
        fields["window"] = 0
    if assumed := [name for name in ("chunk", "window", "sink") if name not in said | asked.frames]:
        why += f"; {', '.join(f'{name} {fields[name]}' for name in assumed)} assumed, as Self-Forcing has it"
    try:
        # A student with a sink is of LongLive's kind, which recomputes keys at a prompt switch.
        longlive = dict(recache=True, recache_of="window") if fields["sink"] else {}
        own = {name: config[name] for name in OWN_KEYS if name in config}
        return CausalConfig(wan, **fields, max_frames=_FRAMES, **{**longlive, **own}), why
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}", "window") from error


def _said(part: str, wrapper: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """(kind, why) as far as a file tells."""

    def place(wanted: str) -> str:
        """Where the file calls the model that, in words; "" where it does not."""
        for told, names in ((f"part {part}", part), (f"wrapper {wrapper}", wrapper)):
            if any(name.startswith(wanted) for name in names.split(".")):
                return told
        return ""

    if told := place("critic"):
        return "teacher", f"the {told} is a critic, which sees all frames"
    keys = [key for key in CAUSAL_KEYS if key in config]
    if keys or str(config.get("_class_name", "")).startswith("Causal"):
        return "causal", f"config.json has {keys[0] if keys else config['_class_name']}"
    if told := place("generator"):
        return "causal", f"the {told} is a generator"
    return "teacher", "nothing in it says that it is causal"
