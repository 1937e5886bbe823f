"""Gated Linear Attention (arXiv 2312.06635) of the size of configs/tiny.py.

Shows that one decay per channel, without erasing, learns bytes of Python source.
Data and optimizer: as in configs/tiny.py.
Command: python scripts/train.py configs/gla.py
"""

from jaxlab.mixers import gla
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="gla",
    data=TextData(sequence_length=256, eval_tokens=65_536),
    model=LMConfig(width=192, n_layers=3, pattern=(gla.Config(192, n_heads=4),)),
    optimizer=AdamW(learning_rate=4e-3, schedule=WarmupCosine(warmup=50)),
    batch_size=8,
    steps=500,
    max_minutes=4.6,
    eval_every=250,
    checkpoint_every=100,
    prompt="def ",
)
