"""The hot path of drawing: a LLaMA that decodes one image token a step over a preallocated key-value cache.

The weights are those of transformers' `LlamaModel`, used in place. What is different from its `generate`: the cache is
allocated once and never copied, a step reads only the columns that are filled, each prompt is run once and shared by its
candidates, and nothing in the loop waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaModel


@dataclass
class Cache:
    """Keys and values of every layer, `[layers, rows, key-value heads, columns, head dim]`.

    Prompts are right-aligned in the first `filled` columns, so that all rows decode at the same column; `padding` int64
    `[rows]` counts the columns before a row's prompt, and is None where no row has any.
    """

    keys: torch.Tensor
    values: torch.Tensor
    filled: int
    padding: torch.Tensor | None


def head_dim(config: LlamaConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(config: LlamaConfig, columns: int, dtype: torch.dtype) -> int:
    """Bytes of one row's keys and values."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * columns * dtype.itemsize


def prefill(llm: LlamaModel, prompts: list[torch.Tensor], rows: list[int], more: int) -> tuple[torch.Tensor, Cache]:
    """Run each distinct prompt once and hand it to its rows.

    prompts: distinct prompts as embeddings, `[length, hidden]` each. rows: for each row of the batch, which prompt.
    more: columns to leave for image tokens. Returns the last hidden state of each row, `[rows, hidden]`, and the cache.
    """
    config, device, dtype = llm.config, prompts[0].device, prompts[0].dtype
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    shape = (config.num_hidden_layers, len(rows), config.num_key_value_heads, width + more, head_dim(config))
    keys, values = torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
    last = torch.empty((len(rows), config.hidden_size), dtype=dtype, device=device)
    for length in sorted(set(lengths)):
        members = [i for i, other in enumerate(lengths) if other == length]
        place = {prompt: i for i, prompt in enumerate(members)}
        used = torch.tensor([row for row, prompt in enumerate(rows) if prompt in place], device=device)
        source = torch.tensor([place[prompt] for prompt in rows if prompt in place], device=device)
        prefix = DynamicCache(config=config)
        hidden = llm(inputs_embeds=torch.stack([prompts[i] for i in members]), past_key_values=prefix, use_cache=True)
        last[used] = hidden.last_hidden_state[source, -1]
        for layer, states in enumerate(prefix.layers):
            keys[layer, used, :, width - length : width] = states.keys[source]
            values[layer, used, :, width - length : width] = states.values[source]
        if length < width:  # masked columns are read too, and 0 x NaN is NaN
            keys[:, used, :, : width - length] = 0
            values[:, used, :, : width - length] = 0
    padding = None
    if len(set(lengths)) > 1:
        padding = torch.tensor([width - lengths[prompt] for prompt in rows], device=device)
    return last, Cache(keys, values, width, padding)


def step(llm: LlamaModel, hidden: torch.Tensor, cache: Cache) -> torch.Tensor:
    """One more token a row: its embedding `[rows, hidden]` to the last hidden state `[rows, hidden]`; fills a column."""
    column, rows = cache.filled, len(hidden)
    positions = torch.full((rows,), column, device=hidden.device)
    mask = None
    if cache.padding is not None:
        positions = positions - cache.padding
        mask = (torch.arange(column + 1, device=hidden.device) >= cache.padding[:, None])[:, None, None]
    cos, sin = (part.transpose(0, 1) for part in llm.rotary_emb(hidden, positions[None]))  # [rows, 1, head dim]
    grouped = llm.config.num_key_value_heads != llm.config.num_attention_heads
    dim = cos.shape[-1]
    for layer, keys, values in zip(llm.layers, cache.keys, cache.values, strict=True):
        normed = layer.input_layernorm(hidden)
        attention = layer.self_attn
        query = rotate(attention.q_proj(normed).view(rows, -1, dim), cos, sin)
        keys[:, :, column] = rotate(attention.k_proj(normed).view(rows, -1, dim), cos, sin)
        values[:, :, column] = attention.v_proj(normed).view(rows, -1, dim)
        mixed = F.scaled_dot_product_attention(
            query[:, :, None], keys[:, :, : column + 1], values[:, :, : column + 1], attn_mask=mask, enable_gqa=grouped
        )
        hidden = hidden + attention.o_proj(mixed.view(rows, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    cache.filled = column + 1
    return llm.norm(hidden)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of `[rows, heads, head dim]`, halves convention."""
    left, right = states.chunk(2, -1)
    return states * cos + torch.cat((-right, left), -1) * sin


def sample(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF sampling: logits `[n, codes]`, one uniform in [0, 1) for each row, float64 `[n]`; int64 `[n]`.

    The cumulative sum is in float64: in float32 its tail over 16,384 codes would lose codes of small probability.
    """
    cumulative = logits.float().softmax(-1).double().cumsum(-1)
    threshold = draws[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


@torch.no_grad()
def decode(
    llm: LlamaModel,
    prompts: list[torch.Tensor],
    rows: list[int],
    draws: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    embed: Callable[[torch.Tensor], torch.Tensor],
    guidance_scale: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw n images of t tokens.

    prompts: distinct prompts as embeddings `[length, hidden]`; rows: which prompt each row continues: n of them, or, with
    guidance, 2 n, an image's conditional row before its unconditional one. draws: float64 `[n, t]`. head: hidden states to
    logits over codes. embed: codes to embeddings. Returns tokens int64 `[n, t]` and, float64 `[n]`, their log-probability
    under the conditional model at temperature 1.
    """
    count, length = draws.shape
    guided = len(rows) == 2 * count
    hidden, cache = prefill(llm, prompts, rows, length - 1)
    tokens = torch.empty((count, length), dtype=torch.long, device=draws.device)
    total = torch.zeros(count, dtype=torch.float64, device=draws.device)
    for place in range(length):
        logits = head(hidden).float()
        conditional = logits
        if guided:
            conditional, unconditional = logits[0::2], logits[1::2]
            logits = unconditional + guidance_scale * (conditional - unconditional)
        token = sample(logits / temperature, draws[:, place])
        tokens[:, place] = token
        total += conditional.log_softmax(-1).gather(1, token[:, None]).squeeze(1).double()
        if place + 1 < length:
            embedded = embed(token)
            hidden = step(llm, embedded.repeat_interleave(2, 0) if guided else embedded, cache)
    return tokens, total
