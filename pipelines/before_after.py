"""What an alignment has changed, for people: a sheet of pictures and a table."""

import math
from typing import Any

from flowbp_ray.config import AlignConfig
from flowbp_ray.pictures import Cell, Row, sheet
from flowbp_ray.rollouts.evaluation import Pictures, differences, scores
from flowbp_ray.shapes.checker import check
from flowbp_ray.shapes.evaluation import Score
from pipelines.report import share


def before_after(config: AlignConfig, prompts: list[str], before: Any, after: Any, heading: str) -> Any:
    """Two rows of the same prompts and seeds, with the checker's verdicts where it judges; ``heading`` is the second one's."""

    def row(heading: str, pictures: Any) -> Row:
        if not config.evaluation.checked:
            return Row(heading, [Cell(p, t) for p, t in zip(pictures, prompts, strict=True)])
        verdicts = [check(p, t) for p, t in zip(pictures, prompts, strict=True)]
        return Row(heading, [Cell(p, t, v.reason, v.right) for p, t, v in zip(pictures, prompts, verdicts, strict=True)])

    return sheet(
        "The same prompts and seeds",
        [row("before" if config.adapter is None or config.adapter.init_from is None else "start", before), row(heading, after)],
    )


def table(config: AlignConfig, base: Pictures | None, aligned: Pictures) -> str:
    """base | aligned | difference, as Markdown: tasks in per cent of pictures right, other scores in their own units."""
    before, gained = (None, None) if base is None else (scores(base), differences(base, aligned))
    lines = ["| | base | aligned | difference |", "| --- | ---: | ---: | ---: |"]
    for name, after in scores(aligned).items():
        scale = 100.0 if share(name) or name == "mean" else 1.0
        columns = [(before, ""), ({name: after}, ""), (gained, "+")]
        cells = ["" if of is None else number(of[name], scale, sign) for of, sign in columns]
        lines.append(f"| {f'**{name}**' if name == 'mean' else name.replace('_', ' ')} | {' | '.join(cells)} |")
    settings, sampling = config.evaluation, config.sampling
    lines.append("")
    of = f"Means over {len(aligned['seed'])} pictures." + (" Tasks: % right by GenEval." if settings.geneval else "")
    if settings.checked:
        of = (
            f"Tasks: % right by the exact checker, {settings.per_task} pictures each; watermarked: % of all of these (the "
            "checker lets none of them pass); rewards: their mean."
        )
    lines.append(
        f"{of} ± is one standard error, a difference's over the same prompts and noise. Guidance "
        f"{sampling.guidance_scale:g}, {sampling.steps} steps, seed {settings.seed}, weights: {settings.weights}."
    )
    return "\n".join(lines) + "\n"


def number(score: Score, scale: float, sign: str) -> str:
    """Value and error, with as many decimals as two digits of the error need: rewards have all kinds of units."""
    error = scale * score.error
    decimals = max(2, 1 - math.floor(math.log10(error))) if error else 2
    return f"{scale * score.value:{sign}.{decimals}f} ± {error:.{decimals}f}"
