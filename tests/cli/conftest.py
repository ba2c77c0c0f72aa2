"""An image folder that every verb is tried on."""

import pytest
import torch
from PIL import Image


@pytest.fixture
def images(tmp_path):
    """Two classes; the second has a name that is hard on terminals."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 3)):
        for base, name in ((40, "cats"), (160, "dögs 🐕")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(base, base + 50, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return tmp_path / "data"
