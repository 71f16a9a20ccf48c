"""Attention over a packed row on a CPU, segment by segment: no mask is made and no masked block computed.

Every prompt and every answer attends to itself, causally, and all answers of a family together to their prompt. The two
parts of an answer's attention are joined by their log-sum-exps, and torch's own kernel for the backward pass is right
for each part once it is given the joined output and log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch

from stages.update.packing import Layout, Range

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class SegmentAttention(torch.autograd.Function):
    """Of queries, keys and values, [1, heads, T, D]; those of the prompts are this row's where none are given."""

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
