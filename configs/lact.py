"""A LaCT language model of Python source: a window of 64 bytes, and fast weights.

Paper: "Test-Time Training Done Right", arXiv 2505.23884. Attention sees 64 bytes; the
rest of the 512 are seen through fast weights, which take a Muon step every 64 bytes.
Data and optimizer: as in configs/tiny.py, with half as many rows of twice the length.
To compare with the window alone, set the pattern to attention.Config(192, window=64).
Command: python scripts/train.py configs/lact.py
"""

from jaxlab.mixers import lact
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import TextData, TrainConfig

config = TrainConfig(
    name="lact",
    data=TextData(sequence_length=512, eval_tokens=65_536),
    model=LMConfig(
        width=192,
        n_layers=3,
        pattern=(lact.Config(192, n_heads=6, n_fast_heads=4, chunk_size=64),),
    ),
    optimizer=AdamW(learning_rate=4e-3, schedule=WarmupCosine(warmup=50)),
    batch_size=4,
    steps=400,
    max_minutes=4.6,  # plus the last evaluation and checkpoint
    eval_every=200,
    checkpoint_every=100,
    prompt="def ",
)
