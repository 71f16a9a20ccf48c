"""Bad rewards, and what a refusal leaves behind: nothing that counts as whole, and a way on once it is mended."""

from __future__ import annotations

import importlib
import sys

import pyarrow as pa
import pytest
import tiny_models
import written_run
from here import workshop
from refusals import refuse_published, refused

from pipeline.artifacts import StageFolder
from pipeline.policies import Policies
from pipeline.round import Round
from stages.contracts import CANDIDATES, FATES, GROUPS
from stages.errors import InputError, StageError
from stages.score.functions import FunctionScorer, find_function

FUNCTIONS = """
import sys
import numpy as np
import torch

CONSTANT = 3
def raises(prompts, completions, **columns): raise KeyError("level")
def exits(prompts, completions, **columns): sys.exit(3)
def too_few(prompts, completions, **columns): return [1.0]
def too_many(prompts, completions, **columns): return [1.0] * 9
def texts(prompts, completions, **columns): return ["0.5"] * len(completions)
def one_text(prompts, completions, **columns): return [1.0, "good"]
def a_word(prompts, completions, **columns): return "ab"
def lists(prompts, completions, **columns): return [[1.0, 2.0]] * len(completions)
def keys(prompts, completions, **columns): return {0: 1.0, 1: 1.0}
def no_order(prompts, completions, **columns): return {1.0, 2.0}
def nothing(prompts, completions, **columns): pass
def one_number(prompts, completions, **columns): return 1.0
def one_tensor(prompts, completions, **columns): return torch.tensor(1.0)
def too_large(prompts, completions, **columns): return [10**400, 1]
def cut_generator(prompts, completions, **columns):
    yield 1.0
    raise TypeError("in the generator")
async def later(prompts, completions, **columns): return [1.0] * len(completions)
def no_columns(prompts, completions): return [1.0] * len(completions)
def other_column(prompts, completions, truth, **columns): return [1.0] * len(completions)

def array(prompts, completions, **columns): return np.array([1, 2])
def tensor(prompts, completions, **columns): return torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
def scalars(prompts, completions, **columns): return [np.float32(1), torch.tensor(2)]
def generator(prompts, completions, **columns): yield from (1.0, 2.0)
def pair(prompts, completions, **columns): return (True, 2)
def talks(prompts, completions, **columns): print("word " * 100_000); return [1.0, 2.0]
def takes_all(prompts, completions, answer, **columns):
    for found in (prompts, completions, answer):
        found.clear()
    return [1.0, 2.0]
"""

MISTAKES = {
    "raises": ("KeyError: 'level'", "many_rewards.py, line 7"),
    "exits": ("SystemExit: 3", "line 8"),
    "too_few": ("1 for 2 answers", "as many"),
    "too_many": ("9 for 2 answers", "as many"),
    "texts": ("str '0.5' for answer 1",),
    "one_text": ("str 'good' for answer 2",),
    "a_word": ("str", "return a list"),
    "lists": ("list '[1.0, 2.0]' for answer 1",),
    "keys": ("dict", "return a list"),
    "no_order": ("set", "return a list"),
    "nothing": ("NoneType", "return a list"),
    "one_number": ("float", "return a list"),
    "one_tensor": ("Tensor", "return a list"),
    "too_large": ("for answer 1",),
    "cut_generator": ("in the generator",),
    "later": ("coroutine", "async def", "return a list"),
    "no_columns": ("unexpected keyword argument 'answer'", "**columns"),
    "other_column": ("'truth'", "columns are answer"),
}
MODULES = {
    "no_such_module:f": (None, "No module named", "beside the config"),
    "bad_name:nope": ("f = len", "no attribute 'nope'", "spelling"),
    "bad_kind:CONSTANT": ("CONSTANT = 3", "int", "name a function"),
    "bad_syntax:f": ("x = 1\ndef f(:\n", "SyntaxError", "line 2"),
    "bad_import:f": ("import a_library_that_is_not_there", "a_library_that_is_not_there", "bad_import.py, line 1"),
    "bad_start:f": ("x = 1 / 0", "ZeroDivisionError", "mend the module"),
    "bad_exit:f": ("raise SystemExit(4)", "SystemExit: 4", "mend the module"),
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder on Python's path; modules that were imported from it are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.mark.parametrize("target", MODULES)
def test_a_function_that_cannot_be_found(modules, target):
    content, *says = MODULES[target]
    if content is not None:
        (modules / f"{target.partition(':')[0]}.py").write_text(content + "\n")
    refused(lambda: find_function(target), target, *says, kind=InputError)


def scored(name, columns=None):
    scorer = FunctionScorer("mine", "main", 1.0, f"many_rewards:{name}")
    return scorer(["p", "p"], ["a", "b"], {"answer": ["1", "2"]} if columns is None else columns)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_function_that_gives_no_rewards(modules, name):
    (modules / "many_rewards.py").write_text(FUNCTIONS)
    refused(lambda: scored(name), f"many_rewards:{name}", "one float, or None", *MISTAKES[name], kind=StageError)


@pytest.mark.parametrize("name", ["array", "tensor", "scalars", "generator", "pair", "talks", "takes_all"])
def test_rewards_in_every_usual_form_are_taken_and_what_was_given_is_left_as_it_was(modules, name):
    (modules / "many_rewards.py").write_text(FUNCTIONS)
    columns = {"answer": ["1", "2"]}
    assert scored(name, columns) == [1.0, 2.0]
    assert columns == {"answer": ["1", "2"]}


# ---- what a refusal leaves behind -----------------------------------------------------------------------------------

COUNTING = """
def value(prompts, completions, **columns):
    {before}
    return [{value} for i, c in enumerate(completions)]
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_models.policy("gpt2", tmp_path_factory.mktemp("models") / "gpt2")


class Bench:
    """A round on prompts and candidates of two shards, whose reward and settings change from call to call."""

    def __init__(self, folder, policy, module):
        self.folder, self.module, self._policy = folder, module, policy

    def round(self, *overrides, value="i + len(c) / 100", before="pass"):
        self.module.write_text(COUNTING.format(value=value, before=before))
        sys.modules.pop(self.module.stem, None)
        importlib.invalidate_caches()
        prompts = self.folder / "prompts.jsonl"
        prompts.write_text('{"prompt": "a"}\n')
        target = f"score.rewards=[{{type: function, target: '{self.module.stem}:value'}}]"
        sets = (
            f"policy.path={self._policy}",
            f"prompts.path={prompts}",
            "evaluate=null",
            "prompts.shard_size=2",
            target,
        )
        shop = workshop(self.folder, *sets, "pair.min_margin=0", *overrides)
        return Round(shop, 1, Policies(shop.sources.policy, shop.sources.policy))


@pytest.fixture
def bench(tmp_path, modules, policy):
    return Bench(tmp_path, policy, modules / f"reward_of_{abs(hash(str(tmp_path)))}.py")


def test_a_reward_that_fails_in_the_second_shard_can_be_mended_and_what_came_before_it_is_kept(bench):
    broken = bench.round(before="assert 'asked 2' not in prompts[0], 'not this one'")
    tables = written_run.sampled(broken)
    refused(lambda: broken.data.score(*tables), "not this one", kind=StageError)
    refuse_published(broken.folder / "scored")
    before = [file.stat().st_mtime_ns for folder in tables for file in sorted(folder.path.glob("part-*"))]
    mended = bench.round()
    assert mended.data.score(*tables).is_closed()
    assert before == [file.stat().st_mtime_ns for folder in tables for file in sorted(folder.path.glob("part-*"))]


def test_a_reward_that_failed_once_goes_on_where_it_stopped(bench):
    up = f"__import__('pathlib').Path({str(bench.folder / 'up')!r}).exists()"
    once = f"assert 'asked 2' not in prompts[0] or {up}"
    rnd = bench.round(before=once)
    tables = written_run.sampled(rnd)
    refused(lambda: rnd.data.score(*tables), kind=StageError)
    first = rnd.folder / "scored" / "part-00000.parquet"
    published = first.stat().st_mtime_ns
    refuse_published(rnd.folder / "scored")
    (bench.folder / "up").touch()
    assert bench.round(before=once).data.score(*tables).is_closed()
    assert first.stat().st_mtime_ns == published


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("1.0", "for every one of 16 answers"),
        ("float('nan')", "16 of 16 answers without one"),
        ("None", "16 of 16 answers without one"),
        ("float('inf')", "16 of 16 answers without one"),
        ("None if i else 1.0", "answers without one"),
    ],
)
def test_rewards_that_say_nothing_stop_the_round_and_give_way_to_others(bench, value, says):
    rnd = bench.round(value=value)
    tables = written_run.sampled(rnd)
    refused(lambda: rnd.data.score(*tables), "score", says, kind=StageError)
    refuse_published(rnd.folder / "scored")
    mended = bench.round()
    pairs = mended.data.pair(*tables, mended.data.score(*tables))
    assert pairs.is_closed() and sum(entry.rows for entry in pairs.entries()) > 0


def test_a_round_without_a_pair_tells_the_fates_and_the_spread_and_gives_way_to_another_rule(bench):
    rnd = bench.round("pair.min_margin=1000")
    tables = written_run.sampled(rnd)
    scored = rnd.data.score(*tables)
    before = (scored.path / "part-00000.parquet").stat().st_mtime_ns
    says = ("none from 4 prompts", "gap_too_small", "duplicate_answers", "rewards from", "pair.min_margin")
    refused(lambda: rnd.data.pair(*tables, scored), *says, kind=StageError)
    refuse_published(rnd.folder / "pairs")
    refuse_published(rnd.folder / "fates")
    mended = bench.round("pair.min_margin=0.5")
    assert mended.data.pair(*tables, mended.data.score(*tables)).is_closed()
    assert (scored.path / "part-00000.parquet").stat().st_mtime_ns == before


def test_empty_answers_of_a_whole_round_are_one_answer_and_no_pair(bench):
    rnd = bench.round()
    prompts, candidates = written_run.sampled(rnd)
    empty = StageFolder(bench.folder / "empty", CANDIDATES)
    parts = []
    for table in candidates.read_all():
        column = table.schema.get_field_index("response")
        parts.append(table.set_column(column, table.schema.field(column), pa.array([""] * table.num_rows)))
    written_run.publish(empty, parts)
    scored = rnd.data.score(prompts, empty)
    refused(lambda: rnd.data.pair(prompts, empty, scored), "duplicate_answers 4", "sample.temperature", kind=StageError)


def test_a_round_of_groups_publishes_them_in_the_place_of_pairs(bench):
    rnd = bench.round("pair={strategy: groups, length_penalty: 0.5}", "update.loss_type=exo")
    tables = written_run.sampled(rnd)
    made = rnd.data.pair(*tables, rnd.data.score(*tables))
    assert made.contract is GROUPS and made.is_closed() and not (rnd.folder / "pairs").exists()
    groups = [row for table in made.read_all() for row in table.to_pylist()]
    candidates = {row["response_id"]: row for table in tables[1].read_all() for row in table.to_pylist()}
    for row in groups:
        assert row["rewards"] == sorted(row["rewards"], reverse=True) and row["rewards"][0] > row["rewards"][-1]
        mine = [candidates[key] for key in row["response_ids"]]
        assert row["responses"] == [answer["response"] for answer in mine]
        assert row["response_token_ids"] == [answer["response_token_ids"] for answer in mine]
    fates = [row for table in StageFolder(rnd.folder / "fates", FATES).read_all() for row in table.to_pylist()]
    assert sorted(f["prompt_id"] for f in fates if f["num_pairs"]) == sorted(row["prompt_id"] for row in groups)
