#!/usr/bin/env bash
# Pillow 13.0.0 resizes tall pictures to other pixels than Pillow 12.3.0 does, by the same call.
#
# Both resample bytes in two passes and round to bytes between them. Pillow 12.3.0 always takes rows first. Pillow 13.0.0
# takes columns first where the height shrinks and loses more than twice the pixels that the width loses: a screenshot
# of 1080 x 2400 that is squashed to 224 x 224 for a vision encoder, or any portrait picture that is narrower than the
# encoder's input. On noise the two differ by up to 31 of 255; all other pictures are equal to the last bit.
#
# So image processors backed by Pillow (`backend="pil"`) feed a model other pixels after an update of Pillow, golden
# files of tall pictures fail, and a reimplementation that is exact for one version is not for the other.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/resize.py" <<'PY'
import random
import sys

from PIL import Image

CASES = [
    ((108, 240), (22, 22)),  # loses 218 rows, more than twice 86 columns
    ((200, 320), (224, 224)),  # loses 96 rows, gains columns
    ((200, 320), (100, 120)),  # loses 200 rows, twice 100 columns
    ((200, 320), (100, 119)),  # one more
    ((300, 400), (22, 22)),
    ((320, 200), (224, 224)),
]
pixels = b""
for old, new in CASES:
    picture = Image.frombytes("RGB", old, random.Random(0).randbytes(3 * old[0] * old[1]))
    for filter in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
        resized = picture.resize(new, filter)
        rows_first = picture.resize((new[0], old[1]), filter).resize(new, filter)
        columns_first = picture.resize((old[0], new[1]), filter).resize(new, filter)
        order = "rows" if resized == rows_first else "columns" if resized == columns_first else "neither"
        print(f"  {old} to {new} {filter.name}: {order} first")
        pixels += resized.tobytes()
open(sys.argv[1], "wb").write(pixels)
PY

for version in 12.3.0 13.0.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet "pillow==$version"
    echo "Pillow $version"
    "$work/$version/bin/python" "$work/resize.py" "$work/$version.pixels"
done | tee "$work/seen"
python3 - "$work/12.3.0.pixels" "$work/13.0.0.pixels" <<'PY' | tee -a "$work/seen"
import sys

old, new = (open(path, "rb").read() for path in sys.argv[1:])
print("largest difference:", max(abs(a - b) for a, b in zip(old, new)), "of 255")
PY

columns_first() { sed -n "/^Pillow $1/,/^Pillow\|^largest/p" "$work/seen" | grep -c 'columns first' || true; }
[[ $(columns_first 12.3.0) == 0 ]] || { echo "CHANGED: Pillow 12.3.0 takes columns first"; exit 1; }
[[ $(columns_first 13.0.0) == 9 ]] || { echo "CHANGED: Pillow 13.0.0 takes columns first in other cases"; exit 1; }
! grep -q 'neither\|difference: [0-9] of' "$work/seen" || { echo "CHANGED: see above"; exit 1; }
echo "as described"
