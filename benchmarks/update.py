"""An optimizer step of ours against TRL's `DPOTrainer`, and against itself, one JSON line a case.

    python benchmarks/update.py                                    every case that needs no data
    python benchmarks/update.py --gsm8k .../gsm8k/train.jsonl      that on GSM8K's prompts too
    python benchmarks/update.py --case speed --only 512/128

Cases: `speed`: pairs a second, peak memory and useful FLOPs at three active shares. `gsm8k`: the same in a real second
epoch on real prompts. `dense`: a step in which no rejected answer is active against one in which all are pushed.
`workers`: two workers of one thread against one. `vocabulary`: what peak memory grows by. Every side is a process of
its own; policy, pairs, precision, global batch and threads are the same on both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.update_measure import Job
from benchmarks.update_work import Pair, Sizes, gsm8k_pairs, random_pairs, useful_flops, write_pairs, write_policy

ROOT = Path(__file__).parents[1]
STILL = 1e-9  # a learning rate at which no answer comes near its reference
MOVING = 1e-4  # that of a real second epoch
MIB = 2**20
MEMORY_GOAL, FLOPS_GOAL, GSM8K_GOAL, DENSE_GOAL, WORKERS_GOAL, GROWTH_GOAL = 0.6, 0.6, 3.0, 1.4, 1.7, 1.1

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts and answers, pairs behind a step, and the goal against TRL at each active share."""

    prompt: int
    answer: int
    batch: int
    goals: dict[float, float]

    @property
    def name(self) -> str:
        return f"{self.prompt}/{self.answer}"


LENGTHS = (
    Lengths(512, 128, 4, {0.0: 5.0, 0.5: 4.2, 1.0: 3.8}),
    Lengths(64, 128, 8, {0.0: 3.5, 0.5: 2.6, 1.0: 2.3}),
)
SHORT = LENGTHS[1]
GSM8K_BATCH, GSM8K_BATCHES = 8, 4


