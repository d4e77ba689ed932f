"""Image decoding with a LLaMA: one image token per row and step, over a preallocated KV cache. This is the hot path of drawing.

It uses the weights of transformers' `LlamaModel` in place. It differs from transformers' `generate` in that the cache is
allocated once and never copied, a step reads only the filled positions, each prompt is run once and shared by its candidates,
and nothing in the loop waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaModel


@dataclass
class Cache:
    """The KV cache: keys and values of every layer, each `[layers, rows, key-value heads, positions, head dim]`.

    Prompts are right-aligned in the first `filled` positions, so that all rows decode at the same position. padding, int64
    `[rows]`, is the number of padding positions before each row's prompt; it is None if no row has any.
    """

    keys: torch.Tensor
    values: torch.Tensor
    filled: int
    padding: torch.Tensor | None


def head_dim(config: LlamaConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(config: LlamaConfig, columns: int, dtype: torch.dtype) -> int:
    """Return the size of one row's keys and values in bytes. columns: the number of positions."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * columns * dtype.itemsize


def prefill(llm: LlamaModel, prompts: list[torch.Tensor], rows: list[int], more: int) -> tuple[torch.Tensor, Cache]:
    """Run each distinct prompt once and copy its keys and values to its rows.

    prompts: embeddings of the distinct prompts, each `[length, hidden]`. rows: the index of each row's prompt.
    more: the number of positions to reserve for image tokens.

    Return the last hidden state of each row, `[rows, hidden]`, and the cache.
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
        if length < width:  # attention reads masked positions too, and 0 x NaN is NaN
            keys[:, used, :, : width - length] = 0
            values[:, used, :, : width - length] = 0
    padding = None
    if len(set(lengths)) > 1:
        padding = torch.tensor([width - lengths[prompt] for prompt in rows], device=device)
    return last, Cache(keys, values, width, padding)


def step(llm: LlamaModel, hidden: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Run one decode step: embeddings in, last hidden states out, both `[rows, hidden]`. It writes one cache position."""
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
    """Return states `[rows, heads, head dim]` with rotary position embedding; the pairs are (i, i + dim / 2)."""
    left, right = states.chunk(2, -1)
    return states * cos + torch.cat((-right, left), -1) * sin


def sample(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return one code for each row, int64 `[n]`, by inverse-CDF sampling.

    logits: `[n, codes]`. draws: float64 `[n]`, uniform in [0, 1). The cumulative sum is in float64, because in float32 codes of
    small probability would be lost in its tail over 16,384 codes.
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
    """Draw n images of t tokens each.

    prompts: embeddings of the distinct prompts, each `[length, hidden]`.
    rows: the index of each row's prompt. There are n rows, or with guidance 2 n, where each image's conditional row comes
        directly before its unconditional one.
    draws: float64 `[n, t]`, uniform in [0, 1).
    head: maps hidden states to logits over the codes. embed: maps codes to embeddings.

    Return the tokens, int64 `[n, t]`, and their log-probabilities under the conditional model at temperature 1, float64 `[n]`.
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
