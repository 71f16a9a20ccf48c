"""Two full rounds through the command line: interrupted, continued, and read back by other programs.

One run serves every test here; its policy and judge are the real embedded ones.
"""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import pytest
from curves import read_curves

from stages import faults as fault_points
from stages.weights import weights_sha256

TABLES = ["prompts", "candidates", "scored", "pairs", "fates", "reference_logps"]


def hashes(folder: Path) -> dict[str, str]:
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("part-*.parquet"))}


# Four cells of the kill matrix (`tests/faults`), by the call in which they die: a raylet; a driver; a sampler whose
# part is in place and its entry not, and the scorer with its rewards in memory.
CELLS = (
    "file.placed[evaluation/prompts/part-]:parent",
    "driver.start:kill",
    "file.written[round-0001/candidates/_shards/part-]:kill; score.middle[round-0001/scored]:kill@2",
)


@pytest.fixture(scope="module")
def story(prefloop):
    """Killed twice, interrupted while round 2 samples, then continued to the end; two workers die meanwhile."""
    folder, marks = prefloop.runs / "quickstart", [prefloop.runs / f"marks-{call}" for call in range(len(CELLS))]
    faults = [
        {fault_points.FAULTS: cells, fault_points.FOLDER: str(mark)} for cells, mark in zip(CELLS, marks, strict=True)
    ]
    in_round_2 = folder / "round-0002" / "candidates" / "_shards" / "part-00000.json"
    killed = [prefloop.run(faults=armed) for armed in faults[:2]]
    first = prefloop.interrupted(when=in_round_2.exists, faults=faults[2])
    kept = hashes(folder)
    second = prefloop.run()
    return {"folder": folder, "first": first, "kept": kept, "killed": killed, "second": second, "marks": marks}


def test_workers_that_die_are_replaced_and_a_dead_driver_or_raylet_costs_a_call(story):
    fired = [len(times) for mark in story["marks"] for times in fault_points.fired(mark).values()]
    assert fired == [1, 1, 1, 1]
    assert story["first"].out.count("restarted  sampler-0") == story["first"].out.count("restarted  scorer-0") == 1
    raylet, driver = story["killed"]
    assert driver.code == -signal.SIGKILL
    assert raylet.code == 1 and raylet.err.startswith("Ray was lost") and "the same command carries on" in raylet.err
    assert "Traceback" not in raylet.out + raylet.err


def test_ctrl_c_says_how_to_go_on_and_leaves_no_traceback(story):
    first = story["first"]
    assert first.code == 130, first.err
    assert "the same command carries on" in first.err
    assert "Traceback" not in first.err + first.out


def test_the_same_command_carries_on_and_touches_nothing_that_was_published(story):
    second = story["second"]
    assert second.code == 0, second.err
    assert "Traceback" not in second.err
    assert "round 1/2  finished   nothing to do" in second.out
    after = hashes(story["folder"])
    assert story["kept"].items() <= after.items()


def table(story, round, name):
    import pyarrow.dataset as ds

    return ds.dataset(sorted((story["folder"] / f"round-{round:04d}" / name).glob("part-*.parquet"))).to_table()


@pytest.mark.parametrize("round", [1, 2])
def test_rows_are_conserved_and_joined_by_id(story, round):
    prompts, candidates, scored, pairs, fates, refs = (table(story, round, name) for name in TABLES)
    ids = prompts["prompt_id"].to_pylist()
    assert len(set(ids)) == len(ids) == 128
    assert sorted(fates["prompt_id"].to_pylist()) == sorted(ids)
    assert candidates.num_rows == scored.num_rows == 128 * 8
    assert len(set(candidates["response_id"].to_pylist())) == candidates.num_rows
    assert set(scored["response_id"].to_pylist()) == set(candidates["response_id"].to_pylist())
    answers = set(pairs["chosen_id"].to_pylist()) | set(pairs["rejected_id"].to_pylist())
    assert answers <= set(candidates["response_id"].to_pylist())
    assert set(refs["response_id"].to_pylist()) == answers
    assert all(margin >= 0.5 for margin in pairs["margin"].to_pylist())
    for name, found in zip(TABLES, (prompts, candidates, scored, pairs, fates, refs), strict=True):
        assert set(found["round"].to_pylist()) == {round}, name


