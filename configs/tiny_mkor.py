"""The model of `make train` by MKOR, with LAMB behind it.

Paper: Mozaffari et al., MKOR, arXiv 2306.01685.
Expected: not measured to its end; see the README for the autoencoder.
Command: python scripts/train.py configs/tiny_mkor.py
"""

import dataclasses
from pathlib import Path

from jaxlab.optimizers import LAMB, MKOR, WarmupCosine
from jaxlab.training import config_file

tiny = config_file.load(Path(__file__).parent / "tiny.py")
config = dataclasses.replace(
    tiny,
    name="tiny_mkor",
    optimizer=MKOR(base=LAMB(learning_rate=1e-2, schedule=WarmupCosine(warmup=50))),
)
