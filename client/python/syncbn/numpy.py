"""Batch normalization of NumPy arrays over all workers, as functions.

    y, state = syncbn.numpy.forward(worker, "layer", x, weight, bias, running_mean=mean, running_var=var)
    dx, d_weight, d_bias, _ = state.backward(dy)

Arrays are [N, C, ...] (`channels_last=False`) or [N, ..., C], float16, bfloat16 (ml_dtypes'), float32 or float64; or
anything with `__dlpack__` in the host's memory, such as tensors of torch and arrays of JAX. Results are NumPy arrays.
Nothing is copied that is dense, with the channels innermost in memory or between the batch and the rest; other arrays
are. Running statistics are updated in place, so they have to be contiguous NumPy arrays.
"""

import math
from typing import Any, NamedTuple, Optional, Tuple, Union

import numpy as np

from syncbn import _arguments, _dlpack, _library, _numpy_masked, _passes
from syncbn._library import ADDRESS_SIZE, BACKWARD_INPUTS, BACKWARD_OUTPUTS, EVALUATE_OPTIONS, FORWARD_OUTPUTS, TENSOR, VECTOR
from syncbn.core import Worker

_TYPES = {
    np.dtype(np.float32): _library.FLOAT32,
    np.dtype(np.float64): _library.FLOAT64,
    np.dtype(np.float16): _library.FLOAT16,
}

_MOST_THREADS = 1024


class Gradients(NamedTuple):
    """The types and shapes of x, weight, bias and residual; None for those that were absent."""

    dx: np.ndarray
    d_weight: Optional[np.ndarray]
    """This worker's own, not summed over workers."""
    d_bias: Optional[np.ndarray]
    d_residual: Optional[np.ndarray]


def _array(value: Any) -> np.ndarray:
    """An array of a type that the library has, over the same memory."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("a numpy.ma.MaskedArray: give its data, and which positions count as mask=")
    array = np.asarray(_dlpack.to_numpy(value))  # No subclass: its arithmetic may differ.
    _type_of(array)
    return array


def _type_of(array: np.ndarray) -> int:
    found = _TYPES.get(array.dtype)
    if found is None and array.dtype.name == "bfloat16":  # ml_dtypes', which need not be there.
        found = _library.BFLOAT16
    if found is None:
        raise TypeError(f"syncbn.numpy takes float16, bfloat16, float32 and float64, not {array.dtype}")
    return found


def _parameter(value: Any) -> Optional[np.ndarray]:
    return None if value is None else np.ascontiguousarray(_array(value))


# Tensors are [N, C, ...] from here on, whatever their order in memory: views of the caller's where that differs.


def _channels_second(array: np.ndarray, channels_last: bool) -> np.ndarray:
    return np.moveaxis(array, -1, 1) if channels_last and array.ndim > 1 else array


def _as_given(array: np.ndarray, channels_last: bool) -> np.ndarray:
    """The opposite of `_channels_second`."""
    return np.moveaxis(array, 1, -1) if channels_last else array


def _innermost(x: np.ndarray) -> bool:
    """Tells whether x is dense with its channels innermost, and not also with them in second place."""
    return x.ndim > 2 and not x.flags.c_contiguous and np.moveaxis(x, 1, -1).flags.c_contiguous


def _tensor(value: Any, channels_last: bool) -> np.ndarray:
    """[N, C, ...], dense; without a copy where it is."""
    array = _array(value)
    x = _channels_second(array, channels_last)
    if x.flags.c_contiguous or _innermost(x):
        return x
    return _channels_second(np.ascontiguousarray(array), channels_last)


def _tensor_like(value: Any, x: np.ndarray, channels_last: bool, name: str) -> np.ndarray:
    """As `_tensor`, of x's shape and order in memory."""
    array = _channels_second(_array(value), channels_last)
    if array.shape != x.shape:
        raise ValueError(f"{name} is {_shape(array, channels_last)}, and x is {_shape(x, channels_last)}")
    if np.moveaxis(array, 1, -1).flags.c_contiguous if _innermost(x) else array.flags.c_contiguous:
        return array
    copy = np.empty_like(x, dtype=array.dtype)
    copy[...] = array
    return copy


