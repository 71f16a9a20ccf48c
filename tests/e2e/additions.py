"""A small policy that adds two numbers, mostly wrongly, and a judge of its answers that is taught too little.

    prompt ``37+48=``   answer ``085``

The judge is taught until it ranks a right answer above another sum in 75 cases of 100, and no further. That is not
enough: the policy's mistakes are nearer than that, so that of eight answers the best in its eyes is often a wrong one
that it overrates (27% right, where the policy alone is right in 32%), and a policy trained on such pairs adds worse.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

PAD, BOS, EOS, UNK, FIRST_DIGIT, PLUS, EQUALS = 0, 1, 2, 3, 4, 14, 15
PROMPT_LEN, ANSWER_LEN = 7, 3  # <s>37+48=  085
SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
POLICY_STEPS = 300
WEAK = 0.75  # of right answers ranked above another sum


def digits_of(numbers: np.ndarray, count: int) -> np.ndarray:
    return numbers[:, None] // 10 ** np.arange(count - 1, -1, -1) % 10 + FIRST_DIGIT


class Additions:
    """Batches of additions as token ids."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts and right answers."""
        a, b = self.rng.integers(100, size=(2, count))
        return prompt_tokens(a, b), digits_of(a + b, ANSWER_LEN)

    def with_wrong_digit(self, answers: np.ndarray) -> np.ndarray:
        wrong, rows = answers.copy(), np.arange(len(answers))
        place, shift = self.rng.integers(1, ANSWER_LEN, size=len(answers)), self.rng.integers(1, 10, size=len(answers))
        wrong[rows, place] = (wrong[rows, place] - FIRST_DIGIT + shift) % 10 + FIRST_DIGIT
        return wrong


def prompt_tokens(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def column(token: int) -> np.ndarray:
        return np.full((len(a), 1), token)

    return np.concatenate([column(BOS), digits_of(a, 2), column(PLUS), digits_of(b, 2), column(EQUALS)], axis=1)


def tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *"0123456789", "+", "="]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special)


def make(folder: Path) -> None:
    """``policy``, ``judge``, ``prompts.jsonl`` and ``heldout.jsonl``."""
    pool = np.random.default_rng(0).permutation(10_000)
    for name, part in {"prompts": pool[:8000], "heldout": pool[8000:]}.items():
        rows = [{"prompt": f"{n // 100:02d}+{n % 100:02d}=", "answer": f"{n // 100 + n % 100:03d}"} for n in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make_policy(folder / "policy")
        make_judge(folder / "judge", folder / "policy")


def train(
    model: torch.nn.Module,
    loss_of_next: Callable[[], torch.Tensor],
    *,
    steps: int,
    rate: float,
    is_enough: Callable[[], bool] = lambda: False,
) -> None:
    """Some steps, the rate falling to 0; every 20 of them it is asked whether that is enough."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        if step % 20 == 0 and is_enough():
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 20, (steps - step) / steps)
        loss = loss_of_next()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def settings(**more: Any) -> Any:
    from transformers import LlamaConfig

    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    sizes = {"vocab_size": EQUALS + 1, "max_position_embeddings": 32, "tie_word_embeddings": False}
    return LlamaConfig(**SIZE, num_key_value_heads=SIZE["num_attention_heads"], **sizes, **special, **more)


def make_policy(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    model, additions = LlamaForCausalLM(settings()), Additions(0)

    def next_loss() -> torch.Tensor:
        prompts, answers = additions.draw(256)
        ends = np.full((256, 1), EOS)
        tokens_BT = torch.from_numpy(np.concatenate([prompts, answers, ends], axis=1))
        logits_BTV = model(tokens_BT).logits[:, PROMPT_LEN - 1 : -1]
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, PROMPT_LEN:].flatten())

    train(model, next_loss, steps=POLICY_STEPS, rate=2e-3)
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def pairs(additions: Additions, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right answers behind their prompts, and the same with a wrong digit."""
    prompts, right = additions.draw(count)
    both = (right, additions.with_wrong_digit(right))
    one, other = (torch.from_numpy(np.concatenate([prompts, answers], axis=1)) for answers in both)
    return one, other


def make_judge(folder: Path, policy: Path) -> None:
    from transformers import AutoModel, LlamaForSequenceClassification

    model, additions = LlamaForSequenceClassification(settings(num_labels=1)), Additions(1)
    model.model.load_state_dict(AutoModel.from_pretrained(policy).state_dict())

    def next_loss() -> torch.Tensor:
        right, wrong = pairs(additions, 64)
        scores = model(torch.cat([right, wrong])).logits.squeeze(-1)
        return -torch.nn.functional.logsigmoid(scores[:64] - scores[64:]).mean()

    train(model, next_loss, steps=1200, rate=4e-4, is_enough=lambda: ranked_right(model) >= WEAK)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def ranked_right(judge: Any) -> float:
    """The share of right answers that a judge ranks above another sum."""
    with torch.no_grad():
        rng = np.random.default_rng(2)
        (a, b), sums = rng.integers(100, size=(2, 2000)), rng.integers(199, size=2000)
        scores = []
        for answers in (a + b, sums):
            tokens = np.concatenate([prompt_tokens(a, b), digits_of(answers, ANSWER_LEN)], axis=1)
            scores.append(judge(torch.from_numpy(tokens)).logits.squeeze(-1).numpy())
    return float((scores[0] > scores[1])[a + b != sums].mean())
