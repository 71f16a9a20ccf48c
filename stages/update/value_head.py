"""A value head: what reward the policy's answers to a prompt will get, read from the language model's last layer.

It stands beside the language model and outside of DeepSpeed: a linear map in float32, equal on every rank, with an
AdamW of its own. It reads activations, not weights, so that it works however the weights are shared out, and it reads
them detached, so that its gradient ends with it. It never enters a policy's folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from stages.errors import InputError
from stages.update.objectives.base import Loss

_FILE = "value_head.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ValueHead:
    """``weight . hidden + bias``, from 0.

    Args:
        width: numbers in a hidden state.
        learning_rate: of AdamW, without warm-up, decay of weights or clipping; AdamW bounds its steps by itself.
        device: where the hidden states are.
    """

    def __init__(self, width: int, *, learning_rate: float, device: torch.device) -> None:
        self._tensors = {
            "weight": torch.zeros(width, device=device, requires_grad=True),
            "bias": torch.zeros((), device=device, requires_grad=True),
        }
        self._optimizer = torch.optim.AdamW(self._tensors.values(), lr=learning_rate, weight_decay=0.0)
        self.num_steps = 0

    def __call__(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        """The value of each prompt, shape [B], float32, in units of the reward."""
        return hidden_BH.detach().float() @ self._tensors["weight"] + self._tensors["bias"]

    def reduce(self) -> torch.Tensor:
        """Take the mean over ranks of the gradients so far; called on all ranks together.

        Returns:
            The norm of that mean gradient.
        """
        tensors = list(self._tensors.values())
        gradient = torch.cat([(torch.zeros_like(t) if t.grad is None else t.grad).flatten() for t in tensors])
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
        for tensor, part in zip(tensors, gradient.split([t.numel() for t in tensors]), strict=True):
            tensor.grad = part.view_as(tensor).clone()
        return gradient.norm()

    def step(self, *, skipped: bool) -> None:
        """One step of AdamW on the gradient that `reduce` has left, or none, and away with the gradient."""
        if not skipped:
            self._optimizer.step()
            self.num_steps += 1
        self._optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the weights, AdamW's moments and the number of steps, on the CPU."""
        state = {"num_steps": torch.tensor(self.num_steps)}
        for name, tensor in self._tensors.items():
            state[name] = tensor.detach().cpu().clone()
            for moment in _MOMENTS:
                kept = self._optimizer.state[tensor].get(moment)
                state[f"{name}.{moment}"] = torch.zeros_like(state[name]) if kept is None else kept.cpu().clone()
        return state

    def set_state(self, state: Mapping[str, torch.Tensor], *, source: Path) -> None:
        """Go on from a state.

        Args:
            source: where it was read.

        Raises:
            InputError: if it belongs to a model of another width.
        """
        for name, tensor in self._tensors.items():
            value = state[name]
            if value.shape != tensor.shape:
                raise InputError(
                    f"value head {source}",
                    wanted=f"{tensor.numel()} weights, as many as the model's hidden states have numbers",
                    got=str(value.numel()),
                    fix="go on from the policy that the head was trained with",
                )
            tensor.data.copy_(value)
            moments = {moment: state[f"{name}.{moment}"].to(tensor.device) for moment in _MOMENTS}
            self._optimizer.state[tensor] = {"step": state["num_steps"].float(), **moments}
        self.num_steps = int(state["num_steps"])

    def save(self, folder: Path) -> None:
        """Write the state as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state(), folder / _FILE)

    def restore(self, folder: Path) -> None:
        """Go on from a saved head. Raises as `set_state`."""
        self.set_state(load_file(folder / _FILE), source=folder)


def new_value_head(losses: Sequence[Loss], model: Any, device: torch.device) -> ValueHead | None:
    """A head for a model, if objectives need one; its learning rate is the first such objective's."""
    rate = next((loss.params.value_learning_rate for loss in losses if "value" in loss.objective.needs), None)
    return None if rate is None else ValueHead(hidden_width(model), learning_rate=rate, device=device)


def hidden_width(model: Any) -> int:
    """Numbers in a hidden state, as the output embedding takes them.

    Raises:
        InputError: if the model has no output embedding that says so.
    """
    width = getattr(model.get_output_embeddings(), "in_features", None)
    if width is None:
        raise InputError(
            f"policy {type(model).__name__}",
            wanted="a linear output embedding, for the value head to read its input",
            got=type(model.get_output_embeddings()).__name__,
            fix="choose an objective without a value head",
        )
    return width


@contextmanager
def final_hidden_states(model: Any) -> Iterator[list[torch.Tensor]]:
    """A list that gets the last layer's hidden states of every forward meanwhile, each [N, T, H]."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        hook.remove()