def _shape(array: np.ndarray, channels_last: bool) -> str:
    return f"{array.dtype}{list(_as_given(array, channels_last).shape)}"


def _address(array: Optional[np.ndarray]) -> int:
    return 0 if array is None or array.size == 0 else array.ctypes.data


_NO_VECTOR = VECTOR.pack(0, _library.FLOAT64)


def _vector(array: Optional[np.ndarray], channels: int, name: str) -> bytes:
    """A struct Vector."""
    if array is None:
        return _NO_VECTOR
    if array.shape != (channels,):
        raise ValueError(f"{name} has shape {array.shape}, and the layer {channels} channels")
    return VECTOR.pack(array.ctypes.data, _type_of(array))


def _running(value: Optional[np.ndarray], channels: int, name: str) -> bytes:
    if value is not None and not (isinstance(value, np.ndarray) and value.flags.c_contiguous and value.flags.writeable):
        raise ValueError(f"{name} is updated in place: it has to be a contiguous, writable NumPy array")
    return _vector(value, channels, name)


def _residual(value: Any, x: np.ndarray, channels_last: bool) -> Optional[np.ndarray]:
    if value is None:
        return None
    residual = _tensor_like(value, x, channels_last, "residual")
    if residual.dtype != x.dtype:
        raise ValueError(f"residual is {residual.dtype}, and x is {x.dtype}")
    return residual


