"""Images a second of PyTorch's DataLoader over a folder of pictures, as benches/examples/data.rs measures them.

    python benches/data.py FOLDER --how pillow|torchvision --size 224 --workers 2 --batch 16 --images 256
    python benches/data.py FOLDER --make

`pillow` resizes with Pillow, as HF's slower processors do; `torchvision` resizes the tensor, as the faster ones do.
`--make` fills the folder with JPEGs instead.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode, functional

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Pictures(Dataset):
    def __init__(self, folder, how, size):
        self.paths = sorted(p for p in Path(folder).iterdir() if p.suffix in (".jpg", ".jpeg", ".png"))
        self.how, self.size = how, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = Image.open(self.paths[index]).convert("RGB")
        if self.how == "pillow":
            pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC), dtype=np.float32)
            pixels = (pixels / 255 - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
            return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        pixels = functional.pil_to_tensor(image)
        pixels = functional.resize(pixels, [self.size, self.size], InterpolationMode.BICUBIC, antialias=True)
        return functional.normalize(functional.to_dtype(pixels, torch.float32, scale=True), MEAN, STD)


def make(folder):
    """Smooth noise of the size of photographs."""
    generator = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(128):
        coarse = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{n:04}.jpg", quality=90)


def forever(loader):
    while True:
        yield from loader


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--how", choices=["pillow", "torchvision"])
    for name in ["size", "workers", "batch", "images"]:
        parser.add_argument(f"--{name}", type=int)
    args = parser.parse_args()
    if args.make:
        return make(args.folder)
    pictures = Pictures(args.folder, args.how, args.size)
    loader = DataLoader(pictures, batch_size=args.batch, num_workers=args.workers, persistent_workers=True)
    batches = forever(loader)
    for _ in range(2):
        next(batches)
    start, images = time.perf_counter(), 0
    while images < args.images:
        images += len(next(batches))
    print(f"{images / (time.perf_counter() - start):.2f}")


if __name__ == "__main__":
    main()
