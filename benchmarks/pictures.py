"""A picture of several sets under each other: for each set the first image of every class, for ``assets``.

Below each other stand what the arguments name, from top to bottom; with ``--rows 2`` each has two rows of images.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from dsdistill import SyntheticDataset


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", type=Path, help="folders of sets with the same classes")
    parser.add_argument("--rows", type=int, default=1, help="images of each class")
    parser.add_argument("--scale", type=int, default=4, help="how many times as large pixels are shown")
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    return parser.parse_args()


def rows_of(folder: Path, rows: int) -> Tensor:
    """(rows, K, C, H, W) in [0, 1]: the first images of each of the K classes."""
    made = SyntheticDataset.load(folder)
    images, _ = made.tensors()
    targets = torch.tensor(made.targets)
    places = [(targets == label).nonzero().flatten()[:rows] for label in range(len(made.classes))]
    chosen = torch.stack(places, 1)
    return made.normalization.to_unit(images[chosen.flatten()]).clamp(0, 1).unflatten(0, chosen.shape)


def main() -> None:
    options = parse()
    parts = [rows_of(folder, options.rows) for folder in options.sets]
    images = torch.cat(parts)
    large = images.flatten(0, 1).repeat_interleave(options.scale, -1).repeat_interleave(options.scale, -2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(make_grid(large, nrow=images.shape[1], padding=2, pad_value=1.0)).save(options.out)
    print(f"written to {options.out}, {options.rows} rows each: {', '.join(map(str, options.sets))}")


if __name__ == "__main__":
    main()
