"""Teaching the embedded models: their recipe, their corpus, their tokenizer, their training.

    prompt ``48315>``   answer ``51384``

The policy learns from a corpus in which most answers have a wrong digit, so that sampled answers are often wrong
although the greedy one is right: there is something for preference alignment to do. One tenth of all strings
(`held_out`) appears in no corpus and in no round.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerFast

NUM_DIGITS = 5
PROMPT_LEN = NUM_DIGITS + 2  # <s>, the digits, >
PAD, BOS, EOS, UNK, FIRST_DIGIT, ARROW = 0, 1, 2, 3, 4, 14

Tick = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides what the two models are; its hash is their cache key."""

    version: int = 1
    num_layers: int = 3
    hidden_size: int = 128
    num_heads: int = 4
    wrong_share: float = 0.78
    policy_steps: int = 350
    policy_batch_size: int = 256
    policy_learning_rate: float = 2e-3
    judge_steps: int = 700
    judge_batch_size: int = 128
    judge_learning_rate: float = 4e-4
    seed: int = 0


SMALL = replace(Recipe(), policy_steps=30, judge_steps=30, policy_batch_size=64, judge_batch_size=32)
"""A recipe for tests: real models, hardly taught."""


def held_out(digits: str) -> bool:
    """Whether a digit string is kept out of every corpus and every round; ``48315`` is one of them."""
    return zlib.crc32(digits.encode()) % 10 == zlib.crc32(b"48315") % 10


# ---- data -----------------------------------------------------------------------------------------------------------


def write_prompts(work: Path, recipe: Recipe, *, want_held_out: bool, count: int) -> None:
    import numpy as np

    strings = [f"{n:0{NUM_DIGITS}d}" for n in range(10**NUM_DIGITS)]
    pool = [s for s in strings if held_out(s) == want_held_out]
    order = np.random.default_rng(recipe.seed).permutation(len(pool))[:count]
    rows = [{"prompt": f"{pool[i]}>", "answer": pool[i][::-1]} for i in order]
    work.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Strings:
    """Batches of digit strings outside the held-out tenth, as token ids."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self.rng = np.random.default_rng(seed)
        taught = [n for n in range(10**NUM_DIGITS) if not held_out(f"{n:0{NUM_DIGITS}d}")]
        digits = np.array(taught)[:, None] // 10 ** np.arange(NUM_DIGITS - 1, -1, -1) % 10
        self.digits = digits + FIRST_DIGIT

    def draw(self, count: int) -> np.ndarray:
        return self.digits[self.rng.integers(len(self.digits), size=count)]

    def with_wrong_digit(self, answers: np.ndarray) -> np.ndarray:
        """Each row with one digit replaced by another."""
        import numpy as np

        wrong, rows = answers.copy(), np.arange(len(answers))
        place = self.rng.integers(NUM_DIGITS, size=len(answers))
        shift = self.rng.integers(1, 10, size=len(answers))
        wrong[rows, place] = (wrong[rows, place] - FIRST_DIGIT + shift) % 10 + FIRST_DIGIT
        return wrong


def token_rows(digits: np.ndarray, answers: np.ndarray, *, end: bool) -> torch.Tensor:
    """``<s> digits > answer`` and, for the policy, ``</s>``."""
    import numpy as np
    import torch

    def column(token: int) -> np.ndarray:
        return np.full((len(digits), 1), token)

    parts = [column(BOS), digits, column(ARROW), answers, *([column(EOS)] if end else [])]
    return torch.from_numpy(np.concatenate(parts, axis=1))


# ---- models ---------------------------------------------------------------------------------------------------------


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *"0123456789", ">"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=32,
        clean_up_tokenization_spaces=False,
    )


def _llama_config(recipe: Recipe, **more: Any) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=ARROW + 1,
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=32,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
        **more,
    )


def _train(
    model: torch.nn.Module,
    loss_of_next: Callable[[], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    tick: Tick,
) -> None:
    """AdamW with a tenth of warm-up and a linear decay."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    for step in range(steps):
        loss = loss_of_next()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tick(step + 1, steps)


@contextmanager
def _private_rng(seed: int) -> Iterator[None]:
    """Seeded torch randomness that leaves the caller's as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_policy(work: Path, recipe: Recipe, tick: Tick) -> None:
    import torch
    from transformers import LlamaForCausalLM

    strings = Strings(recipe.seed)
    num_wrong = round(recipe.wrong_share * recipe.policy_batch_size)

    with _private_rng(recipe.seed):
        model = LlamaForCausalLM(_llama_config(recipe))

        def next_loss() -> torch.Tensor:
            digits = strings.draw(recipe.policy_batch_size)
            answers = digits[:, ::-1].copy()
            answers[:num_wrong] = strings.with_wrong_digit(answers[:num_wrong])
            tokens_BT = token_rows(digits, answers, end=True)
            logits_BTV = model(tokens_BT).logits[:, PROMPT_LEN - 1 : -1]
            return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, PROMPT_LEN:].flatten())

        _train(
            model,
            next_loss,
            steps=recipe.policy_steps,
            learning_rate=recipe.policy_learning_rate,
            tick=tick,
        )
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(work)
    _tokenizer().save_pretrained(work)


def make_judge(work: Path, recipe: Recipe, policy: Path, tick: Tick) -> None:
    """A pairwise (Bradley-Terry) reward model that starts from the policy's body.

    Its wrong answers have one or two wrong digits, or, one in sixteen, a digit missing.
    """
    import torch
    from transformers import AutoModel, LlamaForSequenceClassification

    body = AutoModel.from_pretrained(policy)
    strings = Strings(recipe.seed + 1)
    size = recipe.judge_batch_size

    with _private_rng(recipe.seed + 1):
        model = LlamaForSequenceClassification(_llama_config(recipe, num_labels=1))
        model.model.load_state_dict(body.state_dict())

        def next_loss() -> torch.Tensor:
            digits = strings.draw(size)
            right = digits[:, ::-1].copy()
            wrong = strings.with_wrong_digit(right)
            wrong[: size // 4] = strings.with_wrong_digit(wrong[: size // 4])
            wrong[-(size // 16) :, -1] = PAD
            tokens_BT = torch.cat([token_rows(digits, right, end=False), token_rows(digits, wrong, end=False)])
            scores_B = model(tokens_BT, attention_mask=tokens_BT != PAD).logits.squeeze(-1)
            return -torch.nn.functional.logsigmoid(scores_B[:size] - scores_B[size:]).mean()

        _train(
            model,
            next_loss,
            steps=recipe.judge_steps,
            learning_rate=recipe.judge_learning_rate,
            tick=tick,
        )
    model.save_pretrained(work)
    _tokenizer().save_pretrained(work)
