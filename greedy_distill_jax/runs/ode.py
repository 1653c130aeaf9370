"""Trajectories of a trained run's or a model folder's ODE, at the noise levels of a student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from greedy_distill_jax import ranges
from greedy_distill_jax.data.sources.trajectories import write_trajectories
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Count, Steps
from greedy_distill_jax.runs.model_folder import load_model_folder
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.records import fingerprint_files
from greedy_distill_jax.text.prompts import read_prompts

_MOST_IN_MEMORY = 128  # prompts; one has 8 MiB of rows at Wan's size
_MODEL_GUIDANCE = 6.0  # with which the published trajectories of Wan2.1 were made


def follow_teacher(
    prompts: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    sigmas: tuple[float, ...],
    shift: float,
    teacher: str | os.PathLike | None = None,
    model: str | os.PathLike | None = None,
    text: str | None = None,
    steps: int = 48,
    guidance: float | None = None,
    negative: str | None = None,
    width: int = 832,
    height: int = 480,
    frames: int = 81,
    **options: Any,
) -> dict[str, Any] | None:
    """Stores what a teacher makes of noise, with the states at every noise level of a student.

    Args:
      prompts: file of conditions, see `read_prompts`.
      directory: folder to write.
      sigmas: the student's noise levels, decreasing from 1.
      shift: of the noise levels between them.
      teacher: run directory of a teacher; or
      model: a model folder in the layout of diffusers.
      text: text store or model folder that encodes the prompts instead.
      steps: evaluations of a trajectory.
      guidance: scale; None for the teacher run's, with a model folder 6.
      negative: prompt of the unconditional branch; None for the teacher run's, with a model folder Wan2.1's own.
      width, height, frames: of the videos in pixels, with a model folder.
      options: of `write_trajectories`.

    Returns:
      What dataset.json holds; None if other processes have not finished.

    Raises:
      UserError: prompts, a teacher or a text encoder that cannot be used, or a folder that cannot be written.
    """
    ranges.check(steps, Steps, "steps")
    ranges.check(frames, Count, "frames")
    conditions = read_prompts(prompts)
    if teacher is not None:
        run = _of_run(teacher, text)
        source = f"run of {run.meta['data_position']} examples ({run.fingerprint})"
    else:
        if not text and len(conditions) > _MOST_IN_MEMORY:
            raise UserError(
                f"{prompts} holds {len(conditions)} prompts, whose rows do not fit into memory; encode them with "
                "python -m greedy_distill_jax.prepare text, and name the store as the text encoder",
                field="prompts",
            )
        run = _of_folder(model, conditions, height=height, width=width, frames=frames, negative=negative, text=text)
        guidance = _MODEL_GUIDANCE if guidance is None else guidance
        parts = (Path(model).expanduser() / part for part in ("transformer", "vae"))
        files = sorted(file for part in parts for file in part.rglob("*") if file.is_file())
        source = f"model folder {fingerprint_files(files)}"
    run.check_words(conditions)
    sampler = run.teacher_sampler(steps=steps, shift=shift, guidance=guidance, negative_prompt=negative)
    return write_trajectories(
        conditions,
        directory,
        lambda noise, rows: sampler.trajectories(noise, rows, sigmas),
        run.encoder,
        run.codec,
        sigmas=sigmas,
        latent_shape=run.latent_shape,
        plan={
            "teacher": source,
            "text": getattr(run.encoder, "fingerprint", None),
            "steps": steps,
            "shift": shift,
            "guidance": sampler.guidance,
            "negative": run.settings.data.negative_prompt if negative is None else negative,
        },
        **options,
    )


def _of_run(teacher: str | os.PathLike, text: str | None) -> Run:
    try:
        run = Run.load(teacher, text=text)
    except UserError as error:  # what is not about the text encoder is about the run
        raise UserError(str(error), "text" if error.field == "text" else "teacher") from error
    if run.is_student:
        raise UserError(f"{teacher} holds a student; name the run of a teacher", "teacher")
    return run


def _of_folder(model: str | os.PathLike, prompts: list[str], **options: Any) -> Run:
    try:
        return load_model_folder(model, prompts, **options)
    except UserError as error:
        raise UserError(str(error), "model" if error.field == "folder" else error.field) from error
