"""How a stream denoises: the noise levels of every chunk's steps, and the level at which its context is kept.

Few-step students take more steps where the history is short: 4, 3, 2, 2, ... evaluations for chunk 0, 1, 2, 3, ...
(Diagonal Distillation, arXiv 2603.09488). Later chunks look at a finished one as it is, or noised to a level again and
the network told that level, which keeps its own errors out of its context.
"""

import dataclasses
import itertools
import numbers
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float32, Int, Int32

from greedy_distill_jax.diffusion.noise_levels import shift_sigma, uniform_steps
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Steps, allowed, complaint

SAMPLERS = ("euler", "renoise")
# Diagonal Distillation's lists by their lengths, before the shift. With shift 5 those of 2, 3 and 4 steps are the
# published ones, t = 1000, 357; 1000, 933, 357; 1000, 933, 833, 357. For 5 steps none is published.
DIAGONAL = {2: (1.0, 0.1), 3: (1.0, 14 / 19, 0.1), 4: (1.0, 14 / 19, 0.5, 0.1), 5: (1.0, 14 / 19, 0.5, 0.25, 0.1)}


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The denoising steps and the context level of every chunk; equal plans are equal streams.

    Attributes:
      sigmas: per chunk the decreasing noise levels of its steps, from 1, pure noise, on; chunk i takes list
        min(i, last).
      sampler: "euler" follows the flow ODE; "renoise" predicts x0 and adds fresh noise (few-step students).
      context_sigmas: per chunk the noise level, in [0, 1), at which it is kept once it is finished; the last one
        repeats. 0 keeps it clean.

    Raises:
      UserError: an empty list, levels that do not decrease or leave their range, or an unknown sampler.
    """

    sigmas: tuple[tuple[float, ...], ...]
    sampler: str = "euler"
    context_sigmas: tuple[float, ...] = (0.0,)

    def __post_init__(self):
        lists = _without_repeats(tuple(float(sigma) for sigma in row) for row in self.sigmas)
        contexts = _without_repeats(float(sigma) for sigma in self.context_sigmas)
        object.__setattr__(self, "sigmas", lists)
        object.__setattr__(self, "context_sigmas", contexts)
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler {self.sampler!r} is unknown; choose from {', '.join(SAMPLERS)}", field="sampler")
        if not lists:
            raise UserError("there are no steps; give at least one list of noise levels", field="steps")
        for chunk, row in enumerate(lists):
            falls = all(a > b for a, b in itertools.pairwise(row))
            if not row or not falls or row[-1] <= 0 or row[0] != 1:
                raise UserError(
                    f"the steps of chunk {chunk} are {list(row)}; give noise levels that decrease from 1, the pure "
                    f"noise that a chunk begins as, and stay above 0",
                    field="steps",
                )
        wrong = [sigma for sigma in contexts if not 0 <= sigma < 1]
        if wrong or not contexts:
            raise UserError(
                f"the context's noise level is {wrong[0] if wrong else 'missing'}; give one from 0 (clean) to below 1",
                field="context_sigma",
            )

        for chunk in range(max(len(lists), len(contexts))):
            kept, end = contexts[min(chunk, len(contexts) - 1)], self.steps_of(chunk)[-1]
            if kept > end:
                raise UserError(
                    f"chunk {chunk} is kept at noise level {kept:g}, above {end:g}, the level of its last step, the "
                    f"lowest that the network sees; give at most that level",
                    field="context_sigma",
                )

    @classmethod
    def parse(cls, steps: Any, *, shift: float, sampler: str = "euler", context_sigma: Any = 0.0) -> "StepPlan":
        """A plan from the values that configurations and command lines hold.

        Args:
          steps: one entry for all chunks, or one per chunk, of which the last repeats: a number of steps, or a list of
            noise levels. As text, entries are separated by commas and levels by slashes: "4,3,2" or "1/.93/.36,1/.36".
            "diagonal-4322222" has the lists of ``DIAGONAL`` by their lengths.
          shift: of the levels where a number of steps or a diagonal is given, see ``noise_levels.uniform_steps``.
          sampler: as the attribute.
          context_sigma: one level for all chunks but the first, which stays clean, or a level per chunk.

        Raises:
          UserError: as the class, or a value that cannot be read.
        """
        if isinstance(steps, str) and steps.startswith("diagonal"):
            steps = _diagonal(steps, shift)
        entries = steps.split(",") if isinstance(steps, str) else steps if _is_list(steps) else [steps]
        lists = [_levels(entry, shift) for entry in entries]
        contexts = context_sigma if _is_list(context_sigma) else (0.0, context_sigma)
        if not all(isinstance(sigma, numbers.Real) for sigma in contexts):
            raise UserError(
                f"the context's noise level is {context_sigma!r}; give a number, or one per chunk",
                field="context_sigma",
            )
        return cls(tuple(lists), sampler, tuple(contexts))

    def values(self, shift: float) -> dict[str, Any]:
        """Arguments from which ``parse`` makes this plan: numbers of steps where ``shift`` gives the levels."""
        entries = tuple(len(row) if row == uniform_steps(len(row), shift) else row for row in self.sigmas)
        steps = entries[0] if len(entries) == 1 and isinstance(entries[0], int) else entries
        context = 0.0 if self.keeps_clean else self.context_sigmas
        return {"steps": steps, "sampler": self.sampler, "context_sigma": context}

    @property
    def lengths(self) -> Int32[np.ndarray, " lists"]:
        """Number of steps of every list, int32."""
        return np.asarray([len(row) for row in self.sigmas], np.int32)

    @property
    def ends(self) -> Int32[np.ndarray, " lists"]:
        """Number of the last step of every list, int32."""
        return self.lengths - 1

    @property
    def table(self) -> Float32[np.ndarray, "lists _"]:
        """Noise levels [lists, longest + 1], float32; every row ends in zeros."""
        table = np.zeros((len(self.sigmas), int(self.lengths.max()) + 1), np.float32)
        for i, row in enumerate(self.sigmas):
            table[i, : len(row)] = row
        return table

    @property
    def keeps_clean(self) -> bool:
        """Whether every finished chunk is kept as it is."""
        return self.context_sigmas == (0.0,)

    def steps_of(self, chunk: int) -> tuple[float, ...]:
        """The noise levels of one chunk's steps."""
        return self.sigmas[min(chunk, len(self.sigmas) - 1)]

    def last_sigmas(self, chunks: int) -> Float32[np.ndarray, " chunks"]:
        """Noise level of the last step of each of the first ``chunks`` chunks, float32."""
        return np.asarray([self.steps_of(i)[-1] for i in range(chunks)], np.float32)

    def context_sigma(self, index: Int[ArrayLike, "*shape"]) -> Float32[Array, "*shape"]:
        """Noise level at which chunk ``index`` (int or traced, or an array of them) is kept, float32."""
        levels = jnp.asarray(self.context_sigmas, jnp.float32)
        return levels[jnp.minimum(index, len(self.context_sigmas) - 1)]

    def check_context(self, mode: str) -> None:
        """Raises UserError where a student's context mode leaves no level to choose: the last step's keys have its."""
        if mode == "last_step_kv" and not self.keeps_clean:
            raise UserError(
                f"the context's noise level is {max(self.context_sigmas)}, but context 'last_step_kv' keeps the keys "
                "of the last step at its own level; set it to 0 or choose another context",
                field="context_sigma",
            )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _diagonal(name: str, shift: float) -> list[tuple[float, ...]]:
    digits = name.removeprefix("diagonal-")
    if digits == name or not digits or set(digits) - {str(n) for n in DIAGONAL}:
        raise UserError(
            f"the steps are {name!r}; give the number of steps of every chunk, {min(DIAGONAL)} to {max(DIAGONAL)}, "
            f"such as diagonal-4322222",
            field="steps",
        )
    return [(1.0, *(float(shift_sigma(raw, shift)) for raw in DIAGONAL[int(n)][1:])) for n in digits]


def _levels(entry: Any, shift: float) -> tuple[float, ...]:
    """Noise levels of one chunk's entry, see ``StepPlan.parse``."""
    try:
        if isinstance(entry, str):
            entry = [float(part) for part in entry.split("/")] if set(entry) & set("/.") else int(entry)
        if _is_list(entry):
            return tuple(float(sigma) for sigma in entry)
        if not complaint(entry, Steps):
            return uniform_steps(int(entry), shift)
    except (TypeError, ValueError) as error:
        raise UserError(f"the steps of a chunk are {entry!r} ({error}); {_FORMS}", field="steps") from error
    raise UserError(f"the steps of a chunk are {entry!r}; {_FORMS}", field="steps")


_FORMS = f"give a number {allowed(Steps)}, or noise levels such as 1/.93/.36"


def _without_repeats(values) -> tuple:
    """``values`` without the entries at the end that repeat the one before them."""
    values = list(values)
    while len(values) > 1 and values[-1] == values[-2]:
        values.pop()
    return tuple(values)
