"""Whether a job that was compiled is the published one: a benchmark or a test that shrank it to make it fit fails here.

Sizes of Wan2.1 are those of its checkpoints (docs/method.md, section 2.1); video and text are 480p as trained there:
81 frames of 832 x 480, which are 21 latent frames of 60 x 104, and 512 rows of text.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Size(NamedTuple):
    """Of one of Wan's networks, and of a student of two halves of it (ETM and SDD share no parameters).

    ``factors``: numbers of an adapter of that student: q, k, v and o of both attentions, up and down, of rank 256.
    ``clip``: latent frames that a group's streams make apart in stage "rl".
    """

    layers: int
    width: int
    parameters: int
    student: int
    factors: int
    clip: int


SIZES = {
    "wan1_3b": Size(30, 1536, 1_418_996_800, 1_515_523_648, 349_962_240, 21),
    "wan14b": Size(40, 5120, 14_288_491_584, 15_569_771_584, 1_226_833_920, 4),
}
STEPS = {
    "teacher": ("teacher",),
    "teacher_forcing": ("teacher_forcing", "stream"),
    "dmd": ("dmd", "critic", "stream"),
    "rl": ("rollout", "rl", "stream"),
}
EPISODE = {"group": 8, "frames": 84}  # of stage "rl": streams per prompt, latent frames of the longest


def steps(stage: str, critic: bool) -> list[str]:
    """Of a job of this stage, with a critic or without."""
    return [step for step in STEPS[stage] if step != "critic" or critic]


def differences(
    record: Mapping[str, Any],
    *,
    stage: str,
    size: str,
    teacher: str = "",
    student: str = "etm_sdd",
    critic: bool = True,
    batch: int = 64,
    only: str = "",
) -> list[str]:
    """Returns what of a record of ``pods.report.report`` is not as published, a line each; [] is the whole job.

    Args:
      stage: of training.
      size: of the student (in stage "teacher": of the teacher), a key of ``SIZES``.
      teacher: of the frozen teacher of stage "dmd", with whose guidance two branches are computed.
      student: "etm_sdd", halves of a DiT, or "causal", a whole one.
      critic: whether stage "dmd" has one, of the student's size; else the student is its own fake score.
      batch: global; in stage "rl" of prompts, where the student is held near a reference, itself at the start.
      only: as given to the command.
    """
    facts, own = record["facts"], SIZES[size]
    streaming, dmd = stage != "teacher", stage == "dmd"
    whole, half = {"": [own.layers, own.width]}, [own.layers // 2, own.width]
    halves, critic = streaming and student == "etm_sdd", dmd and critic
    stacks = {"trained": {"etm": half, "sdd": half} if halves else whole, "critic": whole if critic else {}}
    if stage == "rl":
        stacks["reference"] = stacks["trained"]
    if dmd:
        stacks["teacher"] = {"": [SIZES[teacher].layers, SIZES[teacher].width]}
    count = own.student if halves else own.parameters
    wanted = {
        "stage": stage,
        "steps": [step for step in steps(stage, critic) if only in step],
        "frames": 21,
        "latents": "60x104",
        "channels": 16,
        "tokens_per_frame": 1560,
        "tokens": 32_760,
        "text_rows": 512,
        "networks": stacks,
        "parameters": count,
        "ema_parameters": count,
        "teacher_parameters": SIZES[teacher].parameters if dmd else 0,
        "critic_parameters": own.parameters if critic else 0,
        "cfg_branches": 2 if dmd else 1,
        "batch": batch,
        "dtype": "bfloat16",
        "episode": EPISODE | {"clip": own.clip} if stage == "rl" else None,
    }
    found = [f"{key} is {facts.get(key)}, not {value}" for key, value in wanted.items() if facts.get(key) != value]
    kept = 3 * own.factors if stage == "rl" else 2 * count  # an adapter and two moments of it; two moments
    if facts["optimizer_parameters"] < kept:
        found.append(f"the optimiser keeps {facts['optimizer_parameters']} numbers, not {kept}")
    groups = facts["mesh"]["data"] * facts["mesh"]["fsdp"]
    if facts["accumulate"] * facts["microbatch_per_group"] * groups != batch:
        found.append(f"microbatches do not add up to the batch of {batch}")
    if streaming and (streams := facts.get("streams", {})).get("latents") != "60x104":
        found.append(f"streams are {streams}, not of 60x104 latents")
    if [step["step"] for step in record["steps"]] != wanted["steps"] or record["only"] != only:
        found.append(f"compiled were {[step['step'] for step in record['steps']]}, with --only={record['only']!r}")
    for step in record["steps"]:
        if step["collectives"] and not step["collectives"]["kernels"]["runs"]:
            found.append(f"{step['step']} computes attention by {step['attention']}, without a kernel")
    return found
