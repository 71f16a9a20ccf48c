"""A small run's folder, written through the project's own contracts, pairing and publishing; no model is needed.

Its prompts and answers are what a model might say to break a page or a terminal.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from cluster.timing import Timed
from pipeline import figures
from pipeline.artifacts import StageFolder
from pipeline.config_file import load_config
from pipeline.evaluate import Judged, comparison, evaluation_figures, form_figures
from pipeline.files import write_json
from pipeline.jobs.answers import SampleShard, group_stats, pair_stats
from pipeline.jobs.probes import ProbeFolder
from pipeline.jobs.training import UpdatePolicy, step_journal
from pipeline.lineage import Lineage, RoundRecord, describe
from pipeline.model_folders import close_model
from pipeline.run_folder import write_config
from pipeline.timeline import Timeline
from stages.contracts import CANDIDATES, FATES, GROUPS, PAIRS, PROMPTS, REFERENCE_LOGPS, SCORED
from stages.protocols import Weights
from stages.sample.config import SampleConfig
from stages.sample.stage import Draw, Dropped
from stages.score.pairing.stage import pair
from stages.seeds import row_id
from stages.update.config import UpdateConfig
from stages.update.rows import answers_of, candidate_answers, pair_rows, reference_table

HOLDOUT = {"holdout": ["exact_match"]}
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</div></details></body></html><h1>taken over</h1>",
    "\u202eright to left\u202c \u2066isolated",
    "\x00 and \x1b[31m red \x1b]0;title\x07 \x9b31m",
    "'\"><svg/onload=alert(1)> {{ 7 * 7 }} {% raw %}",
    "tail " + "very long " * 3000 + "end",
    "tag \U000e0041 characters, z\u0335\u0336a\u0337lgo, family 👨‍👩‍👧, \ufeff",
]
NUM_ANSWERS, SHARD_SIZE, NUM_STEPS = 4, 4, 3


def write_run(folder: Path, *overrides: str, rounds: int = 2) -> Path:
    """A finished run of some rounds in ``folder/hostile``."""
    sets = [f"run.dir={folder}", "run.name=hostile", f"rounds={rounds}", "prompts.per_round=8", *overrides]
    config = load_config(Path("configs/quickstart.yaml"), sets)
    run = config.folder()
    pool, held_out = prompts("train", 8, round=0), prompts("held out", 3, round=0)
    publish(StageFolder(run / "prompts", PROMPTS), [pool])
    publish(StageFolder(run / "evaluation" / "prompts", PROMPTS), [held_out])
    policies = [Weights(run / "first", row_id("weights", 0) * 2, 0)]
    policies += [Weights(run / f"round-{n:04d}/policy", row_id("weights", n) * 2, n) for n in range(1, rounds + 1)]
    lineage = Lineage(run / "run.json")
    for number, policy in enumerate(policies):
        report = {"decision": "first", "reason": "the start"}
        if number:
            report = write_round(run, number, policies, pool, config.for_round(number).pair)
        report["evaluate"] = write_evaluation(run, number, policy, held_out)
        write_json(run / f"round-{number:04d}" / "report.json", {"round": number} | report)
        if number:
            start = policies[number - 1]
            lineage.settle(RoundRecord(number, start, start, [start], policy, policy, "promote", "every result is", {}))
    write_config(config, run)
    write_json(run / "final.json", describe(policies[-1], run))
    return run


def write_round(run, number, policies, pool, rule):
    """Draw, answer, score, pair and update, each published; the round's report but for its evaluation."""
    folder, start = run / f"round-{number:04d}", policies[number - 1]
    drawn = PROMPTS.table(row | {"round": number} for row in pool.to_pylist())
    made_of_it = GROUPS if rule.strategy == "groups" else PAIRS
    stages = {c.name: StageFolder(folder / c.name, c) for c in (PROMPTS, CANDIDATES, SCORED, made_of_it, FATES)}
    refs = StageFolder(folder / "reference_logps", REFERENCE_LOGPS)
    made: dict[str, list] = {name: [] for name in [*stages, "reference_logps"]}
    drops = []
    for at in range(0, drawn.num_rows, SHARD_SIZE):
        shard = drawn.slice(at, SHARD_SIZE)
        rows = shard.to_pylist()
        too_long = [Dropped(rows[0]["prompt_id"], "prompt_too_long", "900 tokens")] if at else []
        answered = answers(rows[len(too_long) :], start, Draw(0, number, number, "policy"), NUM_ANSWERS)
        scored = rewards(answered, shift=number)
        drops.append([asdict(drop) for drop in too_long])
        pairs, fates = pair(shard, answered, scored, too_long, rule, round=number, seed=0)
        paired = candidate_answers(shard, answered) if made_of_it is GROUPS else answers_of(pair_rows([pairs]))
        logps = {row.response_id: -float(len(row.token_ids)) for row in paired}
        logps = reference_table(paired, logps, weights=start, reference="round_start", dtype="float32", round=number)
        for name, table in zip(made, (shard, answered, scored, pairs, fates, logps), strict=True):
            made[name].append(table)
    for name, stage in (stages | {"reference_logps": refs}).items():
        stats = {"pairs": pair_stats, "groups": group_stats, "fates": fate_stats}.get(name)
        publish(stage, made[name], stats=stats, drops=drops if name == "candidates" else None)
    summed = figures.grouped if made_of_it is GROUPS else figures.paired
    found = summed(stages[made_of_it.name].entries(), stages["fates"].entries())
    num_made = sum(table.num_rows for table in made[made_of_it.name])
    steps = [step(number, index) for index in range(NUM_STEPS)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(found) + "\n" for found in steps))
    update = {"num_steps": NUM_STEPS, "num_pairs": num_made, "first": steps[0], "last": steps[-1]}
    (folder / "policy").mkdir()
    close_model(folder / "policy", {}, sha256=policies[number].sha256, master_sha256=None, update=update)
    worked = times().figures(number, 100.0, 112.0)
    settled = {"decision": "promote", "reason": "every result is", "seconds": 12.0}
    settled |= {name: worked[name] for name in ("timeline", "idle_share")}
    return settled | {made_of_it.name: found, "update": update}


