"""The module that an engine is started around: a causal language model that also takes packed rows."""

from __future__ import annotations

from typing import Any

import torch

from stages.update import attention
from stages.update.head import token_logps
from stages.update.packing import PackedRow


class Scorer(torch.nn.Module):
    """Called with a `PackedRow` it gives log-probs of answers; called as the model is called, what the model gives.

    The attention function stays that of the last call, since activations may be computed again in the backward pass.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        attention.register()
        self.model = model
        self._own_attention = model.config._attn_implementation
        assert self._own_attention != attention.NAME, "the model was in another scorer: let go of it with `release`"

    def release(self) -> None:
        """Give the model its own attention back."""
        self.model.config._attn_implementation = self._own_attention

    def forward(self, row: PackedRow | None = None, **inputs: Any) -> Any:
        """For a row: summed log-probs of the answers in it, float32, and the hidden states at the prompts' ends.

        The log-probs have shape [N + 1]: by number, and last what belongs to no answer. The hidden states, [F, H], are
        those that the output embedding takes, detached.
        """
        if row is None:
            self.release()
            return self.model(**inputs)
        self.model.config._attn_implementation = attention.NAME
        states_TH = self.model.base_model(
            input_ids=row.tokens_T[None], position_ids=row.positions_T[None], use_cache=False, layout=row.layout
        ).last_hidden_state[0]
        logps_A = token_logps(
            self.model.get_output_embeddings(), states_TH.index_select(0, row.states_A), row.targets_A
        )
        # One after the other, hundreds of float32 numbers would add up with more rounding than a sum over a row has.
        sums_N = torch.zeros(row.num_answers + 1, dtype=torch.float64, device=logps_A.device)
        logps_N = sums_N.index_add(0, row.answers_A, logps_A.double()).float()
        return logps_N, states_TH.detach().index_select(0, row.prompt_ends_F)
