"""The card of a set: what a reader who finds the folder must know."""

import json
from typing import TYPE_CHECKING

from dsdistill.exchange.report import shown_learned

if TYPE_CHECKING:
    from dsdistill.synthetic import SyntheticDataset


def write_card(synthetic: "SyntheticDataset") -> str:
    """The text of a set's README.md, with the header that the Hugging Face Hub reads."""
    recipe, size = synthetic.recipe, synthetic.nbytes
    settings = "\n".join(f"| `{key}` | `{value}` |" for key, value in recipe.method.items() if key != "type")
    notes = "".join(f"- {note}\n" for note in recipe.notes)
    classes = ", ".join(synthetic.classes[:20]) + (", ..." if len(synthetic.classes) > 20 else "")
    source_name = str(recipe.source.get("name"))
    told = ", ".join(shown_learned(synthetic.learned))
    learned = f", {size.learned:,} of other learned tensors ({told})" if size.learned else ""
    zca = synthetic.normalization.zca
    whitened = f", then whitened (ZCA, eps {zca.eps}; the matrices are in normalization.safetensors)" if zca else ""
    return f"""---
tags: [dataset-distillation]
source_datasets: [{json.dumps(source_name)}]
task_categories: [image-classification]
---

# {recipe.title}: {synthetic.ipc} per class of {source_name}

![the images, class by class](grid.png)

{len(synthetic)} synthetic images {"x".join(map(str, synthetic.shape))} (channels x height x width) of
{len(synthetic.classes)} classes ({classes}), distilled from {sum(recipe.source.get("counts", []))} real images.
Stored: {size.images:,} bytes of images ({synthetic.images.key}), {size.labels:,} of labels
({synthetic.labels.key}){learned}.

{notes}
```python
import dsdistill as dd

synthetic = dd.SyntheticDataset.load("path/to/this/folder")
image, target = synthetic[0]  # float32, standardised: ready for a network
```

Pixels are standardised with mean {list(synthetic.normalization.mean)} and standard deviation
{list(synthetic.normalization.std)}{whitened}; `synthetic.normalization.to_unit` brings them back to [0, 1].

| setting | value |
|---|---|
{settings}

Seed {recipe.seed}; source fingerprint `{recipe.source.get("fingerprint")}`;
{", ".join(f"{name} {number}" for name, number in recipe.versions.items())}.
The images derive from the source data: its licence and terms apply to them.
"""
