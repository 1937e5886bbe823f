"""Trained parameters back from a run's directory."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxlab import config, params
from jaxlab.checkpoint import CheckpointError, Checkpoints
from jaxlab.data import open_corpus
from jaxlab.data.tokenizer import Tokenizer, load_tokenizer
from jaxlab.training import places
from jaxlab.training.source import TOKENIZER, TextData


class Run(NamedTuple):
    """A trained model.

    Attributes:
        config: what the run was made of; a search of a model has its fields too. Its
            paths are those that lead to its data now.
        params: its parameters, on `mesh`.
        step: updates they have seen.
        mesh: the mesh they are on.
    """

    config: Any
    params: Any
    step: int
    mesh: Mesh


def saved_config(directory: str | Path) -> Any:
    """The config that a run was saved with; None if it holds no readable checkpoint."""
    try:
        folder = Path(directory) / "checkpoints"
        return config.from_json(Checkpoints(folder, config={}).load_config())
    except (CheckpointError, ValueError, TypeError):
        return None


def load_run(
    directory: str | Path,
    *,
    step: int | None = None,
    mesh_config: params.MeshConfig | None = None,
) -> Run:
    """Read the parameters of a run, without its optimizer.

    Args:
        directory: the run's, such as ``runs/tiny``.
        step: a saved step; None takes the newest complete one.
        mesh_config: where the parameters go; None spreads copies over all devices.

    Raises:
        CheckpointError: there is no such run or step, or none is readable.
    """
    folder = Path(directory) / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(
            f"{directory} holds no run: there is no {folder}. Train one first, for "
            "example with `make train`, which writes runs/tiny."
        )
    saved = Checkpoints(folder, config={}).load_config(step)
    cfg = config.from_json(saved)
    cfg = places.located(cfg, places.roots(directory, cfg))
    if cfg.learned is None:
        kind = type(getattr(cfg, "task", cfg)).__name__
        raise CheckpointError(
            f"{directory} is a run of {kind}, which has no objective; name a run of "
            "text, of a task or of a fine-tuning."
        )
    mesh = params.make_mesh(mesh_config or params.MeshConfig())
    specs = cfg.learned.spec()
    abstract = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=sharding
        ),
        params.abstract(specs),
        params.shardings(specs, mesh),
    )
    with Checkpoints(folder, config=saved) as checkpoints:
        step, arrays = checkpoints.restore(abstract, step=step, subtree="params")
    return Run(cfg, arrays, step, mesh)


def load_run_tokenizer(directory: str | Path, cfg: Any) -> Tokenizer:
    """The tokenizer of a run of text, of which its directory keeps a copy.

    Args:
        directory: the run's.
        cfg: its config, from `load_run`.

    Raises:
        CheckpointError: the run was not trained on text.
        ValueError, OSError, ImportError: the tokenizer cannot be read.
    """
    data = getattr(cfg, "data", None)
    if not isinstance(data, TextData):
        raise CheckpointError(f"{directory} was trained on a task, which has no text.")
    copy = Path(directory) / TOKENIZER
    if data.corpus.tokenizer == "bytes" or copy.is_file():
        path = "bytes" if data.corpus.tokenizer == "bytes" else str(copy)
        return load_tokenizer(path, data.corpus.separator)
    return open_corpus(data.corpus.directory).tokenizer
