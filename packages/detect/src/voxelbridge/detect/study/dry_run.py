"""What `study run --dry-run` prints: every job with its cost, and what is missing."""

from collections.abc import Sequence

from voxelbridge.detect.study.estimate import Estimator, JobCost
from voxelbridge.detect.study.jobs import Plan
from voxelbridge.detect.study.markers import Markers
from voxelbridge.detect.study.tasks import Kind, Train

KINDS: tuple[Kind, ...] = ("prepare", "truth", "train", "sweep", "predict", "evaluate")


def describe_jobs(plan: Plan) -> str:
    """A line for each job, then totals, the model of the estimate, and missing files."""
    markers = Markers(plan)
    estimator = Estimator(plan)
    costs = [estimator.cost(job) for job in plan.jobs.values()]
    lines = [f"{plan.study.source}: {len(plan.cells)} cells, {len(costs)} jobs"]
    for cost in costs:
        done = "done" if markers.done(cost.job.id) is not None else ""
        lines.append(f"  {_hours(cost):>12}  {done:<4}  {_described(cost)}")
    lines += ["", *_totals(costs, markers), estimator.describe()]
    missing = _missing(plan)
    if missing:
        lines += [f"missing now, {len(missing)}:", *(f"  {text}" for text in missing)]
    return "\n".join(lines)


def total_hours(costs: Sequence[JobCost]) -> float:
    """GPU hours of jobs together."""
    return sum(cost.gpu_hours or 0.0 for cost in costs)


def _totals(costs: Sequence[JobCost], markers: Markers) -> list[str]:
    lines = []
    for kind in KINDS:
        own = [cost for cost in costs if cost.job.kind == kind]
        if own:
            hours = total_hours(own)
            needs = f"{hours:,.1f} GPU hours" if own[0].gpu_hours is not None else "no GPU"
            lines.append(f"{kind:<9} {len(own):>6} jobs  {needs}")
    left = [cost for cost in costs if markers.done(cost.job.id) is None]
    lines.append(
        f"together  {len(costs):>6} jobs  {total_hours(costs):,.1f} GPU hours, of which "
        f"{total_hours(left):,.1f} in the {len(left)} jobs that are not done"
    )
    return lines


def _hours(cost: JobCost) -> str:
    return "no GPU" if cost.gpu_hours is None else f"{cost.gpu_hours:,.3g} GPU h"


def _described(cost: JobCost) -> str:
    task = cost.job.task
    if not isinstance(task, Train):
        return cost.job.id
    init = f" from {task.init}" if task.init else " from scratch"
    stem = f", stem {task.stem}" if task.stem else ""
    parts = f", {task.parts}" if task.parts else ""
    return f"{cost.job.id}: {cost.steps:,} steps{init}{stem}{parts}"


def _missing(plan: Plan) -> list[str]:
    found: dict[str, int] = {}
    for job in plan.jobs.values():
        for source in job.inputs:
            if not source.path.exists():
                found[str(source.path)] = found.get(str(source.path), 0) + 1
    return [f"{path} (needed by {count} jobs)" for path, count in found.items()]
