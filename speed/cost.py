"""What an image costs at least: bytes read and FLOPs counted from the configuration, over what the device can do."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import JanusConfig

from stages.families.tools.devices import DEVICES


@dataclass
class Cost:
    """Of one image: bytes read from memory, and floating-point operations."""

    bytes: float
    flops: float

    def floor_seconds(self, device: str) -> float | None:
        """The least time one image can take on the device: reading and computing overlap, so the longer of the two; None
        for a device that is not in DEVICES."""
        for name, (bandwidth, compute) in DEVICES.items():
            if name in device:
                return max(self.bytes / bandwidth, self.flops / compute)
        return None


def llm_parameters(config: JanusConfig) -> int:
    """The language model's layers: what a step multiplies with, without embedding and text head."""
    text = config.text_config
    dim = text.hidden_size // text.num_attention_heads
    attention = text.hidden_size * dim * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    return text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def head_parameters(config: JanusConfig) -> int:
    hidden, vq = config.text_config.hidden_size, config.vq_config
    return hidden * vq.image_token_embed_dim + vq.image_token_embed_dim * vq.num_embeddings


def generation(config: JanusConfig, prompt: int, tokens: int, images: int, guided: bool, itemsize: int) -> Cost:
    """Drawing: weights are read once a step for the whole batch, each row's keys and values up to where they are filled."""
    text = config.text_config
    rows = 2 if guided else 1
    weights = llm_parameters(config) + head_parameters(config)
    column = 2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    read = sum(prompt + place for place in range(tokens)) * column * rows
    return Cost((tokens * weights / images + read) * itemsize, rows * tokens * 2 * weights)


def scoring(config: JanusConfig, question: int, itemsize: int) -> Cost:
    """Judging: one forward over picture and question; weights are read once a batch, which is nothing beside the FLOPs."""
    text, vision = config.text_config, config.vision_config
    pictures = vision.num_image_tokens
    tokens = pictures + question
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * int(vision.hidden_size * vision.mlp_ratio)
    projector = vision.hidden_size * vision.projection_dim + (vision.depth - 1) * vision.projection_dim**2
    matrices = 2 * tokens * llm_parameters(config) + 2 * pictures * (vision.num_hidden_layers * layer + projector)
    attention = 2 * tokens**2 * text.hidden_size * text.num_hidden_layers  # causal: half of 4 n^2 d
    attention += 4 * pictures**2 * vision.hidden_size * vision.num_hidden_layers
    return Cost(tokens * text.hidden_size * itemsize, matrices + attention)


def training(config: JanusConfig, flops: float, itemsize: int, batch: int) -> Cost:
    """A sample of `flops`, forward and backward, recomputed activations not counted; weights are read once in each."""
    return Cost(2 * llm_parameters(config) * itemsize / batch, flops)
