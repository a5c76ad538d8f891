"""What a session of some minutes on a GPU measures, without cargo and without weights: models of the right shapes are made there.

    python benches/gpu.py --part speed --program target/debug/examples/peers --out DIR [--rehearse]
    python benches/gpu.py --part photos --program target/debug/vora --out DIR --llm DIR --teacher DIR --photos DIR --held-out DIR [--seconds 110]
    python benches/gpu.py --part nccl --program target/debug/vora --out DIR [--rehearse]

`cargo xtask bench gpu --part PART` builds the program and runs this. Where there is no cargo, carry the program (stripped) and
run this with LD_LIBRARY_PATH at the libraries of a PyTorch 2.11. Part `speed` needs Python's torch, transformers and peft. `--rehearse`
goes through the same commands with tiny models on the CPU.

Part `speed`: the first step on the GPU against the CPU's; a step of the default recipe's models at three batch sizes, and one of
the published VoRA's size (Qwen2.5-7B, LoRA of rank 1024 on 24 blocks, 1024 picture tokens), each beside transformers with PEFT.

Part `photos`: a VoRA and a LLaVA, each taught for so many seconds by the same captioned photographs (recipes photos.yaml and
photos-llava.yaml), then asked about held-out ones: CIDEr of captions, and yes/no by contrast, beside blind controls. The folders have
`captions.jsonl` and what it names; weights are those of SmolLM2-135M-Instruct and DINOv2-small.

Part `nccl`: a process of a group of one, over NCCL, over Gloo and without a group: trained, stopped and resumed, with shared optimizer state
and shared weights, each step's loss beside the others'; then two processes on one GPU, which NCCL refuses, so more than one on one GPU
cannot be had. Models are those of fixtures/tiny, seconds are those of tiny steps. `libvora_nccl.so`, which `cargo xtask setup --cuda` puts into
`.libtorch/lib`, lies there or beside the program. A rehearsal goes over Gloo in place of NCCL.
"""

import argparse
import atexit
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
parser.add_argument("--part", choices=["speed", "photos", "nccl"], required=True)
parser.add_argument("--program", type=Path, required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--rehearse", action="store_true")
for name in ("llm", "teacher", "photos", "held-out"):
    parser.add_argument(f"--{name}", type=Path, help="of part photos")
parser.add_argument("--seconds", type=float, default=110, help="of part photos: of training, each")
args = parser.parse_args()
device = "cpu" if args.rehearse else "cuda"
machine = f"a rehearsal on {os.cpu_count()} cores"
if not args.rehearse:
    names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], check=True, text=True, stdout=subprocess.PIPE)
    machine = names.stdout.splitlines()[0]
args.out.mkdir(parents=True, exist_ok=True)
scratch = Path(tempfile.mkdtemp())  # models, runs and starts, gigabytes; tables alone go to --out
atexit.register(shutil.rmtree, scratch, True)
began = time.monotonic()


def said(text):
    print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)


