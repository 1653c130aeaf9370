"""Tiny model folders in the layout of diffusers, written by transformers and diffusers themselves."""

import os
from pathlib import Path

WORDS = ("a", "red", "blue", "square", "circle", "moving", "left", "right", "worst", "quality", "&")
TEXT_DIM = 12


def tokenizer():
    """A word tokenizer with T5's habits: pads with <pad>, ends with </s>."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    words = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def text_encoder(seed: int = 0):
    """A random UMT5 encoder of two layers in float32."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(WORDS) + 3,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=20,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = UMT5EncoderModel(config).eval()
    with torch.no_grad():  # the initialisation is so small that a wrong row would hide in the tolerance
        for name, parameter in model.named_parameters():
            if not name.endswith("layer_norm.weight"):
                parameter.normal_(std=1.0 if "shared" in name else 0.3)
    return model


def write_text_folder(folder: str | os.PathLike, seed: int = 0) -> Path:
    """A folder with `tokenizer/` and `text_encoder/` alone."""
    folder = Path(folder)
    tokenizer().save_pretrained(folder / "tokenizer")
    text_encoder(seed).save_pretrained(folder / "text_encoder")
    return folder


def pipeline(*, vae: bool = True, channels: int = 16, shift: float = 3.0, seed: int = 0):
    """A random `WanPipeline`: text encoder, transformer of two layers, UniPC, and an autoencoder if asked for."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=40,
        num_layers=2,
        rope_max_seq_len=64,
    )
    decoder = None
    if vae:
        decoder = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    pipe = diffusers.WanPipeline(tokenizer(), text_encoder(seed), decoder, scheduler, transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe
