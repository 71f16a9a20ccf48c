"""Tables made elsewhere that a stage cannot build upon: refused before it starts, with the row's id."""

from __future__ import annotations

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
from refusals import refused

from pipeline.artifacts import StageFolder
from pipeline.export import export_pairs
from pipeline.jobs.tables import AdoptTables
from pipeline.report import show_page
from pipeline.single import made_from_one_another, parquet_files
from pipeline.status import show_status
from pipeline.trace import show_trace
from stages.contracts import CANDIDATES, PAIRS, PROMPTS, SCORED
from stages.errors import ContractError, InputError

ALL = (PROMPTS, CANDIDATES, SCORED)


@pytest.fixture(scope="module")
def tables(written):
    folder = written / "round-0001"
    return {c.name: pa.concat_tables(StageFolder(folder / c.name, c).read_all()) for c in (*ALL, PAIRS)}


def adopt(tables, folder, contracts=ALL, model=None, **changes):
    files = {}
    for contract in contracts:
        table = changes.get(contract.name, lambda table: table)(tables[contract.name])
        path = folder / f"{contract.name}.parquet"
        path.write_bytes(table) if isinstance(table, bytes) else pq.write_table(table, path)
        files[contract.name] = parquet_files(path)
    out = [StageFolder(folder / "given" / contract.name, contract) for contract in contracts]
    return AdoptTables(files, out, 4, model)(None)


def change(column, values):
    """Every value of a column replaced: by one value, or by a cast to a type."""

    def edit(table):
        field = table.schema.field(column)
        new = table[column].cast(values) if isinstance(values, pa.DataType) else [values] * table.num_rows
        new = new if isinstance(values, pa.DataType) else pa.array(new, field.type)
        return table.set_column(table.schema.get_field_index(column), column, new)

    return edit


def twice(table):
    return pa.concat_tables([table, table.slice(0, 1)])


TABLES = {
    "a column too few": ({"candidates": lambda t: t.drop_columns(["seed"])}, "no column 'seed'"),
    "a column too many": ({"scored": lambda t: t.append_column("x", [t["round"].combine_chunks()])}, "'x' besides"),
    "another type": ({"candidates": change("sample_index", pa.int64())}, "int16", "int64"),
    "null for an id": ({"candidates": change("response_id", None)}, "response_id: null"),
    "another table": ({"candidates": lambda t: t.select(["response_id", "prompt_id"])}, "no column"),
    "a CSV": ({"candidates": lambda _: b"a,b\n1,2\n"}, "Parquet"),
    "no prompt": ({c.name: lambda t: t.slice(0, 0) for c in ALL}, "at least one row"),
    "a prompt twice": ({"prompts": twice}, "every prompt_id once"),
    "a candidate twice": ({"candidates": twice}, "every response_id once"),
    "a score twice": ({"scored": twice}, "every response_id once"),
    "candidates of other prompts": ({"candidates": change("prompt_id", "0" * 32)}, "the given prompts have", "0" * 32),
    "prompts too few": ({"prompts": lambda t: t.slice(1)}, "the given prompts have"),
    "scores too few": ({"scored": lambda t: t.slice(1)}, "the given scored have", "1 others"),
    "a score that is no number": ({"scored": change("reward", float("nan"))}, "finite", "nan"),
    "an answer of no token": ({"candidates": change("response_token_ids", [])}, "one token id or more"),
    "an unknown end": ({"candidates": change("finish_reason", "abort")}, "stop or length", "abort"),
    "extras that are no object": ({"prompts": change("extra", "[1]")}, "a JSON object"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_do_not_belong_together(tables, tmp_path, case):
    changes, *says = TABLES[case]
    error = refused(lambda: adopt(tables, tmp_path, **changes), *says)
    assert isinstance(error, (InputError, ContractError))
    assert not (tmp_path / "given").exists()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.slice(0, 0), "at least one row"),
        (change("chosen_token_ids", []), "one token id or more"),
        (change("rejected_token_ids", [-1]), "none below 0"),
        (change("prompt_token_ids", [10_000]), "token ids below"),
        (change("margin", float("inf")), "finite"),
    ],
)
def test_pairs_that_a_model_cannot_be_trained_on(tables, tmp_path, edit, says):
    model = tiny_models.policy("gpt2", tmp_path / "gpt2")
    refused(lambda: adopt(tables, tmp_path, (PAIRS,), model, pairs=edit), says, kind=InputError)


def test_good_tables_are_taken_whatever_the_order_of_their_rows(tables, tmp_path):
    turned = lambda t: t.take(list(range(t.num_rows))[::-1])  # noqa: E731
    entries = adopt(tables, tmp_path, candidates=turned, scored=turned)
    rows = {name: sum(e.rows for e in entries if e.contract == name) for name in ("prompts", "candidates", "scored")}
    assert rows == {name: tables[name].num_rows for name in rows}


def test_published_tables_of_two_rounds_are_not_taken_for_those_of_one(run):
    first, second = run / "round-0001", run / "round-0002"
    mixed = [StageFolder(first / "prompts", PROMPTS), StageFolder(second / "candidates", CANDIDATES)]
    assert not made_from_one_another(mixed)
    assert made_from_one_another([StageFolder(first / "pairs", PAIRS)])
    assert not made_from_one_another([StageFolder(run / "nothing", PAIRS)])


def test_paths_that_hold_no_table(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(lambda: parquet_files(tmp_path / "no"), "no such path", "RUN/round-0001", kind=InputError)
    refused(lambda: parquet_files(tmp_path / "empty"), "none in it", kind=InputError)


# ---- what is not, or not yet, a run ---------------------------------------------------------------------------------


def export(folder, **options):
    export_pairs(folder, **{"kind": "trl", "rounds": (), "out": None} | options)


LOOKS = {
    "status": show_status,
    "report": lambda folder: show_page(folder, None),
    "trace": lambda folder: show_trace(folder, "ab", full=False),
    "export": export,
}


@pytest.mark.parametrize("look", LOOKS)
def test_folders_without_a_run(tmp_path, look):
    for folder in (tmp_path, tmp_path / "no"):
        refused(lambda folder=folder: LOOKS[look](folder), str(folder), "runs/NAME", kind=InputError)
    assert not list(tmp_path.iterdir())


def test_what_a_run_does_not_have_cannot_be_exported(run, tmp_path):
    refused(lambda: export(run, rounds=(9,)), "pairs of round 9", "1, 2", kind=InputError)
    refused(lambda: export(run, out=tmp_path / "a.csv"), ".parquet or .jsonl", kind=InputError)
    young = shutil.copytree(run / "round-0001" / "pairs", tmp_path / "young" / "round-0001" / "pairs")
    refused(lambda: export(young.parents[1]), "reference_logps beside the pairs", "--round", kind=InputError)
