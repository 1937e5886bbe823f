"""A Mixture-of-Memories language model of Python source, for two CPU cores.

Paper: MoM, arXiv 2502.13685. Shows the method at the sizes of `configs/tiny.py`: each
token updates two of a layer's four memories and one that all tokens share; the balance
loss is reported as `auxiliary_loss` (0.02 if the memories are used equally, 0.04 if all
tokens use the same two).
Data: the standard library of the running Python, as bytes; 5% of the files held out.
Command: python scripts/train.py configs/mom.py --resume
"""

from jaxlab.mixers import mom
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="mom",
    data=TextData(sequence_length=256, eval_tokens=65_536),
    model=LMConfig(width=192, n_layers=3, pattern=(mom.Config(192, n_heads=4),)),
    optimizer=AdamW(learning_rate=4e-3, schedule=WarmupCosine(warmup=50)),
    batch_size=8,
    steps=500,
    max_minutes=4.6,  # plus the last evaluation and checkpoint
    eval_every=250,
    checkpoint_every=100,
    prompt="def ",
)
