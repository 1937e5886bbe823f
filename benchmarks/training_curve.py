"""Draw docs/images/training.png, the curve of a run on the front page.

    python -m benchmarks.training_curve

Nothing is trained. The curve is from results/optimizers_bytes_delta_product.json:
Adam's first run on the DeltaProduct model of bytes (`benchmarks.optimizers.problems`).
The same function draws `loss.png` in a training run.
"""

import json
import pathlib
import tempfile

from benchmarks.record import RESULTS, ROOT
from jaxlab.training.loss_curve import plot_losses

PICTURE = ROOT / "docs" / "images" / "training.png"


def main() -> None:
    data = json.loads((RESULTS / "optimizers_bytes_delta_product.json").read_text())
    run = data["methods"]["Adam"]["runs"][0]
    points = enumerate(zip(run["losses"], run["followed"], strict=True), start=1)
    lines = [
        {"step": data["every"] * i, "loss": loss, "held_out_loss": held_out}
        for i, (loss, held_out) in points
    ]
    PICTURE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        metrics = pathlib.Path(folder) / "metrics.jsonl"
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        plot_losses(
            metrics,
            PICTURE,
            ylabel="loss (nats per byte)",
            title="A small DeltaProduct language model of Python source",
        )
    print(f"Wrote {PICTURE.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
