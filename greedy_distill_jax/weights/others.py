"""What is no Wan2.1 text-to-video model, named as what it is before anything is read of it."""

import re
from collections.abc import Mapping
from pathlib import Path

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.files import AGAIN, Entry, listed

_LFS, _GGUF = b"version https://git-lfs.github.com/spec/v1", b"GGUF"
# (names of tensors, whose they are); the first that fits counts.
_VARIANTS = (
    (r"(^|\.)vace_(blocks|patch_embedding)", "VACE"),
    (r"(^|\.)(control_adapter|ref_conv)\.", "camera control or Fun control"),
    (r"(^|\.)(casual_audio_encoder|audio_injector|audio_proj|audio_model)\b", "speech-to-video"),
    (r"(^|\.)(face_adapter|motion_encoder|face_encoder|pose_patch_embedding)\.", "Wan2.2 Animate"),
    (r"(^|\.)(fps_embedding|fps_projection)\.", "SkyReels-V2 (which is told a frame rate)"),
    (r"(^|\.)(k_img|v_img|img_emb|add_k_proj|add_v_proj|image_embedder)\.", "image-to-video"),
)
_COMPONENTS = (
    (r"(decoder|encoder)\.(conv_in|conv1|middle|mid_block)\b", "those of a video autoencoder; name it as a codec"),
    (r"(shared|token_embedding)\.weight|encoder\.block\.\d+\.layer\.", "those of a text encoder; name it as one"),
    (r"visual\.|vision_model\.", "those of an image encoder, which text-to-video models do not have"),
)
_EXPERT = re.compile(r"(high|low)[_-]?noise", re.IGNORECASE)
_PAIRS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
_TWO_CHANNELS_OF = 48  # latent channels of Wan2.2's own autoencoder


def check_file(file: Path) -> None:
    """Raises UserError for a file that cannot be read, or holds no tensors that are: GGUF, a pointer of Git LFS."""
    try:
        with open(file, "rb") as opened:
            begin = opened.read(256)
    except OSError as error:  # a link to nothing, a folder of that name, another user's
        raise UserError(
            f"{file} cannot be read ({error.strerror or error}); make it readable, or {AGAIN}.", "path"
        ) from error
    if begin.startswith(_LFS):
        size = re.search(rb"size (\d+)", begin)
        told = f" to {int(size[1]):,} bytes" if size else ""
        raise UserError(f"{file} is a pointer of Git LFS{told}, not the file; fetch it: git lfs pull.", "path")
    if begin.startswith(_GGUF) or file.suffix == ".gguf":
        raise UserError(
            f"{file} is a GGUF file, whose quantised weights are not read; use the safetensors it was made of.", "path"
        )


def check_folder(folder: Path) -> None:
    """Raises UserError for a folder that holds a checkpoint of torch.distributed, or two experts, or is one of them."""
    if (folder / ".metadata").is_file() and any(folder.glob("*.distcp")):
        raise UserError(
            f"{folder} is a checkpoint of torch.distributed (DCP), whose index is a pickle that could run code; where "
            f"you trust it, make one file of it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{folder} model.pt.",
            "path",
        )
    _check_pairs(folder)
    check_expert(folder)


def check_expert(folder: Path) -> None:
    """Raises UserError for the folder of one of two experts; a folder around them may hold other files of its own."""
    folder = folder.absolute()
    if any(folder.name in pair for pair in _PAIRS):
        _check_pairs(folder.parent)


def _check_pairs(place: Path) -> None:
    for pair in _PAIRS:
        if all((place / name).is_dir() for name in pair):
            raise _two_experts(f"{place} holds the two experts of a Wan2.2 model, {' and '.join(pair)}")


def check_model(path: Path, entries: Mapping[str, Entry]) -> None:
    """Raises UserError for tensors of a Wan DiT that is no text-to-video model of Wan2.1."""
    for pattern, title in _VARIANTS:
        if name := next((name for name in entries if re.search(pattern, name)), ""):
            raise UserError(
                f"{path} holds {title} weights (tensor {entries[name].stored_name}); use a text-to-video model.", "path"
            )
    patch, head = entries.get("patch_embedding.weight"), entries.get("head.head.weight", entries.get("proj_out.weight"))
    if patch and head and len(patch.shape) == 5 and head.shape:
        takes, makes = patch.shape[1], head.shape[0] // (patch.shape[3] * patch.shape[4])
        if takes != makes:
            raise UserError(
                f"{path} takes {takes} channels and makes {makes}, as image-to-video, inpainting and control models "
                "do; use a text-to-video model.",
                "path",
            )
        if takes == _TWO_CHANNELS_OF:
            raise UserError(
                f"{path} holds Wan2.2 TI2V-5B weights ({takes} latent channels, of Wan2.2's own autoencoder, which is "
                "not known here); use a Wan2.1 text-to-video model.",
                "path",
            )
    # A file in the cache of Hugging Face is a link to one whose name is a sum.
    pieces = (*path.absolute().parts[-2:], *path.resolve().parts[-2:])
    if found := next((piece for piece in pieces if _EXPERT.search(piece)), ""):
        raise _two_experts(f"{path} is, by its name {found} (rename it if it is not), one of two experts of Wan2.2")


def _two_experts(told: str) -> UserError:
    return UserError(
        f"{told}, of which each makes a part of the denoising and none is a model alone; use a Wan2.1 text-to-video "
        "model.",
        "path",
    )


def unknown(path: Path, entries: Mapping[str, Entry]) -> UserError:
    """The error for tensors that are none of a DiT or a student."""
    some, kind = listed(sorted(entries), 2) or "none", "not those of a Wan DiT or of a student"
    for pattern, title in _COMPONENTS:
        kind = title if any(re.match(pattern, name) for name in entries) else kind
    return UserError(f"{path}: its tensors ({some}) are {kind}.", "path")
