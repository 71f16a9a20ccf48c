"""Plans: what they know of models, how needs change with the config, what they refuse, and what they do not know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.resources import Devices, Node, Resources, place
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.layout import lay_out
from pipeline.plan import memory, training
from pipeline.plan.command import outlook_of, refuse_what_cannot_be_held, show_plan
from pipeline.plan.hardware import named
from pipeline.plan.memory import Lengths
from pipeline.plan.model_facts import ModelFacts, facts_of_shapes, read_facts
from stages.errors import ConfigError, InputError
from stages.update.config import UpdateConfig

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def _where_nothing_has_run(tmp_path_factory, monkeypatch):
    """A run that lies beside the tests would change what is still to do."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


LENGTHS = Lengths(200, 100)
TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def tiny_llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TINY | {"bos_token_id": 1, "eos_token_id": 2} | more))


def small_files_of_a_70b_model(folder: Path) -> Path:
    """What a download of its JSON files gives; 80 layers, 70.6 billion parameters, tokenizer left out."""
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    return small_files_of_a_model(folder, num_parameters=70_553_706_496, **large, num_key_value_heads=8)


def small_files_of_a_model(folder: Path, *, num_parameters: int, **more) -> Path:
    config = TINY | {"vocab_size": 128256, "max_position_embeddings": 8192} | more
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    index = {"metadata": {"total_size": 2 * num_parameters}, "weight_map": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def config_of(*overrides: str) -> Config:
    return load_config(QUICKSTART, overrides)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_parameters_are_counted_without_opening_the_weights(tmp_path, tied, shard):
    model = tiny_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    facts = read_facts(tmp_path)
    assert facts is not None
    assert facts.num_parameters == sum(p.numel() for p in model.parameters())
    assert (facts.vocab_size, facts.context, facts.num_kv_heads, facts.head_size) == (300, 512, 2, 16)


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_alone_tell_what_the_real_model_tells(tmp_path, tied):
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
    real = read_facts(tmp_path)
    assert real is not None and real.tied == tied
    (tmp_path / "model.safetensors").unlink()
    assert read_facts(tmp_path) == real
    shapes = TINY | {"model_type": "llama", "tie_word_embeddings": tied}
    named_alone = outlook_of(config_of("policy.path=no-such/model", f"policy.shapes={json.dumps(shapes)}"))
    assert named_alone.policy.facts == real
    assert named_alone.workers == outlook_of(config_of(f"policy.path={tmp_path}")).workers


@pytest.mark.parametrize("kin", [{"model_type": "gpt2", "n_embd": 32, "n_head": 4}, {"model_type": "opt"}])
def test_shapes_of_other_kin_are_counted_too(kin):
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 64, "vocab_size": 99}
    small |= {"word_embed_proj_dim": 32} if kin["model_type"] == "opt" else {}
    shapes = kin | {name: value for name, value in small.items() if name not in ("hidden_size",) or "n_embd" not in kin}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes))
    facts = facts_of_shapes(shapes)
    assert facts is not None
    assert facts.num_parameters == sum(p.numel() for p in model.parameters())
    assert facts.tied and facts.hidden_size == 32


def test_shapes_of_no_known_model_are_refused():
    with pytest.raises(ConfigError, match="model_type"):
        outlook_of(config_of("policy.path=no-such/model", "policy.shapes={hidden_size: 64}"))


