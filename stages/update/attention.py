"""Attention over a packed row, given to transformers as an attention function of its own: which way it goes.

On a CPU it goes segment by segment, without a mask (`stages.update.segments`). Only a row of many very short answers
goes through one call under a mask, since there the calls cost more than the masked blocks. On a GPU FlexAttention gets
a block mask that says the same (`stages.update.flex`).
"""

from __future__ import annotations

from typing import Any

import torch

from stages.update.flex import flex
from stages.update.packing import Layout
from stages.update.segments import SegmentAttention

NAME = "prefloop_packed"
"""Of the attention function, in transformers' registry."""


class NotExact(Exception):
    """An attention module asks for more than a packed row can give; the reason."""


def register() -> None:
    """Make transformers know the attention function; it has no mask function, so that no mask is made for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a row, in and out as transformers has it: [1, heads, T, D] to [1, T, heads, D].

    Raises:
        NotExact: if the module asks for something else than plain attention.
    """
    _refuse(attention_mask, dropout, more)
    if layout.keeps:
        assert layout.prompts is not None
        if module in layout.prompts:
            raise NotExact("it goes through a layer more than once")
        layout.prompts[module] = key, value
    prompts = None if layout.keeps or layout.prompts is None else layout.prompts[module]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type != "cpu":
        return flex(query, key, value, prompts, layout, scale).transpose(1, 2), None
    if query.shape[-1] != value.shape[-1]:
        raise NotExact("its values have another width than its keys")
    if _mask_pays(layout, query, prompts):
        return _masked(query, key, value, prompts, layout, scale).transpose(1, 2), None
    prompt_key, prompt_value = prompts or (None, None)
    return SegmentAttention.apply(query, key, value, prompt_key, prompt_value, layout, scale).transpose(1, 2), None


_HARMLESS = {"is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions"}
"""Of what attention functions are handed: what the row says itself, or `stages.update.exactness` looks at."""


def _refuse(mask: torch.Tensor | None, dropout: float, more: dict[str, Any]) -> None:
    if mask is not None:
        raise NotExact("it makes an attention mask of its own")
    if dropout:
        raise NotExact("its attention drops out at random")
    for name, value in more.items():
        if value is not None and name not in _HARMLESS:
            raise NotExact(f"its attention has a term of its own ({name})")
    if more.get("is_causal") is False:
        raise NotExact("its attention is not causal")


CALL_S = 60e-6  # of one kernel call with its slices, measured
MULTIPLY_ADDS_A_SECOND = 25e9  # of torch's attention kernel on two cores, measured with heads of 32


def _mask_pays(layout: Layout, query: torch.Tensor, prompts: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
    """Whether the calls for each segment cost more than the blocks that one call under a mask computes in vain."""
    _, num_heads, num_queries, width = query.shape
    num_keys = num_queries + (0 if prompts is None else prompts[0].shape[2])
    useful = sum(
        span.answers.size * span.prompt.size + sum(part.size**2 / 2 for part in span.segments) for span in layout.spans
    )
    vain_s = (num_queries * num_keys - useful) * 2 * num_heads * width / MULTIPLY_ADDS_A_SECOND
    num_calls = sum(len(span.segments) + (span.answers.size > 0) for span in layout.spans)
    return vain_s < (num_calls - 1) * CALL_S


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompts: tuple[torch.Tensor, torch.Tensor] | None,
    layout: Layout,
    scale: float,
) -> torch.Tensor:
    if prompts is not None:
        key, value = torch.cat([prompts[0], key], dim=2), torch.cat([prompts[1], value], dim=2)
    if "dense" not in layout.masks:
        layout.masks["dense"] = layout.visible(query.shape[2], key.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=layout.masks["dense"],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
