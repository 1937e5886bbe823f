"""A language model of bytes with the mixer of `smoothing.py`, beside this file.

    python scripts/train.py docs/howto/own_method/smoothed_text.py
    python scripts/sample.py runs/smoothed_text \
      --config docs/howto/own_method/smoothed_text.py
"""

import smoothing

from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="smoothed_text",
    data=TextData(sequence_length=128, eval_tokens=16_384),
    model=LMConfig(width=64, n_layers=2, pattern=(smoothing.Config(64),)),
    optimizer=AdamW(learning_rate=4e-3, schedule=WarmupCosine(warmup=20)),
    batch_size=8,
    steps=200,
    eval_every=100,
    prompt="def ",
)
