"""Mamba-2 (arXiv 2405.21060) of the size of configs/tiny.py.

Shows that one data-dependent decay per head learns bytes of Python source.
Data and optimizer: as in configs/tiny.py.
Command: python scripts/train.py configs/mamba2.py
"""

from jaxlab.mixers import mamba2
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="mamba2",
    data=TextData(sequence_length=256, eval_tokens=65_536),
    model=LMConfig(
        width=192, n_layers=3, pattern=(mamba2.Config(192, head_size=48, n_states=64),)
    ),
    optimizer=AdamW(learning_rate=4e-3, schedule=WarmupCosine(warmup=50)),
    batch_size=8,
    steps=500,
    max_minutes=4.6,
    eval_every=250,
    checkpoint_every=100,
    prompt="def ",
)
