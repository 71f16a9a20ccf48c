"""A pickle that would tell on whoever opens it, in every place where a file is read: none is ever opened as one."""

from __future__ import annotations

import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
import torch
from here import workshop

from pipeline.artifacts import StageFolder
from pipeline.config_file import load_config
from pipeline.lineage import Lineage
from pipeline.run import Run
from pipeline.trace import show_trace
from stages.contracts import PROMPTS
from stages.errors import PrefloopError
from stages.update.model import load_policy
from stages.update.value_head import ValueHead

pytestmark = pytest.mark.slow

REWARDS = "score.rewards=[{type: function, target: 'stages.score.functions:exact_match'}]"


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, song: Path) -> None:
        self.song = song

    def __reduce__(self):
        return Path.write_text, (self.song, "opened")


@pytest.fixture
def song(tmp_path):
    """The file that a canary writes; that it would is seen first."""
    file = tmp_path / "song"
    pickle.loads(pickle.dumps(Canary(file)))
    assert file.read_text() == "opened"
    file.unlink()
    return file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_models.policy("gpt2", root / "policy")
    return root


def prepare(policy: Path, prompts: Path, folder: Path, *more: str) -> None:
    """The way of a policy and of prompts into a run."""
    sets = [f"policy.path={policy}", f"prompts.path={prompts}", "prompts.per_round=2", "policy.pad_token=<|endoftext|>"]
    shop = workshop(folder, *sets, "evaluate=null", REWARDS, *more)
    Run(shop).prepare()
    load_policy(shop.sources.policy.path, dtype="float32")


def some_prompts(folder: Path) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text('{"prompt": "The old mill"}\n{"prompt": "Bread is"}\n')
    return file


WEIGHTS = ("pytorch_model.bin", "model.pt", "model.pth", "pytorch_model.pkl", "model.safetensors")


@pytest.mark.parametrize("how", ["torch", "plain"])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("beside", [True, False])
def test_as_weights(models, tmp_path, song, name, how, beside):
    policy = tmp_path / "policy"
    shutil.copytree(models / "policy", policy)
    if not beside:
        (policy / "model.safetensors").unlink()
    if how == "torch":
        torch.save({"lm_head.weight": Canary(song)}, policy / name)
    else:
        (policy / name).write_bytes(pickle.dumps(Canary(song)))
    if beside and name != "model.safetensors":
        prepare(policy, some_prompts(tmp_path), tmp_path / "run")
    else:
        with pytest.raises(PrefloopError, match="safetensors"):
            prepare(policy, some_prompts(tmp_path), tmp_path / "run")
    assert not song.exists()


BESIDE = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.pkl", "tokenizer.json")
"""Files that trainers leave beside weights, and two that a tokenizer may be read from."""


@pytest.mark.parametrize("name", [*BESIDE, "tokenizer_config.json", "config.json", "generation_config.json"])
def test_beside_weights(models, tmp_path, song, name):
    policy = tmp_path / "policy"
    shutil.copytree(models / "policy", policy)
    (policy / name).write_bytes(pickle.dumps(Canary(song)))
    try:
        prepare(policy, some_prompts(tmp_path), tmp_path / "run")
    except PrefloopError:
        assert name.endswith(".json")
    assert not song.exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow", ".pkl", ".pickle", ".pt", ".csv", ".txt"])
def test_as_prompts(models, tmp_path, song, suffix):
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(pickle.dumps([{"prompt": Canary(song)}]))
    with pytest.raises(PrefloopError):
        prepare(models / "policy", file, tmp_path / "run")
    assert not song.exists()


@pytest.mark.parametrize("name", ["arrow.py_extension_type", "arrow.arrow.py_extension_type"])
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_as_a_column_of_a_type_that_readers_once_unpickled(models, tmp_path, song, name, form):
    metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": pickle.dumps(Canary(song))}
    column = pa.field("prompt", pa.string(), metadata=metadata)
    table = pa.table([["The old mill", "Bread is"]], schema=pa.schema([column]))
    file = tmp_path / f"prompts.{form}"
    if form == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with suppress(PrefloopError):
        prepare(models / "policy", file, tmp_path / "run")
    assert not song.exists()


def test_as_a_saved_dataset(models, tmp_path, song):
    from datasets import Dataset

    folder = tmp_path / "saved"
    Dataset.from_dict({"prompt": ["The old mill", "Bread is"]}).save_to_disk(folder)
    for name in ("state.json", "dataset_info.json", "indices.arrow", "dataset.pkl"):
        (folder / name).write_bytes(pickle.dumps(Canary(song)))
    with suppress(PrefloopError):
        prepare(models / "policy", folder, tmp_path / "run")
    assert not song.exists()


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch SONG']", "!!python/name:os.system"])
def test_in_yaml(tmp_path, song, text):
    file = tmp_path / "mine.yaml"
    file.write_text(f"run: {{name: x}}\npolicy: {text.replace('SONG', str(song))}\n")
    with pytest.raises(PrefloopError):
        load_config(file, [])
    assert not song.exists()


def test_as_a_published_table(tmp_path, song):
    folder = StageFolder(tmp_path / "prompts", PROMPTS)
    folder.begin({})
    (folder.path / "part-00000.parquet").write_bytes(pickle.dumps(Canary(song)))
    (folder.path / "_shards").mkdir(exist_ok=True)
    (folder.path / "_shards" / "part-00000.json").write_bytes(pickle.dumps(Canary(song)))
    for read in (lambda: folder.read(0), folder.entries):
        with pytest.raises(PrefloopError):
            read()
    assert folder.drop_damaged() and folder.missing(1) == [0]
    assert not song.exists()


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "report.json", "round-0001/report.json"])
def test_in_a_runs_folder(tmp_path, song, name):
    file = tmp_path / "run" / name
    (tmp_path / "run" / "round-0001").mkdir(parents=True)
    Lineage(tmp_path / "run" / "run.json").drop([])
    file.write_bytes(pickle.dumps(Canary(song)))
    with suppress(PrefloopError):
        show_trace(tmp_path / "run", "00ff", full=True)
    assert not song.exists()


def test_as_a_value_head(tmp_path, song):
    (tmp_path / "value_head.safetensors").write_bytes(pickle.dumps(Canary(song)))
    head = ValueHead(8, learning_rate=1e-4, device=torch.device("cpu"))
    with pytest.raises(Exception, match="(?i)header|safetensor"):
        head.restore(tmp_path)
    assert not song.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_models_own_code_is_refused_unless_it_is_to_be_ignored_and_never_runs(models, tmp_path, song, file, ignored):
    policy = tmp_path / "policy"
    shutil.copytree(models / "policy", policy)
    (policy / "theirs.py").write_text(f"open({str(song)!r}, 'w').write('run')\nclass Theirs: pass\n")
    content = json.loads((policy / file).read_text())
    key = "AutoConfig" if file == "config.json" else "AutoTokenizer"
    value = "theirs.Theirs" if file == "config.json" else ["theirs.Theirs", None]
    (policy / file).write_text(json.dumps(content | {"auto_map": {key: value}}))
    ask = [f"run.ignore_auto_map={str(ignored).lower()}"]
    if ignored:
        prepare(policy, some_prompts(tmp_path), tmp_path / "run", *ask)
    else:
        with pytest.raises(PrefloopError, match="auto_map"):
            prepare(policy, some_prompts(tmp_path), tmp_path / "run", *ask)
    assert not song.exists()
