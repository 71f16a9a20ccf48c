"""Steps that kill their ranks: found by the journal after three deaths, whatever else dies in between."""

from __future__ import annotations

from stages.update.deadly_steps import FEWEST_DEATHS, MOST_PASSED_OVER, StepJournal


def group(journal, *survived, dies_in=None):
    """A group of ranks that survives some steps, and then dies: in a step, or between two."""
    deadly = journal.new_group()
    for step in survived:
        journal.begins(step)
        journal.survived(step)
    if dies_in is not None:
        journal.begins(dies_in)
    return deadly


def test_a_step_is_passed_over_by_the_group_after_the_third_death_in_it_and_not_before(tmp_path):
    journal = StepJournal(tmp_path / "steps.jsonl", call="this")
    for _ in range(FEWEST_DEATHS):
        assert group(journal, 0, 1, dies_in=2) == {}
    assert journal.can_go_on()
    assert group(journal, 0, 1, 3) == {2: "3 groups of ranks died in it"}


def test_deaths_in_other_steps_between_steps_and_before_the_first_one_do_not_count(tmp_path):
    journal = StepJournal(tmp_path / "steps.jsonl", call="this")
    for dies_in in (2, 2, 3, None, 4):
        group(journal, 0, 1, dies_in=dies_in)
    group(journal)
    group(journal, 0, 1, 2)
    assert not journal.can_go_on()
    assert group(journal) == {}


def test_a_death_elsewhere_is_no_reason_to_go_on_though_an_earlier_step_was_found(tmp_path):
    journal = StepJournal(tmp_path / "steps.jsonl", call="this")
    for _ in range(FEWEST_DEATHS):
        group(journal, dies_in=0)
    group(journal, dies_in=1)
    assert not journal.can_go_on()
    assert list(group(journal)) == [0]


def test_where_too_many_steps_kill_the_fault_is_not_their_rows(tmp_path):
    journal = StepJournal(tmp_path / "steps.jsonl", call="this")
    found = []
    for step in range(MOST_PASSED_OVER + 1):
        for _ in range(FEWEST_DEATHS):
            group(journal, dies_in=step)
        found.append(journal.can_go_on())
    assert found == [True] * MOST_PASSED_OVER + [False]


def test_a_line_that_was_torn_by_a_death_is_none(tmp_path):
    journal = StepJournal(tmp_path / "steps.jsonl", call="this")
    group(journal, 0)
    with journal.file.open("a") as file:
        file.write('\n{"beg')
    assert group(journal, 0) == {}
    assert not journal.can_go_on()


def test_an_earlier_calls_journal_says_nothing_once_it_is_dropped(tmp_path):
    journal = StepJournal(tmp_path / "steps.jsonl", call="this")
    for _ in range(FEWEST_DEATHS):
        group(journal, dies_in=2)
    journal.drop()
    assert group(journal) == {} and not journal.can_go_on()


def test_what_another_call_left_where_it_could_not_be_dropped_says_nothing(tmp_path):
    earlier, later = (StepJournal(tmp_path / "steps.jsonl", call=call) for call in ("earlier", "later"))
    for _ in range(FEWEST_DEATHS):
        group(earlier, dies_in=2)
    assert group(later) == {} and not later.can_go_on()
    assert earlier.can_go_on()
