"""What DeepSpeed leaves to its user without ZeRO: float32 masters under bfloat16 weights, and the gradient's norm.

Under stage 0 DeepSpeed 0.19.8 adds gradients up and reduces them in bfloat16, lets its Adam count a step that was never
made, and tells no norm in float32. So it is given float32 parameters here, which it only has to reduce.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


class Masters(torch.nn.Module):
    """A scorer of a bfloat16 model whose parameters, as an optimizer sees them, are float32 masters.

    The model computes with its own weights. Their gradients add up in float32 and are the masters' gradients, and
    `round` copies the masters back into the weights after a step.
    """

    def __init__(self, scorer: Any) -> None:
        super().__init__()
        # Hidden from registration, so that the rounded weights are nobody's parameters.
        self._hidden = {"scorer": scorer}
        self._rounded = {name: p for name, p in scorer.model.named_parameters() if p.requires_grad}
        self._masters = torch.nn.ParameterList(p.detach().float() for p in self._rounded.values())
        for rounded, master in zip(self._rounded.values(), self._masters, strict=True):
            rounded.grad_dtype = torch.float32
            rounded.register_post_accumulate_grad_hook(partial(_lend_gradient, master))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.scorer(*args, **kwargs)

    @property
    def scorer(self) -> Any:
        """What computes."""
        return self._hidden["scorer"]

    @property
    def by_name(self) -> dict[str, torch.nn.Parameter]:
        """The masters under the names of the model's parameters."""
        return dict(zip(self._rounded, self._masters, strict=True))

    @torch.no_grad()
    def round(self) -> None:
        """Give the model the masters' values, and let go of its gradients."""
        for rounded, master in zip(self._rounded.values(), self._masters, strict=True):
            rounded.copy_(master)
            rounded.grad = None


def _lend_gradient(master: torch.Tensor, rounded: torch.Tensor) -> None:
    master.grad = rounded.grad  # one tensor with two owners: later backwards and the reduction over ranks write into it


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips to a norm, and keeps the norm before clipping where DeepSpeed's own optimizers do.

    As they do, it takes no step whose norm is not finite.
    """

    def __init__(self, parameters: Any, *, max_norm: float, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._max_norm = max_norm
        self._global_grad_norm: torch.Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_norm)
        return super().step(closure) if torch.isfinite(self._global_grad_norm) else None
