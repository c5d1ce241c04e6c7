"""Rounds of arrays that lie on several devices of the process, where no program of jit's surrounds them."""

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np


def outside_of_programs(body: Callable[..., Any], call: Callable[..., Any], arguments: Any) -> Any:
    """A round that no jit surrounds: `body` as a callback of JAX's, which `call` makes of it, or called from here.

    JAX cannot call back for arrays on several devices from outside of a program; some versions end the process. Results
    that come from here belong to no device, and JAX puts them to those of whatever they meet.
    """
    spans = (getattr(getattr(argument, "sharding", None), "device_set", ()) for argument in arguments)
    if all(len(devices) <= 1 for devices in spans):
        return call(body, *arguments)
    jax.effects_barrier()  # Rounds of programs that JAX still runs come first.
    return jax.tree_util.tree_map(jnp.asarray, body(*(np.asarray(argument) for argument in arguments)))
