"""One rule per layer function: how its parameters' per-example gradients come out of the one backward pass.

A rule replaces a call such as ``F.conv2d(x, weight, ...)`` by a :class:`torch.autograd.Function` with the same
forward.  Its backward computes the gradient of the input and, in place of the weight gradient summed over the batch,
the weight gradient *of each example*, which goes to a tape.

A layer sees ``rows = examples * copies`` rows, the copies of one example next to each other (noise multiplicity K =
copies); the gradient of an example is the sum over its rows.  A new layer type needs one new rule: a function under
``@rule(function, *argument_names)``.
"""

from dpsyngen.privacy.rules import layers
from dpsyngen.privacy.rules.registry import RULES, Recorder, Tape, UnsupportedLayer, rule

__all__ = ["RULES", "Recorder", "Tape", "UnsupportedLayer", "layers", "rule"]
