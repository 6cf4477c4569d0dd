"""Options of the CPU compiler, by the version of jaxlib; imports no jax, which reads its flags only once."""

import importlib.metadata

JAXLIB = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])


def fusion_emitters(on):
    """The option that joins operations into one loop, or none: from jaxlib 0.12 on XLA always does.

    It ends a process that sets a flag which it does not know, and refuses such an option.
    """
    return {"xla_cpu_use_fusion_emitters": on} if JAXLIB < (0, 12) else {}