def times():
    """Two engines that sample side by side, and then an update."""
    timeline, (prompts, candidates) = Timeline(), (StageFolder(Path(c.name), c) for c in (PROMPTS, CANDIDATES))
    for worker in ("sampler-0", "sampler-1"):
        job = SampleShard(0, prompts, candidates, Weights(Path("w"), "", 0), SampleConfig(), Draw(0, 1, 1, "policy"))
        timeline.note(job, Timed(None, 101.0, 104.0, worker=worker))
    timeline.note(update_of(Path("round"), Weights(Path("w"), "", 0)), Timed(109.0, 105.0, 110.0, worker="trainers"))
    return timeline


def write_evaluation(run, number, policy, held_out):
    folder, draw = run / f"round-{number:04d}" / "evaluation", Draw(0, number, 0, "evaluation")
    answered = answers(held_out.to_pylist(), policy, draw, 1)
    scored = rewards(answered, shift=2 * number)
    publish(StageFolder(folder / "candidates", CANDIDATES), [answered])
    publish(StageFolder(folder / "scored", SCORED), [scored])
    first = StageFolder(run / "round-0000" / "evaluation" / "scored", SCORED)
    mine, theirs = (Judged.of(tables, HOLDOUT) for tables in ([scored], first.read_all()))
    against = {"first": comparison(mine, theirs, max_error_share=0.01)} if number else {}
    return evaluation_figures(mine, theirs) | form_figures([answered]) | {"against": against}


def publish(stage, tables, *, stats=None, drops=None):
    stage.begin({})
    for shard, table in enumerate(tables):
        stage.publish(shard, table, stats=stats(table) if stats else {}, drops=drops[shard] if drops else ())
    stage.close(len(tables))


def fate_stats(fates):
    return dict(Counter(fates["fate"].to_pylist()))


