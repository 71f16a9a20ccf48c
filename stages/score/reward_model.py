"""A sequence classifier as a reward: prompt and answer through its own tokenizer and template, one score out.

Answers are batched by length, and a score does not depend on the batch it was in: padding stands on the right behind
an attention mask, and the model's own head reads the score at the last token that is not the pad token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.errors import InputError
from stages.pretrained import load_model
from stages.protocols import Turn
from stages.score.config import ModelReward
from stages.tokenizers import load_tokenizer
from stages.vocab import RewardRole


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
        from transformers import AutoModelForSequenceClassification

        self.name, self.role, self.weight = name, config.role, config.weight
        self._key, self._folder = key, folder
        self._batch_tokens = config.batch_tokens
        self._device = torch.device("cuda" if use_gpu else "cpu")
        if not use_gpu:
            torch.set_num_threads(num_threads)
        self._tokenizer = load_tokenizer(folder, pad_token=config.pad_token, key=key)
        self._tokenizer.padding_side = "right"
        model = load_model(
            AutoModelForSequenceClassification,
            folder,
            dtype=getattr(torch, config.dtype),
            where=f"{key} {folder}",
            wanted="a sequence classifier that transformers can load",
        )
        model.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        self._model: Any = model.to(self._device).eval()
        self._context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)

    name: str
    role: RewardRole
    weight: float

    def __call__(
        self, prompts: Sequence[Turn], completions: Sequence[Turn], columns: Mapping[str, Sequence[object]]
    ) -> list[float | None]:
        """One score an answer; None for one that is longer than the reward model's context."""
        import torch

        ids = [self._tokens(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores: list[float | None] = [None] * len(ids)
        for rows in self._batches(ids):
            batch = self._tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            with torch.inference_mode():
                logits_B1 = self._model(
                    input_ids=batch["input_ids"].to(self._device),
                    attention_mask=batch["attention_mask"].to(self._device),
                ).logits
            for row, score in zip(rows, logits_B1.squeeze(-1).float().tolist(), strict=True):
                scores[row] = score
        return scores

    def _tokens(self, prompt: Turn, completion: Turn) -> list[int]:
        """Text as it is, a chat through this model's own template."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return list(self._tokenizer(prompt + completion).input_ids)
        if not self._tokenizer.chat_template:
            raise InputError(
                f"{self._key} {self._folder}",
                wanted="a reward model whose tokenizer has a chat template, since the prompts are chats",
                got="no chat template",
                fix="use a reward model for chats, or prompts of plain text",
            )
        return list(self._tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=False))

    def _batches(self, ids: list[list[int]]) -> Iterator[list[int]]:
        """Row numbers by length, at most ``batch_tokens`` with padding a batch; too long ones are left out."""
        order = sorted((row for row in range(len(ids)) if len(ids[row]) <= self._context), key=lambda r: len(ids[r]))
        batch: list[int] = []
        for row in order:
            if batch and len(ids[row]) * (len(batch) + 1) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


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
    num_labels = len(config_json.get("id2label") or {0: "", 1: ""})
    if num_labels != 1:
        raise InputError(
            where,
            wanted="one score an answer (num_labels 1)",
            got=f"{num_labels} classes",
            fix="use a reward model with num_labels=1, or turn the classes into one number in a reward function",
        )
