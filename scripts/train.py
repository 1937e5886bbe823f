"""Run a config: python scripts/train.py configs/tiny.py [--resume] [--model.width 64]

Training by gradients, evolution strategies and policy gradients alike. Every number and
name in the config is an option; --help after the config lists them. --resume continues
the run of the same name.

With several processes, each one runs the same command with --distributed. On TPU pods,
under SLURM, MPI and Kubernetes they find each other; elsewhere say where process 0 is,
how many there are and which one this is:

    --distributed --coordinator-address 10.0.0.1:8476 --num-processes 2 --process-id 0
"""

import argparse
import contextlib
import logging
import os
import signal
import sys

# Whatever takes long to import is imported in `run`, where Ctrl-C gets a sentence.

ERRORS = (ValueError, TypeError, ArithmeticError, OSError, RuntimeError, ImportError)


def main() -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", force=True
    )
    signal.signal(signal.SIGTERM, terminated)
    try:
        run(sys.argv[1:])
    except ERRORS as error:
        logging.getLogger(__name__).debug("Traceback:", exc_info=True)
        end(f"error: {error}", 1)
    except KeyboardInterrupt:
        end(
            "Stopped; --resume goes on from the last checkpoint, if any.",
            128 + signal.SIGINT,
        )


def end(sentence: str, status: int) -> None:
    """End at once, without waiting for threads and processes that a failure left."""
    with contextlib.suppress(OSError, ValueError):
        print(sentence, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)


def terminated(number, _frame) -> None:
    """End by an exception, so that what is unfinished is removed."""
    sys.exit(128 + number)


def run(arguments: list[str]) -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--resume", action="store_true")
    own.add_argument("--distributed", action="store_true")
    own.add_argument("--coordinator-address")
    own.add_argument("--num-processes", type=int)
    own.add_argument("--process-id", type=int)
    given, rest = own.parse_known_args(arguments)

    from jaxlab import config

    cfg = config.parse_cli(rest, __doc__)
    join_processes(given)
    from jaxlab.training import train

    train(cfg, resume=given.resume)


def join_processes(given: argparse.Namespace) -> None:
    place = (given.coordinator_address, given.num_processes, given.process_id)
    described = [x for x in place if x is not None]
    if described and not given.distributed:
        raise ValueError(
            "--coordinator-address, --num-processes and --process-id describe the "
            "processes of --distributed; add it, or leave them out."
        )
    if described:
        check_place(*place)
    if given.distributed:
        import jax

        try:
            jax.distributed.initialize(*place)
        except ValueError as error:
            raise ValueError(
                f"--distributed found no cluster ({error}) On TPU pods, under SLURM, "
                "MPI and Kubernetes it finds one; elsewhere add --coordinator-address "
                "HOST:PORT --num-processes N --process-id I, or leave it out on a "
                "single machine."
            ) from error


def check_place(address: str | None, processes: int | None, index: int | None) -> None:
    if address is None or processes is None or index is None:
        raise ValueError(
            "--coordinator-address, --num-processes and --process-id are given "
            "together: where process 0 is, how many there are, and which one this is."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"--coordinator-address {address} must be HOST:PORT, a free port of the "
            "machine of process 0, such as 10.0.0.1:8476."
        )
    if not 0 <= index < processes:
        raise ValueError(
            f"--process-id {index} must be from 0 to --num-processes {processes} less "
            "1, another for each process."
        )


if __name__ == "__main__":
    main()