def test_a_cut_weights_file_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="whole safetensors"):
        read_facts(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_layers_keep_for_the_backward_pass_is_estimated_from_above_and_not_far_off(tmp_path, dtype):
    import torch

    from stages.update.packing import Family, pack
    from stages.update.scorer import Scorer

    model = tiny_llama(dtype=dtype).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        families = [Family((5 + i,) * 200, {2 * i: (6,) * 100, 2 * i + 1: (7,) * 100}) for i in range(2)]
        loss = Scorer(model)(pack(families, 4, torch.device("cpu")))
    facts = read_facts(tmp_path)
    assert facts is not None
    num_tokens = training.tokens_a_forward(UpdateConfig(micro_batch_size=2), LENGTHS)
    assert num_tokens == 2 * (200 + 2 * 100)
    activations = training.activation_bytes(facts, num_tokens=num_tokens, dtype=dtype)
    assert sum(kept.values()) <= activations <= 3 * sum(kept.values())
    del loss


# ---- needs ----------------------------------------------------------------------------------------------------------

SIZES = st.builds(
    ModelFacts,
    num_parameters=st.integers(10**5, 10**12),
    hidden_size=st.integers(64, 16384),
    intermediate_size=st.integers(64, 65536),
    num_layers=st.integers(1, 120),
    vocab_size=st.integers(16, 300_000),
    num_heads=st.integers(1, 128),
    num_kv_heads=st.integers(1, 128),
    head_size=st.integers(8, 256),
    context=st.none() | st.integers(64, 1 << 20),
    chat_template=st.none() | st.booleans(),
    tied=st.booleans(),
)
DTYPES = st.sampled_from(["float32", "bfloat16"])


@given(facts=SIZES, dtype=DTYPES, workers=st.integers(1, 64), more=st.integers(1, 64), on_cpu=st.booleans())
def test_more_workers_never_need_more_each_under_zero_3(facts, dtype, workers, more, on_cpu):
    def need(count: int) -> memory.Need:
        update = UpdateConfig(zero_stage=3, workers=count)
        return training.trainer(facts, update, dtype=dtype, lengths=LENGTHS, on_cpu=on_cpu)

    assert need(workers + more).total <= need(workers).total
    assert need(workers + more).least <= need(workers).least


@given(facts=SIZES, dtype=DTYPES, workers=st.integers(1, 64))
def test_a_higher_zero_stage_never_needs_more_at_the_least(facts, dtype, workers):
    least = [
        training.trainer(facts, UpdateConfig(zero_stage=s, workers=workers), dtype=dtype, lengths=LENGTHS, on_cpu=False)
        for s in (1, 2, 3)
    ]
    assert least[0].least >= least[1].least >= least[2].least
    assert all(need.least <= need.total for need in least)


@given(facts=SIZES, dtype=DTYPES, tokens=st.integers(1, 10**5))
def test_activations_computed_again_never_need_more(facts, dtype, tokens):
    def need(recomputed: bool) -> int:
        return training.activation_bytes(facts, num_tokens=tokens, dtype=dtype, recomputed=recomputed)

    if facts.num_layers > 1:
        assert need(True) <= need(False)


@given(facts=SIZES, dtype=DTYPES, stage=st.integers(1, 3), workers=st.integers(1, 8))
def test_adapters_and_offload_never_need_more_on_a_gpu(facts, dtype, stage, workers):
    def need(**more) -> memory.Need:
        update = UpdateConfig(zero_stage=stage, workers=workers, **more)
        return training.trainer(facts, update, dtype=dtype, lengths=LENGTHS, on_cpu=False)

    assert need(lora={"r": 4}).total <= need().total
    assert need(offload_optimizer=True).total <= need().total


def test_adapters_are_counted_as_peft_makes_them(tmp_path):
    from stages.update.lora import add_adapters

    model = tiny_llama()
    model.save_pretrained(tmp_path)
    update = UpdateConfig(lora={"r": 4})
    add_adapters(model, update.lora, round=0)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert training.trained_parameters(read_facts(tmp_path), update) == counted


# ---- places ---------------------------------------------------------------------------------------------------------


def test_sums_are_not_enough_where_no_single_machine_holds_a_worker():
    worker = Resources(1.0, 1.0)
    assert place([Node(4, 0), Node(0.5, 4)], [worker]) is None
    assert place([Node(4, 0), Node(1, 4)], [worker]) is not None
    assert place([Node(8, 4), Node(8, 4)], [Resources(1, 8)]) is None


def test_shares_of_a_gpu_are_of_one_gpu():
    assert place([Node(8, 2)], [Resources(1, 0.66)] * 3) is None
    places = place([Node(8, 2)], [Resources(1, 0.5)] * 3)
    assert places is not None
    assert sorted(spot.gpus for spot in places) == [(0,), (0,), (1,)]


@given(
    cpus=st.integers(1, 32),
    gpus=st.integers(0, 8),
    engines=st.integers(1, 4),
    ranks=st.sampled_from([1, 2, 4]),
    workers=st.integers(1, 8),
    device=st.sampled_from(["auto", "cpu"]),
    placement=st.sampled_from(["split", "colocate"]),
)
def test_what_is_laid_out_on_one_machine_finds_its_places(cpus, gpus, engines, ranks, workers, device, placement):
    config = config_of()
    config = config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"placement": placement}),
            "sample": config.sample.model_copy(update={"engines": engines, "tensor_parallel_size": ranks}),
            "update": config.update.model_copy(update={"workers": workers, "device": device}),
        }
    )
    try:
        layout = lay_out(config, Devices(cpus, gpus))
    except ConfigError:
        return
    assert place([Node(cpus, gpus)], [each for count, each in layout.workers for _ in range(count)]) is not None


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize("nodes", [2, 3, 8])
def test_where_a_machine_is_lost_the_others_hold_all_workers(nodes, cpus):
    there = Devices(nodes * cpus, 0, (Node(cpus, 0),) * nodes)
    layout = lay_out(config_of("sample.engines=2", "update.workers=2"), there)
    workers = [each for count, each in layout.workers for _ in range(count)]
    assert place([Node(cpus, 0)] * (nodes - 1), workers) is not None


