"""A DeltaProduct language model of Python source, for two CPU cores.

Data: the standard library of the running Python, as bytes; 5% of the files held out.
Command: make train      (python scripts/train.py configs/tiny.py --resume)
"""

from jaxlab.mixers import delta_product
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="tiny",
    data=TextData(sequence_length=256),
    model=LMConfig(
        width=192,
        n_layers=3,
        pattern=(delta_product.Config(192, n_heads=3, n_householders=1),),
    ),
    optimizer=AdamW(learning_rate=3e-3, schedule=WarmupCosine(warmup=50, end=0.05)),
    batch_size=8,
    steps=1000,
    max_minutes=5,
    prompt="def ",
)
