"""The step of `benches/examples/peers.rs` by transformers and PEFT, from the weights and on the batches that it wrote.

    python benches/peers.py DIR LLM TEACHER --logits learned|usual --dtype f32|bf16 --device cpu|cuda --rank R --blocks B --steps N

`usual` is what a training script does with transformers' models: logits of every token, the labels shifted. `learned` makes
logits of the places that have a label and of no others. A line on stdin asks for a turn of N steps, `trace PATH` for one step under
PyTorch's profiler.
"""

import argparse
import json
import resource
import sys
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, Dinov2Model

PATCH = 14
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

parser = argparse.ArgumentParser()
parser.add_argument("dir")
parser.add_argument("llm")
parser.add_argument("teacher")
parser.add_argument("--logits", choices=["learned", "usual"])
parser.add_argument("--dtype", choices=["f32", "bf16"])
parser.add_argument("--device")
parser.add_argument("--rank", type=int)
parser.add_argument("--blocks", type=int)
parser.add_argument("--steps", type=int)
args = parser.parse_args()
torch.set_num_threads(1)
device = torch.device(args.device)
kind = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
start = load_file(f"{args.dir}/start.safetensors", device=str(device))

llm = AutoModelForCausalLM.from_pretrained(args.llm, dtype=kind, attn_implementation="sdpa").to(device)
lora = LoraConfig(
    r=args.rank,
    lora_alpha=args.rank,
    target_modules=LINEARS,
    layers_to_transform=list(range(args.blocks)),
    layers_pattern="layers",
    lora_dropout=0.0,
    bias="none",
)
model = get_peft_model(llm, lora, autocast_adapter_dtype=False)
model.config.use_cache = False
model.train()
teacher = Dinov2Model.from_pretrained(args.teacher, dtype=kind, attn_implementation="sdpa").to(device).eval().requires_grad_(False)


class PatchEmbed(nn.Module):
    def __init__(self, embed_dim, hidden, positions):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, PATCH, PATCH)
        self.norm = nn.RMSNorm(embed_dim, eps=1e-5)
        self.pos_embed = nn.Parameter(torch.empty(1, positions, embed_dim))
        self.out_proj = nn.Linear(embed_dim, hidden, bias=False)

    def forward(self, pixels):
        patches = self.proj(pixels).flatten(2).transpose(1, 2)  # [batch, patches, embed_dim]
        return self.out_proj(self.norm(patches) + self.pos_embed)


def take(name):
    return start.pop(name)


with torch.no_grad():
    weights = {name.removeprefix("vision_embedding."): take(name) for name in list(start) if name.startswith("vision_embedding.")}
    weights = {name.removeprefix("patchifier."): tensor for name, tensor in weights.items()}
    hidden, embed_dim = weights["out_proj.weight"].shape
    embed = PatchEmbed(embed_dim, hidden, weights["pos_embed"].shape[1])
    embed.load_state_dict(weights)
    embed.to(device, kind)
    heads = nn.ModuleList()
    for block in range(args.blocks):
        norm, proj = take(f"aux_vision.aux_layer_{block}.0.weight"), take(f"aux_vision.aux_layer_{block}.1.weight")
        head = nn.Sequential(nn.RMSNorm(hidden, eps=1e-5), nn.Linear(hidden, proj.shape[0], bias=False))
        head[0].weight.copy_(norm)
        head[1].weight.copy_(proj)
        heads.append(head.to(device, kind))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parts = name.removeprefix("base_model.model.").replace(".default.weight", ".weight")
            parameter.copy_(take(next(key for key in start if key.endswith(parts))))
pixels, words = take("pixel_values"), take("input_ids")
assert not start, f"not taken: {list(start)[:4]}"

trained = [p for p in model.parameters() if p.requires_grad] + list(embed.parameters()) + list(heads.parameters())
optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05)
batches = 3
size = len(words) // batches
image = embed.pos_embed.shape[1]
seq = image + words.shape[1]
mask = torch.full((seq, seq), torch.finfo(kind).min, dtype=kind, device=device).triu(1)
mask[:image, :image] = 0
mask = mask.expand(size, 1, seq, seq).contiguous()


def step(number):
    at = slice(number % batches * size, (number % batches + 1) * size)
    picture, ids = pixels[at].to(kind), words[at]
    with torch.no_grad():
        targets = teacher(picture, output_hidden_states=True).hidden_states[1:]
    inputs = torch.cat([embed(picture), llm.get_input_embeddings()(ids)], 1)
    if args.logits == "learned":
        output = llm.model(inputs_embeds=inputs, attention_mask=mask, output_hidden_states=True, use_cache=False)
        logits = llm.lm_head(output.last_hidden_state[:, image - 1 : -1].flatten(0, 1)).float()
        loss = F.cross_entropy(logits, ids.flatten())
    else:
        labels = torch.cat([torch.full((size, image), -100), ids], 1)
        output = model(inputs_embeds=inputs, attention_mask=mask, labels=labels, output_hidden_states=True, use_cache=False)
        loss = output.loss
    students = (head(state[:, :image]).float() for head, state in zip(heads, output.hidden_states[1:]))
    cosines = [F.cosine_similarity(s, t[:, 1:].float(), dim=-1) for s, t in zip(students, targets)]
    distill = torch.stack([(1 - cosine).mean() for cosine in cosines]).mean()
    (loss + distill).backward()
    with record_function("Optimizer.clip"):
        gradient = nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [loss.item(), distill.item(), gradient.item()]


print("ready", flush=True)
done = 0
for line in sys.stdin:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    before = clock()
    if line.startswith("trace "):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            losses = [step(done)]
        profiled.export_chrome_trace(line.removeprefix("trace ").strip())
    else:
        losses = [step(done + i) for i in range(args.steps)]
    done += len(losses)
    if device.type == "cpu":
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    else:
        peak_mib = torch.cuda.max_memory_allocated() / 2**20
    turn = {
        "seconds": clock() - before,
        "peak_mib": peak_mib,
        "first": losses[0],
    }
    print(json.dumps(turn), flush=True)
