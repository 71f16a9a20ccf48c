"""The plan's estimate of a training rank's memory beside the measured peak, one JSON line a case.

    python benchmarks/memory.py                                every model, ZeRO 0 and 2, one rank and two
    python benchmarks/memory.py --model gpt2 --ranks 1 --zero-stage 2 --dtype bfloat16

Each model has random weights and the shapes of a well-known kin. The real trainer (`memory_rank.py`) loads it, makes
two optimizer steps of several forwards each and saves it. Told is the most that a rank held above its idle size: after
imports, and after a small model has gone through the same.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.memory_rank import PARTS, MemoryJob
from pipeline.plan import training
from pipeline.plan.memory import Lengths
from pipeline.plan.model_facts import read_facts
from stages.update.config import UpdateConfig

ROOT = Path(__file__).parents[1]
MIB = 2**20
GOAL = 0.15
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "tie_word_embeddings": False,
    },
    "qwen2": {  # three quarters of it are the vocabulary
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 50_257, "n_embd": 768, "n_layer": 12, "n_head": 12},
}
Report = dict[str, Any]


def write_model(folder: Path, shapes: dict[str, Any]) -> Path:
    """A model of these shapes with random weights; what is there already stays."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**shapes | {"bos_token_id": 1, "eos_token_id": 2})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def case(folder: Path, name: str, ranks: int, zero_stage: int, asked: argparse.Namespace) -> Report:
    """What a rank held at the most, and what the plan says.

    Raises:
        SystemExit: with the ranks' last words, if they fail.
    """
    policy = write_model(folder / name, MODELS[name])
    kin = {"model_type": MODELS[name]["model_type"], "tie_word_embeddings": True}
    update = UpdateConfig(
        zero_stage=zero_stage,
        workers=ranks,
        global_batch_size=asked.pairs * ranks,
        micro_batch_size=asked.micro_batch,
        max_tokens_per_batch=1 << 20,
        skip_inactive=False,
        gradient_checkpointing=asked.gradient_checkpointing,
        learning_rate=1e-9,
    )
    job = MemoryJob(
        small=str(write_model(folder / f"small-{name}", kin | SMALL)),
        policy=str(policy),
        folder=str(folder),
        dtype=asked.dtype,
        update=update.model_dump(),
        prompt=asked.prompt,
        answer=asked.answer,
        num_pairs=asked.pairs * ranks,
        vocabulary=SMALL["vocab_size"],
        threads=asked.threads,
    )
    file = folder / "job.json"
    job.write(file)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = [*(launcher if ranks > 1 else []), str(ROOT / "benchmarks" / "memory_rank.py"), str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(asked.threads)}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    facts = read_facts(policy)
    assert facts is not None
    need = training.trainer(
        facts, update, dtype=asked.dtype, lengths=Lengths(asked.prompt, asked.answer), on_cpu=not found[0]["on_gpu"]
    )
    parts = {part.what: round(part.bytes / MIB, 1) for part in need.parts if part.what != "libraries"}
    measured, told = max(_peak(rank) for rank in found), sum(parts.values())
    return {
        "model": name,
        "parameters": facts.num_parameters,
        "zero_stage": zero_stage,
        "ranks": ranks,
        "dtype": asked.dtype,
        "tokens_a_forward": training.tokens_a_forward(update, Lengths(asked.prompt, asked.answer)),
        "peak_mib": measured,
        "estimate_mib": round(told, 1),
        "ratio": round(told / measured, 3),
        "goal": f"within {GOAL:.0%}",
        "met": abs(told / measured - 1) <= GOAL,
        "parts_mib": parts,
        "measured_mib": found,
    }


def _peak(rank: dict[str, float]) -> float:
    return max(rank[f"{part}_mib"] for part in PARTS)


def conditions(asked: argparse.Namespace) -> Report:
    """Of the machine, and what ran on it."""
    names = ("torch", "transformers", "deepspeed")
    return {"threads": asked.threads, **{name: importlib.metadata.version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--zero-stage", nargs="+", type=int, choices=range(4), default=[0, 2])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompt", type=int, default=96, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--pairs", type=int, default=8, help="of a step, a rank")
    parser.add_argument("--micro-batch", type=int, default=4, help="pairs a forward")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--folder", type=Path, help="for the models, to be kept; left out: one that is removed")
    asked = parser.parse_args()
    with TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch)
        for name, zero_stage, ranks in product(asked.model, asked.zero_stage, asked.ranks):
            found = case(folder, name, ranks, zero_stage, asked)
            print(json.dumps({"case": "memory", **found, "conditions": conditions(asked)}), flush=True)


if __name__ == "__main__":
    main()
