"""Configuration and tokenizer of a small Show-o in the shapes world: the family's own classes at a small size."""

from __future__ import annotations

from dataclasses import asdict

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPVisionConfig, PhiConfig, PreTrainedTokenizerFast

from stages.families.show_o.layout import add_special_tokens
from stages.families.show_o.magvit import Geometry
from stages.families.show_o.model import ShowOConfig
from stages.shapes.scenes import GRID
from stages.shapes.tiny_janus import vocabulary as words_of_the_world

TEXT_END, UNKNOWN = "<|endoftext|>", "<unk>"
# 128 codes for the 109 tiles of the world, and one code for each tile of 16 x 16 pixels, as upstream's.
VQ = Geometry(
    channels=32,
    bits=7,
    encoder_widths=(1, 1, 1, 1, 1),
    encoder_blocks=(0, 1, 1, 1, 1),  # without blocks, what is between the levels would be linear
    decoder_widths=(1, 1, 1, 1, 1),
    decoder_blocks=(1, 1, 1, 1, 1),
)


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer, in the place of Phi's."""
    words = [TEXT_END, UNKNOWN, "user", "assistant", *(word for word in words_of_the_world() if not word.startswith("<"))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=TEXT_END, eos_token=TEXT_END, unk_token=UNKNOWN)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer with Show-o's special tokens."""
    tokenizer = text_tokenizer()
    add_special_tokens(tokenizer)
    return tokenizer


def make_config(
    tokenizer: PreTrainedTokenizerFast, hidden: int = 192, layers: int = 6, vision: CLIPVisionConfig | None = None
) -> ShowOConfig:
    """Return the configuration for a tokenizer: 2.4 million parameters by default."""
    text = PhiConfig(
        vocab_size=len(tokenizer) + 2**VQ.bits + 1,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=256,
        qk_layernorm=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return ShowOConfig(
        text_config=text, vision_config=vision, vq_config=asdict(VQ), image_tokens=GRID * GRID, max_text_tokens=32
    )
