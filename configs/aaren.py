"""An Aaren language model of Python source, of the size of configs/tiny.py.

Data and optimizer: as in configs/tiny.py, for about as long.
Paper: Feng et al., Attention as an RNN, arXiv 2405.13956. The query does not depend on
the token and the tokens it reads have no order, so expect less than from attention.
Command: python scripts/train.py configs/aaren.py
"""

from jaxlab.mixers import aaren
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="aaren",
    data=TextData(sequence_length=256, eval_tokens=65_536),
    model=LMConfig(width=192, n_layers=3, pattern=(aaren.Config(192, n_heads=4),)),
    optimizer=AdamW(learning_rate=4e-3, schedule=WarmupCosine(warmup=50)),
    batch_size=8,
    steps=500,
    max_minutes=4.6,
    eval_every=250,
    checkpoint_every=100,
    prompt="def ",
)