def test_no_prompt_is_asked_twice_and_none_that_is_evaluated_on(story):
    asked = [set(table(story, round, "prompts")["prompt_id"].to_pylist()) for round in (1, 2)]
    assert not asked[0] & asked[1]
    import pyarrow.dataset as ds

    held_out = ds.dataset(sorted((story["folder"] / "evaluation" / "prompts").glob("part-*.parquet"))).to_table()
    assert held_out.num_rows == 256
    assert not set(held_out["prompt_id"].to_pylist()) & (asked[0] | asked[1])


def test_the_lineage_names_the_weights_that_sampled_every_candidate(story):
    rounds = json.loads((story["folder"] / "run.json").read_text())["rounds"]
    assert [r["round"] for r in rounds] == [1, 2]
    assert rounds[1]["start"] == rounds[0]["result"]
    for record in rounds:
        assert set(table(story, record["round"], "candidates")["policy_version"].to_pylist()) == {
            record["start"]["sha256"]
        }
        assert [ref["sha256"] for ref in record["references"]] == [record["start"]["sha256"]]
        assert weights_sha256(story["folder"] / record["result"]["path"]) == record["result"]["sha256"]
    final = json.loads((story["folder"] / "final.json").read_text())
    assert final == rounds[1]["result"]
    assert weights_sha256(story["folder"] / "final") == final["sha256"]


