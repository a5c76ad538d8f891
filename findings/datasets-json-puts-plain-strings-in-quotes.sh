#!/usr/bin/env bash
# datasets 5.2.0 writes every plain string of a chat data set with quotes around it, once one message has parts.
#
# `load_dataset("json", …)` over messages whose `content` is a string in most records and a list of parts in some (as
# vision chats mix them) makes `content` a `Json()` feature. datasets itself reads it back as it was, but `to_parquet`
# stores JSON texts, with the extension type arrow.json: pyarrow 26.0.1 gives `"a cat"` with its quotes, where the same
# messages without that one list of parts give `a cat`. A reader that takes the column for text, as it was for years,
# teaches a model to answer in quotation marks and shows it parts as raw JSON; nothing fails.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 numpy==2.4.6
export HF_HOME="$work/cache" HF_HUB_OFFLINE=1

cat > "$work/write.py" <<'PY'
import json

import datasets
import pyarrow.parquet

datasets.disable_progress_bars()
PLAIN = {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a cat"}]}
PARTS = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
                      {"role": "assistant", "content": "a dog"}]}
for name, records in (("plain", [PLAIN] * 3), ("mixed", [PLAIN] * 2 + [PARTS])):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    found = datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="cache")
    found.to_parquet(f"{name}.parquet")
    content = pyarrow.parquet.read_table(f"{name}.parquet").to_pylist()[0]["messages"][1]["content"]
    print(f"{name}: datasets {found[0]['messages'][1]['content']!r}, pyarrow {content!r}")
PY

cat > "$work/expected" <<'TXT'
plain: datasets 'a cat', pyarrow 'a cat'
mixed: datasets 'a cat', pyarrow '"a cat"'
TXT
cd "$work"
"$work/venv/bin/python" write.py | tee seen
diff expected seen || { echo "CHANGED"; exit 1; }
echo "as described"
