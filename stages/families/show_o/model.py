"""Show-o's transformer in the form that training needs, and what it may look at.

The transformer is Phi (transformers' `PhiForCausalLM`) with layer norms on queries and keys, over one vocabulary of text,
special tokens, image codes and the mask. Which token sees which ("omni-attention") depends on the task: see `seen_drawing` and
`seen_asking`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel, PhiConfig, PhiForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec

TARGETS_AT_ONCE = 2048  # tokens whose logits over the whole vocabulary are held at a time


@strict
class ShowOConfig(PreTrainedConfig):
    """text_config: Phi's, with the vocabulary of text, special tokens, codes and mask. vision_config: the CLIP tower's, or
    None where pictures are understood through their codes. vq_config: fields of `magvit.Geometry`. image_tokens: codes of a
    picture. max_text_tokens: the longest prompt of a drawing, with its task token and without the end of text.
    """

    model_type = "show_o"
    sub_configs_defaults = {  # noqa: RUF012 -- the base class reads it from the class
        "text_config": PhiConfig,
        "vision_config": SubConfigSpec(config_class=CLIPVisionConfig, optional=True),
    }

    text_config: Any = None
    vision_config: Any = None
    vq_config: Any = None
    image_tokens: int = 256
    max_text_tokens: int = 128
    tie_word_embeddings: bool = False


class ShowOModel(PreTrainedModel):
    """The transformer, and with a CLIP tower also that and the projector from its features."""

    config_class = ShowOConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("PhiDecoderLayer",)

    def __init__(self, config: ShowOConfig) -> None:
        super().__init__(config)
        self.llm = PhiForCausalLM(config.text_config)
        if config.vision_config is not None:
            width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
            self.vision = CLIPVisionModel(config.vision_config)
            self.projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.lm_head

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the tower sees, `[n, patches, hidden]`: its last layer but one, without the class token, projected."""
        seen = self.vision(pixels.to(self.projector[0].weight.dtype), output_hidden_states=True).hidden_states[-2]
        return self.projector(seen[:, 1:])

    def embedded(self, ids: torch.Tensor, pixels: torch.Tensor | None = None, at: int = 0) -> torch.Tensor:
        """Return the embeddings of ids `[n, s]`, with the features of pixels, if given, before column `at`."""
        found = self.get_input_embeddings()(ids)
        return found if pixels is None else torch.cat([found[:, :at], self.features(pixels), found[:, at:]], 1)

    def attention_mask(self, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the mask, `[n, 1, s, s]`, that makes Phi's attention see what `seen`, bool `[n, s, s]`, allows.

        Phi's eager attention adds the mask to its scores, so a boolean one would be wrong there without an error.
        """
        if self.llm.config._attn_implementation != "eager":
            return seen[:, None]
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]

    def forward(
        self,
        ids: torch.Tensor,
        seen: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        targets: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
        at: int = 0,
    ) -> torch.Tensor:
        """Return log-probabilities of targets, float32 `[m]`, or without targets the logits `[m, vocabulary]`.

        Entry j is read at row `rows[j]` and column `columns[j]` of the sequences ids `[n, s]`. Nothing is shifted: a masked
        code is predicted in its own place. seen: see `attention_mask`. pixels and at: see `embedded`.
        """
        inputs = self.embedded(ids, pixels, at)
        mask = self.attention_mask(seen, inputs.dtype)
        hidden = self.llm.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state[rows, columns]
        if targets is None:
            return self.llm.lm_head(hidden)

        def some(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return -F.cross_entropy(self.llm.lm_head(part).float(), wanted, reduction="none")

        parts = zip(hidden.split(TARGETS_AT_ONCE), targets.split(TARGETS_AT_ONCE), strict=True)
        if len(hidden) <= TARGETS_AT_ONCE or not torch.is_grad_enabled():
            return torch.cat([some(part, wanted) for part, wanted in parts])
        return torch.cat([checkpoint(some, part, wanted, use_reentrant=False) for part, wanted in parts])


def seen_drawing(pads: torch.Tensor, length: int, image: int) -> torch.Tensor:
    """Return what each token sees in a drawing, bool `[n, length, length]`: text, then the `image` last tokens of the picture.

    pads, int64 `[n]`: pads at the left of each row. Text sees the text before it and never the picture. The picture, which
    includes the tokens of its begin and end, sees all text and itself. A pad sees itself alone, and nothing else sees it.
    """
    place = torch.arange(length, device=pads.device)
    causal, picture = place[None] <= place[:, None], place[:, None] >= length - image
    real = place >= pads[:, None]
    seen = (causal | picture) & real[:, None, :] & real[:, :, None]
    return seen | torch.eye(length, dtype=torch.bool, device=pads.device)


def seen_asking(length: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Return what each token sees in a question about a picture, bool `[length, length]`.

    The columns from `start` to before `stop` are seen by all tokens, the others only by later ones. So the picture never sees
    its question.
    """
    place = torch.arange(length, device=device)
    return (place[None] <= place[:, None]) | ((place >= start) & (place < stop))[None]
