"""A language model of integers, trained without a gradient and without a float."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab import data, params
from jaxlab.evolution.integer import TEXTS, IntegerEGGROLL, integer_model
from jaxlab.evolution.noise import divided
from jaxlab.training.batches import Numbered
from jaxlab.training.problem import Curve, Problem, Reading
from jaxlab.training.problems.placement import abstract, compiled, placed
from jaxlab.training.source import TextData
from jaxlab.training.state import TrainState

ROWS, LENGTH = 64, 256  # of an evaluation


@dataclasses.dataclass(frozen=True)
class IntegerTraining:
    """A corpus of bytes, a model, and its strategy."""

    data: TextData = TextData(sequence_length=32, eval_tokens=2**17)  # rows: segments
    model: integer_model.Config = integer_model.Config()
    es: IntegerEGGROLL = IntegerEGGROLL()

    def open(self, steps: int, seed: int, *, resumes: bool = False) -> Problem:
        """The problem of a run of so many generations."""
        # A run that resumes takes the corpus as it was built, as `open_source` does.
        corpus = (
            data.open_corpus(self.data.corpus.directory)
            if resumes
            else data.build(self.data.corpus)
        )
        separator = corpus.tokenizer.separator
        if (
            self.model.vocab_size < corpus.vocab_size
            or self.model.separator != separator
        ):
            raise ValueError(
                f"The model has vocab_size={self.model.vocab_size} and separator="
                f"{self.model.separator}, but the corpus {corpus.vocab_size} ids, of "
                f"which {separator} separates documents; set the model's vocab_size "
                "and separator."
            )
        rows = self.es.population // self.es.members_per_sequence
        segments = data.Streams(
            corpus.split("train"), rows=rows, length=self.data.sequence_length
        )
        strategy = self.es.build(self.model)
        of_weights, of_noise = jax.random.split(jax.random.key(seed))
        weights = params.init(integer_model.spec(self.model), of_weights)
        memory = strategy.init(weights, of_noise)
        names, _ = divided(self.es.axes, rows, TEXTS)
        own = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(names))
        memory = dataclasses.replace(memory, hidden=jax.device_put(memory.hidden, own))

        def generation(state: TrainState, tokens):
            es, weights, figures = strategy.step(state.opt_state, state.params, tokens)
            # Every process adds up the losses, by itself.
            losses = figures["losses"]
            losses = params.constrain(losses, *(None,) * losses.ndim)
            figures = figures | {"losses": losses}
            return TrainState(state.step + 1, weights, es), figures

        start = placed(TrainState(jnp.zeros((), jnp.int32), weights, memory))
        update = compiled(generation, start)
        predictions = self.es.population * self.data.sequence_length

        def read(step: int, batch: Any, figures: dict[str, Any]) -> Reading:
            losses = int(np.asarray(figures["losses"], np.int64).sum())
            return Reading(
                {
                    "bits_per_token": integer_model.bits(losses) / predictions,
                    "undecided": float(figures["undecided"]),
                    "moved": float(figures["moved"]),
                }
            )

        def score(state: TrainState) -> dict[str, float]:
            bits = heldout_bits_per_byte(
                corpus, self.model, state.params, self.data.eval_tokens
            )
            return {"bits_per_byte": bits}

        return Problem(
            abstract=abstract(start),
            init=lambda: start,
            batches=Numbered(
                lambda number: segments[number], {"corpus": corpus.fingerprint}
            ),
            step=lambda state, tokens, key: update(state, tokens),
            score=score,
            read=read,
            headline=(
                f"integer model, {params.count(integer_model.spec(self.model)):,} "
                f"parameters, by a population of {self.es.population}, {steps} steps"
            ),
            watched="bits_per_token",
            goal="bits_per_byte",
            curve=lambda scores: Curve(
                file="scores.png",
                train="bits_per_token",
                held_out="bits_per_byte",
                labels=("bits_per_token", "bits_per_byte"),
                unit="bits per byte",
                baselines=corpus.baselines,
            ),
        )


def heldout_bits_per_byte(
    corpus: data.Corpus,
    cfg: integer_model.Config,
    weights: Any,
    most: int | None = None,
) -> float:
    """Bits per byte of the parameters without noise, on held-out text read end to end.

    Args:
        most: tokens, spread over the rows that read side by side; None for all.
    """
    documents = corpus.split("heldout")
    streams = data.Streams(documents, rows=ROWS, length=LENGTH)
    count = streams.segments_a_pass
    if most is not None:
        count = min(count, max(most // (ROWS * LENGTH), 1))
    state, sixteenths, size = integer_model.init_state(cfg, ROWS), 0, 0
    for n in range(count):
        losses, state = _segment_loss(cfg, weights, streams[n], state)
        sixteenths += int(np.sum(np.asarray(losses, np.int64)))
        size += int(documents.token_bytes[streams[n][:, 1:]].sum())
    return integer_model.bits(sixteenths) / size


@partial(jax.jit, static_argnames="cfg")
def _segment_loss(cfg: integer_model.Config, weights, tokens, state):
    return integer_model.segment_loss(weights, tokens, cfg, state)
