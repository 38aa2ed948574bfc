"""Attention of one new token on PyTorch's fast kernels, for transformers' models.

With grouped queries and a mask, PyTorch's fast kernels want as many key heads as query heads, so
the keys and values of a whole cache are copied for every group, in every step. One new token needs
no copies: the queries of a group are given as if they were as many tokens of one head. transformers
does the same from 5.23 on; and its boolean mask, which PyTorch turns into numbers in every block,
is made of numbers once a step here.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "grouped_sdpa"


def use(model: Any) -> None:
    """Let a model attend this way, unless it is one that PyTorch's own kernels do not serve."""
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
    """What transformers calls in every block.

    Args:
        module: the block's attention.
        query: [batch, heads, new tokens, channels].
        key, value: [batch, key-value heads, tokens, channels].
        attention_mask: [batch, 1, new tokens, tokens], added to the scores; None for a prompt
            whose tokens attend to all before them.
        scaling: of the scores.
        options: the rest of what transformers gives.

    Returns:
        [batch, new tokens, heads, channels], and no weights.
    """
    batch, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    if tokens > 1 or groups == 1:
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
    """Transformers' mask as numbers to add to the scores; None for a prompt that needs none.

    The lowest finite number, not infinity: a place of the padding, to which nothing attends, may
    then attend to anything instead of dividing by 0.

    Args:
        batch_size: sequences.
        q_length: new tokens.
        kv_length: places that they may attend to.
        dtype: of the numbers.
        attention_mask: bool[batch, tokens], False for padding; None if there is none.
        local_size: of a sliding window; None if there is none.
        allow_is_causal_skip: whether it may be None.
        options: the rest of what transformers gives.

    Returns:
        [batch, 1, new tokens, places].
    """
    # transformers 5.17 makes one for every prompt whose reading is recorded into a CUDA graph.
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
