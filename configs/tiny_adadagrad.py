"""The model of `make train` trained by AdAdaGrad; the norm test grows the batch.

Data: as in configs/tiny.py; a step takes 8 rows at first, and up to 64 later.
Paper: Lau, Liu, Kolar, AdAdaGrad, arXiv 2402.11215.
Expected: the batch has 64 rows from the fifth step on; no full run was measured.
Command: python scripts/train.py configs/tiny_adadagrad.py
"""

from jaxlab.mixers import delta_product
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdAdaGrad, BatchGrowth, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="tiny_adadagrad",
    data=TextData(sequence_length=256, eval_tokens=65_536),
    model=LMConfig(
        width=192,
        n_layers=3,
        pattern=(delta_product.Config(192, n_heads=4, n_householders=2),),
    ),
    optimizer=AdAdaGrad(learning_rate=1e-2, schedule=WarmupCosine(warmup=20)),
    batch_size=8,
    accumulate=4,
    growth=BatchGrowth(eta=0.6, largest=64),
    steps=300,
    log_every=5,
    eval_every=150,
    checkpoint_every=50,
    prompt="def ",
)
