"""One rank's engine, with the weights and AdamW's moments in it: taken from folders, and written to them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stages.protocols import Moments, Weights
from stages.update import checkpoint, deepspeed_engine
from stages.update.allocation import give_back_freed_memory
from stages.update.checkpoint import Resumed
from stages.update.config import UpdateConfig
from stages.update.exactness import Sharing
from stages.update.lora import add_adapters, merged_policy, save_adapters
from stages.update.model import load_policy, publish_policy, read_weights, state_of
from stages.update.step import refuse_nonfinite
from stages.update.tensor_files import TensorFiles, write_tensors
from stages.weights import refuse_changed_weights, weights_sha256

_NEW = "new"  # moments of 0, before any step


class Holder:
    """Every method is called on all ranks together; arguments as of `stages.update.worker.Trainer`.

    Attributes:
        engine: None until weights are loaded, and while it rests.
        sharing: whether the model's answers may share prompts.
        identity: of the weights in the engine; None once a step has changed them.
        num_steps: made since they were loaded.
    """

    def __init__(self, config: UpdateConfig, *, dtype: str, device: torch.device, pad_token: str | None) -> None:
        self.config, self._dtype, self._device, self._pad_token = config, dtype, device, pad_token
        self.engine: Any = None
        self.sharing: Sharing
        self.identity: str | None = None
        self.num_steps = 0
        self._origin: Weights | None = None  # where the weights came from, with the tokenizer
        self._moments: str | None = _NEW  # what names the moments in the engine's optimizer; None: steps were made

    def configure(self, config: UpdateConfig) -> None:
        """Update as `config` says, from the next `load` on."""
        if deepspeed_engine.engine_settings(config) != deepspeed_engine.engine_settings(self.config):
            self.identity = None
        self.config = config

    def load(self, weights: Weights) -> None:
        """Hold these weights; where there is a float32 master, from that.

        Weights that are held already, since an update has just made them, are not read again.
        """
        if self.identity != weights.identity:
            self.identity = None
            if dist.get_rank() == 0:
                weights.refuse_changed()
            self._stop()
            model = load_policy(weights.path, dtype=self._dtype)
            if self.config.lora is not None:
                add_adapters(model, self.config.lora, round=weights.round)
            model = model.to(self._device)
            self.engine = deepspeed_engine.start_engine(model, self.config, dtype=self._dtype, device=self._device)
            self.sharing = Sharing(self.engine, self._device, dtype=self._dtype)
            if weights.master is not None and self.config.lora is None:
                deepspeed_engine.set_float32_state(self.engine, read_weights(weights.master))
            self.identity, self._moments = weights.identity, _NEW
        self._origin, self.num_steps = weights, 0

    def rest(self) -> None:
        """Let go of the device's memory for others: model and optimizer go, and the next `load` reads weights again.

        Nothing is lost by it: between two jobs a trainer holds nothing but weights that were published, or given.
        """
        self._stop()
        self.identity, self._origin, self.num_steps = None, None, 0
        gc.collect()  # a stopped engine is held by cycles
        give_back_freed_memory()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def stepping(self) -> None:
        """Called before a step: even one that is refused may change the weights."""
        self.num_steps += 1
        self.identity = self._moments = None

    def resume(self, folder: Path) -> Resumed:
        """Hold a checkpoint's weights and moments; those of the update's start were loaded before."""
        self.stepping()
        resumed = checkpoint.restore(folder, self.engine)
        self.num_steps = len(resumed.steps)
        return resumed

    def _stop(self) -> None:
        if self.engine is not None:
            deepspeed_engine.stop_engine(self.engine)
            self.engine = None

    def save(self, folder: Path, *, round: int) -> Weights:
        """Write policy and tokenizer to ``folder/policy``, and a float32 master to ``folder/master`` if one is needed.

        Adapters go to ``folder/adapter``; the policy is then the start with them merged. Trained weights are gathered
        one at a time; rank 0 keeps and writes them.

        Returns:
            What was written, on every rank; `round` is the round that made it.
        """
        assert self.engine is not None and self._origin is not None
        lora = self.config.lora
        tensors = (deepspeed_engine.float32_state if lora is None else deepspeed_engine.trained_state)(self.engine)
        state = self._kept_by_rank_0(tensors)
        written: list[Any] = [None]
        if dist.get_rank() == 0:
            model = deepspeed_engine.model_of(self.engine)
            if lora is not None:
                start = self._origin.master or self._origin.path
                save_adapters(model, folder / "adapter", state, base=start)
                model = merged_policy(start, state, lora)
                state = state_of(model)
            written[0] = publish_policy(
                model, folder, state, dtype=self._dtype, origin=self._origin, pad_token=self._pad_token, round=round
            )
        dist.broadcast_object_list(written, src=0)
        result: Weights = written[0]
        if lora is not None:  # a sum rounds: only weights that are read again are those that were written
            self.load(result)
        self.identity = result.identity
        return result

    def _kept_by_rank_0(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Tensors that all ranks gather, on the CPU of rank 0 alone.

        Raises:
            StageError: on all ranks, if one is not finite.
        """
        kept = {}
        for name, tensor in tensors:
            refuse_nonfinite(tensor, "policy", step=self.num_steps - 1, config=self.config)
            if dist.get_rank() == 0:
                kept[name] = tensor.cpu()
        return kept

    def save_moments(self, folder: Path) -> Moments:
        """Write AdamW's moments in float32. Rank 0 writes; they are gathered on all, one at a time."""
        written, tensors = [""], deepspeed_engine.moments(self.engine)
        if dist.get_rank() == 0:
            write_tensors(folder, tensors)
            written = [weights_sha256(folder)]
        else:
            for _ in tensors:
                pass
        dist.broadcast_object_list(written, src=0)
        self._moments = written[0]
        return Moments(folder, written[0])

    def take_moments(self, moments: Moments | None) -> None:
        """Have AdamW go on with saved moments, or anew; those that it holds already are not read again.

        Raises:
            StageError: if the folder no longer holds them.
        """
        if self._moments == (_NEW if moments is None else moments.sha256):
            return
        if moments is None:
            deepspeed_engine.reset_moments(self.engine)
            return
        if dist.get_rank() == 0:
            refuse_changed_weights(moments.path, moments.sha256)
        deepspeed_engine.set_moments(self.engine, TensorFiles(moments.path))
