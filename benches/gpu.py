"""What a session of some minutes on a GPU measures, without cargo and without weights: models of the right shapes are made there.

    python benches/gpu.py --part speed --program target/debug/examples/peers --out DIR [--rehearse]

`cargo xtask bench gpu --part speed` builds the program and runs this. Where there is no cargo, carry the program (stripped) and
run this with LD_LIBRARY_PATH at the libraries of a PyTorch 2.11. Python needs torch, transformers and peft. `--rehearse` goes
through the same commands with tiny models on the CPU.

Part `speed`: the first step on the GPU against the CPU's; a step of the default recipe's models at three batch sizes, and one of
the published VoRA's size (Qwen2.5-7B, LoRA of rank 1024 on 24 blocks, 1024 picture tokens), each beside transformers with PEFT.
"""

import argparse
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Dinov2Config, Dinov2Model

HERE = Path(__file__).parent
LLMS = {
    "smollm2-135m": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": dict(
        model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768, rope_theta=1000000.0,
        tie_word_embeddings=False,
    ),
    "tiny": dict(
        model_type="llama", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    ),
}  # fmt: skip
TEACHERS = {
    "dinov2-small": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
    "dinov2-large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
    "tiny": dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2),
}
# Name, language model, teacher, what `peers` is told.
STEPS = [
    ("batch 7", "smollm2-135m", "dinov2-small", "--tokens 16 --words 16 --batch 7 --rank 32 --blocks 12 --steps 10"),
    ("batch 64", "smollm2-135m", "dinov2-small", "--tokens 16 --words 16 --batch 64 --rank 32 --blocks 12 --steps 10"),
    ("batch 256", "smollm2-135m", "dinov2-small", "--tokens 16 --words 16 --batch 256 --rank 32 --blocks 12 --steps 5"),
    ("7B", "qwen2.5-7b", "dinov2-large", "--tokens 1024 --words 64 --batch 2 --rank 1024 --blocks 24 --steps 2"),
]
TINY = [("batch 3", "tiny", "tiny", "--tokens 4 --words 8 --batch 3 --rank 4 --blocks 2 --steps 2")]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--part", choices=["speed"], required=True)
parser.add_argument("--program", type=Path, required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--rehearse", action="store_true")
args = parser.parse_args()
device = "cpu" if args.rehearse else "cuda"
args.out.mkdir(parents=True, exist_ok=True)
scratch = Path(tempfile.mkdtemp())  # models and starts, gigabytes; the two tables alone go to --out
atexit.register(shutil.rmtree, scratch, True)
began = time.monotonic()


def said(text):
    print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)


def folder(kind, name):
    """The folder of a model with random weights, in bf16."""
    path = scratch / f"{kind}-{name}"
    if (path / "config.json").exists():
        return path
    torch.manual_seed(3)
    with torch.device(device):
        if kind == "llm":
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLMS[name]), dtype=torch.bfloat16)
        else:
            sizes = TEACHERS[name]
            config = Dinov2Config(image_size=518, patch_size=14, **sizes)
            model = Dinov2Model(config).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="100GB")
    return path


def peers(llm, teacher, more, out, device, limit):
    command = [args.program, "--llm", llm, "--teacher", teacher, "--python", sys.executable]
    command += ["--script", HERE / "peers.py", "--out", out, "--device", device, *more]
    return subprocess.run([str(part) for part in command], timeout=limit, check=True, text=True, stdout=subprocess.PIPE).stdout


def first_step(llm, teacher, more, out, device):
    """Cross-entropy, cosine loss and gradient of the first step of this project's side alone, in f32."""
    out.mkdir(exist_ok=True)
    command = [args.program, "--turns", "--llm", llm, "--teacher", teacher, "--python", "-", "--script", "-", "--out", out]
    command += ["--device", device, "--dtype", "f32", *more]
    run = subprocess.run([str(part) for part in command], input="go\n", timeout=100, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(run.stdout.splitlines()[-1])["first"]


rows, steps = [], TINY if args.rehearse else STEPS
name, llm, teacher, more = steps[0]
both = [first_step(folder("llm", llm), folder("teacher", teacher), more.split(), scratch / place, place)
        for place in ("cpu", device)]  # fmt: skip
apart = [abs(a - b) / abs(a) for a, b in zip(*both)]
said(f"first step on cpu and {device}, f32: {both}, apart {apart}")
assert max(apart) < 2e-3, "the GPU computes something else than the CPU"
for name, llm, teacher, more in steps:
    out = scratch / name.replace(" ", "-")
    try:
        peers(folder("llm", llm), folder("teacher", teacher), [*more.split(), "--dtype", "bf16", "--rounds", "3"], out, device, 150)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said(f"{name}: {error}")
        continue
    tokens = sum(int(more.split()[more.split().index(key) + 1]) for key in ("--tokens", "--words"))
    batch = int(more.split()[more.split().index("--batch") + 1])
    for row in json.loads((out / "peers.json").read_text()):
        rate = row["samples_per_second"]
        rows.append({"step": name, "of": row["name"], "seconds": batch / rate, "tokens_per_second": rate * tokens, "peak_mib": row["peak_mib"]})  # fmt: skip
    said(name)
machine = torch.cuda.get_device_name() if device == "cuda" else f"a rehearsal on {os.cpu_count()} cores"
table = f"{machine}, bf16, `benches/gpu.py --part speed`\n\n| step | | s | tokens/s | peak MiB |\n| --- | --- | --- | --- | --- |\n"
for row in rows:
    table += f"| {row['step']} | {row['of']} | {row['seconds']:.4f} | {row['tokens_per_second']:.0f} | {row['peak_mib']:.0f} |\n"
(args.out / "speed.json").write_text(json.dumps({"machine": machine, "first_step": both, "rows": rows}, indent=1) + "\n")
(args.out / "speed.md").write_text(table)
print(table)
if len(rows) < 3 * len(steps):
    sys.exit("some steps were not measured")
