"""AdamW with the rates of a method, and the schedule of its learning rate."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from unipelt_cli.config.sections import TrainSettings
from unipelt_cli.methods import StagePosition
from unipelt_cli.methods.base import Stage
from unipelt_cli.models.tuned import TunedModel


def make_adamw(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings, tuned: TunedModel
) -> torch.optim.AdamW:
    """Make AdamW with the method's rates; it decays only matrices that the method lets decay.

    A bias or a gate must not be pulled to nothing.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    heads = {id(part): head.rate for head in tuned.classifier.heads for part in head.parameters()}
    for name, parameter in parameters.items():
        is_head = not name.startswith("backbone.")
        backbone_name = name.removeprefix("backbone.")
        rate = heads.get(id(parameter), 1.0)
        factor = settings.head_rate * rate if is_head else tuned.method.rate(backbone_name)
        is_matrix = parameter.ndim > 1 and parameter.shape[0] > 1
        decays = is_matrix and (is_head or tuned.method.decays(backbone_name))
        decay = settings.weight_decay if decays else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": decay, "factor": factor}
            for (factor, decay), members in groups.items()
        ],
        fused=tuned.device.type in ("cpu", "cuda"),
    )


def schedule(
    stages: Sequence[Stage], stage_steps: Sequence[int], moment: StagePosition
) -> StagePosition:
    """Return where the schedule of the rate stands: over a stage and those that continue it."""
    first, end = moment.stage, moment.stage + 1
    while stages[first].continues:
        first -= 1
    while end < len(stages) and stages[end].continues:
        end += 1
    before = sum(stage_steps[first : moment.stage])
    return StagePosition(first, before + moment.step, sum(stage_steps[first:end]))


def scheduled_rate(settings: TrainSettings, moment: StagePosition) -> float:
    """Return the learning rate of a step of a schedule: linear warm-up, then linear decay to 0.

    The first step of a warm-up has a rate already, which transformers' own schedule starts at 0.
    """
    peak = settings.learning_rate
    assert peak is not None
    warm = round(settings.warmup * moment.steps)
    if moment.step < warm:
        return peak * (moment.step + 1) / warm
    return peak * (moment.steps - moment.step) / max(1, moment.steps - warm)
