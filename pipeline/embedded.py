"""The embedded default: a small policy and a small judge that are taught to reverse digit strings on first use.

    prompt ``48315>``   answer ``51384``

The policy learns from a corpus in which most answers have a wrong digit, so sampled answers are often wrong although
the greedy one is right: there is something for preference alignment to do, and exact accuracy, which the judge cannot
fake, shows whether it was done. Both models are ordinary Hugging Face folders in a cache outside the repository, under
a key of their recipe. One tenth of all strings (`held_out`) appears in no corpus and in no round.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PREFIX = "embedded:"
NUM_DIGITS = 5
PROMPT_LEN = NUM_DIGITS + 2  # <s>, the digits, >
PAD, BOS, EOS, UNK, FIRST_DIGIT, ARROW = 0, 1, 2, 3, 4, 14
NUM_PROMPTS, NUM_HELD_OUT = 8000, 2000

Progress = Callable[[str, int, int], None]  # (what, done, total)


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


def held_out(digits: str) -> bool:
    """Whether a digit string is kept out of every corpus and every round; ``48315`` is one of them."""
    return zlib.crc32(digits.encode()) % 10 == zlib.crc32(b"48315") % 10


def cache_root() -> Path:
    """``$PREFLOOP_CACHE``, else ``prefloop`` in the user's cache folder."""
    if "PREFLOOP_CACHE" in os.environ:
        return Path(os.environ["PREFLOOP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prefloop"


def names() -> list[str]:
    """Every name that may stand behind ``embedded:`` in a config."""
    return sorted(_MAKERS)


def make(name: str, *, recipe: Recipe | None = None, progress: Progress | None = None) -> Path:
    """The folder or file behind an ``embedded:`` name, made now if the cache does not have it.

    Args:
        name: one of `names`, without the prefix.
        recipe: a smaller one in tests.
        progress: called with what is being made, steps done and steps in all.

    Raises:
        KeyError: for an unknown name.
    """
    recipe = recipe or Recipe()
    key = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:12]
    suffix = "" if name in ("reverse", "reverse-judge") else ".jsonl"
    target = cache_root() / "embedded" / key / f"{name}{suffix}"
    if not target.exists():
        with _built_aside(target) as work:
            _MAKERS[name](work, recipe, progress or _silent)
    return target


def _silent(_what: str, _done: int, _total: int) -> None:
    pass


@contextmanager
def _built_aside(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place once complete; the first of two makers wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        yield scratch / target.name
        if not target.exists():
            (scratch / target.name).rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---- data -----------------------------------------------------------------------------------------------------------


def _write_prompts(work: Path, recipe: Recipe, *, want_held_out: bool, count: int) -> None:
    import numpy as np

    strings = [f"{n:0{NUM_DIGITS}d}" for n in range(10**NUM_DIGITS)]
    pool = [s for s in strings if held_out(s) == want_held_out]
    order = np.random.default_rng(recipe.seed).permutation(len(pool))[:count]
    rows = [{"prompt": f"{pool[i]}>", "answer": pool[i][::-1]} for i in order]
    work.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class _Strings:
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


def _rows(digits: np.ndarray, answers: np.ndarray, *, end: bool) -> torch.Tensor:
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
    tick: Callable[[int], None],
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
        tick(step + 1)


@contextmanager
def _private_rng(seed: int) -> Iterator[None]:
    """Seeded torch randomness that leaves the caller's as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _make_policy(work: Path, recipe: Recipe, progress: Progress) -> None:
    import torch
    from transformers import LlamaForCausalLM

    strings = _Strings(recipe.seed)
    num_wrong = round(recipe.wrong_share * recipe.policy_batch_size)

    with _private_rng(recipe.seed):
        model = LlamaForCausalLM(_llama_config(recipe))

        def next_loss() -> torch.Tensor:
            digits = strings.draw(recipe.policy_batch_size)
            answers = digits[:, ::-1].copy()
            answers[:num_wrong] = strings.with_wrong_digit(answers[:num_wrong])
            tokens_BT = _rows(digits, answers, end=True)
            logits_BTV = model(tokens_BT).logits[:, PROMPT_LEN - 1 : -1]
            return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, PROMPT_LEN:].flatten())

        _train(
            model,
            next_loss,
            steps=recipe.policy_steps,
            learning_rate=recipe.policy_learning_rate,
            tick=lambda done: progress("policy", done, recipe.policy_steps),
        )
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(work)
    _tokenizer().save_pretrained(work)


def _make_judge(work: Path, recipe: Recipe, progress: Progress) -> None:
    """A pairwise (Bradley-Terry) reward model that starts from the policy's body.

    Its wrong answers have one or two wrong digits, or, one in sixteen, a digit missing.
    """
    import torch
    from transformers import AutoModel, LlamaForSequenceClassification

    body = AutoModel.from_pretrained(make("reverse", recipe=recipe, progress=progress))
    strings = _Strings(recipe.seed + 1)
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
            tokens_BT = torch.cat([_rows(digits, right, end=False), _rows(digits, wrong, end=False)])
            scores_B = model(tokens_BT, attention_mask=tokens_BT != PAD).logits.squeeze(-1)
            return -torch.nn.functional.logsigmoid(scores_B[:size] - scores_B[size:]).mean()

        _train(
            model,
            next_loss,
            steps=recipe.judge_steps,
            learning_rate=recipe.judge_learning_rate,
            tick=lambda done: progress("judge", done, recipe.judge_steps),
        )
    model.save_pretrained(work)
    _tokenizer().save_pretrained(work)


_MAKERS: dict[str, Callable[[Path, Recipe, Progress], None]] = {
    "reverse": _make_policy,
    "reverse-judge": _make_judge,
    "reverse-prompts": lambda work, recipe, _: _write_prompts(work, recipe, want_held_out=False, count=NUM_PROMPTS),
    "reverse-heldout": lambda work, recipe, _: _write_prompts(work, recipe, want_held_out=True, count=NUM_HELD_OUT),
}
SMALL = replace(Recipe(), policy_steps=30, judge_steps=30, policy_batch_size=64, judge_batch_size=32)


# ---- in a process of its own ----------------------------------------------------------------------------------------


def make_aside(name: str, *, log: Path, progress: Progress) -> Path:
    """`make` in a process of its own, so that torch's memory and talk stay out of the driver.

    Args:
        log: where that process's output goes.

    Raises:
        RuntimeError: if it failed; the log says why.
    """
    with log.open("a", encoding="utf-8") as errors:
        command = [sys.executable, "-m", "pipeline.embedded", name]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdout is not None
        target = None
        for line in child.stdout:
            kind, *rest = line.rstrip("\n").split("\t")
            if kind == "progress":
                progress(rest[0], int(rest[1]), int(rest[2]))
            elif kind == "made":
                target = Path(rest[0])
    if child.wait() != 0 or target is None:
        raise RuntimeError(f"making embedded:{name} failed (log: {log})")
    return target


def _main(name: str) -> None:
    def tell(what: str, done: int, total: int) -> None:
        print("progress", what, done, total, sep="\t", flush=True)

    print("made", make(name, progress=tell), sep="\t", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
