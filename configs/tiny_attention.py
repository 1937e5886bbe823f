"""Attention with the width and depth of configs/tiny.py, trained for about as long.

Data and optimizer: as in configs/tiny.py; more steps, because a step is faster.
Command: python scripts/train.py configs/tiny_attention.py
"""

from jaxlab.mixers import attention
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="tiny_attention",
    data=TextData(sequence_length=256, eval_tokens=65_536),
    model=LMConfig(width=192, n_layers=3, pattern=(attention.Config(192, n_heads=4),)),
    optimizer=AdamW(learning_rate=4e-3, schedule=WarmupCosine(warmup=50)),
    batch_size=8,
    steps=850,
    max_minutes=4.6,
    eval_every=425,
    checkpoint_every=170,
    prompt="def ",
)
