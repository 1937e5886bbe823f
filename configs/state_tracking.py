"""DeltaProduct tracks the product of random permutations of three things (S3).

Reproduces, at a size for two CPU cores, the state-tracking result of DeltaProduct
(arXiv 2502.10297, section 5.1): one layer solves S3 with two Householder steps a token
and beta in [0, 2], but not with one step or with beta in [0, 1]. As in the paper there
is no convolution, forget gate or output gate.

Command: python scripts/train.py configs/state_tracking.py
Other groups, steps and ranges, for several seeds:
    python scripts/experiment.py state_tracking
Single other cells: --name other --model.pattern.0.n-householders 1
    --model.pattern.0.beta-max 1.0
"""

from jaxlab.data import GroupWordProblem
from jaxlab.mixers import delta_product
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TaskData, TrainConfig

config = TrainConfig(
    name="state_tracking",
    data=TaskData(GroupWordProblem("S3", length=33), eval_rows=1024),
    model=LMConfig(
        vocab_size=8,
        width=64,
        n_layers=1,
        pattern=(
            delta_product.Config(
                64,
                n_heads=4,
                n_householders=2,
                beta_max=2.0,
                forget_gate=False,
                output_gate=False,
                convolution=0,
            ),
        ),
        tie_embeddings=False,
    ),
    optimizer=AdamW(
        learning_rate=5e-3, schedule=WarmupCosine(warmup=50), weight_decay=0.01
    ),
    batch_size=128,
    steps=1200,
    eval_every=400,
    checkpoint_every=1200,
)
