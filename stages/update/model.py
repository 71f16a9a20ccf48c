"""A policy as a Hugging Face folder: loading it to train, and writing it with its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import ConfigError
from stages.pretrained import load_model
from stages.protocols import Weights
from stages.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch

# What belongs to a policy besides weights and config; copied as it is, so that no token changes its meaning.
_CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)


def load_policy(folder: Path, *, dtype: str) -> Any:
    """A causal language model in `dtype`, with every dropout at 0.

    Raises:
        InputError: if transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = load_model(
        AutoModelForCausalLM,
        folder,
        dtype=getattr(torch, dtype),
        where=f"policy {folder}",
        wanted="a causal language model that transformers can load",
    )
    disable_dropout(model)
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Set to 0 what is random in training (dropout, skipped layers, noise in a router).

    Policy and reference must agree on equal weights, and an update must not depend on torch's random state.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def recompute_activations(model: Any) -> None:
    """Keep only the layers' inputs for the backward pass, which computes the rest again.

    Raises:
        ConfigError: if the model cannot.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            "update.gradient_checkpointing",
            wanted="a model whose layers transformers can compute again",
            got=str(error),
            fix="--set update.gradient_checkpointing=false, and a smaller update.micro_batch_size for the memory",
        ) from error


def publish_policy(
    model: Any,
    folder: Path,
    state: Mapping[str, torch.Tensor],
    *,
    dtype: str,
    origin: Weights,
    pad_token: str | None,
    round: int,
) -> Weights:
    """Write a policy with its tokenizer to ``folder/policy``, and a float32 master to ``folder/master`` if needed.

    Args:
        state: its weights, in float32.
        origin: what it was made from.
        round: that made it.
    """
    targets = {"policy": dtype} | ({} if dtype == "float32" else {"master": "float32"})
    for name, kind in targets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_policy(model, folder / name, state, dtype=kind)
        copy_tokenizer(origin.path, folder / name, pad_token=pad_token)
    master = folder / "master" if "master" in targets else None
    return Weights.found(folder / "policy", round=round, master=master)


def save_policy(model: Any, folder: Path, state: Mapping[str, torch.Tensor], *, dtype: str) -> None:
    """Write `state` as the weights of a model like `model`, in `dtype`, as safetensors.

    Args:
        state: every parameter once (of tied ones, one).
    """
    import torch

    kind = getattr(torch, dtype)
    weights = {name: (t.to(kind) if t.is_floating_point() else t).contiguous() for name, t in state.items()}
    model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter of a policy's folder by the model's name for it, tied ones once.

    A file's own names may be others: of a mixture of experts transformers writes each expert apart.
    """
    from transformers import AutoModelForCausalLM

    model = load_model(
        AutoModelForCausalLM,
        folder,
        dtype="auto",
        where=f"policy {folder}",
        wanted="a causal language model that transformers can load",
    )
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer of a model once."""
    kept = persistent_buffers(model)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | buffers


def persistent_buffers(model: torch.nn.Module) -> set[str]:
    """The names of the buffers that belong to a model's weights."""
    persistent = set()
    for prefix, child in model.named_modules():
        local = set(child._buffers) - child._non_persistent_buffers_set
        persistent |= {f"{prefix}.{name}" if prefix else name for name in local}
    return persistent


def copy_tokenizer(source: Path, target: Path, *, pad_token: str | None) -> None:
    """Carry the tokenizer and generation config over, byte for byte unless a pad token was asked for."""
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    if pad_token is not None:
        load_tokenizer(source, pad_token=pad_token, key="policy.path").save_pretrained(target)
