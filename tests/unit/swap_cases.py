"""Real updates to put into engines: tiny policies, trained in a process of its own, with what the trainer says of them.

In a process of its own since vLLM changes some of transformers' classes in its own.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models

from stages.protocols import Weights
from stages.sample.probe import FLOAT32_LEAST, FLOAT32_TOLERANCE, Probe
from stages.update.config import UpdateConfig

UPDATE = UpdateConfig(learning_rate=1e-3, global_batch_size=4, micro_batch_size=2, max_grad_norm=1.0)
NUM_ANSWERS, MAX_NEW_TOKENS = 8, 24


@dataclass(frozen=True, slots=True)
class Case:
    """One policy before and after an update.

    Attributes:
        start, result: folders.
        probe: answers that the first one sampled, with the trainer's log-probs under both.
        plain: transformers' log-probs of them from the result's folder.
    """

    start: Path
    result: Path
    probe: Probe
    plain: list[float]


def make_cases(root: Path, kinds: list[tuple[str, bool]], dtype: str = "float32") -> dict[tuple[str, bool], Case]:
    """Write, sample, train, publish and read back each architecture, tied or not."""
    return {(name, tied): _case(root / f"{name}-{tied}", name, tied, dtype) for name, tied in kinds}


def with_old_tensor(case: Case, name: str, target: Path) -> Weights:
    """The result with one tensor as it was before the update."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(case.result, target)
    new, old = (load_file(folder / "model.safetensors") for folder in (case.result, case.start))
    save_file(new | {name: old[name]}, target / "model.safetensors", metadata={"format": "pt"})
    return Weights.found(target, round=1)


def tensors_of(case: Case) -> list[str]:
    from safetensors import safe_open

    with safe_open(case.result / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def _case(root: Path, name: str, tied: bool, dtype: str) -> Case:
    from stages.update.rows import AnswerRow, PairRow
    from stages.update.worker import Trainer

    start = tiny_models.policy(name, root / "start", tied=tied)
    prompts, answers = _sampled(start)
    trainer = Trainer(UPDATE, dtype=dtype, pad_token=None, num_threads=1)
    trainer.load(Weights.found(start, round=0))
    rows = [AnswerRow(str(i), p, a) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
    old = trainer.logps(rows)
    pairs = [
        PairRow(f"{a.response_id}", a.response_id, b.response_id, a.prompt_token_ids, a.token_ids, b.token_ids)
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]
    trainer.update(pairs, [old], own_reference=0, seed=1)
    new = trainer.logps(rows)
    trainer.save(root, round=1)
    probe = Probe(
        prompt_token_ids=prompts,
        response_token_ids=answers,
        new=[new[row.response_id] for row in rows],
        old=[old[row.response_id] for row in rows],
        # vLLM's Bloom is up to 7e-5 nats a token from transformers'; a run measures that before it asks
        tolerance=FLOAT32_LEAST if dtype == "float32" and name != "bloom" else FLOAT32_TOLERANCE,
    )
    return Case(start, root / "policy", probe, _plain(root / "policy", prompts, answers, dtype))


def _sampled(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Eight answers to each of four prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops}
    torch.manual_seed(5)
    prompts, answers = [], []
    for text in tiny_models.PROMPTS[:4]:
        ids = tokenizer(text).input_ids
        sampled = model.generate(
            torch.tensor([ids]),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=NUM_ANSWERS,
            pad_token_id=0,
        )
        for row in sampled[:, len(ids) :].tolist():
            end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
            prompts.append(ids)
            answers.append(row[: end + 1])
    return prompts, answers


def _plain(folder: Path, prompts: list[list[int]], answers: list[list[int]], dtype: str) -> list[float]:
    """By transformers alone, one answer at a time; plain attention, since the fused one leaves Gemma 2's cap out."""
    import torch
    from transformers import AutoModelForCausalLM

    kind: Any = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="eager").eval()
    logps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer])
        with torch.no_grad():
            logps_TV = model(tokens).logits[0, :-1].float().log_softmax(-1)
        logps.append(float(logps_TV.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :].sum()))
    return logps