def folder(kind, name):
    """The folder of a model with random weights, in bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Dinov2Config, Dinov2Model

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


def speed():
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
    table = f"{machine}, bf16, `benches/gpu.py --part speed`\n\n| step | | s | tokens/s | peak MiB |\n| --- | --- | --- | --- | --- |\n"
    for row in rows:
        table += f"| {row['step']} | {row['of']} | {row['seconds']:.4f} | {row['tokens_per_second']:.0f} | {row['peak_mib']:.0f} |\n"
    (args.out / "speed.json").write_text(json.dumps({"machine": machine, "first_step": both, "rows": rows}, indent=1) + "\n")
    (args.out / "speed.md").write_text(table)
    print(table)
    if len(rows) < 3 * len(steps):
        sys.exit("some steps were not measured")


def vora(*command):
    """Runs the program, with its words on the screen."""
    subprocess.run([str(part) for part in (args.program, *command)], check=True)


def made_up(folder, count, first):
    """Photographs for a rehearsal: squares of a colour, with captions that say so."""
    import numpy as np
    from PIL import Image

    colours = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
    (folder / "images").mkdir(parents=True)
    with open(folder / "captions.jsonl", "w") as records:
        for number in range(first, first + count):
            name, colour = list(colours.items())[number % 4]
            pixels = np.full((60 + number % 5 * 20, 80, 3), 128, dtype=np.uint8)
            pixels[10:40, 20:50] = colour
            Image.fromarray(pixels).save(folder / f"images/{number}.png")
            captions = [f"A {name} square on grey .", f"There is a {name} square number {number} ."]
            turns = [{"from": "human", "value": "<image>\nDescribe this image."}, {"from": "gpt", "value": captions[0]}]
            record = {"id": str(number), "frames": [f"images/{number}.png"], "conversations": turns, "captions": captions}
            records.write(json.dumps(record) + "\n")
    return folder


def photos():
    llm, teacher, batch, workers, trial = args.llm, args.teacher, 64, 14, 40
    train, held_out = args.photos, args.held_out
    if args.rehearse:
        tiny = HERE.parent / "fixtures/tiny"
        llm, teacher, batch, workers, trial = tiny / "llm", tiny / "dinov2", 4, 1, 4
        train, held_out = made_up(scratch / "photos", 24, 0), made_up(scratch / "held-out", 12, 100)
    if None in (llm, teacher, train, held_out):
        sys.exit("part photos needs --llm, --teacher, --photos and --held-out")
    contrast, asked = scratch / "contrast.jsonl", scratch / "asked.jsonl"
    vora("data", "contrast", train / "captions.jsonl", "--out", contrast)
    vora("data", "contrast", held_out / "captions.jsonl", "--out", asked, "--captions", "5" if not args.rehearse else "2")
    paths = [{"anno_path": str(file), "image_folder": str(train), "weight": 1.0} for file in (train / "captions.jsonl", contrast)]
    rows = []
    for name, recipe, sees in (("VoRA", "photos.yaml", "aux_vision"), ("LLaVA", "photos-llava.yaml", "vision_tower")):
        run = scratch / name

        def train_for(steps, *more):
            keys = {
                "model.llm": llm, f"model.{sees}": teacher, "output_dir": run, "max_steps": steps, "save_steps": 1000000,
                "data.train.data_fetch.data_paths": json.dumps(paths), "data.eval": "{}", "report_to": "none",
                "per_device_train_batch_size": batch, "dataloader_num_workers": workers,
            }  # fmt: skip
            more = [*more, *(["model.lora.layers=2"] if args.rehearse else [])]
            sets = [f"{key}={value}" for key, value in keys.items()] + more
            config = HERE.parent / "crates/vora-train/recipes" / recipe
            vora("train", "--config", config, "--device", device, *(part for pair in sets for part in ("--set", pair)))

        train_for(trial, "text_anchor=null")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        ends = [line["seconds"] for line in lines[trial // 2 :]]
        step = statistics.median(after - before for before, after in zip(ends, ends[1:]))
        shutil.rmtree(run)
        # A step with texts beside pictures takes longer than the trial's by their share of the tokens, which is small.
        steps = max(int(args.seconds / step), trial)
        said(f"{name}: {step:.3f} s a step, {steps} steps")
        train_for(steps, f"warmup_steps={max(steps // 20, 1)}")
        result = json.loads((run / "train_results.json").read_text())
        row = {"of": name, "steps": steps, "seconds": result["train_runtime"], "peak_mib": result["peak_memory"] / 2**20}
        for task, data, tokens in (("caption", held_out / "captions.jsonl", 20), ("yesno", asked, 3)):
            out = scratch / f"{name}-{task}.json"
            vora("eval", run / "final", "--data", data, "--images", held_out, "--task", task, "--max-tokens", tokens, "--batch-size", batch,
                 "--device", device, "--out", out)  # fmt: skip
            row[task] = json.loads(out.read_text())["scores"]
        rows.append(row)
        said(name)
    table = f"{machine}, `benches/gpu.py --part photos`\n\n"
    table += "| | steps | seconds | CIDEr (blind) | yes/no (blind) of | interval of 95% |\n| --- | --- | --- | --- | --- | --- |\n"
    for row in rows:
        caption, yesno = row["caption"]["all"], row["yesno"]["all"]
        share, n = yesno["accuracy"], yesno["n"]
        low, high = wilson(share, n)
        table += f"| {row['of']} | {row['steps']} | {row['seconds']:.0f} | {caption['cider']:.3f} ({caption['blind_cider']:.3f}) | "
        table += f"{share:.3f} ({yesno['blind_accuracy']:.3f}) of {n} | {low:.3f} to {high:.3f} |\n"
    (args.out / "photos.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    (args.out / "photos.md").write_text(table)
    print(table)


def wilson(share, n, z=1.96):
    """Wilson's interval of a share."""
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]


