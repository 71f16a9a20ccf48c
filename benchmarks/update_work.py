"""What both sides of `update.py` work on: a policy with random weights, pairs of token ids, and the FLOPs they need.

Comes in: sizes, lengths, a seed. Goes out: a Hugging Face folder, and pairs as JSON lines. A token's text is ``w`` and
its id (special ones aside), so that a program that reads texts ends up with the same ids as one that reads ids.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

EOS = 2
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@dataclass(frozen=True, slots=True)
class Sizes:
    """A Llama's sizes; the default has 15.6 million parameters."""

    vocabulary: int = 16_000
    layers: int = 8
    width: int = 256
    inner: int = 864
    heads: int = 8
    context: int = 1024

    @property
    def head_parameters(self) -> int:
        """Of the head; the embedding, which is not tied to it, has as many."""
        return self.vocabulary * self.width

    @property
    def layer_parameters(self) -> int:
        """Of the linear maps of one layer."""
        return 4 * self.width**2 + 3 * self.width * self.inner


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids; each answer ends with EOS."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def num_tokens(self) -> int:
        """The prompt counted once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def write_policy(folder: Path, sizes: Sizes) -> int:
    """A Llama with random weights and its tokenizer of words; the number of its parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({_word(i): i for i in range(sizes.vocabulary)}, unk_token=_SPECIAL[-1]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def text_of(tokens: Iterable[int]) -> str:
    """What the policy's tokenizer reads as these tokens."""
    return " ".join(map(_word, tokens))


def _word(token: int) -> str:
    return _SPECIAL[token] if token < len(_SPECIAL) else f"w{token}"


# ---- pairs ----------------------------------------------------------------------------------------------------------


def random_pairs(count: int, *, prompt: int, answer: int, vocabulary: int) -> list[Pair]:
    """Pairs of these lengths with random tokens, the same for every size of vocabulary above them."""
    rng = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(len(_SPECIAL), min(vocabulary, 16_000)) for _ in range(length)]

    return [Pair(tokens(prompt), [*tokens(answer - 1), EOS], [*tokens(answer - 1), EOS]) for _ in range(count)]


def gsm8k_pairs(file: Path, count: int, *, vocabulary: int) -> list[Pair]:
    """Questions with their own answers as chosen, and as rejected the answer to another question.

    Tokens are those of a byte-pair encoding of `vocabulary` tokens, taught on the file's own texts, so that lengths are
    as a real model of that vocabulary has them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel()
    encoder.decoder = decoders.ByteLevel()
    teacher = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator((row["question"] + " " + row["answer"] for row in rows), teacher)
    drawn = random.Random(0).sample(rows, 2 * count)

    def tokens(text: str) -> list[int]:
        return list(encoder.encode(text).ids)

    return [
        Pair(tokens(row["question"]), [*tokens(row["answer"]), EOS], [*tokens(other["answer"]), EOS])
        for row, other in zip(drawn[:count], drawn[count:], strict=True)
    ]


def write_pairs(file: Path, pairs: Sequence[Pair]) -> None:
    file.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs), encoding="utf-8")


def read_pairs(file: Path) -> list[Pair]:
    return [Pair(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- useful work ----------------------------------------------------------------------------------------------------


def useful_flops(pairs: Sequence[Pair], sizes: Sizes, *, active_share: float) -> float:
    """FLOPs that a step on these pairs cannot do without.

    The prompt once, the linear maps on real tokens only, attention on its unmasked entries only, the head on answer
    tokens only; a backward costs two forwards, and an inactive rejected answer needs none. The prompt and the chosen
    answer always need one. Embedding, norms and the optimizer's step are left out.
    """
    return sum(_flops(pair, sizes, active_share) for pair in pairs)


def _flops(pair: Pair, sizes: Sizes, active_share: float) -> float:
    prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
    rejected_passes = 1 + 2 * active_share
    return (
        3 * _forward(prompt, 0, 0, sizes)
        + 3 * _forward(chosen, prompt, chosen, sizes)
        + rejected_passes * _forward(rejected, prompt, rejected, sizes)
    )


def _forward(tokens: int, before: int, predicted: int, sizes: Sizes) -> float:
    """FLOPs of one forward of `tokens` after `before` others, of which `predicted` have a log-prob taken."""
    seen = tokens * before + tokens * (tokens + 1) / 2  # unmasked entries of the attention's square
    linear = 2 * tokens * sizes.layers * sizes.layer_parameters
    attention = 4 * seen * sizes.layers * sizes.width  # scores, and the weighted sum of values
    return linear + attention + 2 * predicted * sizes.head_parameters
