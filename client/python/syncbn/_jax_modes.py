"""JAX's checkpoints, which rounds go with, and its forward mode, which they do not.

A program under jax.checkpoint computes again, in its backward pass, what the forward pass has not kept. A round must not
be begun again, since the other workers take no part in a second one. JAX keeps the results of every operation with an
effect, and does not repeat it; but it allows only effects that are known to it. Allowing that of an ordered io_callback
is all that rounds need: the vectors that came back from the workers are kept, and x's normalization is computed again.
There is no public function for it.
"""

from typing import Any, Iterable, Tuple

from jax.interpreters import ad, batching, mlir

try:
    from jax.extend.core import Primitive
except ImportError:  # Before JAX 0.4.36.
    from jax.core import Primitive
try:
    from jax._src import effects as _effects

    _allowed: Any = _effects.remat_allowed_effects
except (ImportError, AttributeError):  # A JAX that keeps them elsewhere refuses rounds under checkpoints, in its own words.
    _allowed = None

# A linearization alone is no forward mode: jax.vjp is one too, and jax.linear_transpose goes back through either.
FORWARD_MODE = (
    "syncbn.jax cannot be differentiated in forward mode (jax.jvp, jax.jacfwd, calls of what jax.linearize returns): a "
    "forward round is followed by backward rounds at every worker. Go back instead (jax.grad, jax.vjp, jax.jacrev, or "
    "jax.linear_transpose after jax.linearize); gradients themselves may be differentiated in either mode, as by jax.hessian"
)


def allow_checkpoints(effects: Iterable[Any]) -> None:
    """Lets jax.checkpoint keep the results of operations with these effects."""
    if _allowed is not None:
        for effect in effects:
            _allowed.add_type(type(effect))


# The tangent of a value: nothing that could be computed, but something that can be gone back through.
_tangent_p = Primitive("syncbn_tangent")


@_tangent_p.def_impl
def _refuse(tangent: Any) -> Any:
    raise TypeError(FORWARD_MODE)


_tangent_p.def_abstract_eval(lambda tangent: tangent)
mlir.register_lowering(_tangent_p, lambda context, tangent: _refuse(tangent))
ad.deflinear2(_tangent_p, lambda cotangent, _: [cotangent])
batching.defvectorized(_tangent_p)

_values_p = Primitive("syncbn_values")
_values_p.multiple_results = True
_values_p.def_impl(lambda *values: list(values))
_values_p.def_abstract_eval(lambda *values: list(values))
mlir.register_lowering(_values_p, lambda context, *values: [*values])
batching.primitive_batchers[_values_p] = lambda values, axes: (_values_p.bind(*values), axes)


def _derivative(values: Any, tangents: Any) -> Tuple[Any, Any]:
    """The values as they are, so that whatever differentiates this one in its turn finds them."""
    return list(values), [t if type(t) is ad.Zero else _tangent_p.bind(t) for t in tangents]


ad.primitive_jvps[_values_p] = _derivative


def reverse_only(*values: Any) -> Any:
    """The values, which cannot be differentiated in forward mode: TypeError before any round. One call for all that go into
    an operation: where gradients are differentiated, a value that they are not taken of is found here no more.
    """
    return _values_p.bind(*values)
