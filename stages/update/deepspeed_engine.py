"""The only file that knows DeepSpeed: an engine whose accumulation boundary is ours, and its float32 weights.

``managed_gradient_accumulation: false`` lets the trainer call backward as often as a batch needs and step once, so that
a smaller last batch needs no padding steps. Clipping is always written out: DeepSpeed clips to 1.0 when told nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.update.config import UpdateConfig
from stages.update.model import persistent_buffers, recompute_activations

if TYPE_CHECKING:
    import torch


MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, as torch names them."""

_SETTINGS = (
    "zero_stage",
    "gradient_checkpointing",
    "max_grad_norm",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "lora",
)


def engine_settings(config: UpdateConfig) -> list[Any]:
    """What an engine is started with, and cannot change."""
    return [getattr(config, name) for name in _SETTINGS]


def start_engine(model: Any, config: UpdateConfig, *, dtype: str, device: torch.device) -> Any:
    """A DeepSpeed engine around a `Scorer` of `model` with AdamW, under the configured ZeRO stage.

    Gradients are averaged over the ranks, and accumulate until ``engine.step()``.

    Raises:
        ConfigError: if activations are to be recomputed and the model cannot.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch

    from stages.update.scorer import Scorer

    # Told that it fits, DeepSpeed compiles an operation for 40 s that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if config.gradient_checkpointing:
        recompute_activations(model)
    model.train()
    with_zero = config.zero_stage > 0
    scorer = Scorer(model)
    module, optimizer = _with_zero(scorer, config) if with_zero else _without_zero(scorer, config, dtype=dtype)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": config.max_grad_norm if with_zero else 0.0,  # there the optimizer clips
            "zero_optimization": {"stage": config.zero_stage} | _offload(config, device),
            "bf16": {"enabled": with_zero and dtype == "bfloat16"},
            # Told nothing, DeepSpeed adds up micro-batches and ranks in bfloat16, and the result depends on their
            # number: two ranks were 1% of an update's length away from one.
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        },
    )
    if not with_zero and torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # it would copy all gradients, for nobody
    return engine


def _with_zero(scorer: Any, config: UpdateConfig) -> tuple[Any, Any]:
    """Module and optimizer for stages 1 to 3, which make their own masters."""
    import torch

    options = _adam_options(config)
    if config.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return scorer, DeepSpeedCPUAdam(_trained(scorer), adamw_mode=True, **options)
    return scorer, torch.optim.AdamW(_trained(scorer), fused=True, **options)


def _offload(config: UpdateConfig, device: torch.device) -> dict[str, Any]:
    if not config.offload_optimizer:
        return {}
    return {"offload_optimizer": {"device": "cpu", "pin_memory": device.type == "cuda"}}


def _without_zero(scorer: Any, config: UpdateConfig, *, dtype: str) -> tuple[Any, Any]:
    """Module and optimizer for stage 0: float32 parameters, and an optimizer that clips and tells the norm."""
    from stages.update.unsharded import ClippingAdamW, Masters

    module = Masters(scorer) if dtype == "bfloat16" else scorer
    optimizer = ClippingAdamW(_trained(module), max_norm=config.max_grad_norm, fused=True, **_adam_options(config))
    if isinstance(module, Masters):
        optimizer.register_step_post_hook(lambda *_: module.round())
    return module, optimizer


def _trained(module: Any) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _adam_options(config: UpdateConfig) -> dict[str, Any]:
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.weight_decay,
    }


def model_of(engine: Any) -> Any:
    """The model that an engine was started around."""
    return _scorer(engine).model


def _scorer(engine: Any) -> Any:
    return engine.module if _masters(engine) is None else engine.module.scorer


def stop_engine(engine: Any) -> None:
    """Let go of an engine's hooks and buffers."""
    _scorer(engine).release()
    engine.destroy()


def reset_moments(engine: Any, *, num_steps: int = 0) -> None:
    """Make an engine's optimizer a new one: moments of 0, and `num_steps` counted.

    In place, since DeepSpeed keeps views of the moments from the first step on, and would go on reading the old ones.
    """
    import torch

    wrapped = engine.optimizer
    optimizer = getattr(wrapped, "optimizer", wrapped)
    flat = getattr(wrapped, "fp32_partitioned_groups_flat", None)  # under stage 3 the groups are empty between steps
    for part in flat or [part for group in optimizer.param_groups for part in group["params"]]:
        state = optimizer.state[part]
        for name in MOMENTS:
            state[name] = state[name].zero_() if name in state else torch.zeros_like(part, requires_grad=False)
        counts = isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's CPU Adam takes a plain number
        state["step"] = torch.tensor(float(num_steps), device=part.device) if counts else num_steps
    if hasattr(wrapped, "_lazy_init_hp_params_optimizer_state"):
        wrapped._lazy_init_hp_params_optimizer_state()