@pytest.mark.parametrize(("gpus", "trainers"), [(1, 1), (2, 1), (8, 3), (8, 8)])
def test_colocated_workers_share_gpus_with_other_kinds_alone(gpus, trainers):
    sets = ("cluster.placement=colocate", "update.device=auto", f"sample.engines={gpus}", f"update.workers={trainers}")
    layout = lay_out(config_of(*sets), Devices(64, gpus))
    kinds = [kind for kind, (count, _) in enumerate(layout.workers) for _ in range(count)]
    places = place([Node(64, gpus)], [each for count, each in layout.workers for _ in range(count)])
    assert places is not None
    held = [(kind, gpu) for kind, spot in zip(kinds, places, strict=True) for gpu in spot.gpus]
    assert len(held) == len(set(held)) == gpus + 1 + trainers
    # Ray fills a GPU with shares before it takes the next: whatever comes after the engines must not fit twice.
    beside_engine = 1 - layout.sampler.gpus
    assert 2 * layout.trainer.gpus > beside_engine >= layout.trainer.gpus + layout.scorer.gpus


@pytest.mark.parametrize(
    ("setting", "key"),
    [("sample.tensor_parallel_size=2", "tensor_parallel_size"), ("update.workers=3", "workers"), (None, "engines")],
)
def test_what_cannot_take_turns_is_refused_with_what_can(setting, key):
    sets = ["cluster.placement=colocate", "update.device=auto", *([setting] if setting else [])]
    with pytest.raises(ConfigError, match=rf"{key}[\s\S]*--set"):
        lay_out(config_of(*sets), Devices(16, 2))


@pytest.mark.parametrize(
    ("text", "nodes", "node", "gpu_bytes", "ram_bytes"),
    [
        ("8x80GB", 1, Node(64, 8), 80 * 10**9, None),
        ("2x8x80gb", 2, Node(64, 8), 80 * 10**9, None),
        ("1x22.5GiB", 1, Node(8, 1), int(22.5 * 2**30), None),
        ("cpu:16", 1, Node(16, 0), None, None),
        ("16cpu", 1, Node(16, 0), None, None),
        ("cpu:16x64GB", 1, Node(16, 0), None, 64 * 10**9),
    ],
)
def test_devices_are_named(text, nodes, node, gpu_bytes, ram_bytes):
    hardware = named(text)
    assert (hardware.num_nodes, hardware.node) == (nodes, node)
    assert (hardware.gpu_bytes, hardware.ram_bytes) == (gpu_bytes, ram_bytes)


