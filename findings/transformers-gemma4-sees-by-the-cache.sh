#!/usr/bin/env bash
# transformers 5.23.0 lets a Gemma 4 Unified see its pictures by two masks: one in a forward, another where the cache is static.
#
# `Gemma4UnifiedModel.forward`, and with it training and `generate` as it is, ors the block of a picture into the masks of
# layers with and without a window (Gemma 3's way). `generate(cache_implementation="static")` takes the masks of
# `create_masks_for_vision_model`: causal in layers without a window, and cut off by the window within the picture. The
# same weights, prompt and picture then have other logits, and other greedy answers. Ours are those of the forward.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --requirement "$root/fixtures/generate/requirements.txt"

cat > "$work/ask.py" <<'PY'
import sys

import torch
from PIL import Image
from transformers import Gemma4UnifiedForConditionalGeneration, Gemma4UnifiedProcessor
from transformers.utils import logging

logging.disable_progress_bar()
folder = sys.argv[1]
model = Gemma4UnifiedForConditionalGeneration.from_pretrained(folder)
processor = Gemma4UnifiedProcessor.from_pretrained(folder)
text = processor.apply_chat_template(
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    add_generation_prompt=True,
)
inputs = processor(text=text, images=[Image.new("RGB", (60, 20), (200, 30, 40))], return_tensors="pt")
ask = dict(do_sample=False, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
with torch.no_grad():
    forward = model(**inputs).logits[0, -1]
    for name, more in (("dynamic", {}), ("static", dict(cache_implementation="static", disable_compile=True))):
        logits = model.generate(**inputs, **ask, **more).logits[0][0]
        print(f"{name}: {'as the forward' if torch.allclose(logits, forward, atol=1e-4) else 'other logits'}")
PY

cat > "$work/expected" <<'TXT'
dynamic: as the forward
static: other logits
TXT
cd "$work"
"$work/venv/bin/python" ask.py "$root/fixtures/tiny/gemma4" 2> errors | tee seen || { cat errors; exit 1; }
diff expected seen || { echo "CHANGED"; exit 1; }
echo "as described"
