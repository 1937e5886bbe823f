"""A Mamba language model of Python source, of the size of configs/tiny.py.

Data and optimizer: as in configs/tiny.py, for about as long.
Paper: Gu and Dao, Mamba, arXiv 2312.00752. Shows that the selective scan trains and
generates like any other mixer.
Command: python scripts/train.py configs/mamba.py
"""

from jaxlab.mixers import mamba
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="mamba",
    data=TextData(sequence_length=256, eval_tokens=65_536),
    model=LMConfig(width=192, n_layers=3, pattern=(mamba.Config(192),)),
    optimizer=AdamW(learning_rate=4e-3, schedule=WarmupCosine(warmup=50)),
    batch_size=8,
    steps=500,
    max_minutes=4.6,
    eval_every=250,
    checkpoint_every=100,
    prompt="def ",
)
