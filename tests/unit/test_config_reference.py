"""The configuration page against the classes that it is made from."""

from __future__ import annotations

from pathlib import Path

from pipeline import config_reference
from pipeline.config import Config

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_classes_say():
    page = (ROOT / config_reference.PAGE).read_text(encoding="utf-8")
    assert page == config_reference.written(), "the page is old: make configuration writes it anew"


def test_every_key_says_what_it_is():
    assert config_reference.undescribed() == []


def test_every_key_of_every_section_stands_on_the_page():
    page = config_reference.written()
    for kind in config_reference.all_records(Config):
        for name, field in kind.model_fields.items():
            told = f".{name}`" if config_reference.records_in(field.annotation) else f"| `{name}` |"
            assert told in page or f"## `{name}`" in page, f"{kind.__name__}.{name}"


def test_bounds_and_defaults_are_told():
    lines = config_reference.written().splitlines()
    assert any(line.startswith("| `top_p` | number, more than 0, at most 1 | `1.0` |") for line in lines)
    assert any(line.startswith("| `num_threads` | whole number or `null`, at least 1 | `null` |") for line in lines)
    assert any(line.startswith("| `path` | text, not empty | **required** |") for line in lines)


def test_what_the_reader_of_files_fills_in_is_not_called_required():
    section = config_reference.written().partition("## `run`")[2].partition("\n## ")[0]
    assert "required" not in section.lower()
    assert "the config file's name" in section
