"""A DeltaProduct language model of Python source, for two CPU cores.

Data: the standard library of the running Python, as bytes; 5% of the files held out.
Expected: below 2.1 bits per byte on held-out files (unigram 4.55, bigram 3.44); the
measured value is in docs/results/models.md.
Command: make train      (python scripts/train.py configs/tiny.py --resume)
"""

from jaxlab.mixers import delta_product
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="tiny",
    data=TextData(sequence_length=256, eval_tokens=65_536),
    model=LMConfig(
        width=192,
        n_layers=3,
        pattern=(delta_product.Config(192, n_heads=4, n_householders=2),),
    ),
    optimizer=AdamW(learning_rate=4e-3, schedule=WarmupCosine(warmup=50)),
    batch_size=8,
    steps=500,
    max_minutes=4.6,  # plus the last evaluation and checkpoint
    eval_every=250,
    checkpoint_every=100,
    prompt="def ",
)
