"""A model larger than the memory it may take: seconds a token and peak memory; whole, in host memory, and on the disk.

    python tests/benchmarks/offload.py                            # 4 GB of bf16 weights, about two minutes
    python tests/benchmarks/offload.py --gigabytes 0.1 --methods whole,disk,disk-1 --json FILE

Each method runs in a process of its own that generates greedily from the same prompt with the same random weights:
    whole            everything in memory
    cpu              cpu_offload: weights in host memory; where the CPU computes they are there already
    disk             from safetensors through two buffers, the next block read while one computes ("cached", by the page cache)
    disk-direct      the same past the page cache (O_DIRECT): what a disk gives when memory holds nothing of the file
    disk-1           one buffer, no look-ahead;  disk-1-direct  the same past the page cache
    accelerate-*     Hugging Face Accelerate's functions of the same names, where it is installed
Memory is VmHWM of the process, transformers included, above what it had after `import torch`. Beside the time a token stand, from
the same process, the time to read all blocks and compute nothing, and to compute on what is in the buffers and read nothing:
    overhead         seconds a token / the larger of the two
    cpu              processor time a token / that of reading plus that of computing, all threads: what doing both at once costs.
                     Other programs on the same cores lengthen seconds, and hardly this.
`same` compares tokens and the last logits, bit for bit, with `whole`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METHODS = ("whole", "cpu", "disk", "disk-direct", "disk-1", "disk-1-direct")
PEERS = ("accelerate-cpu", "accelerate-disk")
TOKENS = 4
ROUNDS = 3


# -- the model -----------------------------------------------------------------------------------------------------------
def config_for(gigabytes: float) -> dict[str, Any]:
    """Llama's shape, with blocks of a fortieth of the weights."""
    width = 2048 if gigabytes >= 1 else 512
    block = (4 * width * width + 3 * width * (width * 11 // 4)) * 2
    return {
        "vocab_size": 8192 if gigabytes >= 1 else 1024,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": max(4, round(gigabytes * 1e9 / block)),
        "num_attention_heads": width // 128,
        "num_key_value_heads": width // 128,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def make_weights(folder: Path, gigabytes: float) -> int:
    """Write random bf16 weights as shards with an index, one shard in memory at a time; return their bytes."""
    import torch
    from drivetrain.strategies.checkpoint.weights import save_weights

    config = config_for(gigabytes)
    (folder / "model_config.json").write_text(json.dumps(config))
    shapes = shapes_of(config)

    def read(names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        made = {}
        for name in names:
            values = torch.empty(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1:
                made[name] = values.fill_(1.0)
                continue
            # A few rows are drawn and repeated: drawing 4 GB takes a minute.
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            rows = torch.empty((min(64, shapes[name][0]), shapes[name][1])).normal_(0, 0.02, generator=draw).to(torch.bfloat16)
            for start in range(0, shapes[name][0], len(rows)):
                part = values[start : start + len(rows)]
                part.copy_(rows[: len(part)].roll(start // len(rows), 1))
            made[name] = values
        return made

    sizes = {n: torch.Size(s).numel() * 2 for n, s in shapes.items()}
    save_weights(folder, sizes, read, max_shard_size="500MB")
    return sum(sizes.values())


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the weights of transformers' Llama, whose import takes longer than writing them."""
    width, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for i in range(config["num_hidden_layers"]):
        for key in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{i}.self_attn.{key}.weight"] = (width, width)
        shapes |= {f"model.layers.{i}.mlp.{key}.weight": (inner, width) for key in ("gate_proj", "up_proj")}
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"model.layers.{i}.{key}.weight": (width,) for key in ("input_layernorm", "post_attention_layernorm")}
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (words, width)}


def build(folder: Path) -> Any:
    """Return the model without values."""
    import torch
    from drivetrain.strategies.offload.empty import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    with init_empty_weights():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(LlamaConfig(**json.loads((folder / "model_config.json").read_text()))).eval()
        finally:
            torch.set_default_dtype(before)


# -- one method, in a process of its own ---------------------------------------------------------------------------------
def memory(key: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def child(method: str, folder: Path, limit: str, rounds: int) -> dict[str, Any]:
    """Run one method; return what was measured."""
    import torch

    base = memory("VmRSS")
    begin = time.perf_counter()
    model = build(folder)
    imported_s = time.perf_counter() - begin
    begin = time.perf_counter()
    weights = place(model, method, folder, limit)
    found: dict[str, Any] = {"method": method, "torch": base, "import_s": imported_s, "load_s": time.perf_counter() - begin}
    prompt = torch.arange(3, 11)[None]
    with torch.no_grad():
        generate(model, prompt, 1)
        tokens, logits = generate(model, prompt, TOKENS)
        found["peak"] = memory("VmHWM") - base
        found["resident"] = memory("VmRSS") - base
        found["result"] = hashlib.sha256(json.dumps(tokens).encode() + logits).hexdigest()[:16]
        found |= times(model, weights if weights is not None and weights.streamed else None, prompt, rounds)
    return found


def place(model: Any, method: str, folder: Path, limit: str) -> Any:
    """Load the model as `method` says; return drivetrain's handle on the weights, if it is its."""
    if method.startswith("accelerate"):
        import accelerate
        import torch

        if method == "accelerate-disk":
            where = tempfile.mkdtemp(dir=folder)
            # {"": "disk"} fails there on a machine without accelerators.
            places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
            accelerate.load_checkpoint_and_dispatch(model, str(folder), {**places, "model.layers": "disk"}, offload_folder=where)
        else:
            accelerate.load_checkpoint_in_model(model, str(folder), {"": "cpu"})
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        return None
    from drivetrain.strategies.offload.dispatch import load_checkpoint_and_dispatch
    from drivetrain.strategies.offload.handle import weights_of

    if method in ("whole", "cpu"):
        load_checkpoint_and_dispatch(model, folder, {"": "cpu"})
        if method == "cpu":
            from drivetrain.strategies.offload.tiers import cpu_offload

            cpu_offload(model)
        return None
    io = "direct" if method.endswith("direct") else "cached"
    prefetch = not method.startswith("disk-1")
    load_checkpoint_and_dispatch(model, folder, "auto", {"cpu": limit}, prefetch=prefetch, io=io)
    return weights_of(model)


def generate(model: Any, prompt: Any, count: int) -> tuple[list[int], bytes]:
    """Generate `count` tokens greedily; return them and the bytes of the last logits."""
    out = model.generate(
        prompt,
        attention_mask=prompt.new_ones(prompt.shape),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return out.sequences[0].tolist(), out.logits[-1].float().numpy().tobytes()


def times(model: Any, weights: Any, prompt: Any, rounds: int) -> dict[str, Any]:
    """Measure a token, and reading alone and computing alone, in turns; keep the best of each, of wall and of processor time."""

    def token() -> tuple[float, float]:
        begin, used = time.perf_counter(), time.process_time()
        generate(model, prompt, TOKENS)
        return (time.perf_counter() - begin) / TOKENS, (time.process_time() - used) / TOKENS

    def best(what: str, found: Sequence[tuple[float, float]]) -> dict[str, float]:
        return {f"{what}_s": min(wall for wall, _ in found), f"{what}_cpu_s": min(used for _, used in found)}

    if weights is None:
        return best("token", [token() for _ in range(rounds)])
    stream = weights.stream
    beginning = stream._begin
    whole, reading, computing = [], [], []
    before = after = (stream.stats.missed, stream.stats.reads)
    for _ in range(rounds):
        whole.append(token())
        after = (stream.stats.missed, stream.stats.reads)
        stream._begin = lambda slot, block: []
        computing.append(token())
        stream._begin = beginning
        used = time.process_time()
        took = stream.read_once()
        reading.append((took, time.process_time() - used))
    held = {"held": weights.held_bytes, "passes": weights.streamed_bytes, "blocks": len(weights.streamed)}
    found = best("token", whole) | best("computing", computing) | best("reading", reading)
    return {**found, **held, "missed": after[0] - before[0], "reads": after[1] - before[1]}


# -- all of them -----------------------------------------------------------------------------------------------------------
def measure(folder: Path, methods: Sequence[str], limit: str, threads: int = 1, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Run each method in a fresh process; return what they measured."""
    results = []
    for method in methods:
        command = [sys.executable, "-W", "ignore", __file__, "--child", method, "--folder", str(folder), "--limit", limit]
        command += ["--rounds", str(rounds)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MALLOC_ARENA_MAX": "2", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=540, check=False)
        if done.returncode:
            raise RuntimeError(f"{method} failed:\n{done.stderr[-3000:]}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def table(results: Sequence[Mapping[str, Any]], total: int) -> str:
    """Lay the results out."""
    head = f"{'method':<18}{'s/token':>9}{'tokens/s':>10}{'peak MB':>9}{'load s':>8}"
    rows = [f"{head}{'read s':>8}{'compute s':>10}{'overhead':>10}{'cpu':>7}  same"]
    whole = next((r["result"] for r in results if r["method"] == "whole"), None)
    for r in results:
        row = f"{r['method']:<18}{r['token_s']:>9.3f}{1 / r['token_s']:>10.2f}{r['peak'] / 1e6:>9.0f}{r['load_s']:>8.2f}"
        if "reading_s" in r:
            most = max(r["reading_s"], r["computing_s"])
            row += f"{r['reading_s']:>8.3f}{r['computing_s']:>10.3f}{r['token_s'] / most:>10.2f}"
            row += f"{r['token_cpu_s'] / (r['reading_cpu_s'] + r['computing_cpu_s']):>7.2f}"
        else:
            row += f"{'-':>8}{'-':>10}{'-':>10}{'-':>7}"
        rows.append(row + f"  {'-' if whole is None else 'yes' if r['result'] == whole else 'NO'}")
    held = next((r for r in results if "held" in r), None)
    rows.append(f"weights {total / 1e9:.2f} GB; memory above `import torch`, transformers included")
    if held:
        rows.append(
            f"drivetrain holds {held['held'] / 1e6:.0f} MB of weights, buffers included; {held['passes'] / 1e9:.2f} GB pass in "
            f"{held['blocks']} blocks a token"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--methods", default=",".join((*METHODS, *PEERS)))
    parser.add_argument("--limit", default="330MB", help="max_memory of the CPU, for the weights and the buffers")
    parser.add_argument("--threads", type=int, default=1, help="that compute; the reader is one more")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of which the best counts")
    parser.add_argument("--folder", help="keep the weights there, or find them there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json")
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(child(chosen.child, Path(chosen.folder), chosen.limit, chosen.rounds)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(chosen.folder or temporary)
        folder.mkdir(exist_ok=True, parents=True)
        if not (folder / "model_config.json").exists():
            make_weights(folder, chosen.gigabytes)
        total = sum(p.stat().st_size for p in folder.glob("model*.safetensors"))
        results = measure(folder, chosen.methods.split(","), chosen.limit, chosen.threads, chosen.rounds)
    print(table(results, total))
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"weights": total, "threads": chosen.threads, "results": results}, indent=1))


if __name__ == "__main__":
    main()
