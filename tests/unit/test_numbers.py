"""The reward for arithmetic word problems: the final number, however it is spelled."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.score.numbers import final_number, number_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("A: 18", "18"),
        ("$1,080.00", "1080"),
        ("the answer is 18.", "18"),
        ("The answer is: $18.50", "18.5"),
        ("She has 3 + 4 = 7.\n#### 7", "7"),
        ("#### 7\nBut 3 of them are red.", "7"),
        ("so \\boxed{-12} apples", "-12"),
        ("It takes 3 hours and then 5 more, 8 hours", "8"),
        ("**Answer:** 1,234,567", "1234567"),
        ("-$5", "-5"),
        ("$ 70,000", "70000"),
        ("18%", "18"),
        ("the total is .5 litres", "0.5"),
        ("x2 is no number, 3 is", "3"),
        ("The total is 3 + 4 = 7.", "7"),
        ("Result: 17 - 2 = 15", "15"),
        ("#### 5*3=15", "15"),
        ("#### Step 2: 5*3 = 15", "15"),
        ("#### 12\n(3 = 3)", "12"),
        ("It is \N{MINUS SIGN}5", "-5"),
        ("10 - -5", "-5"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_the_final_number_is_found_however_it_is_spelled(text, number):
    assert number_of(text) == (None if number is None else Decimal(number))


@given(st.text("0123456789+-.,$= #A:\n\N{MINUS SIGN}", max_size=30))
def test_no_text_is_too_odd_to_be_read(text):
    """One answer that raised would end a run."""
    found = number_of(text)
    assert found is None or found.is_finite()


def test_a_completion_without_a_number_is_wrong_and_chats_are_read_too():
    chat = [{"role": "assistant", "content": "I think\n#### 4"}]
    answers = ["2 + 2 = <<2+2=4>>4\n#### 4"] * 3
    assert final_number(["?"] * 3, [chat, "dunno", "It is 5"], answers) == [1.0, 0.0, 0.0]


@pytest.mark.skipif("PREFLOOP_TEST_DATA" not in os.environ, reason="PREFLOOP_TEST_DATA names no folder of real data")
def test_every_real_solution_agrees_with_its_number_in_every_spelling_and_with_no_other():
    lines = (Path(os.environ["PREFLOOP_TEST_DATA"]) / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    truths = [json.loads(line)["answer"] for line in lines]
    numbers = [truth.rpartition("####")[2].strip() for truth in truths]
    for spelled in ("#### {}", "A: {}", "${:,.2f}", "the answer is {}.", "So she pays \\boxed{{{}}} in all"):
        values = [Decimal(number.replace(",", "")) for number in numbers]
        completions = [spelled.format(value) for value in values]
        assert final_number(truths, completions, truths) == [1.0] * len(truths)
        wrong = [spelled.format(value + 1) for value in values]
        assert final_number(truths, wrong, truths) == [0.0] * len(truths)
    assert final_number(truths, truths, truths) == [1.0] * len(truths)
