"""Mamba copies, in order, the tokens that are scattered among blanks.

Reproduces, at a size for two CPU cores, the selective copying result of Mamba (arXiv
2312.00752, section 4.1.1 and table 1): a layer whose step, input and output depend on
the token learns what to store. Expected: above 98% of the held-out answers (the paper:
99.8% at length 4096).

Command: python scripts/train.py configs/selective_copying.py
"""

from jaxlab.data import SelectiveCopying
from jaxlab.mixers import mamba
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TaskData, TrainConfig

config = TrainConfig(
    name="selective_copying",
    data=TaskData(
        SelectiveCopying(length=64, num_tokens=8, num_symbols=8), eval_rows=512
    ),
    model=LMConfig(
        vocab_size=10,
        width=64,
        n_layers=2,
        pattern=(mamba.Config(64),),
        tie_embeddings=False,
    ),
    optimizer=AdamW(
        learning_rate=5e-3, schedule=WarmupCosine(warmup=50), weight_decay=0.01
    ),
    batch_size=32,
    steps=1500,
    eval_every=300,
    checkpoint_every=1500,
)
