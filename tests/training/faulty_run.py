"""The config of the runs that `test_faults` breaks: small, and it compiles quickly."""

from jaxlab.data import GroupWordProblem
from jaxlab.mixers import retnet
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupStableDecay
from jaxlab.training import TaskData, TrainConfig

config = TrainConfig(
    name="run",
    data=TaskData(GroupWordProblem("S3", 9), eval_rows=8),
    model=LMConfig(
        vocab_size=8,
        width=32,
        n_layers=1,
        mlp_hidden=32,
        pattern=(retnet.Config(32, n_heads=2),),
    ),
    # Its rates do not depend on the number of steps, so that runs share their programs.
    optimizer=AdamW(schedule=WarmupStableDecay(warmup=2, decay=0.0)),
    batch_size=8,
    steps=40,
    log_every=1,
    eval_every=20,
    checkpoint_every=5,
    keep_best=0,
)