TAUGHT = {
    "max_steps": 40, "save_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": "false",
    "evaluation_strategy": "no", "data.eval": "{}", "report_to": "none", "overwrite_output_dir": "false",
}  # fmt: skip


def ranks(run, number, on, keys, *more):
    """Starts the processes of a training, each in the environment of a group; 0: one that is in none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sets = [f"{key}={value}" for key, value in {**TAUGHT, "output_dir": run, **keys}.items()]
    command = [args.program, "train", "--config", "crates/vora-train/recipes/smoke.yaml", "--device", on, *more]
    command += [part for pair in sets for part in ("--set", pair)]
    started = []
    for rank in range(max(number, 1)):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        group = {key: str(value) for key, value in group.items()} if number else {}
        started.append(subprocess.Popen([str(part) for part in command], cwd=HERE.parent, env={**os.environ, **group}, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))  # fmt: skip
    return started


def lines(run):
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def ended(process, *codes):
    error = process.communicate(timeout=100)[1]
    if process.returncode not in codes:
        sys.exit(f"a process ended with {process.returncode}: {error}")
    return error


def nccl():
    backend = "gloo" if args.rehearse else "nccl"
    shares = {"zero_stage": 3, "gradient_checkpointing": "true"}
    ways = [
        ("no group", 0, {}),
        ("gloo", 1, {"ddp_backend": "gloo"}),
        (backend, 1, {"ddp_backend": backend}),
        (f"{backend}, zero_stage 3", 1, {"ddp_backend": backend, **shares}),
    ]
    rows, first = [], None
    for number, (name, processes, keys) in enumerate(ways):
        for resumed in (False, True):
            run = scratch / f"run-{number}-{resumed}"
            process, stopped = ranks(run, processes, device, keys)[0], 0
            if resumed:
                while len(lines(run)) < 15 and process.poll() is None:
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                ended(process, 128 + signal.SIGTERM)
                stopped = len(lines(run))
                process = ranks(run, processes, device, keys, "--resume")[0]
            error = ended(process, 0)
            if "by way of the host" in error:
                sys.exit(error)
            found = lines(run)
            losses = [line["loss"] for line in found]
            first = first or losses
            if len(losses) != len(first):
                sys.exit(f"{name}: {len(losses)} steps of {len(first)}")
            apart = max(abs(a - b) / abs(a) for a, b in zip(first, losses))
            steps = [after["seconds"] - before["seconds"] for before, after in zip(found[5:], found[6:])]
            result = json.loads((run / "train_results.json").read_text())
            row = {"of": name, "stopped_after": stopped, "apart": apart, "step_seconds": statistics.median(steps), "peak_mib": result["peak_memory"] / 2**20}
            rows.append(row)
            said(f"{name}{f', stopped after step {stopped} and resumed' if resumed else ''}: losses {apart:.1e} apart")
    two = [ended(process, 1) for process in ranks(scratch / "two", 2, "cpu" if args.rehearse else "cuda:0", {"ddp_backend": "nccl", "ddp_timeout": 60})]
    refused = [error.strip().splitlines()[-1] for error in two]
    said(f"two processes on one: {refused[0]}")
    if not all(("this run is on Cpu" if args.rehearse else "Duplicate GPU") in line for line in refused):
        sys.exit(f"two processes on one device were not refused for that: {refused}")
    table = f"{machine}, f32, fixtures/tiny, {TAUGHT['max_steps']} steps, `benches/gpu.py --part nccl`\n\n"
    table += "| one process over | stopped and resumed after step | losses from those of no group, at most | s a step | peak MiB |\n| --- | --- | --- | --- | --- |\n"
    for row in rows:
        table += f"| {row['of']} | {row['stopped_after'] or '-'} | {row['apart']:.1e} | {row['step_seconds']:.4f} | {row['peak_mib']:.0f} |\n"
    table += f"\nTwo processes on one device: `{refused[0]}`\n"
    (args.out / "nccl.json").write_text(json.dumps({"machine": machine, "rows": rows, "two": refused}, indent=1) + "\n")
    (args.out / "nccl.md").write_text(table)
    print(table)
    if max(row["apart"] for row in rows) > 1e-4:
        sys.exit("the losses are farther apart than 1e-4")


{"speed": speed, "photos": photos, "nccl": nccl}[args.part]()
