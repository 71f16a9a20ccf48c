"""Attention over a packed row, given to transformers as an attention function of its own.

On a CPU no mask is made and no masked block computed: every prompt and every answer attends to itself, causally, and
all answers of a family together to their prompt. The two parts of an answer's attention are joined by their
log-sum-exps, and torch's own kernel for the backward pass is right for each part once it is given the joined output and
log-sum-exp. Only a row of many very short answers goes through one call under a mask, since there the calls cost more
than the masked blocks. On a GPU FlexAttention gets a block mask that says the same.
"""

from __future__ import annotations

from typing import Any

import torch

from stages.update.flex import flex
from stages.update.packing import Layout, Range

NAME = "prefloop_packed"
"""Of the attention function, in transformers' registry."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


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
    return _Attention.apply(query, key, value, prompt_key, prompt_value, layout, scale).transpose(1, 2), None


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


# ---- on a CPU -------------------------------------------------------------------------------------------------------

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


class _Attention(torch.autograd.Function):
    """Keys and values of the prompts are this row's where none are given."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prompt_key: torch.Tensor | None,
        prompt_value: torch.Tensor | None,
        layout: Layout,
        scale: float,
    ) -> torch.Tensor:
        groups = key.shape[1]
        q, k, v = _grouped(query, groups), _grouped(key, groups), _grouped(value, groups)
        pk, pv = (k, v) if prompt_key is None else (_grouped(prompt_key, groups), _grouped(prompt_value, groups))
        out = torch.empty(query.transpose(1, 2).shape, dtype=query.dtype).transpose(1, 2)
        lse = torch.empty(query.shape[2], query.shape[1]).T[None]
        o, s = _grouped(out, groups), lse.unflatten(1, (groups, -1))[0]
        wide = tuple(q.shape[:2])
        for span in layout.spans:
            for part in span.segments:
                o[:, :, part.start : part.stop], s[:, :, part.start : part.stop] = _forward(
                    _at(q, part), _at(k, part, wide), _at(v, part, wide), 0.0, True, scale=scale
                )
            if span.answers.size and span.prompt.size:
                theirs, their_lse = _forward(
                    _at(q, span.answers),
                    _at(pk, span.prompt, wide),
                    _at(pv, span.prompt, wide),
                    0.0,
                    False,
                    scale=scale,
                )
                _join(_at(o, span.answers), _at(s, span.answers), theirs, their_lse)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, out, lse)
        # Not the layout: its kept keys hold this graph, and the two would hold each other until they are collected.
        ctx.spans, ctx.scale = layout.spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        query, key, value, prompt_key, prompt_value, out, lse = ctx.saved_tensors
        groups = key.shape[1]
        g, q, k, v, o = (_grouped(tensor, groups) for tensor in (gradient, query, key, value, out))
        s = lse.unflatten(1, (groups, -1))[0]
        wide = tuple(q.shape[:2])
        to_query, to_key, to_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        dq, dk, dv = (_grouped(tensor, groups) for tensor in (to_query, to_key, to_value))
        to_prompt_key = to_prompt_value = None
        pk, pv, dpk, dpv = k, v, dk, dv
        if prompt_key is not None:
            to_prompt_key, to_prompt_value = torch.zeros_like(prompt_key), torch.zeros_like(prompt_value)
            pk, pv, dpk, dpv = (
                _grouped(tensor, groups) for tensor in (prompt_key, prompt_value, to_prompt_key, to_prompt_value)
            )

        def back(
            mine: Range, theirs: Range, keys: Any, values: Any, to_keys: Any, to_values: Any, causal: bool
        ) -> None:
            found = _backward(
                _at(g, mine),
                _at(q, mine),
                _at(keys, theirs, wide),
                _at(values, theirs, wide),
                _at(o, mine),
                _at(s, mine),
                0.0,
                causal,
                scale=ctx.scale,
            )
            _at(dq, mine).add_(found[0])
            _at(to_keys, theirs).add_(_summed(found[1], to_keys))
            _at(to_values, theirs).add_(_summed(found[2], to_values))

        for span in ctx.spans:
            for part in span.segments:
                back(part, part, k, v, dk, dv, True)
            if span.answers.size and span.prompt.size:
                back(span.answers, span.prompt, pk, pv, dpk, dpv, False)
        return to_query, to_key, to_value, to_prompt_key, to_prompt_value, None, None


def _grouped(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[1, heads, T, D] as [groups, heads a group, T, D]: keys and values have one head a group."""
    return tensor[0].unflatten(0, (groups, -1))


def _at(tensor: torch.Tensor, places: Range, wide: tuple[int, ...] | None = None) -> torch.Tensor:
    """Some places of a grouped tensor; with `wide`, seen by every head of a group without a copy."""
    part = tensor[:, :, places.start : places.stop]
    return part if wide is None else part.expand(*wide, -1, -1)


def _summed(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Over the heads of a group, where they share keys."""
    return gradient if gradient.shape[1] == like.shape[1] else gradient.sum(1, keepdim=True)


def _join(out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor) -> None:
    """Put attention to further keys into attention to some, in place."""
    both = torch.logaddexp(lse, more_lse)
    out.mul_((lse - both).exp_().unsqueeze(-1)).add_(more * (more_lse - both).exp_().unsqueeze(-1))
    lse.copy_(both)
