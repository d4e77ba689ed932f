"""Janus as a language model over images, in the form that TRL's trainers need.

TRL computes `model.base_model(...).last_hidden_state @ model.get_output_embeddings().weight.T` and never uses the model's
logits. Janus's image head is an MLP. The base model therefore includes the head up to its last linear layer, and that layer is
the output embedding. Token ids belong to a joint vocabulary: image codes first (0 to K - 1), then text (K + text id).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import JanusForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class JanusOverImages(PreTrainedModel):
    """Wraps a Janus model without copying it: training the wrapper trains the wrapped model."""

    config_class = JanusForConditionalGeneration.config_class
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, janus: JanusForConditionalGeneration) -> None:
        super().__init__(janus.config)
        self.janus = janus
        self.generation_config = janus.generation_config
        self.codes: int = janus.config.vq_config.num_embeddings

    def _hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object):
        """Return the hidden states before the image head's last layer, `[n, s, d]`.

        Rows are right-padded and attention is causal, so the padding mask changes no position that the loss uses. It is passed
        on for attention backends that need it.
        """
        is_code = (input_ids < self.codes)[:, :, None]
        text = self.janus.get_input_embeddings()((input_ids - self.codes).clamp(min=0))
        image = self.janus.prepare_embeddings_for_image_generation(input_ids.clamp(max=self.codes - 1))
        embeddings = torch.where(is_code, image, text)
        model, head = self.janus.model.language_model, self.janus.model.generation_head
        hidden = model(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return BaseModelOutputWithPast(last_hidden_state=head.activation_fn(head.proj_out(hidden)))

    @property
    def base_model(self):
        return self._hidden

    def get_input_embeddings(self) -> nn.Module:
        return self.janus.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.janus.model.generation_head.vision_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
        question_ids: torch.Tensor | None = None,
        last: torch.Tensor | None = None,
        **_: object,
    ):
        """Return the logits over the image codes, `[n, s, K]`, or over the first token of an answer, `[n, text vocabulary]`.

        The latter is for questions about images: pixels `[n, 3, h, w]`; question_ids `[n, q]`, ids of the text vocabulary; and
        last `[n]`, the index of each question's last token.
        """
        if pixels is not None:
            embeddings = looked_at(self.janus, pixels, question_ids)
            hidden = self.janus.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            return CausalLMOutputWithPast(
                logits=self.janus.lm_head(hidden[torch.arange(len(hidden), device=hidden.device), last])
            )
        hidden = self._hidden(input_ids, attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=self.get_output_embeddings()(hidden))


def looked_at(janus: JanusForConditionalGeneration, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return embeddings `[n, s, d]` of ids `[n, s]`, with the features of the images `[n, 3, h, w]` at the image tokens."""
    features = janus.model.get_image_features(pixels).pooler_output
    embeddings = janus.get_input_embeddings()(ids)
    mask = (ids == janus.config.image_token_id)[:, :, None].expand_as(embeddings)
    return embeddings.masked_scatter(mask, features.to(embeddings.dtype))
