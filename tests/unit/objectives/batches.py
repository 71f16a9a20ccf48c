"""Batches for the objectives, and every objective in its forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from stages.update.objectives.base import Groups, Loss, Pairs, Term
from stages.update.objectives.registry import OBJECTIVES, find_loss

FORMS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in OBJECTIVES),
    ("minor_dpo", {"gate_floor": 0.3, "logps": "mean"}),
    ("dpo", {"label_smoothing": 0.2, "logps": "mean"}),
    ("dpop", {"logps": "mean", "dpop_lambda": 2.0}),
    ("rpo", {"sft_average": True, "beta": 0.5, "eta": 0.2}),
    ("exo", {"beta": 0.1, "beta_r": 0.2, "logps": "mean"}),
    ("exo_pair", {"logps": "mean", "beta": 2.0}),
    ("mpo", {"logps": "sum"}),
    ("chi_po", {"r_max": 0.1}),
    ("hpo", {"base": "minor_dpo", "base_params": {"beta": 0.3}}),
    ("hpo", {"base": "sft"}),
    ("mrpo", {"base": "chi_po", "weights": "as_published"}),
    ("mrpo", {"base": "minor_dpo", "eta": 0.5}),
    ("ipo", {"logps": "sum"}),
    ("hinge", {"logps": "mean", "beta": 1.0}),
    ("robust", {"label_smoothing": 0.0, "logps": "mean"}),
]
"""Every registered objective with its defaults, and what else it can do; a new one needs no line here."""

PAIRWISE = [form for form in FORMS if OBJECTIVES[form[0]].rows == "pairs"]


def told(form: tuple[str, dict[str, Any]]) -> str:
    """A form's name for a test's id."""
    name, params = form
    return name + "".join(f"-{key}={value}" for key, value in params.items())


def pairs(r_w: Any, r_l: Any, *, dtype: torch.dtype = torch.float64, lengths: tuple[float, float] = (1, 1)) -> Pairs:
    """Pairs of given log-ratios against one reference, which stands at -7 and -9 nats; the log-probs take gradients."""
    r_w, r_l = (torch.as_tensor(r, dtype=dtype).reshape(-1) for r in (r_w, r_l))
    ref_w, ref_l = torch.full_like(r_w, -7.0), torch.full_like(r_l, -9.0)
    len_w, len_l = (torch.full_like(r_w, length) for length in lengths)
    chosen, rejected = (ref_w + r_w).requires_grad_(), (ref_l + r_l).requires_grad_()
    return Pairs(chosen, rejected, ref_w[None], ref_l[None], len_w, len_l)


def groups(h: Sequence[Sequence[float]], rewards: Sequence[Sequence[float]], *, pad: float = 0.0) -> Groups:
    """Groups of given log-ratios and rewards, of unequal sizes, padded with `pad`; the log-probs take gradients."""
    most = max(map(len, h))

    def filled(rows: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([[*row, *[pad] * (most - len(row))] for row in rows], dtype=torch.float64)

    mask = torch.tensor([[k < len(row) for k in range(most)] for row in h])
    length = torch.where(mask, 4.0, 0.0).double()
    ref = torch.full_like(filled(h), -7.0)
    return Groups((filled(h) + ref).requires_grad_(), ref[None], length, filled(rewards), mask)


def loss_of(name: str, batch: Pairs | Groups, **params: Any) -> Tensor:
    """The loss a row, all terms added up."""
    return summed(find_loss(name, params)(batch))


def summed(terms: Sequence[Term]) -> Tensor:
    return torch.stack([term.loss_B * term.weight_B for term in terms]).sum(0)


def random_batch(loss: Loss, *, spread: float = 3.0, dtype: torch.dtype = torch.float64, rows: int = 6) -> Any:
    """A batch with all that an objective may need, and log-ratios up to `spread` nats."""
    random = torch.Generator().manual_seed(3)

    def uniform(*shape: int, low: float = -1.0) -> Tensor:
        return (low + (1 - low) * torch.rand(*shape, generator=random, dtype=torch.float64)).to(dtype)

    if loss.objective.rows == "groups":
        mask = torch.tensor([[k < 2 + row % 3 for k in range(4)] for row in range(rows)])
        ref, length = -20 - 10 * uniform(1, rows, 4), torch.full((rows, 4), 5.0, dtype=dtype)
        return Groups(ref[0] + spread * uniform(rows, 4), ref, length, 2 * uniform(rows, 4), mask)
    count = 3 if loss.references[1] is None else loss.references[0]
    ref = [-20 - 10 * uniform(rows) + uniform(count, rows) for _ in "wl"]
    chosen, rejected = (r.mean(0) if count else -25 + 0 * uniform(rows) for r in ref)
    return Pairs(
        chosen_B=chosen + spread * uniform(rows),
        rejected_B=rejected + spread * uniform(rows),
        ref_chosen_RB=ref[0],
        ref_rejected_RB=ref[1],
        chosen_len_B=torch.arange(2, rows + 2).to(dtype),
        rejected_len_B=torch.arange(rows + 1, 1, -1).to(dtype),
        aux_chosen_B=uniform(rows),
        aux_rejected_B=uniform(rows),
        value_B=uniform(rows) / 2,
        stream_logp_B=-10 + uniform(rows),
        stream_len_B=torch.arange(rows).to(dtype),
    )


def with_gradients(batch: Any) -> tuple[Any, list[Tensor]]:
    """The batch with the log-probs of the answers, of which a policy's gradient is made, as leaves."""
    names = ("logp_GK",) if isinstance(batch, Groups) else ("chosen_B", "rejected_B", "stream_logp_B")
    leaves = {name: getattr(batch, name).detach().clone().requires_grad_() for name in names}
    return replace(batch, **leaves), list(leaves.values())


def reordered(batch: Any, order: Tensor) -> Any:
    """The same rows in another order."""
    per_reference = ("ref_chosen_RB", "ref_rejected_RB", "ref_logp_RGK")
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return type(batch)(**{k: v[:, order] if k in per_reference else v[order] for k, v in values.items()})
