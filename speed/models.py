"""Janus geometries by name, with random weights: what speed depends on is the shape, not the values.

Geometry of Janus-Pro: the config.json of deepseek-community/Janus-Pro-1B and Janus-Pro-7B.
"""

from __future__ import annotations

import torch
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from speed.records import ROOT
from stages.families.janus.family import Janus
from stages.shapes.tiny_janus import make_processor

# hidden, layers, heads, feed-forward, vocabulary
LLM = {
    "janus-100m": (768, 10, 12, 2560, 8192),
    "janus-pro-1b": (2048, 24, 16, 5632, 102400),
    "janus-pro-7b": (4096, 30, 32, 11008, 102400),
}
NAMES = ("tiny-janus", *LLM)


def open_model(name: str, device: str, dtype: str) -> Janus:
    """The named geometry on the device; the tiny model with its weights, the others with random ones (seed 0)."""
    if name == "tiny-janus":
        return Janus.load(ROOT / "models" / "tiny-janus", device, dtype)
    hidden, layers, heads, feed_forward, vocabulary = LLM[name]
    processor = make_processor(image_size=384, image_tokens=576)
    tokenizer = processor.tokenizer
    large = name != "janus-100m"
    config = JanusConfig(
        text_config=LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=feed_forward,
            vocab_size=vocabulary,
            max_position_embeddings=16384,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=1024 if large else 384,
            num_hidden_layers=24 if large else 6,
            num_attention_heads=16 if large else 6,
            projection_dim=hidden,
        ),
        vq_config=JanusVQVAEConfig(base_channels=128 if large else 32, projection_dim=hidden, image_token_embed_dim=hidden),
        image_token_id=tokenizer.convert_tokens_to_ids(processor.image_token),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = JanusForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return Janus(model, processor)
