"""The engine for models whose parameters are split over processes.

=========================================  ==================================  =========================================
way to split                               examples                            what travels to clip
=========================================  ==================================  =========================================
:class:`.fsdp.OwnExamples` (FSDP2)         each process has its own            clipped sums, reduced to the shards
:class:`.fsdp.SameExamples` (FSDP2)        all processes of a group see the    squared norms of the examples' parts
                                           same
:class:`.engine.SplitByHand`: tensors      the same                            the same
that each process has to itself
=========================================  ==================================  =========================================

In each the L2 sensitivity of the whole sum is C, if an example is in one process, or in all that share one set of
shards, and in no other.  FSDP's own reduction of gradients has no part in it: it would average gradients that are not
clipped, and gets none to see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from dpsyngen.errors import ConfigError
from dpsyngen.privacy.clipping import ClippingStyle
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.sharding.engine import ShardedGradients, SplitByHand
from dpsyngen.privacy.sharding.fsdp import OwnExamples, SameExamples

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sharded(
    module: nn.Module,
    clipping_norm: float,
    *,
    style: ClippingStyle = "flat",
    kernels: KernelChoices | None = None,
    shards: ProcessGroup | None = None,
) -> ShardedGradients:
    """:class:`PerExampleGradients` of a model that is split over processes.

    Every method but ``zero`` and ``per_example`` must be called in all processes alike, and gives each its own part of
    the sum, with the sensitivity of the whole.

    Args:
        module, clipping_norm, style, kernels: as of :class:`dpsyngen.privacy.per_example.PerExampleGradients`.
        shards: processes that see the same examples and hold parts of one model, whose squared norms are added up.
            None: the module was sharded by ``fully_shard`` and each process has its own examples.

    Raises:
        ConfigError: the parameters are not split, or in a way that is not supported.
    """
    distributed = any(hasattr(p, "to_local") for p in module.parameters() if p.requires_grad)
    if not distributed and shards is None:
        raise ConfigError("the model is whole and `shards` is not given: use PerExampleGradients.")
    kind = (OwnExamples if shards is None else SameExamples) if distributed else SplitByHand
    return kind(module, clipping_norm, style=style, kernels=kernels, shards=shards)
