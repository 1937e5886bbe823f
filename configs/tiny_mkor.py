"""The model of `make train` trained by MKOR, followed by LAMB.

Data: as in configs/tiny.py, for as many steps.
Paper: Mozaffari et al., MKOR, arXiv 2306.01685.
Expected: no full run was measured. MKOR-H is `MKOR(..., switch=Switch())`.
Command: python scripts/train.py configs/tiny_mkor.py
"""

from jaxlab.mixers import delta_product
from jaxlab.models import LMConfig
from jaxlab.optimizers import LAMB, MKOR, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="tiny_mkor",
    data=TextData(sequence_length=256, eval_tokens=65_536),
    model=LMConfig(
        width=192,
        n_layers=3,
        pattern=(delta_product.Config(192, n_heads=4, n_householders=2),),
    ),
    optimizer=MKOR(base=LAMB(learning_rate=1e-2, schedule=WarmupCosine(warmup=50))),
    batch_size=8,
    steps=500,
    eval_every=250,
    checkpoint_every=100,
    prompt="def ",
)
