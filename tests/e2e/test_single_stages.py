"""Stages by themselves, one after another, against the same stages in a run; ready pairs; exports."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import tiny_models

from pipeline import embedded
from stages.weights import weights_sha256

pytestmark = pytest.mark.long

SETS = (
    "rounds=1",
    "evaluate=null",
    "prompts.per_round=32",
    "prompts.shard_size=16",
    "update.num_train_epochs=1",
    "update.workers=1",
)


def rows(folder, *columns):
    table = ds.dataset(sorted(folder.glob("part-*.parquet"))).to_table()
    return sorted(table.select(columns or table.schema.names).to_pylist(), key=str)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Thirty-two prompts in a file."""
    file = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    with embedded.make("reverse-prompts").open(encoding="utf-8") as lines:
        file.write_text("".join(islice(lines, 32)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def whole(prefloop, few):
    """A run of one round."""
    done = prefloop.run("run.name=whole", f"prompts.path={few}", *SETS)
    assert done.code == 0, done.err
    return prefloop.runs / "whole"


@pytest.fixture(scope="module")
def chain(prefloop, few):
    """The same round, stage by stage."""
    out = prefloop.runs / "chain"

    def stage(name, *options):
        done = prefloop.command(
            name, "configs/quickstart.yaml", *options, f"--out={out}", sets=(*SETS, "run.trackers=[mlflow]")
        )
        assert done.code == 0, done.err

    prompts, candidates = f"--prompts={out / 'prompts'}", f"--candidates={out / 'candidates'}"
    done = prefloop.command("sample", "configs/quickstart.yaml", f"--out={out}", sets=(*SETS, f"prompts.path={few}"))
    assert done.code == 0, done.err
    stage("score", prompts, candidates)
    stage("pair", prompts, candidates, f"--scored={out / 'scored'}")
    stage("update", f"--pairs={out / 'pairs'}")
    return out


@pytest.mark.parametrize("table", ["candidates", "scored", "pairs", "fates", "reference_logps"])
def test_stages_by_themselves_make_the_rows_that_they_make_in_a_run(whole, chain, table):
    ours, theirs = rows(chain / table), rows(whole / "round-0001" / table)
    if table == "reference_logps":  # padded among other rows
        assert [row.pop("logp") for row in ours] == pytest.approx([row.pop("logp") for row in theirs], abs=1e-4)
    if table in ("candidates",):
        for row in (*ours, *theirs):
            row["response_logps"] = [round(value, 3) for value in row["response_logps"]]
    assert len(ours) == len(theirs)
    assert ours == theirs


def test_they_end_at_the_policy_that_a_run_ends_at(whole, chain):
    assert weights_sha256(chain / "policy") == weights_sha256(whole / "final")


def test_they_open_no_run_of_a_tracker(chain):
    assert not list(chain.glob("mlruns")) and not list(chain.glob("trackers.json"))


def test_loose_tables_are_taken_and_cut_by_prompt(prefloop, whole, tmp_path):
    for table in ("prompts", "candidates", "scored"):
        merged = ds.dataset(sorted((whole / "round-0001" / table).glob("part-*.parquet"))).to_table()
        pq.write_table(merged.take(list(reversed(range(merged.num_rows)))), tmp_path / f"{table}.parquet")
    given = [f"--{table}={tmp_path / table}.parquet" for table in ("prompts", "candidates", "scored")]
    done = prefloop.command("pair", "configs/quickstart.yaml", *given, f"--out={tmp_path / 'out'}", sets=SETS)
    assert done.code == 0, done.err
    assert rows(tmp_path / "out" / "pairs") == rows(whole / "round-0001" / "pairs")


def test_a_run_is_exported_for_trl_with_its_reference_log_probs(prefloop, whole):
    done = prefloop.command("export", str(whole), "--to", "trl")
    assert done.code == 0, done.err
    exported = pq.read_table(whole / "export" / "trl.parquet").to_pylist()
    logps = {row["response_id"]: row["logp"] for row in rows(whole / "round-0001" / "reference_logps")}
    assert len(exported) == len(rows(whole / "round-0001" / "pairs"))
    for row in exported:
        assert row["ref_chosen_logps"] == logps[row["chosen_id"]]
        assert row["ref_rejected_logps"] == logps[row["rejected_id"]]


def test_trl_finds_the_log_probs_that_were_exported(whole, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    start = embedded.make("reverse")
    exported = Dataset.from_parquet(str(whole / "export" / "trl.parquet"), cache_dir=str(tmp_path))
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(start),
        args=DPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            precompute_ref_log_probs=True,
            max_length=None,
        ),
        train_dataset=exported.select_columns(["prompt", "chosen", "rejected", "pair_id"]),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    trainer.get_train_dataloader()
    found = trainer.train_dataset
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert found[name] == pytest.approx(exported[name], abs=1e-3)


@pytest.mark.skipif("PREFLOOP_TEST_DATA" not in os.environ, reason="PREFLOOP_TEST_DATA names no folder of real data")
def test_ready_pairs_train_a_policy_offline(prefloop, tmp_path):
    """Real chat pairs, from a file as another trainer has it, through a tiny chat model."""
    policy = tiny_models.policy("qwen3", tmp_path / "qwen3")
    config = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    (policy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1000}), encoding="utf-8")
    pairs = Path(os.environ["PREFLOOP_TEST_DATA"]) / "pairs" / "dpo_en_demo.json"
    file = tmp_path / "offline.yaml"
    file.write_text(
        f"policy: {{path: {policy}, dtype: float32}}\nrounds: 1\npairs: {{path: {pairs}}}\n"
        "update: {learning_rate: 1.0e-4, global_batch_size: 16, micro_batch_size: 4, num_train_epochs: 2}\n",
        encoding="utf-8",
    )
    done = prefloop.command("run", str(file), sets=(f"run.dir={tmp_path}",))
    assert done.code == 0, done.err
    assert "299 rows ->" in done.out and "too long" in done.out
    steps = [json.loads(line) for line in (tmp_path / "offline" / "metrics.jsonl").open(encoding="utf-8")]
    assert steps[0]["loss"] == pytest.approx(0.693147180, abs=1e-7)
    second_epoch = steps[len(steps) // 2 :]
    assert sum(step["rewards/accuracies"] for step in second_epoch) / len(second_epoch) > 0.6