def moments(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """AdamW's moments in float32, ``NAME.exp_avg`` and ``NAME.exp_avg_sq``, and the ``num_steps`` counted.

    All ranks go through them together. Of a parameter that never had a gradient they are 0.
    """
    import torch
    from deepspeed.utils import safe_get_full_optimizer_state

    wrapped = engine.optimizer
    optimizer, masters = getattr(wrapped, "optimizer", wrapped), _masters(engine) or {}
    yield "num_steps", torch.tensor(max((int(state["step"]) for state in optimizer.state.values() if state), default=0))
    for name, parameter in _trained_by_name(engine):
        for moment in MOMENTS:
            value = safe_get_full_optimizer_state(parameter, moment)
            if value is None:
                value = optimizer.state.get(masters.get(name, parameter), {}).get(moment)
            yield f"{name}.{moment}", torch.zeros_like(parameter, dtype=torch.float32) if value is None else value


def set_moments(engine: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Go on with moments as `moments` gives them; a call that all ranks make together."""
    reset_moments(engine, num_steps=int(state["num_steps"]))
    wrapped = engine.optimizer
    optimizer, masters = getattr(wrapped, "optimizer", wrapped), _masters(engine) or {}
    for name, parameter in _trained_by_name(engine):
        for moment in MOMENTS:
            value = state[f"{name}.{moment}"].to(parameter.device)
            own = optimizer.state.get(masters.get(name, parameter))
            if own is not None:
                own[moment].copy_(value)
            else:
                _set_full(parameter, value, moment)


def _trained_by_name(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model_of(engine).named_parameters() if p.requires_grad]


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def float32_state(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer once, by name, in float32.

    All ranks go through them together; each is a copy, and only one at a time is whole. Under bfloat16 these are the
    optimizer's float32 masters, not the rounded weights.
    """
    model = model_of(engine)
    kept = persistent_buffers(model)
    yield from _float32_of(engine, list(model.named_parameters()))
    yield from ((name, buffer.detach().clone()) for name, buffer in model.named_buffers() if name in kept)


def trained_state(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """As `float32_state`, of the parameters that are trained."""
    return _float32_of(engine, _trained_by_name(engine))


def _float32_of(
    engine: Any, parameters: Sequence[tuple[str, torch.nn.Parameter]]
) -> Iterator[tuple[str, torch.Tensor]]:
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    masters = _masters(engine) or {}
    for name, parameter in parameters:
        with_master = engine.bfloat16_enabled() and parameter.requires_grad
        master = safe_get_full_fp32_param(parameter) if with_master else masters.get(name)
        if master is not None:
            yield name, master.detach().clone()
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            whole = parameter.detach().to(torch.float32, copy=True)
        yield name, whole


def set_float32_state(engine: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Hold these float32 weights from now on, and their roundings; a call that all ranks make together.

    Args:
        state: of all parameters or of some, by name.
    """
    import deepspeed

    masters = _masters(engine) or {}
    for name, parameter in model_of(engine).named_parameters():
        if name not in state:
            continue
        value = state[name].to(parameter.device)
        if name in masters:
            masters[name].data.copy_(value)
        else:
            _set_full(parameter, value)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
            parameter.data.copy_(value)


def _set_full(parameter: torch.nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
    """Put a whole float32 value, or moment, into the parts that DeepSpeed's optimizer holds; without ZeRO nothing."""
    import torch
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        return
    # DeepSpeed's functions for whole values read beyond their end where the ranks do not divide them.
    size = parameter.ds_tensor.numel()
    mine = value.flatten()[torch.distributed.get_rank() * size :][:size]
    part = torch.nn.functional.pad(mine, (0, size - len(mine)))
    if moment is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, moment)


def _masters(engine: Any) -> dict[str, torch.nn.Parameter] | None:
    """The masters that are not DeepSpeed's own, by name."""
    from stages.update.unsharded import Masters

    return engine.module.by_name if isinstance(engine.module, Masters) else None
