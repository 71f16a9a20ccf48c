"""Log-probs of given tokens straight from hidden states: what the output embedding's logits are needed for.

Logits of all tokens are never in memory together, unless they are few: they are made and used in chunks, and made
again for the backward pass beyond `KEPT_BYTES`. So memory does not grow with vocabulary times length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

from stages.update.config import CHUNK_BYTES, KEPT_BYTES


class _TokenLogps(torch.autograd.Function):
    """``log softmax(hidden @ weight.T + bias)`` at the targets, float32, shape [A].

    With p the softmax and g the gradient of the log-probs, the hidden states' gradient is ``g (weight[target] - p @
    weight)`` and the weight's ``sum of g hidden at the targets - p.T @ (g hidden)``: the chunks of p are read only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_AH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_A: torch.Tensor,
        with_backward: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_AH, weight_VH, bias_V, targets_A)
        ctx.kept = {}
        logps_A = torch.empty(len(targets_A), dtype=torch.float32, device=hidden_AH.device)
        kept_bytes = 0
        for chunk in _chunks(len(targets_A), weight_VH):
            logps_CV = _log_softmax(hidden_AH[chunk], weight_VH, bias_V)
            logps_A[chunk] = logps_CV.gather(1, targets_A[chunk, None])[:, 0]
            kept_bytes += logps_CV.nbytes
            if with_backward and kept_bytes <= KEPT_BYTES:
                ctx.kept[chunk.start] = logps_CV.exp_()
        return logps_A

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient_A,) = gradients
        hidden_AH, weight_VH, bias_V, targets_A = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        to_hidden_AH = torch.empty_like(hidden_AH) if wants_hidden else None
        to_weight_VH = torch.zeros(weight_VH.shape, device=weight_VH.device) if wants_weight else None
        to_bias_V = torch.zeros(len(weight_VH), device=weight_VH.device) if wants_bias else None
        for chunk in _chunks(len(targets_A), weight_VH):
            p_CV = ctx.kept.pop(chunk.start, None)
            if p_CV is None:
                p_CV = _log_softmax(hidden_AH[chunk], weight_VH, bias_V).exp_()
            g_C, targets_C, hidden_CH = gradient_A[chunk], targets_A[chunk], hidden_AH[chunk]
            if to_hidden_AH is not None:
                difference_CH = weight_VH[targets_C].float() - (p_CV.to(weight_VH.dtype) @ weight_VH).float()
                to_hidden_AH[chunk] = (g_C[:, None] * difference_CH).to(hidden_AH.dtype)
            if to_weight_VH is not None:
                scaled_CH = g_C[:, None] * hidden_CH.float()
                to_weight_VH.addmm_(p_CV.T, scaled_CH, alpha=-1).index_add_(0, targets_C, scaled_CH)
            if to_bias_V is not None:
                to_bias_V.addmv_(p_CV.T, g_C, alpha=-1).index_add_(0, targets_C, g_C)
        return (
            to_hidden_AH,
            None if to_weight_VH is None else to_weight_VH.to(weight_VH.dtype),
            None if to_bias_V is None else to_bias_V.to(bias_V.dtype),
            None,
            None,
        )


def _log_softmax(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    return torch.log_softmax(linear(hidden_CH, weight_VH, bias_V), dim=-1, dtype=torch.float32)


def _chunks(num_tokens: int, weight_VH: torch.Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // (4 * len(weight_VH)))
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def token_logps(head: torch.nn.Linear, hidden_AH: torch.Tensor, targets_A: torch.Tensor) -> torch.Tensor:
    """Log-probs of the targets, shape [A], float32, in nats, computed inside the head's own call.

    So whatever hooks onto that call works: under ZeRO 3 the weight is there only meanwhile.
    """
    with _answering(head):
        return head(hidden_AH, targets_A)


@contextmanager
def _answering(head: torch.nn.Linear) -> Iterator[None]:
    """Meanwhile a call of the head takes targets too, and gives their log-probs in place of logits."""

    def forward(hidden_AH: torch.Tensor, targets_A: torch.Tensor) -> torch.Tensor:
        return _TokenLogps.apply(hidden_AH, head.weight, head.bias, targets_A, torch.is_grad_enabled())

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
