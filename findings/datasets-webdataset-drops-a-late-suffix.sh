#!/usr/bin/env bash
# datasets 5.2.0 reads a WebDataset shard and silently drops what has another suffix after the fifth record.
#
# The `webdataset` builder takes a shard's columns from its first five records. A sixth record whose picture is a .jpg
# where the first five have .png comes out with `png: None` and without its picture; one that has a .json beside comes
# out without it; one that lacks its .txt comes out with `txt: None`. No error, no warning. The same mixture within the
# first five records is refused with a ValueError. webdataset 1.0.2 reads all these shards whole.
#
# Shards of scraped pictures mix suffixes, so a model trained through datasets may see a text without its picture where
# the same shard read by webdataset has both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 webdataset==1.0.2 pillow==13.0.0 numpy==2.4.6
export HF_HOME="$work/cache" HF_HUB_OFFLINE=1

cat > "$work/read.py" <<'PY'
import io
import logging
import tarfile
import warnings

import datasets
import webdataset
from PIL import Image

warnings.simplefilter("always")
warnings.simplefilter("ignore", ResourceWarning)  # of files that webdataset leaves to the garbage collector
datasets.disable_progress_bars()


def picture(format):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, format)
    return file.getvalue()


BYTES = {"png": picture("PNG"), "jpg": picture("JPEG"), "txt": b"a red square", "json": b'{"sure": true}'}


def read(name, suffixes):
    """Suffixes that each record has, as written, by datasets and by webdataset."""
    path = f"{name}.tar"
    with tarfile.open(path, "w") as tar:
        for record, of_record in enumerate(suffixes):
            for suffix in of_record:
                member = tarfile.TarInfo(f"{record:03}.{suffix}")
                member.size = len(BYTES[suffix])
                tar.addfile(member, io.BytesIO(BYTES[suffix]))
    last = lambda records: {k: v is not None for k, v in list(records)[-1].items() if not k.startswith("__")}
    print(name)
    print("  webdataset, last record:", last(webdataset.WebDataset(path, shardshuffle=False)))
    try:
        found = datasets.load_dataset("webdataset", data_files=path, split="train", cache_dir=f"cache-{name}")
        print("  datasets, last record:", last(found))
    except ValueError as error:
        print("  datasets:", type(error).__name__)


read("jpg_sixth", [("png", "txt")] * 5 + [("jpg", "txt")])
read("json_sixth", [("png", "txt")] * 5 + [("png", "txt", "json")])
read("no_txt_sixth", [("png", "txt")] * 5 + [("png",)])
read("jpg_fifth", [("png", "txt")] * 4 + [("jpg", "txt")])
PY

cat > "$work/expected" <<'TXT'
jpg_sixth
  webdataset, last record: {'jpg': True, 'txt': True}
  datasets, last record: {'png': False, 'txt': True}
json_sixth
  webdataset, last record: {'png': True, 'txt': True, 'json': True}
  datasets, last record: {'png': True, 'txt': True}
no_txt_sixth
  webdataset, last record: {'png': True}
  datasets, last record: {'png': True, 'txt': False}
jpg_fifth
  webdataset, last record: {'jpg': True, 'txt': True}
  datasets: ValueError
TXT
cd "$work"
"$work/venv/bin/python" read.py 2> errors | tee seen
[[ ! -s errors ]] || { echo "CHANGED: something was told on stderr:"; cat errors; exit 1; }
diff expected seen || { echo "CHANGED"; exit 1; }
echo "as described"
