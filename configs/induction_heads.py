"""Mamba recalls the token that followed the first occurrence of a special token.

Reproduces, at a size for two CPU cores, the induction heads result of Mamba (arXiv
2312.00752, section 4.1.2 and table 2): two layers recall the token after the one
earlier occurrence, so they must store it and ignore all tokens that follow. Expected:
above 99% of the held-out answers.

Command: python scripts/train.py configs/induction_heads.py
"""

from jaxlab.data import InductionHeads
from jaxlab.mixers import mamba
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TaskData, TrainConfig

config = TrainConfig(
    name="induction_heads",
    data=TaskData(InductionHeads(length=64, num_symbols=16), eval_rows=512),
    model=LMConfig(
        vocab_size=17,
        width=64,
        n_layers=2,
        pattern=(mamba.Config(64),),
        tie_embeddings=False,
    ),
    optimizer=AdamW(
        learning_rate=2e-3, schedule=WarmupCosine(warmup=50), weight_decay=0.01
    ),
    batch_size=32,
    steps=600,
    eval_every=200,
    checkpoint_every=600,
)
