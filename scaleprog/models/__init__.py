"""Elastic models; they know nothing about ranks."""

import difflib
import re
from functools import cache

import timm
import torch

from scaleprog.errors import RecipeError
from scaleprog.growth.space import Subnet
from scaleprog.models.elastic import ElasticModel
from scaleprog.models.vit import ElasticViT
from scaleprog.models.volo import ElasticVolo
from scaleprog.recipe.keys import ModelSettings

FAMILIES: tuple[type[ElasticModel], ...] = (ElasticViT, ElasticVolo)


@cache
def resolve_family(settings: ModelSettings) -> tuple[type[ElasticModel], Subnet, int]:
    """The elastic family of a recipe's model, its full size and its stride (pixels; resolutions are its multiples).

    Raises RecipeError for a name that timm does not know, a model outside the elastic families, or sizes that timm
    refuses.
    """
    plain, _, tag = settings.name.partition(".")
    if tag and re.fullmatch(r"\w+", tag) and timm.is_model(plain):
        raise RecipeError(
            f"model.name: {settings.name} names pretrained weights ({tag}), but a run starts from scratch; use "
            f"{plain}, and init.from to start from weights"
        )
    # plain names only, because timm reads hf-hub:... from the network and local-dir:... from a folder
    if not re.fullmatch(r"\w+", settings.name) or not timm.is_model(settings.name):
        near = difflib.get_close_matches(settings.name, timm.list_models(), 3) or timm.list_models("deit_*")[:3]
        raise RecipeError(f"model.name: timm has no model {settings.name!r}; did you mean {' or '.join(near)}?")
    for candidate in FAMILIES:
        with torch.device("meta"):
            try:
                net = candidate.create(settings, None)
            except TypeError:  # a model class without elastic resolution
                continue
            except Exception as error:  # timm's models raise exceptions of any kind if sizes do not fit
                reason = str(error) or type(error).__name__
                raise RecipeError(f"model: timm cannot build {settings.name} with these sizes: {reason}") from error
        if candidate.fits(net):
            return candidate, *candidate.sizes(net)
    raise RecipeError(
        f"model.name: {settings.name} is not in an elastic family; "
        "use a timm VisionTransformer of plain blocks, or a VOLO: most vit_*, deit_*, deit3_* and volo_* names fit"
    )
