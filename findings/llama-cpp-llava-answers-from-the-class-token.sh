#!/usr/bin/env bash
# llama.cpp feeds the class token of a LLaVA's CLIP to the language model, in the place of a patch.
#
# Seen: llama.cpp in xllamacpp 2026.10.11549, with an mmproj file of projector `mlp` whose encoder has a class token.
# LLaVA projects the patches alone (`vision_feature_select_strategy: default`), and where no token attends to another one the
# class token cannot reach them. Here attention and MLP of the encoder add nothing, so that every token goes its way alone; two
# files differ in the class token and nothing else; the answer's log-probabilities differ. The class token is put behind the patches, while their positions, and the choice of the tokens
# that are projected, count it as the first: every patch has its neighbour's position, too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6 pillow==12.3.0
cd "$work"
cat > shown.py <<'PY'
import base64
import io

import numpy as np
import xllamacpp
from gguf import GGUFWriter
from PIL import Image

HIDDEN, SIDE, PATCH = 32, 28, 14


def random(seed, *shape):
    return (0.3 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def language_model(file):
    out = GGUFWriter(file, "llama")
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    out.add_context_length(512)
    out.add_embedding_length(HIDDEN)
    out.add_block_count(1)
    out.add_feed_forward_length(HIDDEN)
    out.add_head_count(2)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("llama")
    out.add_token_list(tokens)
    out.add_token_scores([0.0] * len(tokens))
    out.add_token_types([2, 3, 3] + [6] * 256)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    out.add_tensor("token_embd.weight", random(1, len(tokens), HIDDEN))
    out.add_tensor("output.weight", random(2, len(tokens), HIDDEN))
    out.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for number, name in enumerate(["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]):
        out.add_tensor(f"blk.0.{name}.weight", random(3 + number, HIDDEN, HIDDEN))
    for name in ["attn_norm", "ffn_norm"]:
        out.add_tensor(f"blk.0.{name}.weight", np.ones(HIDDEN, np.float32))
    close(out)


def eyes(file, class_token):
    """An encoder of two blocks that add nothing to what goes through them."""
    out = GGUFWriter(file, "clip")
    out.add_bool("clip.has_vision_encoder", True)
    out.add_string("clip.projector_type", "mlp")
    out.add_uint32("clip.vision.image_size", SIDE)
    out.add_uint32("clip.vision.patch_size", PATCH)
    out.add_uint32("clip.vision.embedding_length", HIDDEN)
    out.add_uint32("clip.vision.feed_forward_length", HIDDEN)
    out.add_uint32("clip.vision.projection_dim", HIDDEN)
    out.add_uint32("clip.vision.block_count", 2)
    out.add_uint32("clip.vision.attention.head_count", 2)
    out.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    out.add_array("clip.vision.feature_layer", [2])
    out.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    out.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    patches = (SIDE // PATCH) ** 2
    out.add_tensor("v.class_embd", class_token)
    out.add_tensor("v.patch_embd.weight", random(20, HIDDEN, 3, PATCH, PATCH))
    out.add_tensor("v.position_embd.weight", random(21, patches + 1, HIDDEN))
    one, none = np.ones(HIDDEN, np.float32), np.zeros(HIDDEN, np.float32)
    for block in range(2):
        for name in ["attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"]:
            weight = random(30, HIDDEN, HIDDEN)
            out.add_tensor(f"v.blk.{block}.{name}.weight", 0 * weight if name in ("attn_out", "ffn_down") else weight)
            out.add_tensor(f"v.blk.{block}.{name}.bias", none)
        for name in ["ln1", "ln2"]:
            out.add_tensor(f"v.blk.{block}.{name}.weight", one)
            out.add_tensor(f"v.blk.{block}.{name}.bias", none)
    for layer, seed in [(0, 40), (2, 41)]:
        out.add_tensor(f"mm.{layer}.weight", random(seed, HIDDEN, HIDDEN))
        out.add_tensor(f"mm.{layer}.bias", none)
    close(out)


def close(out):
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def answer(mmproj):
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path, params.mmproj_use_gpu = "llm.gguf", mmproj, False
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 512, 1, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    pixels = np.random.default_rng(9).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    said = xllamacpp.Server(params).handle_chat_completions({
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a"}]}],
        "max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 5, "cache_prompt": False,
    })
    return {top["id"]: top["logprob"] for top in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def farthest(one, other):
    return max((abs(one[token] - other[token]) for token in one.keys() & other.keys()), default=99.0)


language_model("llm.gguf")
eyes("first.gguf", random(50, HIDDEN))
eyes("same.gguf", random(50, HIDDEN))
eyes("second.gguf", random(51, HIDDEN))
first, same, second = answer("first.gguf"), answer("same.gguf"), answer("second.gguf")
again, changed = farthest(first, same), farthest(first, second)
print(f"log-probabilities of the first token: {again:.6f} apart with the same class token, {changed:.6f} with another")
assert again < 1e-5 and changed > 1e-2, "llama.cpp no longer answers from the class token"
PY
"$work/venv/bin/python" shown.py
echo "as described"
