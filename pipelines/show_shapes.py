"""Write a contact sheet of the embedded default: drawings, autoencoder round trips, samples with verdicts."""

import argparse
import sys
from pathlib import Path

from pipelines import quiet_libraries

COLUMNS = 8


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.show_shapes", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("shapes.png"), help="the PNG to write (default: %(default)s)")
    parser.add_argument("--models", type=Path, help="a folder with base/, if not the committed one")
    parser.add_argument("--guidance-scale", type=float, help="if not the base's own best one")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Draw, sample, judge and write the sheet."""
    args = arguments()
    from flowbp_ray.shapes import MODELS

    models = args.models or MODELS
    if not (models / "base" / "model_index.json").exists():
        sys.exit(
            f"no pipeline in {models / 'base'}: train it with python -m pipelines.build_shapes, or name another --models folder"
        )

    quiet_libraries()
    import json

    import numpy as np

    from flowbp_ray.backbones.sd3 import SD3Backbone
    from flowbp_ray.pictures import Cell, Row, sheet, to_uint8
    from flowbp_ray.shapes.build.measure import STEPS, round_trip
    from flowbp_ray.shapes.captions import TASKS, evaluation_prompts
    from flowbp_ray.shapes.checker import check
    from flowbp_ray.shapes.preferences import random_caption
    from flowbp_ray.shapes.world import draw, lay_out

    backbone = SD3Backbone.from_pretrained(models / "base")
    guidance, measured = args.guidance_scale, models / "measured.json"
    if guidance is None:
        guidance = json.loads(measured.read_text("utf-8")).get("best_guidance") if measured.exists() else None
    if guidance is None:
        sys.exit(f"{measured} does not say the base's best guidance: give one with --guidance-scale")

    def judged(picture: np.ndarray, caption: str) -> Cell:
        verdict = check(picture, caption)
        return Cell(picture, caption, verdict.reason, verdict.right)

    rows = []
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng([args.seed, number])
        captioned = [random_caption("training", rng, task) for _ in range(COLUMNS)]
        rows.append(Row(f"drawn: {task.replace('_', ' ')}", [Cell(draw(lay_out(spec, rng)), text) for text, spec in captioned]))
    drawn = [c for row in rows for c in row.cells[:2]][:COLUMNS]
    decoded = round_trip(backbone, np.stack([c.picture for c in drawn]))
    rows.append(Row("through the autoencoder and back", [judged(p, c.caption) for p, c in zip(decoded, drawn, strict=True)]))
    for task, prompts in evaluation_prompts(COLUMNS, args.seed).items():
        seeds = list(range(args.seed, args.seed + COLUMNS))
        images = backbone.sample(prompts, seeds, steps=STEPS, guidance_scale=guidance, height=64, width=64)
        cells = [judged(p, t) for p, t in zip(to_uint8(images), prompts, strict=True)]
        rows.append(Row(f"sampled by the base: {task.replace('_', ' ')}", cells))
        print(f"{task:18s} {sum(c.good for c in cells)} of {COLUMNS} right")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(f"The embedded default: shapes (guidance {guidance:g}, {STEPS} steps)", rows).save(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
