"""The model card beside the committed parts, written from the measured figures and nothing else."""

import json
from pathlib import Path

from flowbp_ray.shapes.build import base, preference_model
from flowbp_ray.shapes.build.measure import CHECKED, FINAL, GUIDANCE, PAIRS, STEPS, SWEEP
from flowbp_ray.shapes.captions import TASKS
from flowbp_ray.shapes.preferences import ATTRIBUTES, KINDS


def percent(score: dict[str, float]) -> str:
    """A share with its standard error."""
    return f"{100 * score['value']:.1f} ± {100 * score['error']:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def card(figures: dict, history: list[dict]) -> str:
    """The card's text."""
    best, tasks, early = figures["best_guidance"], figures["six_tasks"], figures["six_tasks_at_80_percent"]
    gained = 100 * (tasks["mean"]["value"] - early["mean"]["value"])
    training = [
        [
            row["part"],
            f"{row['steps']:,}",
            str(row["batch"]),
            f"{row['learning_rate']:g}",
            "Muon, AdamW" if row["muon"] else "AdamW",
            f"{row['average']:g}",
            ", ".join(f"{100 * share:g}" for share in row.get("watermarked", ())),
            f"{row['minutes']:.0f}",
        ]
        for row in history
    ]
    checker = figures["checker"]
    sweep = [
        [
            f"{g:g}",
            *(f"{100 * figures[f'guidance_{g}'][t]['value']:.0f}" for t in TASKS),
            percent(figures[f"guidance_{g}"]["mean"]),
        ]
        for g in GUIDANCE
    ]
    comparisons = [
        [k, *(f"{100 * figures[f'comparisons_{m}'][k]:.1f}" for m in ("reward", "judge"))] for k in (*KINDS, "overall")
    ]
    trained_out = "" if gained < 2 else ": it is **not trained out**, and `build_shapes base --further` goes on from it"
    marked = sum(row["steps"] for row in history if "watermarked" in row)
    clean = sum(row["steps"] for row in history if row["part"] == "base") - marked
    first = f"the first {clean:,} steps on drawings without watermarks, then " if clean else ""
    low = [f"{m} on {k}" for m in ("reward", "judge") for k in ATTRIBUTES if figures[f"comparisons_{m}"][k] < 0.85]
    weak = f"Below 85 % on a stated attribute: **{', '.join(low)}**." if low else "Every stated attribute is at 85 % or above."
    return f"""# The embedded default's models

Trained from nothing on drawings of the shapes world by `python -m pipelines.build_shapes` (seed 0; another one where a part was trained further), which also
measured every figure here and wrote this card; `measured.json` and `training.json` hold the raw figures. Apache-2.0, as the code.
No outside data, pictures or weights went in.

| folder | what | parameters |
| --- | --- | ---: |
| `base/` | Stable Diffusion 3 pipeline, 64×64 pixels: plain `StableDiffusion3Pipeline.from_pretrained(path, dtype=torch.float32)` loads it | {sum(v for k, v in figures["parameters"].items() if k.startswith("base")):,} |
| `reward/` | `CLIPModel`, the reward that alignment optimises | {figures["parameters"]["reward"]:,} |
| `judge/` | `CLIPModel` of another width, seed and data, never optimised against | {figures["parameters"]["judge"]:,} |

All weights are float16 on disk; load them in float32 on a CPU. Text lengths are 16 (CLIP) and 8 (T5) tokens, so call
the pipeline with `max_sequence_length=8`. It samples on `sigmas=numpy.linspace(1, 1/{STEPS}, {STEPS})` (which its
scheduler shifts) with {STEPS} steps;
its own best guidance is **{best:g}**.

## Data

Drawings of random training captions of the six tasks, evenly. As on the web, {100 * base.WRONG_CAPTIONS:.0f} % of the base's training captions
are wrong in one attribute, {100 * base.NO_CAPTIONS:.0f} % are missing, and pictures have a watermark: the table below says how many per cent of
those of one thing and of several. A base that is trained out so still leaves alignment something to mend. Watermarks make the
checker fail a picture; neither reward nor judge was ever trained on one. Evaluation captions are in no training set (`tests/shapes/test_captions.py`).

## Training

{table(["part", "steps", "batch", "learning rate", "optimizer", "weights averaged", "watermarked, %", "minutes, one CPU core"], training)}

A part with several rows was trained further, on other drawings. Muon is for the matrices of stacked layers. The base's noise
levels are shifted by {base.SHIFT:g}, in training (but not in its first row) and in its scheduler. The base and its text encoders are
trained together on {base.BANK:,} drawings encoded once; the other parts see a fresh drawing every time. A batch of the preference
models is comparisons, that is, two pictures each. Training captions with a relation mostly name their shapes in one order: with
both alike, no model here began to learn what "left of" means. At the end of their training every picture is changed, by
a vector no longer than {preference_model.RADIUS:g}, in the direction that raises the loss: without, alignment raised the reward and lowered the share
that the checker found right. (The judge, which nothing is optimised against, was trained before that.)

## The checker

{table([f"{CHECKED:,} pictures", "judged right, %"], [[k.replace("_", " "), f"{100 * v:.2f}"] for k, v in checker.items()])}

A wrong caption differs from the true one in exactly one attribute; noise has a spread of 0.05; JPEG has quality 75.

## The base

The guidance sweep, {SWEEP} pictures a task, % right by the checker:

{table(["guidance", *TASKS, "mean"], sweep)}

At guidance {best:g}, {FINAL} pictures a task, evaluation captions, {STEPS} steps:

{table(["", *TASKS, "mean"], [["finished", *(percent(tasks[t]) for t in (*TASKS, "mean"))], ["four fifths of the way", *(percent(early[t]) for t in (*TASKS, "mean"))]])}

The base was trained for {first}{marked:,} steps on watermarked ones. The last fifth of these gained {gained:+.1f} points of
the mean{trained_out}.

## Reward and judge

Comparisons of held-out captions decided rightly, %, {PAIRS} of each kind and {2 * PAIRS} overall (kinds evenly):

{table(["worse by", "reward", "judge"], comparisons)}

{weak}
"""


def write(models: Path) -> None:
    """Write the card of the measured ``models`` beside them."""
    figures, history = (json.loads((models / name).read_text()) for name in ("measured.json", "training.json"))
    (models / "README.md").write_text(card(figures, history))
