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
        InputError: if transformers cannot load it, or weights are missing in its files or of another shape: it would
            fill them in at random.
    """
    try:
        model, found = auto_class.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_attention(folder),
        )
    except Exception as error:  # transformers raises nearly anything for a broken folder
        raise InputError(
            where,
            wanted=wanted,
            got=f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}",
            fix=f"check the folder with {auto_class.__name__}.from_pretrained",
        ) from error
    for what, names in (
        ("not in its files", sorted(found["missing_keys"])),
        ("of another shape than its config.json says", sorted(name for name, *_ in found["mismatched_keys"])),
    ):
        if names:
            raise InputError(
                where,
                wanted=f"{wanted}, with all of its weights",
                got=f"{len(names)} weights {what}, {names[0]} among them",
                fix="copy the whole folder again; a head that was never trained has to be trained first",
            )
    return model


def num_embeddings(folder: Path) -> int:
    """How many tokens a model has embeddings for, from its config; a large number where that does not say.

    Raises:
        InputError: see `read_config`.
    """
    return int(getattr(read_config(folder).get_text_config(), "vocab_size", None) or 1 << 30)


def read_config(folder: Path) -> Any:
    """A model's config as transformers reads it, with the defaults that its file leaves out.

    Raises:
        InputError: if transformers does not know it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything for a broken config
        raise InputError(
            f"{folder / 'config.json'}",
            wanted="the config of a model that transformers knows",
            got=(str(error).splitlines() or [type(error).__name__])[0],
            fix="mend it, or use another model; code that comes with a model is never run",
        ) from error


def _attention(folder: Path) -> dict[str, str]:
    """Plain attention where its logits are capped (Gemma 2): torch's fused one, the default, leaves the cap out."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
