"""What an image costs at least: bytes read and FLOPs counted from the configuration, over what the device can do."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import JanusConfig

from stages.families.tools.devices import DEVICES


@dataclass(frozen=True)
class Goal:
    """What this project wants to reach on GOAL_DEVICE: at most `value` of seconds, or at least `value` of the floor."""

    key: str
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} s/1000" if self.key.startswith("seconds") else f"{100 * self.value:g} %"


GOAL_DEVICE = "H100"
DRAWING, JUDGING = Goal("seconds_per_1000_images", 100), Goal("seconds_per_1000_images", 20)  # with Janus-Pro-7B
TRAINING = Goal("fraction_of_floor", 0.45)


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


def training(config: JanusConfig, forward: float, lora: bool, itemsize: int, batch: int) -> Cost:
    """Training on a sample whose forward pass takes `forward` FLOPs; `batch` of them share the reading of the weights.

    Weights are read once forward and once backward. Backward computes gradients of activations and, but for LoRA, of weights,
    each as much as forward; activations that are computed again are not counted.
    """
    return Cost(2 * llm_parameters(config) * itemsize / batch, (2 if lora else 3) * forward)
