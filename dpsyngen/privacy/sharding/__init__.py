"""The engine for models whose parameters are split over processes by FSDP2 (``torch.distributed.fsdp.fully_shard``).

====================  ============================  ====================================  ===========================
engine                examples                      what travels to clip                  an example's gradient
====================  ============================  ====================================  ===========================
:class:`OwnExamples`  each process has its own      clipped sums, reduced to the shards   whole, in one process
:class:`SameExamples` all processes see the same    squared norms of the parts            divided as the parameters are
====================  ============================  ====================================  ===========================

In either the L2 sensitivity of the whole sum is C, if an example is in one process, or in all that share one set of
shards, and in no other.  FSDP's own reduction of gradients has no part in it: it would average gradients that are not
clipped, and gets none to see.
"""

from dpsyngen.privacy.sharding.engine import OwnExamples, SameExamples

__all__ = ["OwnExamples", "SameExamples"]
