"""Log-probs of answers under a model: summed over the answer's tokens, in nats, float32, at temperature 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.update.batching import TokenBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def answer_logps(model: Any, batch: TokenBatch, device: torch.device) -> Tensor:
    """``log p(answer | prompt)`` a row, shape [N], float32.

    Args:
        model: a causal language model, or the DeepSpeed engine around one.
        batch: rows padded on the right, so that the positions a model counts by itself are right (some architectures
            take none from outside).
        device: where the model is.
    """
    import torch

    tokens_NT, answer_NT = batch.tokens_NT.to(device), batch.answer_NT.to(device)
    logits_NTV = model(input_ids=tokens_NT, attention_mask=batch.mask_NT.to(device), use_cache=False).logits
    wanted_NT = answer_NT[:, 1:]
    logits_AV = logits_NTV[:, :-1][wanted_NT].float()
    targets_A = tokens_NT[:, 1:][wanted_NT]
    logps_A = -torch.nn.functional.cross_entropy(logits_AV, targets_A, reduction="none")
    logps_NT = torch.zeros(wanted_NT.shape, dtype=torch.float32, device=device).masked_scatter(wanted_NT, logps_A)
    return logps_NT.sum(-1)
