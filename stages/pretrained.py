"""Loading a model of transformers from its folder, so that it computes what its config says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError

if TYPE_CHECKING:
    import torch


def load_model(auto_class: Any, folder: Path, *, dtype: torch.dtype | str, where: str, wanted: str) -> Any:
    """A model in `dtype` (``auto``: as it was saved), from safetensors alone.

    Args:
        auto_class: the class of transformers that picks the architecture, such as ``AutoModelForCausalLM``.
        where: names the model in an error, as `wanted` says what it should be.

    Raises:
        InputError: if transformers cannot load it.
    """
    try:
        return auto_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, **_attention(folder)
        )
    except Exception as error:  # transformers raises nearly anything for a broken folder
        raise InputError(
            where,
            wanted=wanted,
            got=f"{type(error).__name__}: {error}",
            fix=f"check the folder with {auto_class.__name__}.from_pretrained",
        ) from error


def _attention(folder: Path) -> dict[str, str]:
    """Plain attention where its logits are capped (Gemma 2): torch's fused one, the default, leaves the cap out."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
