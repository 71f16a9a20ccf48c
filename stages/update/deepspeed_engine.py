"""The only file that knows DeepSpeed: an engine whose accumulation boundary is ours, and its float32 weights.

``managed_gradient_accumulation: false`` lets the trainer call backward as often as a batch needs and step once, so that
a smaller last batch needs no padding steps. Clipping is always written out: DeepSpeed clips to 1.0 when told nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.update.config import UpdateConfig

if TYPE_CHECKING:
    import torch


def start_engine(model: Any, config: UpdateConfig, *, dtype: str, device: torch.device) -> Any:
    """A DeepSpeed engine around `model` with AdamW, under the configured ZeRO stage.

    Gradients are averaged over the ranks, and accumulate until ``engine.step()``.
    """
    import torch

    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": config.max_grad_norm,
            "zero_optimization": {"stage": config.zero_stage},
            "bf16": {"enabled": dtype == "bfloat16"},
            # Told nothing, DeepSpeed adds up micro-batches in bfloat16, and the result depends on their size.
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        },
    )
    engine.train()
    return engine


def stop_engine(engine: Any) -> None:
    """Let go of an engine's hooks and buffers."""
    engine.destroy()


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def float32_state(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer once, in float32 on the CPU; a call that all ranks make together.

    Under bfloat16 these are the optimizer's float32 masters, not the rounded weights.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if engine.bfloat16_enabled() else None
        if master is None:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                master = parameter.detach().clone()
        state[name] = master.detach().float().cpu().clone()
    for name, buffer in engine.module.named_buffers():
        if name in _persistent_buffers(engine.module):
            state[name] = buffer.detach().cpu().clone()
    return state


def set_float32_state(engine: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Put float32 weights under the rounded ones that the engine started from; a call that all ranks make together."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        safe_set_full_fp32_param(parameter, state[name].to(parameter.device))


def _persistent_buffers(module: Any) -> set[str]:
    persistent = set()
    for prefix, child in module.named_modules():
        local = set(child._buffers) - child._non_persistent_buffers_set
        persistent |= {f"{prefix}.{name}" if prefix else name for name in local}
    return persistent