def prompts(name, count, *, round):
    def row(index):
        text = f"{name} {index}: {HOSTILE[index % len(HOSTILE)]}"
        chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": text}] if index % 2 else None
        return {
            "prompt_id": row_id("prompt", text),
            "round": round,
            "prompt": text,
            "conversation": chat,
            "prompt_token_ids": [1, 2, index],
            "answer": f"truth {index}",
            "extra": json.dumps({"source": "<b>" + name}),
        }

    return PROMPTS.table(map(row, range(count)))


def answers(prompt_rows, policy, draw, count):
    """Different texts, but for the second prompt of a shard, whose answers are equal."""

    def row(prompt, at, index):
        text = "the same" if at == 1 else f"{HOSTILE[(at + index) % len(HOSTILE)]} {index}"
        return {
            "response_id": draw.response_id(prompt["prompt_id"], index),
            "prompt_id": prompt["prompt_id"],
            "round": draw.round,
            "stream": draw.stream,
            "sample_index": index,
            "response": text,
            "response_token_ids": [5, 6, index],
            "response_logps": [-0.5, -0.25, -0.125],
            "finish_reason": "stop",
            "policy_version": policy.sha256,
            "policy_round": policy.round,
            "seed": draw.seed(prompt["prompt_id"]) + index,
        }

    return CANDIDATES.table(row(p, at, index) for at, p in enumerate(prompt_rows) for index in range(count))


def rewards(candidates, *, shift):
    def row(number, candidate):
        value = float(shift + number % 5)
        parts = [("<i>judge</i>", value, "main"), ("exact_match", float(number % 2), "holdout")]
        return {
            "response_id": candidate["response_id"],
            "prompt_id": candidate["prompt_id"],
            "round": candidate["round"],
            "reward": value,
            "rewards": [{"name": name, "value": v, "role": role} for name, v, role in parts],
        }

    return SCORED.table(row(*found) for found in enumerate(candidates.to_pylist()))


SPREAD = {"": 0.0, "/p10": -0.3, "/p50": 0.05, "/p90": 0.4}


def step(round, index):
    return {
        "round": round,
        "step": index + 1,
        "steps": NUM_STEPS,
        "loss": math.log(2) - 0.1 * index,
        "rewards/chosen": 0.02 * index,
        "rewards/rejected": -0.05 * index,
        **{f"log_ratios/chosen{at}": 0.2 * index + by for at, by in SPREAD.items()},
        **{f"log_ratios/rejected{at}": -0.5 * index + by for at, by in SPREAD.items()},
        "margins/objective": 0.07 * index,
        "rewards/accuracies": float(index > 0),
        "rejected_active": 0.25 * (index == 1),
    }


def sampled(rnd, change=lambda answers: answers):
    """A round's prompts, in two shards, and their candidates, published as an engine would."""
    asked = prompts("asked", 4, round=1)
    asked = asked.set_column(3, asked.schema.field(3), pa.nulls(4, asked.schema.field(3).type))
    shards = [asked.slice(0, 2), asked.slice(2, 2)]
    folders = [StageFolder(rnd.folder / c.name, c) for c in (PROMPTS, CANDIDATES)]
    if not folders[0].is_closed():
        draw = Draw(0, 1, 1, "policy")
        drawn = [change(answers(shard.to_pylist(), rnd.start, draw, 4)) for shard in shards]
        for folder, parts in zip(folders, (shards, drawn), strict=True):
            publish(folder, parts)
    return folders


def update_of(folder, start):
    """A round's update as it is handed to the training group; nothing of it is there yet."""
    return UpdatePolicy(
        start=start,
        data=StageFolder(folder / "pairs", PAIRS),
        references=[],
        config=UpdateConfig(),
        folder=folder,
        fingerprint={},
        round=1,
        seed=0,
        curves=None,
        auxiliary_weights={},
        stream=None,
        value_head=None,
        moments=None,
        journal=step_journal(folder),
        probe=ProbeFolder(folder / "probe"),
    )
