"""A sequence classifier as a reward: prompt and answer through its own tokenizer and template, one score out.

Answers are batched by length, and a score does not depend on the batch it was in: padding stands on the right behind
an attention mask, and the model's own head reads the score at the last token that is not the pad token.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from stages.errors import InputError
from stages.pretrained import load_model
from stages.protocols import Turn
from stages.score.config import ModelReward
from stages.tokenizers import load_tokenizer, refuse_foreign_tokenizer, refuse_unknown_ids, render_chat
from stages.vocab import RewardRole
from stages.weights import refuse_changed_weights, weights_sha256


class RewardModel:
    """`stages.protocols.Reward` on a Hugging Face sequence classifier with one score.

    Args:
        config: the reward's settings.
        folder: where the model lies.
        key: its config key, for errors.
        num_threads: CPU threads for this process where there is no GPU.
        use_gpu: whether this process has a GPU.

    Raises:
        InputError: if model or tokenizer cannot be used.
    """

    def __init__(
        self, config: ModelReward, *, name: str, folder: Path, key: str, num_threads: int, use_gpu: bool
    ) -> None:
        import torch

        self.name, self.role, self.weight = name, config.role, config.weight
        self._where = f"{key} {folder}"
        self._folder, self._dtype = folder, config.dtype
        self._sha256: str | None = None  # of the weights, where they may have to be read again
        self._batch_tokens, self._text_pair = config.batch_tokens, config.text_pair
        self._template_kwargs = config.chat_template_kwargs
        self._device = torch.device("cuda" if use_gpu else "cpu")
        if not use_gpu:
            torch.set_num_threads(num_threads)
        self._tokenizer = load_tokenizer(folder, pad_token=config.pad_token, key=key, answers=False)
        self._tokenizer.padding_side = "right"
        self._model: Any = self._read_model().to(self._device)
        self._num_embeddings = int(self._model.get_input_embeddings().num_embeddings)
        refuse_foreign_tokenizer(self._tokenizer, self._num_embeddings, where=self._where)
        self._context = _context(self._model)

    name: str
    role: RewardRole
    weight: float

    @property
    def sees(self) -> Literal["turns", "texts"]:
        return "turns"

    def __call__(
        self, prompts: Sequence[Turn], completions: Sequence[Turn], columns: Mapping[str, Sequence[object]]
    ) -> list[float | None]:
        """One score an answer; None for one that is longer than the reward model's context."""
        import torch

        model = self._ready_model()
        rows = [self._encoded(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores: list[float | None] = [None] * len(rows)
        for batch in self._batches([len(row["input_ids"]) for row in rows]):
            padded = self._tokenizer.pad([rows[row] for row in batch], return_tensors="pt").to(self._device)
            with torch.inference_mode():
                logits_B1 = model(**padded).logits
            for row, score in zip(batch, logits_B1.squeeze(-1).float().tolist(), strict=True):
                scores[row] = score
        return scores

    def rest(self) -> None:
        """See `stages.protocols.Reward`: a model leaves a GPU for the machine's memory (not run: no GPU), else it goes.

        The next call moves it back, or reads it again and refuses other weights than before with a `StageError`.
        """
        if self._device.type == "cpu":
            self._model = None
            gc.collect()
        else:
            import torch

            self._model = self._model.to("cpu")
            torch.cuda.empty_cache()

    def _ready_model(self) -> Any:
        if self._model is None:
            self._model = self._read_model()
        self._model = self._model.to(self._device)
        return self._model

    def _read_model(self) -> Any:
        import torch
        from transformers import AutoModelForSequenceClassification

        if self._sha256 is not None:
            refuse_changed_weights(self._folder, self._sha256)
        elif self._device.type == "cpu":
            self._sha256 = weights_sha256(self._folder)
        model = load_model(
            AutoModelForSequenceClassification,
            self._folder,
            dtype=getattr(torch, self._dtype),
            where=self._where,
            wanted="a sequence classifier that transformers can load",
        )
        model.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        return model.eval()

    def _encoded(self, prompt: Turn, completion: Turn) -> dict[str, list[int]]:
        """The model's inputs by name: text as it is, a chat through this model's own template."""
        encode = self._tokenizer
        if not isinstance(prompt, str) or not isinstance(completion, str):
            chat = render_chat(
                encode, [*prompt, *completion], self._template_kwargs, generation_prompt=False, where=self._where
            )
            found = encode(chat, add_special_tokens=False)
        elif self._text_pair:
            found = encode(prompt, completion)
        else:
            found = encode(prompt + completion)
        refuse_unknown_ids(found["input_ids"], self._num_embeddings, where=self._where)
        return {name: found[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in found}

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Row numbers by length, at most ``batch_tokens`` with padding a batch; too long ones are left out."""
        order = sorted((row for row in range(len(lengths)) if lengths[row] <= self._context), key=lengths.__getitem__)
        batch: list[int] = []
        for row in order:
            if batch and lengths[row] * (len(batch) + 1) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def _context(model: Any) -> int:
    """The most tokens that a model has positions for."""
    import torch

    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa's kind counts positions from behind the padding's.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(module.num_embeddings) - offset
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)


def check_reward_model(config_json: Mapping[str, Any], *, where: str) -> None:
    """Refuse, from its ``config.json`` alone, a model that is no sequence classifier with one score.

    Raises:
        InputError: for another kind of model, or another number of classes.
    """
    kinds = config_json.get("architectures") or ["none named"]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise InputError(
            where,
            wanted="a reward model: architectures with ...ForSequenceClassification",
            got=", ".join(kinds),
            fix="name a reward model; a causal language model cannot score answers",
        )
    labels = config_json.get("id2label")
    num_labels = len(labels) if isinstance(labels, dict) and labels else config_json.get("num_labels", 2)
    if num_labels != 1:
        raise InputError(
            where,
            wanted="one score an answer (num_labels 1)",
            got=f"{num_labels} classes",
            fix="use a reward model with num_labels=1, or turn the classes into one number in a reward function",
        )
