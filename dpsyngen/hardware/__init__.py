"""What a machine has, and how it is used: device, precision, memory format, compiling, transfer.

    from dpsyngen.hardware import choose

    compute = choose("auto")
    network = compute.compiled(compute.prepare(network))
    with compute.autocast():
        images = network(compute.send(batch))

Nothing here changes a guarantee: gradients are clipped and summed in fp32 whatever is chosen
(:mod:`dpsyngen.full_precision`).
"""

from dpsyngen.hardware.choice import choose, kind_of
from dpsyngen.hardware.compute import Compute
from dpsyngen.hardware.facts import Facts, Gpu

__all__ = ["Compute", "Facts", "Gpu", "choose", "kind_of"]
