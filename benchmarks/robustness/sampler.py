"""`stages.protocols.Sampler` on plain transformers: for small models in one process, where an engine costs more.

Every answer has random numbers of its own, from its seed alone, so that it does not depend on the batch around it
beyond rounding. Prompts are padded on the left, behind a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.protocols import Answer, SampleRequest, Weights
from stages.sample.config import SampleConfig
from stages.update.batching import token_batch
from stages.update.logps import answer_logps

_ROWS = 1024  # answers in one batch
_CPU = torch.device("cpu")


class PlainSampler:
    """Holds one policy in float32; temperature 1, nothing cut off the distribution."""

    def __init__(self) -> None:
        self._model: Any = None
        self._tokenizer: Any = None
        self._ends: list[int] = []

    def load(self, weights: Weights) -> None:
        self._hold(weights.path)

    def _hold(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        ends = self._model.generation_config.eos_token_id
        self._ends = ends if isinstance(ends, list) else [ends]

    @property
    def max_model_len(self) -> int:
        return int(self._model.config.max_position_embeddings)

    def generate(self, requests: Sequence[SampleRequest], config: SampleConfig) -> list[list[Answer | None]]:
        """See `stages.protocols.Sampler`."""
        count = config.num_generations
        rows = [(r.prompt_token_ids, r.seed + i) for r in requests for i in range(count)]
        made: list[Answer | None] = []
        for part in _parts(rows):
            noise_NTV = torch.stack([self._noise(seed, config.max_new_tokens) for _, seed in part])
            made += self._answers([prompt for prompt, _ in part], config.max_new_tokens, noise_NTV)
        return [made[i * count : (i + 1) * count] for i in range(len(requests))]

    def greedy(self, prompts: Sequence[list[int]], *, max_new_tokens: int) -> list[Answer]:
        """The likeliest token every time."""
        return [answer for part in _parts(prompts) for answer in self._answers(part, max_new_tokens, None)]

    def logps(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        """See `stages.protocols.Sampler`."""
        found: list[float] = []
        with torch.inference_mode():
            for part in _parts(list(zip(prompts, answers, strict=True)), size=64):
                batch = token_batch([list(prompt) for prompt, _ in part], [list(answer) for _, answer in part])
                found += answer_logps(self._model, batch, _CPU).tolist()
        return found

    def rest(self) -> None:
        self._model = None

    def _noise(self, seed: int, num_tokens: int) -> torch.Tensor:
        """Gumbel noise: the token with the greatest sum of log-prob and noise is a sample."""
        shape = num_tokens, self._model.config.vocab_size
        uniform_TV = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        return -torch.log(-torch.log(uniform_TV.clamp_min(1e-20)))

    def _answers(self, prompts: Sequence[list[int]], num_tokens: int, noise_NTV: torch.Tensor | None) -> list[Answer]:
        tokens_NT, logps_NT = self._decode(prompts, num_tokens, noise_NTV)
        return [self._answer(row, logps) for row, logps in zip(tokens_NT.tolist(), logps_NT.tolist(), strict=True)]

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[list[int]], num_tokens: int, noise_NTV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        feed_NT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask_NT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ended_N = torch.zeros(len(prompts), dtype=torch.bool)
        positions_NT, cache, tokens, logps = (mask_NT.cumsum(1) - 1).clamp_min(0), None, [], []
        while len(tokens) < num_tokens and not ended_N.all():
            out = self._model(
                input_ids=feed_NT,
                attention_mask=mask_NT,
                position_ids=positions_NT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logps_NV, cache = out.logits[:, -1].float().log_softmax(-1), out.past_key_values
            ranked_NV = logps_NV if noise_NTV is None else logps_NV + noise_NTV[:, len(tokens)]
            feed_NT = ranked_NV.argmax(-1, keepdim=True)
            tokens.append(feed_NT[:, 0])
            logps.append(logps_NV.gather(1, feed_NT)[:, 0])
            ended_N |= torch.isin(tokens[-1], torch.tensor(self._ends))
            mask_NT = torch.cat([mask_NT, torch.ones(len(prompts), 1, dtype=mask_NT.dtype)], 1)
            positions_NT = positions_NT[:, -1:] + 1
        return torch.stack(tokens, 1), torch.stack(logps, 1)

    def _answer(self, tokens: list[int], logps: list[float]) -> Answer:
        """Cut behind the first end."""
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        length = len(tokens) if end is None else end + 1
        text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
        return Answer(text, tokens[:length], logps[:length], "length" if end is None else "stop")


def _parts(rows: Sequence[Any], *, size: int = _ROWS) -> Iterator[Sequence[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
