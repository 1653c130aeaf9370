"""Lengths of a stream: frames of video, latent frames and chunks. Plain arithmetic, imports nothing heavy."""

import dataclasses
import math
from collections.abc import Iterable

from greedy_distill_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Timeline:
    """How many latent frames a video has, and of how many chunks.

    Attributes:
      stride: frames of video per latent frame after the first, which is one frame (``VideoCodec.temporal_stride``).
      chunk: latent frames that are made together: a student's chunk, 1 where any number can be made.
    """

    stride: int
    chunk: int = 1

    def latent_frames(self, frames: int, field: str = "frames") -> int:
        """Latent frames of a video of ``frames`` frames.

        Args:
          frames: of video.
          field: the argument that an error is about.

        Raises:
          UserError: no whole number of latent frames or of chunks.
        """
        if frames < 1 or (frames - 1) % self.stride:
            near = 1 + max(frames - 1, 0) // self.stride * self.stride
            raise UserError(
                f"{frames} frames do not fit the codec, which makes 1 + {self.stride} k of them; choose {near} or "
                f"{near + self.stride}",
                field,
            )
        count = 1 + (frames - 1) // self.stride
        if count % self.chunk:
            near = [self.video_frames(n) for n in (count - self.chunk, count) if n > 0]
            raise UserError(
                f"{frames} frames do not fit the student's chunk of {self.chunk} latent frames; choose "
                f"{' or '.join(map(str, near))}",
                field,
            )
        return count

    def video_frames(self, latent_frames: int) -> int:
        """Frames of the shortest video of whole chunks with at least so many latent frames."""
        return 1 + (math.ceil(latent_frames / self.chunk) * self.chunk - 1) * self.stride

    def fill(self, frames: int) -> int:
        """Frames of the shortest video of whole chunks with at least so many frames."""
        return self.video_frames(1 + math.ceil((frames - 1) / self.stride))


def check_switches(switches: Iterable[int], frames: int) -> None:
    """Raises UserError (field "switches") for a new prompt at a frame that the video does not have.

    Args:
      switches: frames of video from which a new prompt holds.
      frames: of the video.
    """
    for frame in switches:
        if frames < 2:
            raise UserError(f"a video of {frames} frame has nothing to switch at frame {frame}; make more", "switches")
        if not 0 < frame < frames:
            remedy = f", or make more than {frame}" if frame else ", or change the first prompt"
            raise UserError(
                f"frame {frame} lies outside the video of {frames} frames; choose 1 to {frames - 1}{remedy}", "switches"
            )
