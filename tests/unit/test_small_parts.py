"""Seeds, errors, contracts, the learning rate."""

from __future__ import annotations

import math
import pickle

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.contracts import CANDIDATES, FATES, PAIRS, PROMPTS, REFERENCE_LOGPS, SCORED
from stages.errors import ContractError, StageError
from stages.seeds import hashed_seed, row_id
from stages.update.config import UpdateConfig
from stages.update.schedule import learning_rate_at

CONTRACTS = [CANDIDATES, FATES, PAIRS, PROMPTS, REFERENCE_LOGPS, SCORED]


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_ids_and_seeds_are_functions_of_the_parts_and_of_their_bounds(a, b):
    assert (row_id(*a) == row_id(*b)) == (a == b)
    assert (hashed_seed(*a) == hashed_seed(*b)) == (a == b)
    assert 0 <= hashed_seed(*a) < 2**62


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(StageError("here", wanted="a", got="b\nc", fix="d")))
    assert type(error) is StageError
    assert [line.strip() for line in str(error).splitlines()] == [
        "StageError: here",
        "wanted: a",
        "got:    b",
        "c",
        "fix:    d",
    ]


FATE_ROW = {
    "prompt_id": "p",
    "round": 1,
    "fate": "tied",
    "detail": "",
    "num_candidates": 8,
    "num_valid": 8,
    "num_pairs": 0,
}


def test_a_contract_refuses_another_type_a_missing_and_an_extra_column_and_a_null():
    table = FATES.table([FATE_ROW])
    assert FATES.check(table, where="x") is table
    wider = table.set_column(1, "round", pa.array([1], pa.int64()))
    nulls = table.set_column(0, "prompt_id", pa.array([None], pa.string()))
    for bad in (wider, table.drop_columns(["fate"]), table.append_column("more", pa.array([1])), nulls):
        with pytest.raises(ContractError, match="wanted"):
            FATES.check(bad, where="x")
    with pytest.raises(ContractError):
        FATES.table([FATE_ROW | {"num_pairs": "many"}])


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: c.name)
def test_every_field_says_what_it_means_and_no_map_type_is_used(contract):
    assert contract.schema.metadata[b"version"]
    for field in contract.schema:
        assert field.metadata[b"doc"]
        assert not pa.types.is_map(field.type)


@given(st.integers(1, 400), st.floats(0, 0.9), st.sampled_from(["linear", "cosine", "constant"]))
def test_the_learning_rate_rises_once_then_never_and_no_step_is_lost(total, warmup, kind):
    config = UpdateConfig(learning_rate=1.0, warmup_ratio=warmup, lr_scheduler_type=kind)
    rates = [learning_rate_at(step, total, config) for step in range(total)]
    peak = math.ceil(total * warmup)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if kind != "constant" and peak < total:
        assert rates[peak] == 1
        assert learning_rate_at(total, total, config) == pytest.approx(0, abs=1e-12)


def test_warm_up_and_cosine_are_written_out():
    config = UpdateConfig(learning_rate=1.0, warmup_ratio=0.2, lr_scheduler_type="cosine")
    rates = [learning_rate_at(step, 10, config) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[6] == pytest.approx(0.5)
    assert [a + b for a, b in zip(rates[3:], rates[:2:-1], strict=True)] == pytest.approx([1] * 7)