def test_every_rounds_first_loss_is_ln_2_and_steps_carry_trls_names(story):
    steps = [json.loads(line) for line in (story["folder"] / "metrics.jsonl").open()]
    assert {step["round"] for step in steps} == {1, 2}
    for step in steps:
        assert step.keys() >= {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"}
        if step["step"] == 1:
            assert step["loss"] == pytest.approx(0.693147180, abs=1e-7)


def test_tensorboards_curves_are_the_metrics_and_the_evaluations(story):
    steps = [json.loads(line) for line in (story["folder"] / "metrics.jsonl").open()]
    update = read_curves(story["folder"] / "tensorboard" / "update")
    assert update.keys() == steps[0].keys() - {"round", "step", "steps"}
    for name, points in update.items():
        assert points == [(number, pytest.approx(step[name], rel=1e-6)) for number, step in enumerate(steps, 1)], name
    rounds = json.loads((story["folder"] / "report.json").read_text())["rounds"]
    assert f"tensorboard --logdir {story['folder'] / 'tensorboard'}" in story["second"].out
    rewards = [(r["round"], pytest.approx(r["evaluate"]["reward"], rel=1e-6)) for r in rounds]
    assert read_curves(story["folder"] / "tensorboard" / "evaluation")["reward"] == rewards


def test_the_report_says_when_every_stage_of_a_round_worked(story):
    found = json.loads((story["folder"] / "round-0001" / "report.json").read_text())
    spans = found["timeline"]
    works = {"prompts", "sample", "score", "pair", "reference", "update", "publish", "swap", "evaluate"}
    assert works <= {span["stage"] for span in spans}
    assert all(0 <= span["start_s"] <= span["end_s"] <= found["seconds"] + 0.001 for span in spans)
    assert 0 < found["idle_share"] < 1
    stepped = next(span["end_s"] for span in spans if span["stage"] == "update")
    answered = next(span for span in spans if span["stage"] == "evaluate")
    assert answered["start_s"] < stepped + found["first_answers_s"] <= answered["end_s"] + 0.002


def test_the_policy_got_better_by_a_measure_that_the_judge_cannot_fake(story):
    rounds = json.loads((story["folder"] / "report.json").read_text())["rounds"]
    accuracy = [r["evaluate"]["holdout"]["exact_match"] for r in rounds]
    assert 0.25 <= accuracy[0] <= 0.6
    assert accuracy[2] > accuracy[0] + 0.1
    assert rounds[0]["evaluate"]["win_rate"] == 0.5
    assert rounds[2]["evaluate"]["win_rate"] > 0.55
    assert "after round 2" in story["second"].out
    assert "after round 2" in (story["folder"] / "report.txt").read_text()


def test_the_engines_log_probs_agree_with_the_trainers(story):
    """The two forwards of one policy, joined by id: far apart would mean the engine sampled from other weights."""
    engine = {r["response_id"]: sum(r["response_logps"]) for r in table(story, 2, "candidates").to_pylist()}
    for row in table(story, 2, "reference_logps").to_pylist():
        assert row["logp"] == pytest.approx(engine[row["response_id"]], abs=1e-2)


def test_datasets_reads_every_table(story):
    from datasets import load_dataset

    for name in TABLES:
        files = [str(f) for f in sorted((story["folder"] / "round-0002" / name).glob("part-*.parquet"))]
        found = load_dataset("parquet", data_files=files, split="train")
        assert found.num_rows == table(story, 2, name).num_rows


def test_plain_transformers_loads_the_result_and_answers_held_out_prompts(story):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(story["folder"] / "final")
    model = AutoModelForCausalLM.from_pretrained(story["folder"] / "final")
    import pyarrow.dataset as ds

    rows = ds.dataset(sorted((story["folder"] / "evaluation" / "prompts").glob("part-*.parquet"))).to_table()
    prompts, truths = ["48315>", *rows["prompt"].to_pylist()], ["51384", *rows["answer"].to_pylist()]
    inputs = tokenizer(prompts, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    answers = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert answers[0] == "51384"
    assert sum(a == t for a, t in zip(answers, truths, strict=True)) >= 0.95 * len(truths)


def test_trl_trains_a_step_on_the_pairs_as_they_are(story, tmp_path):
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    files = [str(f) for f in sorted((story["folder"] / "round-0001" / "pairs").glob("part-*.parquet"))]
    trainer = DPOTrainer(
        model=str(story["folder"] / "final"),
        args=DPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False
        ),
        train_dataset=load_dataset("parquet", data_files=files, split="train"),
    )
    assert trainer.train().global_step == 1


def test_status_reads_the_folder_alone(story, prefloop):
    status = prefloop.status(story["folder"])
    assert status.code == 0
    assert "after round 2" in status.out and "done" in status.out


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_do(story, prefloop):
    before = hashes(story["folder"])
    again = prefloop.run()
    assert again.code == 0
    assert again.out.count("nothing to do") == 2
    assert "sample" not in again.out and "update" not in again.out
    assert hashes(story["folder"]) == before


@pytest.mark.slow
def test_damage_to_what_finished_rounds_published_is_refused_by_name(story, prefloop):
    config, fewer = story["folder"] / "round-0002" / "policy" / "config.json", story["folder"] / "round-0001" / "pairs"
    before = config.read_text()
    config.write_text(before.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    assert config.read_text() != before
    outcome = prefloop.run("rounds=3")
    config.write_text(before)
    assert outcome.code == 1 and str(config) in outcome.err
    part = fewer / "part-00000.parquet"
    content = part.read_bytes()
    part.unlink()
    outcome = prefloop.run("rounds=3")
    part.write_bytes(content)
    assert outcome.code == 1 and str(part) in outcome.err


@pytest.mark.slow
def test_fewer_rounds_than_are_settled_are_refused(story, prefloop):
    outcome = prefloop.run("rounds=1")
    assert outcome.code == 2 and "at least 2" in outcome.err


@pytest.mark.slow
def test_another_config_in_the_same_folder_is_refused_with_the_differing_fields(story, prefloop):
    other = prefloop.run("sample.temperature=0.7", "update.beta=0.3")
    assert other.code == 1
    assert "sample.temperature: 0.7" in other.err and "sample.temperature: 1.0" in other.err
    assert "update.beta: 0.3" in other.err
    assert "learning_rate" not in other.err


def test_a_fork_would_make_again_what_is_set_otherwise_and_what_comes_of_it(story):
    from test_fork_run import check_reuse

    check_reuse(story["folder"])