class Bench:
    """The work of all cases, made once, and how a side is run on it."""

    def __init__(self, folder: Path, asked: argparse.Namespace) -> None:
        self.folder, self.asked = folder, asked
        self._parameters: dict[Path, int] = {}

    def policy(self, sizes: Sizes) -> Path:
        target = self.folder / f"policy-{sizes.vocabulary}"
        if target not in self._parameters:
            self._parameters[target] = write_policy(target, sizes)
        return target

    def job(self, pairs: Sequence[Pair], sizes: Sizes, **more: Any) -> Job:
        """A job on these pairs with the settings that all cases share, all pairs in every step."""
        file = self.folder / "pairs.jsonl"
        write_pairs(file, pairs)
        common = {
            "policy": str(self.policy(sizes)),
            "pairs": str(file),
            "batch": len(pairs),
            "micro_batch": len(pairs),
            "share": 0.0,
            "loss_type": "minor_dpo",
            "learning_rate": STILL,
            "warm_up": self.asked.warm_up,
            "steps": self.asked.steps,
            "threads": self.asked.threads,
            "zero_stage": self.asked.zero_stage,
        }
        return Job(**common | more)

    def side(self, side: str, job: Job, *, workers: int = 1) -> Report:
        """What one side measures.

        Raises:
            SystemExit: with its last words, if it fails.
        """
        file = self.folder / "job.json"
        job.write(file)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        words = [*(launcher if workers > 1 else []), str(ROOT / "benchmarks" / f"update_{side}.py"), str(file)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(job.threads), "TQDM_DISABLE": "1"}
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found: Report = json.loads(done.stdout.splitlines()[-1])
        return found

    def parameters(self, sizes: Sizes) -> int:
        return self._parameters[self.policy(sizes)]

    # ---- the cases --------------------------------------------------------------------------------------------------

    def speed(self) -> Iterator[Report]:
        for lengths in LENGTHS:
            if self.asked.only not in (None, lengths.name):
                continue
            pairs = _pairs(lengths)
            for share, goal in lengths.goals.items():
                job = self.job(pairs, Sizes(), share=share)
                yield {"lengths": lengths.name, **self._against_trl(job, pairs, goal, steps=1)}

    def gsm8k(self) -> Iterator[Report]:
        file = self.asked.gsm8k
        if file is None:
            print("gsm8k skipped: --gsm8k names no file", file=sys.stderr, flush=True)
            return
        pairs = gsm8k_pairs(file, GSM8K_BATCH * GSM8K_BATCHES, vocabulary=Sizes().vocabulary)
        job = self.job(pairs, Sizes(), batch=GSM8K_BATCH, micro_batch=GSM8K_BATCH, share=None, learning_rate=MOVING)
        found = self._against_trl(job, pairs, GSM8K_GOAL, steps=GSM8K_BATCHES)
        yield {
            "lengths": "GSM8K's",
            "answers": "the data's own as chosen, another question's as rejected",
            "learning_rate": MOVING,
            **found,
        }

    def dense(self) -> Iterator[Report]:
        """DPO gives every rejected answer a gradient, so that nothing can be left out: the dense path."""
        pairs = _pairs(SHORT)
        sides = {
            "none_active": self.side("ours", self.job(pairs, Sizes(), share=0.0)),
            "dense": self.side("ours", self.job(pairs, Sizes(), share=0.0, loss_type="dpo")),
        }
        ratio = sides["dense"]["step_s"] / sides["none_active"]["step_s"]
        yield {"lengths": SHORT.name, **sides, **_goal(ratio, DENSE_GOAL)}

    def workers(self) -> Iterator[Report]:
        pairs = _pairs(SHORT)
        job = self.job(pairs, Sizes(), share=0.5, threads=1)
        half = replace(job, micro_batch=len(pairs) // 2)
        sides = {"one": self.side("ours", job), "two": self.side("ours", half, workers=2)}
        yield {"lengths": SHORT.name, **sides, **_goal(sides["one"]["step_s"] / sides["two"]["step_s"], WORKERS_GOAL)}

    def vocabulary(self) -> Iterator[Report]:
        pairs = _pairs(SHORT)
        small, large = Sizes(), Sizes(vocabulary=128_000)
        sides = {sizes: self.side("ours", self.job(pairs, sizes, share=0.5)) for sizes in (small, large)}
        grown = sides[large]["peak_mib"] - sides[small]["peak_mib"]
        # float32 weights, gradients and two moments, of head and embedding
        needed = 4 * 4 * 2 * (large.head_parameters - small.head_parameters) / MIB
        yield {
            "lengths": SHORT.name,
            **{f"vocabulary_{sizes.vocabulary}": found for sizes, found in sides.items()},
            "grown_mib": round(grown, 1),
            "head_and_embedding_mib": round(needed, 1),
            "ratio": round(grown / needed, 3),
            "goal": f"at most {GROWTH_GOAL}",
            "met": grown <= GROWTH_GOAL * needed,
        }

    def _against_trl(self, job: Job, pairs: Sequence[Pair], goal: float, *, steps: int) -> Report:
        """Both sides of a job; `steps` are those in which every pair is seen once."""
        theirs = replace(job, micro_batch=self.asked.trl_micro_batch or job.micro_batch)
        sides = {"ours": self.side("ours", job), "trl": self.side("trl", theirs)}
        seconds = {name: found["all_s"] if job.share is None else found["step_s"] for name, found in sides.items()}
        ratio = seconds["trl"] / seconds["ours"]
        above = {name: self._above_state(found) for name, found in sides.items()}
        ours = sides["ours"]
        counts = len(pairs[0].prompt) == LENGTHS[0].prompt  # the goal is one of long prompts
        flops = useful_flops(pairs, Sizes(), active_share=ours["active_share"])
        used = flops / seconds["ours"] / 1e9 / ours["matmul_gflops"]
        return {
            "share": job.share,
            "active_share": ours["active_share"],
            **sides,
            "pairs_per_s": {name: round(len(pairs) / found, 3) for name, found in seconds.items()},
            **_goal(ratio, goal),
            "tokens_real": round(sum(pair.num_tokens for pair in pairs) / steps, 1),
            "memory": {
                "above_weights_and_moments_mib": {name: round(found, 1) for name, found in above.items()},
                "ratio": round(above["ours"] / above["trl"], 3),
                "goal": f"at most {MEMORY_GOAL}",
                "met": above["ours"] <= MEMORY_GOAL * above["trl"],
            },
            "useful_flops": {
                "gflop": round(flops / 1e9, 1),
                "share_of_matmul_peak": round(used, 3),
                "goal": f"above {FLOPS_GOAL}" if counts else None,
                "met": used > FLOPS_GOAL if counts else None,
            },
        }

    def _above_state(self, found: Report) -> float:
        """Peak MiB above what was held before the weights were, less weights and both moments in float32."""
        return float(found["peak_mib"]) - float(found["empty_mib"]) - 3 * 4 * self.parameters(Sizes()) / MIB


def _pairs(lengths: Lengths) -> list[Pair]:
    return random_pairs(lengths.batch, prompt=lengths.prompt, answer=lengths.answer, vocabulary=Sizes().vocabulary)


def _goal(ratio: float, least: float) -> Report:
    return {"ratio": round(ratio, 3), "goal": f"at least {least}", "met": ratio >= least}


def conditions(asked: argparse.Namespace, bench: Bench) -> Report:
    """Of the machine, and what ran on it."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
        "threads": asked.threads,
        "parameters": bench.parameters(Sizes()),
        "dtype": "float32",
        "zero_stage": asked.zero_stage,
        "trl_micro_batch": asked.trl_micro_batch,
        "warm_up": asked.warm_up,
        "steps": asked.steps,
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed", "trl")},
    }


def main() -> None:
    cases: dict[str, Callable[[Bench], Iterator[Report]]] = {
        "speed": Bench.speed,
        "gsm8k": Bench.gsm8k,
        "dense": Bench.dense,
        "workers": Bench.workers,
        "vocabulary": Bench.vocabulary,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--only", choices=[lengths.name for lengths in LENGTHS], help="of the speed case")
    parser.add_argument("--gsm8k", type=Path, help="openai/grade-school-math's train.jsonl")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those that count")
    parser.add_argument("--steps", type=int, default=5, help="steps whose median is told")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side")
    parser.add_argument("--trl-micro-batch", type=int, help="pairs a forward of TRL's; left out: all of a step")
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=0, help="of ours; TRL's side has no ZeRO")
    asked = parser.parse_args()
    with TemporaryDirectory() as folder:
        bench = Bench(Path(folder), asked)
        for name in asked.case:
            under = conditions(asked, bench)
            for report in cases[name](bench):
                print(json.dumps({"case": name, **report, "conditions": under}), flush=True)


if __name__ == "__main__":
    main()
