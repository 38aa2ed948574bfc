"""Attention of a single new token on PyTorch's fast kernels, for transformers' models.

With a mask, PyTorch's fast kernels need as many key heads as query heads. For grouped-query
attention the keys and values of the whole cache are therefore copied for every query head, in every
step. A single new token needs no copies: the queries of a group are passed as if they were several
tokens of one head. transformers does the same from 5.23 on. But its mask is boolean, and PyTorch
converts a boolean mask to numbers in every block; here it is converted once per step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "grouped_sdpa"


def use(model: Any) -> None:
    """Let a model use this attention, if transformers chose PyTorch's kernels (`sdpa`) for it."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one block; transformers calls this function in every block.

    Args:
        module: attention module of the block.
        query: [batch, heads, new tokens, channels].
        key, value: [batch, key-value heads, tokens, channels].
        attention_mask: [batch, 1, new tokens, tokens], added to the scores; None for a prompt with
            plain causal attention.
        scaling: factor of the scores; None for PyTorch's default.
        options: the other arguments that transformers passes.

    Returns:
        [batch, new tokens, heads, channels], and None in place of the attention weights.
    """
    batch, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    # What this function does not do is left to transformers, which does it or refuses it.
    others = any(options.get(name) is not None for name in ("softcap", "position_bias"))
    if tokens > 1 or groups == 1 or others:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return found
    attended = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], groups, -1),
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return attended.reshape(batch, 1, heads, -1), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    dtype: torch.dtype,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """Return transformers' mask as numbers that are added to the scores.

    A masked position gets the lowest finite number, not minus infinity. For a padding token all
    positions may be masked, and a softmax over minus infinity alone divides by 0. With finite
    numbers such a token attends to arbitrary positions instead.

    Args:
        batch_size: number of sequences.
        q_length: number of new tokens.
        kv_length: number of positions that they may attend to.
        dtype: dtype of the numbers.
        attention_mask: bool[batch, tokens], False for padding; None if there is none.
        local_size: tokens of the sliding window; None if there is none.
        allow_is_causal_skip: whether the result may be None.
        options: the other arguments that transformers passes.

    Returns:
        dtype[batch, 1, new tokens, positions]; None for a prompt that needs no mask.
    """
    # transformers 5.17 makes a mask for every prompt that is recorded into a CUDA graph.
    is_plain = attention_mask is None and q_length == kv_length
    if allow_is_causal_skip and is_plain and (local_size is None or kv_length < local_size):
        return None
    seen = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        dtype=dtype,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )
    if seen is None:
        return None
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
