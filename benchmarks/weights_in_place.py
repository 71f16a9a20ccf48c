"""What new weights in a running engine cost, and which faults the probe sees: one JSON line a case.

    python benchmarks/weights_in_place.py time FOLDER ...     # a new engine, weights in place, probe, first token
    python benchmarks/weights_in_place.py faults FOLDER       # updates of several sizes, every tensor in turn kept old

A FOLDER is a Hugging Face folder, or ``llama:LAYERSxWIDTHxVOCABULARY`` (with ``:tied``), a Llama with random weights.
An update of size r adds to every tensor normal noise of r times its root mean square. Log-probs of the update come from
transformers, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from stages.protocols import SampleRequest, Weights
from stages.sample.config import SampleConfig
from stages.sample.fixed_parts import fixed_parts
from stages.sample.probe import FLOAT32_TOLERANCE, Verdict, judge
from stages.sample.vllm_sampler import VLLMSampler
from stages.weights import weights_sha256

NUM_ANSWERS, REPEATS = 32, 5
SIZES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def written(name: str, folder: Path) -> Path:
    """A folder as it is, or a Llama by its sizes, with a tokenizer of words."""
    if not name.startswith("llama:"):
        return Path(name)
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    _, sizes, *tied = name.split(":")
    layers, width, vocabulary = map(int, sizes.split("x"))
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_attention_heads=width // 32,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=bool(tied),
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(folder)
    return folder


def updated(folder: Path, target: Path, size: float, *, kept: str | None = None) -> Path:
    """A copy after an update; `kept` names a tensor that it left out."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    for file in sorted(target.glob("*.safetensors")):
        tensors = load_file(file)
        for number, (name, tensor) in enumerate(sorted(tensors.items())):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
            new = tensor.float() + size * tensor.float().square().mean().sqrt() * noise
            tensors[name] = tensor if name == kept else new.to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def plain_logps(folders: Sequence[Path], prompt: list[int], answers: Sequence[list[int]], dtype: str) -> list[Any]:
    """Each folder's log-probs of the answers, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    rows = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        row = []
        for answer in answers:
            tokens = torch.tensor([prompt + answer])
            with torch.no_grad():
                logps_TV = model(tokens).logits[0, :-1].float().log_softmax(-1)
            row.append(float(logps_TV.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :].sum()))
        rows.append(row)
    return rows


def engine(dtype: str) -> VLLMSampler:
    return VLLMSampler(SampleConfig(), dtype=dtype, num_threads=2, use_gpu=False, seed=0)


def sampled(sampler: VLLMSampler, prompt: list[int], max_new_tokens: int) -> list[list[int]]:
    config = SampleConfig(num_generations=NUM_ANSWERS, max_new_tokens=max_new_tokens)
    (answers,) = sampler.generate([SampleRequest(prompt, 1)], config)
    return [answer.token_ids for answer in answers if answer is not None]


def seconds(function: Any, *args: Any, **options: Any) -> float:
    began = perf_counter()
    function(*args, **options)
    return round(perf_counter() - began, 4)


def time_case(sampler: VLLMSampler, name: str, prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
    with TemporaryDirectory() as root:
        folder = written(name, Path(root) / "start")
        first = Weights.found(folder, round=0)
        second = Weights.found(updated(folder, Path(root) / "updated", 1e-2), round=1)
        start_s = seconds(sampler.load, first)
        restart_s = seconds(sampler.load, second, afresh=True)
        answers = sampled(sampler, prompt, max_new_tokens)
        figures: dict[str, list[float]] = {"in_place_s": [], "probe_s": [], "first_token_s": []}
        for number in range(REPEATS):
            loading = sampler.load((first, second)[number % 2])
            assert loading.way == "in place", loading.reason
            figures["in_place_s"].append(loading.seconds)
            figures["probe_s"].append(seconds(sampler.logps, [prompt] * len(answers), answers))
            figures["first_token_s"].append(seconds(sampled, sampler, prompt, 1))
        return {
            "model": name,
            "weights_mb": round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6, 1),
            "probe_tokens": sum(map(len, answers)),
            "start_s": start_s,
            "restart_s": restart_s,
            "hash_s": seconds(weights_sha256, folder),
            "fixed_parts_s": seconds(fixed_parts, folder),
            **{key: round(median(values), 4) for key, values in figures.items()},
        }


def fault_lines(
    sampler: VLLMSampler, name: str, dtype: str, prompt: list[int], max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """For each size of update: what is said of a sound engine, and of one that kept a tensor, for each tensor."""
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        folder = written(name, root / "start")
        sampler.load(Weights.found(folder, round=0))
        answers = sampled(sampler, prompt, max_new_tokens)
        lengths, prompts = [len(ids) for ids in answers], [prompt] * len(answers)
        at_start = sampler.logps(prompts, answers)
        results = [updated(folder, root / f"{size}", size) for size in SIZES]
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            old, *news = pool.apply(plain_logps, ([folder, *results], prompt, answers, dtype))
        tolerances = [FLOAT32_TOLERANCE, 3 * (judge(at_start, old, old, lengths, tolerance=1.0).gap or 0.0)]
        for size, result, new in zip(SIZES, results, news, strict=True):
            sampler.load(Weights.found(result, round=1))
            sound = sampler.logps(prompts, answers)
            faulty = []
            for kept in tensors_of(folder):
                target = updated(folder, root / "faulty", size, kept=kept)
                sampler.load(Weights.found(target, round=1))
                faulty.append(sampler.logps(prompts, answers))
                shutil.rmtree(target)
            for tolerance in tolerances:
                yield {"model": name, "dtype": dtype, "size": size} | counted(
                    judge(sound, new, old, lengths, tolerance=tolerance),
                    [judge(engine, new, old, lengths, tolerance=tolerance) for engine in faulty],
                )


def counted(sound: Verdict, faulty: Sequence[Verdict]) -> dict[str, Any]:
    gaps = [verdict.gap or 0.0 for verdict in faulty]
    return {
        "tolerance": sound.tolerance,
        "change": sound.change,
        "sound": sound.kind,
        "sound_gap": sound.gap,
        "faults": len(faulty),
        "least_gap": min(gaps),
        "median_gap": median(gaps),
        **Counter(verdict.kind for verdict in faulty),
    }


def tensors_of(folder: Path) -> list[str]:
    from safetensors import safe_open

    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "faults"))
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--prompt", default="1", help="token ids, with commas")
    args = parser.parse_args()
    prompt = [int(token) for token in args.prompt.split(",")]
    sampler = engine(args.dtype)
    for name in args.folders:
        lines: Iterable[dict[str, Any]]
        if args.what == "time":
            lines = [time_case(sampler, name, prompt, args.max_new_tokens)]
        else:
            lines = fault_lines(sampler, name, args.dtype, prompt, args.max_new_tokens)
        for line in lines:
            print(json.dumps(line), flush=True)
    sampler.close()


if __name__ == "__main__":
    main()
