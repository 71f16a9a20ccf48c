"""Adapters of low rank by peft (LoRA, arXiv:2106.09685): put into a model, merged into its weights, written.

A linear map ``W`` is trained as ``W + alpha / r * B @ A``: only A and B move, B from 0, so that a new adapter changes
nothing. What is published is the sum. This is the only file that knows peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stages.errors import ConfigError
from stages.seeds import hashed_seed
from stages.update.config import LoraConfig
from stages.update.model import load_policy

_NAME = "default"  # peft's, of a model's only adapter
_A, _B = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"


def add_adapters(model: Any, config: LoraConfig, *, round: int) -> None:
    """Put new adapters into a model, in place, and freeze all else.

    Args:
        round: that made the model's weights, by which A is drawn: equal on every rank, and however the rounds before
            were cut into forwards, since weights that differ in their last bits get the same A.

    Raises:
        ConfigError: if there is no such linear map in the model, or the output embedding is among them.
    """
    from peft import LoraConfig as Options
    from peft import inject_adapter_in_model

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    options = Options(r=config.r, lora_alpha=config.alpha, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    wanted = "names of linear maps within the model's layers"
    known = ", ".join(sorted({name.rpartition(".")[2] for name in _linear_maps(model)}))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hashed_seed("adapter", round))
            inject_adapter_in_model(options, model)
    except ValueError as error:
        raise ConfigError(
            "update.lora.target_modules", wanted=wanted, got=str(error).partition(". ")[0], fix=f"of {known}"
        ) from error
    adapted = {name.rpartition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    if others := sorted(name for name in adapted if not _is_linear_map(model.get_submodule(name).base_layer, model)):
        raise ConfigError("update.lora.target_modules", wanted=wanted, got=others[0], fix=f"of {known}")


def _linear_maps(model: Any) -> Iterator[str]:
    return (name for name, module in model.named_modules() if _is_linear_map(module, model))


def _is_linear_map(module: Any, model: Any) -> bool:
    """Whether it is one that an adapter may be put on; the output embedding's log-probs are computed without."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return isinstance(module, (torch.nn.Linear, Conv1D)) and module is not getattr(head, "base_layer", head)


@torch.no_grad()
def merged_policy(folder: Path, adapters: Mapping[str, torch.Tensor], config: LoraConfig) -> Any:
    """The model in a folder in float32, with adapters merged into it.

    Args:
        adapters: the trained parameters by name, in float32.
    """
    from transformers.pytorch_utils import Conv1D

    model = load_policy(folder, dtype="float32")
    for name, a_RI in adapters.items():
        if name.endswith(_A):
            module = model.get_submodule(name.removesuffix(_A))
            change_OI = config.alpha / config.r * (adapters[name.removesuffix(_A) + _B] @ a_RI)
            module.weight.add_(change_OI.T if isinstance(module, Conv1D) else change_OI)
    return model


def save_adapters(model: Any, folder: Path, adapters: Mapping[str, torch.Tensor], *, base: Path) -> None:
    """Write adapters as peft does, so that ``PeftModel.from_pretrained`` puts them on the model in `base`.

    Args:
        model: that they were trained in.
        adapters: its trained parameters by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": t.contiguous() for name, t in adapters.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    options = model.peft_config[_NAME]
    options.base_model_name_or_path, options.inference_mode = str(base), True
    options.save_pretrained(str(folder))
