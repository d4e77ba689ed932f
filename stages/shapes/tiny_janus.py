"""Configuration and processor of the tiny model: transformers' own Janus classes at a small size."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    JanusConfig,
    JanusImageProcessorPil,
    JanusProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from stages.families.janus.family import CHAT_TEMPLATE
from stages.shapes.grammar import NUMBERS, RELATIONS
from stages.shapes.scenes import CELL, COLOR_NAMES, GRID, SHAPES, SIZE, TEXTURES

QUESTION = "does this image show {prompt} ?"
CAPTION = "what does this image show ?"
PLACE = "where is the {phrase} ?"
CODES = 128
SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
ROLES = ("<|User|>", "<|Assistant|>")


def vocabulary() -> list[str]:
    words = [
        *SPECIAL.values(),
        *ROLES,
        *[":", "?", ".", ",", "0", "1", "yes", "no", "and", "a", "an"],
        *[word for relation in RELATIONS for word in relation.split()],
        *[word for word in NUMBERS.values()],
        *SHAPES,
        *[shape + ("es" if shape == "cross" else "s") for shape in SHAPES],
        *COLOR_NAMES,
        *TEXTURES,
        *QUESTION.format(prompt="").split(),
        *CAPTION.split(),
        *["the", "score", "is", "of", "image", "picture"],
        *PLACE.format(phrase="").split(),
        "same",
    ]
    return list(dict.fromkeys(words))


def make_processor(image_size: int = SIZE, image_tokens: int = GRID * GRID) -> JanusProcessor:
    """Return a processor with a word-level tokenizer, which adds BOS itself as Janus's does, and Janus's image processor."""
    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words.index(bos))])
    standard = {name: SPECIAL[name] for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    extra = {name: SPECIAL[name] for name in ("image_token", "boi_token", "eoi_token")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **standard, extra_special_tokens=extra, padding_side="left")
    fast.add_special_tokens({"additional_special_tokens": list(ROLES)}, replace_extra_special_tokens=False)
    images = JanusImageProcessorPil(
        size={"height": image_size, "width": image_size}, min_size=image_size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(images, fast, chat_template=CHAT_TEMPLATE, num_image_tokens=image_tokens)


def make_config(processor: JanusProcessor, hidden: int = 128, layers: int = 4) -> JanusConfig:
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    vision = JanusVisionConfig(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=CELL,
        mlp_ratio=2.0,
        projection_dim=hidden,
        num_image_tokens=GRID * GRID,
    )
    codes = JanusVQVAEConfig(
        embed_dim=16,
        num_embeddings=CODES,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1, 1],
        num_res_blocks=0,
        projection_dim=hidden,
        image_token_embed_dim=hidden,
    )
    return JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=codes,
        image_token_id=tokenizer.convert_tokens_to_ids(SPECIAL["image_token"]),
        tie_word_embeddings=False,
    )
