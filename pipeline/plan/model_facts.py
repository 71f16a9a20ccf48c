"""What a model's small files say about its size: ``config.json`` and the safetensors headers, no weights.

Where there are no weights to look into, transformers lays the model out from its shapes, without making a tensor.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import read_json
from stages.errors import InputError

_LENGTH_BYTES = 8  # of a safetensors file's header, before it
_INDEX = "model.safetensors.index.json"
_HEADS = ("lm_head.", "embed_out.", "output.")  # of output embeddings that have a tensor of their own
_STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The sizes of one model.

    Attributes:
        num_parameters: as stored; tied weights once.
        hidden_size, intermediate_size, num_layers, vocab_size: of the network.
        num_heads, num_kv_heads, head_size: of its attention.
        context: tokens it was made for; None where its config does not say.
        chat_template: whether its tokenizer has one; None where no tokenizer is there.
        tied: whether the output embedding is the input's.
    """

    num_parameters: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    context: int | None
    chat_template: bool | None
    tied: bool

    def weights_bytes(self, dtype: str) -> int:
        """Bytes of the weights in ``float32`` or ``bfloat16``."""
        return self.num_parameters * bytes_of(dtype)

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of cached keys and values a token, all layers full."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * bytes_of(dtype)


def bytes_of(dtype: str) -> int:
    """Bytes of a number in ``float32`` or ``bfloat16``."""
    return 4 if dtype == "float32" else 2


def read_facts(folder: Path) -> ModelFacts | None:
    """The facts about a Hugging Face folder; None where its config does not tell.

    Raises:
        InputError: for a file that is damaged.
    """
    if not (folder / "config.json").is_file():
        return None
    config, counted, chat_template = read_json(folder / "config.json"), _counted(folder), _has_chat_template(folder)
    if counted is None:
        return facts_of_shapes(config, chat_template=chat_template)
    return facts_from(config, num_parameters=counted[0], tied=counted[1], chat_template=chat_template)


def facts_of_shapes(shapes: Mapping[str, Any], *, chat_template: bool | None = None) -> ModelFacts | None:
    """The facts about a model of these shapes, as a ``config.json`` has them; None where transformers has none such."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    made = str((shapes.get("architectures") or [""])[0])
    auto = "SequenceClassification" if made.endswith("ForSequenceClassification") else "CausalLM"
    try:
        config = transformers.AutoConfig.for_model(**shapes)
        with torch.device("meta"):
            model = getattr(transformers, f"AutoModelFor{auto}").from_config(config, trust_remote_code=False)
    except Exception:  # transformers raises nearly anything for shapes that go with no model
        return None
    head = model.get_output_embeddings()
    return facts_from(
        config.to_dict(),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
        chat_template=chat_template,
    )


def facts_from(
    config: Mapping[str, Any], *, num_parameters: int, tied: bool, chat_template: bool | None
) -> ModelFacts | None:
    """The facts in a ``config.json``, by the names that Llama's and GPT-2's kin use; None where one is missing."""
    text = {**config, **config.get("text_config", {})}

    def found(*names: str) -> int | None:
        return next((int(text[name]) for name in names if text.get(name)), None)

    hidden, layers = found("hidden_size", "n_embd", "d_model"), found("num_hidden_layers", "n_layer", "num_layers")
    heads, vocab = found("num_attention_heads", "n_head"), found("vocab_size")
    if hidden is None or layers is None or heads is None or vocab is None:
        return None
    return ModelFacts(
        num_parameters=num_parameters,
        hidden_size=hidden,
        intermediate_size=found("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden,
        num_layers=layers,
        vocab_size=vocab,
        num_heads=heads,
        num_kv_heads=found("num_key_value_heads") or heads,
        head_size=found("head_dim") or hidden // heads,
        context=found("max_position_embeddings", "n_positions"),
        chat_template=chat_template,
        tied=tied,
    )


def _counted(folder: Path) -> tuple[int, bool] | None:
    """How many numbers a folder's safetensors hold, and whether there is no output embedding among them.

    Taken from their index where the files themselves are not there; None without either.

    Raises:
        InputError: for a header that cannot be read.
    """
    tensors = {name: entry for file in sorted(folder.glob("*.safetensors")) for name, entry in _header(file).items()}
    if tensors:
        return sum(math.prod(tensor["shape"]) for tensor in tensors.values()), _without_head(tensors)
    if not (folder / _INDEX).is_file():
        return None
    found, config = read_json(folder / _INDEX), read_json(folder / "config.json")
    index, tied = found.get("metadata", {}), _without_head(found.get("weight_map", {}))
    each = _STORED_BYTES.get(config.get("dtype") or config.get("torch_dtype"))
    if "total_parameters" in index:
        return int(index["total_parameters"]), tied
    return (int(index["total_size"]) // each, tied) if each and "total_size" in index else None


def _without_head(names: Iterable[str]) -> bool:
    return not any(name.startswith(_HEADS) for name in names)


def _header(file: Path) -> dict[str, Any]:
    """A safetensors file's table of tensors, without its free metadata."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(_LENGTH_BYTES))
            size = file.stat().st_size
            if _LENGTH_BYTES + length > size:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(opened.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise InputError(
            str(file), wanted="a whole safetensors file", got=str(error), fix="copy or download it again"
        ) from None
    header.pop("__metadata__", None)
    return header


def _has_chat_template(folder: Path) -> bool | None:
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return None
    beside = any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json"))
    return beside or bool(read_json(settings).get("chat_template"))
