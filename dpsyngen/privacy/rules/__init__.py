"""One rule per layer function: how its parameters' per-example gradients come out of the one backward pass.

A rule replaces a call such as ``F.conv2d(x, weight, ...)`` by an :class:`torch.autograd.Function` whose forward is
the same call and whose backward computes (a) the gradient of the input, as ever, and (b) the weight gradient *of
each example* instead of the sum over the batch, which it hands to a tape.  The summed weight gradient is never
computed, which is where the time goes that other methods spend twice.

Rows and examples: a layer sees ``rows = examples * copies`` rows, the copies of one example next to each other
(noise multiplicity K = copies).  The gradient of an example is the sum over its rows.

Adding a layer type is adding one rule: a function under ``@rule(function, *argument_names)``.
"""

from dpsyngen.privacy.rules import constants, layers
from dpsyngen.privacy.rules.registry import RULES, Tape, UnsupportedLayer, rule

__all__ = ["RULES", "Tape", "UnsupportedLayer", "constants", "layers", "rule"]
