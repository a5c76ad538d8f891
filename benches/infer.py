"""Answers by transformers and by llama.cpp, for `benches/examples/infer.rs`.

    python benches/infer.py hf LLM --dtype f32|bf16
    python benches/infer.py llama FILE.gguf

A line `BATCH NEW` on stdin asks for a turn: that many prompts of 288 tokens, each with NEW tokens after it, the likeliest each time.
In transformers the first 256 tokens of a prompt see each other, as a picture's do; llama.cpp gets 288 words, which cost it no more.
A line `perplexity IDS.json` asks for that of these tokens, in windows of 512.
"""

import argparse
import ctypes
import json
import math
import sys
import time

PROMPT, PICTURE, WINDOW = 288, 256, 512

parser = argparse.ArgumentParser()
parser.add_argument("peer", choices=["hf", "llama"])
parser.add_argument("model")
parser.add_argument("--dtype", choices=["f32", "bf16"], default="bf16")
args = parser.parse_args()


def hf():
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=kind, attn_implementation="sdpa").eval()
    hidden = model.config.hidden_size
    mask = torch.full((PROMPT, PROMPT), torch.finfo(kind).min, dtype=kind).triu(1)
    mask[:PICTURE, :PICTURE] = 0

    def turn(batch, new):
        torch.manual_seed(0)
        embeds = (torch.randn(batch, PROMPT, hidden) * 0.02).to(kind)
        cache = DynamicCache(config=model.config)
        before = time.process_time()
        logits = model(
            inputs_embeds=embeds,
            attention_mask=mask.expand(batch, 1, PROMPT, PROMPT),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        first = time.process_time() - before
        before = time.process_time()
        for _ in range(new - 1):
            ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        return first, time.process_time() - before

    def losses(ids):
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()

    return turn, losses


def llama():
    import llama_cpp
    import numpy

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(args.model.encode(), model_params)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = 8 * 512, 8
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, params)
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(512, 0, 1)
    prompt = numpy.random.default_rng(0).integers(100, vocab - 100, PROMPT).tolist()

    def decode(items):
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        assert llama_cpp.llama_decode(context, batch) == 0

    def likeliest(i):
        return int(numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape=(vocab,)).argmax())

    def turn(sequences, new):
        llama_cpp.llama_memory_clear(memory, True)
        before = time.process_time()
        ids = []
        for sequence in range(sequences):
            decode([(token, i, sequence, i == PROMPT - 1) for i, token in enumerate(prompt)])
            ids.append(likeliest(PROMPT - 1))
        first = time.process_time() - before
        before = time.process_time()
        for step in range(new - 1):
            decode([(ids[sequence], PROMPT + step, sequence, True) for sequence in range(sequences)])
            ids = [likeliest(sequence) for sequence in range(sequences)]
        return first, time.process_time() - before

    def losses(ids):
        llama_cpp.llama_memory_clear(memory, True)
        decode([(token, i, 0, True) for i, token in enumerate(ids)])
        total = 0.0
        for i, target in enumerate(ids[1:]):
            logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape=(vocab,)).astype(float)
            total += numpy.log(numpy.exp(logits - logits.max()).sum()) + logits.max() - logits[target]
        return total

    turn.held = (quiet, model, context)
    return turn, losses


def peak_mib():
    """Of this program: `ru_maxrss` is that of the process which started it, where that was larger."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def perplexity(path):
    with open(path) as file:
        ids = json.load(file)
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW) if len(ids) - i > 1]
    return math.exp(sum(map(losses, windows)) / sum(len(window) - 1 for window in windows))


turn, losses = {"hf": hf, "llama": llama}[args.peer]()
print("ready", flush=True)
for line in sys.stdin:
    if line.startswith("perplexity "):
        print(perplexity(line.split(maxsplit=1)[1].strip()), flush=True)
        continue
    batch, new = map(int, line.split())
    first, rest = turn(batch, new)
    print(json.dumps({"first": first, "rest": rest, "peak_mib": peak_mib()}), flush=True)
