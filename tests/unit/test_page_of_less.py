"""What a run lacks is said or left out on its page, and nothing breaks."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from parsed_page import parsed

from pipeline.files import read_json, write_json
from pipeline.lineage import Lineage, describe
from stages.vocab import FATE_MEANINGS


def no_evaluation(run):
    for file in run.glob("round-*/report.json"):
        write_json(file, {key: value for key, value in read_json(file).items() if key != "evaluate"})


def no_metrics(run):
    for file in run.glob("round-*/metrics.jsonl"):
        file.unlink()


def metrics_that_cannot_be_drawn(run):
    (run / "round-0001" / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "rewards/chosen": null}\n')
    (run / "round-0002" / "metrics.jsonl").write_text("")


def no_pair(run):
    shutil.rmtree(run / "round-0002" / "pairs")
    report = read_json(run / "round-0002" / "report.json")
    report["pairs"] = {"num_prompts": 8, "num_pairs": 0, "margin_mean": None, "fates": {"tied": 8}}
    write_json(run / "round-0002" / "report.json", report)


def tables_removed(run):
    for file in run.glob("round-*/*/part-*.parquet"):
        file.unlink()


def nothing_settled(run):
    for number in (1, 2):
        shutil.rmtree(run / f"round-{number:04d}")
    for name in ("config.yaml", "run.json", "final.json"):
        (run / name).unlink()


def second_round_unfinished(run):
    (run / "round-0002" / "report.json").unlink()


def more_figures(run):
    for file in run.glob("round-*/report.json"):
        report = read_json(file)
        report["evaluate"] |= {"kl": 0.5 * report["round"], "texts_nll": 1.25, "holdout": {}}
        write_json(file, report)


def nothing_promoted(run):
    """The first round made no policy, the second's was held."""
    lineage = Lineage.read(run / "run.json")
    first = lineage.rounds[0].start
    held = [replace(r, standing=first, decision="hold", reason="it fell & fell") for r in lineage.rounds]
    again = Lineage(run / "run.json")
    for record in (replace(held[0], result=None), held[1]):
        again.settle(record)
        file = run / f"round-{record.round:04d}" / "report.json"
        write_json(file, read_json(file) | {"decision": "hold", "reason": "it fell & fell"})
    write_json(run / "final.json", describe(first, run))


def one_held_out_prompt(run):
    """One answer has no spread, so that no interval can be told."""
    for stage in ("prompts", "candidates", "scored"):
        for folder in [run / "evaluation" / stage, *run.glob(f"round-*/evaluation/{stage}")]:
            for file in folder.glob("part-*.parquet"):
                pq.write_table(pq.read_table(file).slice(0, 1), file)
    for file in run.glob("round-*/report.json"):
        report = read_json(file)
        report["evaluate"] |= {"num_prompts": 1, "reward_se": None, "against": {}}
        write_json(file, report)


def stopped_after_the_first_round(run):
    shutil.rmtree(run / "round-0002")
    lineage = Lineage.read(run / "run.json")
    again = Lineage(run / "run.json")
    again.settle(lineage.rounds[0])
    write_json(run / "final.json", describe(lineage.rounds[0].standing, run))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (nothing_promoted, "No round's result was promoted, and the first policy stands"),
        (nothing_promoted, "The result of round 2 was not promoted (hold): it fell & fell"),
        (nothing_promoted, "The run stands behind the first policy"),
        (no_evaluation, "nothing was evaluated, so whether the policy got better is not known"),
        (no_pair, f"tied {FATE_MEANINGS['tied']} 0 8"),
        (tables_removed, "prompts drawn 8 8"),
        (nothing_settled, "No round is settled yet"),
        (second_round_unfinished, "1 of 2 rounds are settled"),
        (more_figures, "KL divergence, nats an answer"),
        (one_held_out_prompt, "on 1 held-out prompt;"),
        (stopped_after_the_first_round, "1 of 2 rounds are settled"),
        (stopped_after_the_first_round, "The run stands behind the policy of round 1"),
    ],
)
def test_what_a_run_lacks_is_said_and_nothing_breaks(run, change, said):
    change(run)
    assert said in parsed(run).text


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        (no_metrics, "Optimizer steps of all rounds"),
        (metrics_that_cannot_be_drawn, "Optimizer steps of all rounds"),
        (no_evaluation, "± is the standard error of the mean"),
        (one_held_out_prompt, " ± "),
        (tables_removed, "Picked rows"),
        (stopped_after_the_first_round, "after round 2"),
    ],
)
def test_what_a_run_lacks_is_left_out(run, change, gone):
    before = parsed(run).text
    change(run)
    text = parsed(run).text.replace("± is the standard error", "") if gone == " ± " else parsed(run).text
    assert gone in before and gone not in text