def _describe(x: np.ndarray) -> bytes:
    """A struct Tensor."""
    if x.ndim < 2:
        raise ValueError(f"expected [batch, channels, ...] or [batch, ..., channels], got {list(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError("there are no channels")
    return TENSOR.pack(
        _address(x),
        x.shape[0],
        x.shape[1],
        math.prod(x.shape[2:]),
        _type_of(x),
        _library.CHANNELS_LAST if _innermost(x) else _library.CHANNELS_FIRST,
        _library.DEVICE_CPU,
        0,
    )


class Forward:
    """The values that a backward pass needs of its forward pass, x among them."""

    def __init__(
        self,
        passed: Union[_passes.ForwardPass, _numpy_masked.Pass],
        x: np.ndarray,
        packed: bytes,
        parameters: bytes,
        channels_last: bool,
        weight: Optional[np.ndarray],
        bias: Optional[np.ndarray],
        has_residual: bool,
        relu: bool,
        relu_mask: Optional[np.ndarray],
        num_threads: int,
    ) -> None:
        """packed: the struct Tensor of x; parameters: the structs Vector of weight and bias."""
        self._pass, self._x, self._channels_last = passed, x, channels_last
        self._packed, self._parameters = packed, parameters
        self._weight, self._bias, self._has_residual = weight, bias, has_residual
        self._relu, self._relu_mask, self._num_threads = relu, relu_mask, num_threads
        self._channels = x.shape[1]

    @property
    def count(self) -> int:
        """Values in each channel, over all workers."""
        return self._pass.count

    @property
    def mean(self) -> np.ndarray:
        """float64 [C], over all workers."""
        return self._pass.mean(self._channels)

    @property
    def var(self) -> np.ndarray:
        """float64 [C], the biased variance over all workers."""
        return self._pass.var(self._channels)

    @property
    def backward_required(self) -> bool:
        """True if some worker will call `backward`; if so, all that did not pass backward=False have to."""
        return self._pass.backward_required

    def backward(self, dy: Any) -> Gradients:
        """The gradients, from dy of y's shape.

        dx = weight * invstd * (dy - counts * (sum_dy/N + (x - mean) * invstd**2 * sum_dy_xmu/N)), the sums over all
        workers; dy gated by the ReLU if there is one; counts 1, or 0 where a mask is False. It may be called again, with
        another dy, if all workers do so.
        """
        x = self._x
        gradient = _tensor_like(dy, x, self._channels_last, "dy")
        if gradient.dtype != x.dtype:
            gradient = gradient.astype(x.dtype)
        if isinstance(self._pass, _numpy_masked.Pass):
            return self._masked_gradients(self._pass, gradient)
        dx = np.empty_like(x)
        d_residual = np.empty_like(x) if self._has_residual else None
        d_weight = None if self._weight is None else np.empty_like(self._weight)
        d_bias = None if self._bias is None else np.empty_like(self._bias)
        inputs = BACKWARD_INPUTS.pack(
            BACKWARD_INPUTS.size,
            _address(gradient),
            self._packed[ADDRESS_SIZE:],
            _address(x),
            self._parameters,
            self._relu,
            _address(self._relu_mask),
        )
        outputs = BACKWARD_OUTPUTS.pack(
            BACKWARD_OUTPUTS.size,
            _address(dx),
            _address(d_residual),
            _vector(d_weight, self._channels, "weight") + _vector(d_bias, self._channels, "bias"),
        )
        self._pass.backward(inputs, outputs, num_threads=self._num_threads)
        last = self._channels_last
        return Gradients(
            _as_given(dx, last), d_weight, d_bias, None if d_residual is None else _as_given(d_residual, last)
        )

    def _masked_gradients(self, passed: _numpy_masked.Pass, dy: np.ndarray) -> Gradients:
        x, last = self._x, self._channels_last
        dx, d_weight, d_bias, d_residual = passed.gradients(dy, self._weight)
        narrow = np.empty_like(x)
        narrow[...] = dx
        return Gradients(
            _as_given(narrow, last),
            None if self._weight is None else d_weight.astype(self._weight.dtype),
            None if self._bias is None else d_bias.astype(self._bias.dtype),
            _as_given(d_residual.astype(x.dtype), last) if self._has_residual else None,
        )


def forward(
    worker: Worker,
    layer: str,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    running_mean: Optional[np.ndarray] = None,
    running_var: Optional[np.ndarray] = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    eps_mode: str = "add",
    channels_last: bool = False,
    residual: Any = None,
    relu: bool = False,
    backward: bool = True,
    sequence: Optional[int] = None,
    num_threads: int = 1,
    mask: Any = None,
    biased_running_variance: bool = False,
    numeric: str = "refuse",
) -> Tuple[np.ndarray, Forward]:
    """y = weight * (x - mean) * invstd + bias over the batches of all workers; then, if asked for, + residual and ReLU.

    Args:
      layer: the same name at every worker.
      weight, bias: [C]; absent: 1 and 0.
      running_mean, running_var: [C], updated in place: (1-momentum)*running + momentum*new.
      momentum: the new value's weight.
      eps_mode: "add" or "clamp".
      residual: of x's shape and type.
      backward: whether `Forward.backward` will be called.
      sequence: which time this is; counted by the worker if None.
      mask: True, or 1, where a position counts: statistics are taken from those positions alone, and y is normalized
        everywhere. Of x's shape without the channel axis, or with it at size 1, or a shape that broadcasts to these.
      biased_running_variance: the running variance is M2/N, as in Keras and Flax, instead of M2/(N-1), as in torch.
      numeric: "refuse": NaN and infinity in a batch fail the round, NotFinite; "propagate" lets them flow. Those of
        gradients always flow.
    Returns:
      y of x's shape and type, and the state for the backward pass.
    Raises:
      TypeError: for arrays of other types, and for arguments of other types.
      ValueError: for shapes and numbers that do not fit; where all masks leave no position.
      syncbn.Error: what the round fails with.
    """
    if not isinstance(worker, Worker):
        raise TypeError(f"worker is {worker!r}; it has to be a syncbn.Worker")
    momentum, eps = _arguments.fraction("momentum", momentum), _arguments.not_negative("eps", eps)
    num_threads, relu = _arguments.integer("num_threads", num_threads, 1, _MOST_THREADS), _arguments.truth("relu", relu)
    biased_running_variance = _arguments.truth("biased_running_variance", biased_running_variance)
    if sequence is not None:
        sequence = _arguments.integer("sequence", sequence, 0, _arguments.MOST_SEQUENCE)
    values = _tensor(x, channels_last)
    packed = _describe(values)
    channels = values.shape[1]
    weights, biases, residuals = _parameter(weight), _parameter(bias), _residual(residual, values, channels_last)
    relu_mask = np.empty((values.size + 7) // 8, np.uint8) if relu and residuals is not None else None
    y = np.empty_like(values)
    parameters = _vector(weights, channels, "weight") + _vector(biases, channels, "bias")
    running = _running(running_mean, channels, "running_mean") + _running(running_var, channels, "running_var")
    written = FORWARD_OUTPUTS.pack(
        FORWARD_OUTPUTS.size,
        parameters + running,
        momentum,
        _address(residuals),
        relu,
        _address(relu_mask),
        _address(y),
        packed[ADDRESS_SIZE:],
        0,
        False,
    )
    counts = None if mask is None else _numpy_masked.positions(mask, values, channels_last)
    worker.declare_layer(
        layer,
        channels,
        eps=eps,
        eps_mode=eps_mode,
        momentum=momentum,
        numeric=numeric,
        biased_running_variance=biased_running_variance,
    )
    has_residual, clamp = residuals is not None, eps_mode == "clamp"
    if counts is not None:
        masked = _numpy_masked.Pass(
            worker, layer, values, counts, backward=backward, sequence=sequence, eps=eps, clamp=clamp
        )
        masked.normalize(y, weights, biases, residuals, relu)
        observed = _passes.observed_variance(masked.count, masked.var(channels), biased_running_variance)
        masked.update(running_mean, masked.mean(channels), momentum)
        if observed is not None:
            masked.update(running_var, observed, momentum)
        state = Forward(masked, values, packed, parameters, channels_last, weights, biases, has_residual, relu, None, num_threads)
        return _as_given(y, channels_last), state
    passed = _passes.ForwardPass(
        worker,
        layer,
        packed,
        role=_library.BACKWARD_REQUIRED if backward else _library.BACKWARD_NONE,
        num_threads=num_threads,
        sequence=sequence,
        eps=eps,
        clamp=clamp,
    )
    if passed.end(packed, written, []) < 2:
        passed.finish(packed, written)
    state = Forward(passed, values, packed, parameters, channels_last, weights, biases, has_residual, relu, relu_mask, num_threads)
    return _as_given(y, channels_last), state


def evaluate(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    channels_last: bool = False,
    residual: Any = None,
    relu: bool = False,
    num_threads: int = 1,
) -> np.ndarray:
    """y = weight * (x - running_mean) / sqrt(running_var + eps) + bias: no worker, no round."""
    eps = _arguments.not_negative("eps", eps)
    num_threads, relu = _arguments.integer("num_threads", num_threads, 1, _MOST_THREADS), _arguments.truth("relu", relu)
    values = _tensor(x, channels_last)
    packed = _describe(values)
    mean, var, weights, biases = (_parameter(v) for v in (running_mean, running_var, weight, bias))
    residuals = _residual(residual, values, channels_last)
    y = np.empty_like(values)
    named = (("running_mean", mean), ("running_var", var), ("weight", weights), ("bias", biases))
    vectors = b"".join(_vector(vector, values.shape[1], name) for name, vector in named)
    size, pack = EVALUATE_OPTIONS.size, EVALUATE_OPTIONS.pack
    _passes.evaluate(packed, pack(size, num_threads, 0, vectors, eps, _address(residuals), relu, 0), _address(y))
    return _as_given(y, channels_last)
