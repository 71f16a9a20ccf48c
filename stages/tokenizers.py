"""Loading a tokenizer, and refusing one that could not work before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, *, pad_token: str | None, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a pad token and an EOS.

    Args:
        folder: a Hugging Face model folder.
        pad_token: the token to pad with, where the tokenizer names none.
        key: the config key of the model, for the error's fix.

    Raises:
        InputError: if it cannot be read, has no EOS, or no pad token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything for a broken folder
        raise InputError(
            f"{key} {folder}",
            wanted="a folder with a tokenizer that transformers can load",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            fix="save the tokenizer beside the model: tokenizer.save_pretrained(folder)",
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{key} {folder}",
            wanted="a tokenizer with an EOS token, by which an answer stops",
            got="eos_token is not set",
            fix='set "eos_token" in tokenizer_config.json to the token that ended the answers in training',
        )
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise InputError(
                f"{key} {folder}",
                wanted="pad_token: a token of the tokenizer",
                got=repr(pad_token),
                fix=f"for example pad_token: {tokenizer.eos_token!r}",
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        base = key.removesuffix(".path")
        raise InputError(
            f"{key} {folder}",
            wanted="a tokenizer with a pad token",
            got="pad_token is not set",
            fix=f"--set {base}.pad_token='{tokenizer.eos_token}' (padding is masked; the EOS will do)",
        )
    return tokenizer