@pytest.mark.parametrize("text", ["", "8", "8x80", "x80GB", "0x80GB", "8x80TB", "cpu:0", "gpu:8", "8x80GBx2"])
def test_devices_of_another_form_are_refused_with_examples(text):
    with pytest.raises(ConfigError, match="2x8x80GB"):
        named(text)


# ---- plans ----------------------------------------------------------------------------------------------------------


def test_the_quickstart_fits_here(tmp_path):
    config = config_of(f"run.dir={tmp_path}")
    outlook = outlook_of(config)
    assert not outlook.shortages
    assert refuse_what_cannot_be_held(config) == []
    assert [worker.count for worker in outlook.workers] == [1, 1, 2, 1]


def test_a_plan_of_no_rounds_evaluates_alone(capsys):
    show_plan(QUICKSTART, ["rounds=0"], devices=None, in_json=False)
    assert "before the first round" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_too_large_is_refused_with_exit_code_2_and_the_reason(tmp_path):
    folder = small_files_of_a_70b_model(tmp_path / "70b")
    sets = (f"policy.path={folder}", "policy.dtype=bfloat16", "update.workers=1", "update.device=auto")
    command = [sys.executable, "-m", "pipeline", "plan", str(QUICKSTART), "--devices", "1x24GB"]
    done = subprocess.run([*command, *(f"--set={s}" for s in sets)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "131.4 GiB" in done.stderr and "at the least" in done.stderr and "tensor_parallel_size" in done.stderr
    assert "round 3" in done.stdout and "no room" in done.stdout
    larger = outlook_of(config_of(*sets, "sample.tensor_parallel_size=8"), "16x80GB")
    assert [shortage.where for shortage in larger.shortages] == ["memory of a GPU"]
    assert "AdamW" in larger.shortages[0].wanted


def test_a_plan_says_that_stages_in_turn_have_room_where_all_at_once_have_not(tmp_path):
    folder = small_files_of_a_model(tmp_path / "3b", num_parameters=3_000_000_000)
    sets = (f"policy.path={folder}", "policy.dtype=bfloat16", "update.workers=1", "update.device=auto")
    large = (*sets, "sample.gpu_memory_utilization=0.7", "sample.max_new_tokens=64")
    split = outlook_of(config_of(*large), "1x80GB")
    assert [shortage.where for shortage in split.shortages] == ["memory of a GPU"]
    assert "cluster.placement=colocate" in split.shortages[0].fix and "colocate has room" in split.placement
    in_turn = outlook_of(config_of(*large, "cluster.placement=colocate"), "1x80GB")
    assert not in_turn.shortages and in_turn.placement.startswith("colocate")
    too_small = outlook_of(config_of(*large), "1x48GB")
    assert "colocate" not in too_small.shortages[0].fix + too_small.placement


@pytest.mark.parametrize("setting", ["cluster.streaming='on'", "max_staleness=1"])
def test_stages_that_take_turns_cannot_overlap(setting):
    with pytest.raises(ConfigError, match="colocate"):
        config_of("cluster.placement=colocate", setting)


def test_enough_gpus_hold_what_fewer_did_not(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    sets = (f"policy.path={tmp_path}", "update.device=auto", "update.workers=4", "sample.max_new_tokens=64")
    with pytest.raises(ConfigError, match="one each"):
        show_plan(QUICKSTART, sets, devices="4x24GB", in_json=True)
    show_plan(QUICKSTART, sets, devices="6x24GB", in_json=True)


def test_without_the_models_files_the_plan_says_what_it_cannot_know(capsys):
    sets = ("policy.path=no-such/model", "prompts.path=elsewhere.jsonl", "cluster.address=10.0.0.1:6379")
    show_plan(QUICKSTART, sets, devices=None, in_json=True)
    plan = json.loads(capsys.readouterr().out)
    told = "\n".join(plan["unknown"])
    for word in ("no-such/model", "elsewhere.jsonl", "parameters", "chat template", "--devices"):
        assert word in told
    assert plan["disk"]["policy_bytes"] is None and len(plan["rounds"]) == 3


def test_more_disk_than_there_is_is_refused(tmp_path):
    folder = small_files_of_a_70b_model(tmp_path / "70b")
    outlook = outlook_of(config_of(f"policy.path={folder}", f"run.dir={tmp_path}", "rounds=10000"))
    shortage = next(shortage for shortage in outlook.shortages if shortage.where.startswith("disk"))
    assert shortage.certain


def test_prompts_are_looked_into(tmp_path):
    file = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "ä" * 50}]
    file.write_text("".join(json.dumps({"messages": chat, "n": n}) + "\n" for n in range(100)))
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    sets = (f"policy.path={tmp_path / 'model'}", f"prompts.path={file}", "sample.max_new_tokens=64")
    found = {shortage.where: shortage for shortage in outlook_of(config_of(*sets)).shortages}
    assert found["prompts.per_round"].wanted == "at most the 100 prompts there are"
    assert "chat template" in found[f"policy.path {tmp_path / 'model'}"].wanted


def test_settings_beyond_the_models_context_are_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    for setting in ("sample.max_new_tokens=512", "sample.max_model_len=1024"):
        with pytest.raises(ConfigError, match="context 512"):
            refuse_what_cannot_be_held(config_of(f"policy.path={tmp_path}", setting))


def test_what_is_only_estimated_refuses_a_plan_and_warns_a_run(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    sets = [f"policy.path={tmp_path}", "sample.kv_cache_gib=10000"]
    assert [shortage.certain for shortage in refuse_what_cannot_be_held(config_of(*sets))] == [False]
    with pytest.raises(ConfigError, match="by an estimate"):
        show_plan(QUICKSTART, sets, devices=None, in_json=False)


# ---- what a run would refuse at once --------------------------------------------------------------------------------

EVALUATED = """
policy: {path: "embedded:reverse", dtype: float32}
prompts: {path: "embedded:reverse-prompts", per_round: 8}
sample: {max_new_tokens: 8}
score:
  rewards:
    - {type: function, target: "TARGET"}
evaluate: {path: heldout.jsonl, texts: {path: texts.jsonl}}
"""


def names_not_known(folder: Path, target: str, capsys) -> str:
    file = folder / "evaluated.yaml"
    file.write_text(EVALUATED.replace("TARGET", target), encoding="utf-8")
    show_plan(file, [f"run.dir={folder}"], devices=None, in_json=True)
    return "\n".join(json.loads(capsys.readouterr().out)["unknown"])


@pytest.mark.parametrize("target", ["no_such:f", "stages.score.no_such:f", "json.tool.deeper:f", "stages..score:f"])
def test_a_plan_names_the_modules_that_are_not_there(tmp_path, capsys, target):
    assert f"score.rewards.0.target {target}" in names_not_known(tmp_path, target, capsys)


@pytest.mark.parametrize(
    "target", ["rewards_beside:f", "rewards_package.inner:f", "stages.score.functions:exact_match", "math:sqrt"]
)
def test_a_plan_finds_modules_without_importing_them(tmp_path, capsys, target):
    (tmp_path / "rewards_package").mkdir()
    for name in ("rewards_beside.py", "rewards_package/__init__.py", "rewards_package/inner.py"):
        (tmp_path / name).write_text("raise SystemExit('imported')\n", encoding="utf-8")
    path = list(sys.path)
    assert "score.rewards" not in names_not_known(tmp_path, target, capsys)
    assert sys.path == path


def test_a_plan_names_the_files_of_an_evaluation_that_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = names_not_known(tmp_path, "math:sqrt", capsys)
    assert "evaluate.path heldout.jsonl" in told and "evaluate.texts.path texts.jsonl" in told
    for name in ("heldout.jsonl", "texts.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1>", "text": "a"}\n', encoding="utf-8")
    assert "evaluate" not in names_not_known(tmp_path, "math:sqrt", capsys)
