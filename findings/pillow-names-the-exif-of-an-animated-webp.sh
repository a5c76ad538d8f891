#!/usr/bin/env bash
# Pillow 13.0.0 puts "Exif\0\0" before the EXIF data of an animated WebP and not before those of a still one; the crate
# image 0.25.10 then finds no orientation, and shows the animation's first picture lying on its side.
#
# The same call with the same `exif=`: saved still the chunk begins with the TIFF header, as the container's
# specification has it; saved with `save_all=True` and a second frame it begins with the six bytes that belong into a
# JPEG's segment. Pillow reads both. `ImageDecoder::orientation()` of the crate says Rotate90 for the one and NoTransforms for
# the other, without an error: a data loader in Rust trains on pictures that are turned otherwise than those of one in
# Python.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir -p "$work/src"
cat > "$work/Cargo.toml" <<'TOML'
[package]
name = "orientation"
version = "0.1.0"
edition = "2024"

[dependencies]
image = { version = "=0.25.10", default-features = false, features = ["webp"] }
TOML
cat > "$work/src/main.rs" <<'RS'
use image::{ImageDecoder, ImageReader};

fn main() {
    for name in ["still.webp", "animated.webp"] {
        let mut decoder = ImageReader::open(name).unwrap().into_decoder().unwrap();
        println!("image 0.25.10, {name}: {:?}", decoder.orientation().unwrap());
    }
}
RS
cat > "$work/make.py" <<'PY'
import struct

from PIL import Image

exif = Image.Exif()
exif[0x112] = 6  # on its side
frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
frames[0].save("still.webp", exif=exif)
frames[0].save("animated.webp", exif=exif, save_all=True, append_images=frames[1:])
for name in ("still.webp", "animated.webp"):
    data = open(name, "rb").read()
    at = data.index(b"EXIF")
    size = struct.unpack("<I", data[at + 4 : at + 8])[0]
    begins = data[at + 8 : at + 8 + min(size, 8)]
    print(f"Pillow 13.0.0, {name}: EXIF data begin with {begins!r}, orientation {Image.open(name).getexif()[0x112]}")
PY

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "pillow==13.0.0"
cd "$work"
{
    venv/bin/python make.py
    CARGO_TARGET_DIR="$work/target" cargo run --quiet
} | tee seen
cat > expected <<'TEXT'
Pillow 13.0.0, still.webp: EXIF data begin with b'MM\x00*\x00\x00\x00\x08', orientation 6
Pillow 13.0.0, animated.webp: EXIF data begin with b'Exif\x00\x00MM', orientation 6
image 0.25.10, still.webp: Rotate90
image 0.25.10, animated.webp: NoTransforms
TEXT
diff expected seen && echo "as it was seen"
