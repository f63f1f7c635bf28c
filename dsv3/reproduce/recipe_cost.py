"""What a whole recipe costs on a planned cluster: pre-training, both extensions, post-training."""

from dsv3.plan.cost import DOLLARS_PER_HOUR, PUBLISHED_POST_HOURS, Cost, Stretch, extension_phase, pretraining
from dsv3.plan.training import TrainingPlan
from dsv3.recipes.extension import STEPS, extension
from dsv3.train.schedule import batch_stretches


def recipe_cost(
    plan: TrainingPlan, *, dollars_per_hour: float = DOLLARS_PER_HOUR, post_hours: float | None = None
) -> Cost:
    """Return what a recipe costs as the report's run went: growing batch, two extensions, post-training."""
    config = plan.config
    stretches = [Stretch(rows=rows, steps=steps) for rows, steps in batch_stretches(config)]
    phases = extension(config) if config.model.rope_scaling is None else ()
    lump = PUBLISHED_POST_HOURS if config.recipe == "v3_671b" else 0.0
    return Cost(
        world=plan.world,
        pretrain=pretraining(plan, stretches=stretches),
        extensions=tuple(extension_phase(plan, config=phase, steps=STEPS) for phase in phases),
        post_hours=lump if post_hours is None else post_hours,
        dollars_per_hour=dollars_per_hour,
    )
