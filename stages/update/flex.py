"""Attention over a packed row on a GPU: FlexAttention under a block mask, compiled once. Not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from stages.update.packing import Layout


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompts: tuple[torch.Tensor, torch.Tensor] | None,
    layout: Layout,
    scale: float,
) -> torch.Tensor:
    """Attention of a row's tokens to each other, and to the prompts of another row where there are any.

    Not run on a GPU yet; tests compare it on a CPU, not compiled, with what runs there.
    """
    if prompts is not None:
        key, value = torch.cat([prompts[0], key], dim=2), torch.cat([prompts[1], value], dim=2)
    if "flex" not in layout.masks:
        layout.masks["flex"] = block_mask(layout, query.shape[2], key.shape[2], query.device)
    return _compiled()(
        query, key, value, block_mask=layout.masks["flex"], scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def block_mask(layout: Layout, num_queries: int, num_keys: int, device: torch.device) -> Any:
    """Which of the keys each query sees, by blocks; the row's own keys are the last ones."""
    from torch.nn.attention.flex_attention import create_block_mask

    family_K, segment_K = (labels_K.to(device) for labels_K in layout.labels(num_queries, num_keys))
    before = num_keys - num_queries

    def sees(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
        mine = query + before
        visible = (segment_K[key] == 0) | (segment_K[key] == segment_K[mine])
        return (family_K[mine] == family_K[key]) & visible & (key <= mine)

    return create_block_mask(sees, None, None, num_queries, num_keys, device=device)
