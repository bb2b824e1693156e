"""The run that a fork continues, as its recipe names it. `scaleprog train --from` writes this part of a recipe."""

from typing import Annotated

from pydantic import Field

from scaleprog.recipe.numbers import Layers, LocalPath, NoOrMoreSteps, Pixels, Settings, Steps


class TrainedSettings(Settings):
    """A phase that the parent trained."""

    stage: Steps
    """Number of its stage."""
    stop: Steps
    """The optimizer steps finished when it ended; it began where the phase before ended."""
    resolutions: Annotated[tuple[Pixels, ...], Field(min_length=1, max_length=100)]
    """Resolutions of its networks, ascending; it trained every one of them with every depth."""
    depths: Annotated[tuple[Layers, ...], Field(min_length=1, max_length=100)]
    """Depths of its networks, ascending."""
    base: Layers
    """Depth of the network that it grew from."""
    searched: bool = False
    """Whether it was a search."""


class ParentSettings(Settings):
    """The run that a fork continues; `--from` writes it."""

    run: LocalPath
    """Its run directory when the fork was made."""
    id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    """What its run.id says."""
    step: Steps
    """The checkpoint's optimizer step."""
    position: NoOrMoreSteps
    """The position in this recipe's schedule from which the fork trains; with `phases` of an earlier fork, as if every
    step since then had advanced it."""
    began: NoOrMoreSteps = 0
    """The position at which the weights were initialized; not 0 after a probe that found nothing learned."""
    phases: Annotated[tuple[TrainedSettings, ...], Field(max_length=1024)] = ()
    """Phases that the parent, or one of its own parents, trained up to a step from which on this recipe's schedule
    continues them; empty if its own phases are the same."""
