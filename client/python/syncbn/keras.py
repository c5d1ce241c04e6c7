"""Keras's BatchNormalization over all workers, on its torch, jax and TensorFlow backends.

    layer = syncbn.keras.BatchNormalization(name="stem_bn")
"""

from typing import Any, Dict, Optional, Tuple

import keras

from syncbn.core import Worker


@keras.saving.register_keras_serializable(package="syncbn")
class BatchNormalization(keras.layers.BatchNormalization):
    """keras.layers.BatchNormalization whose statistics in training are those of the batches of all workers.

    Weights, and arguments that are not named here, are Keras's: the weights of one fit the other. In training, every
    worker calls and differentiates the same layers, each as often as the others; a batch may be empty.

    Args:
      worker: default `syncbn.default_worker()`, at the first call in training. It is not part of the configuration.
      layer: the same name at every worker. Default: `name`, which Keras numbers by the order in which layers are made.
      synchronized: refused if True, since it is for the strategies of TensorFlow.

    Raises:
      ValueError: for `synchronized=True`; in training, for a mask where `axis` is not the last one, since a mask of
        Keras has all axes but the last.
      syncbn.Error: what a round fails with; see the function `moments` of syncbn.torch, syncbn.jax, syncbn.tensorflow.
    """

    def __init__(
        self, axis: int = -1, *, worker: Optional[Worker] = None, layer: Optional[str] = None, **arguments: Any
    ) -> None:
        if arguments.get("synchronized"):
            raise ValueError("synchronized is True; it is for TensorFlow's strategies, and has to be False here")
        if worker is not None and not isinstance(worker, Worker):
            raise TypeError(f"worker is {worker!r}; it has to be a syncbn.Worker")
        super().__init__(axis=axis, **arguments)
        self.worker, self.layer = worker, layer
        if keras.backend.backend() == "tensorflow":
            self.supports_jit = False  # XLA has no calls of the host.

    def get_config(self) -> Dict[str, Any]:
        """Keras's, with the name of the layer."""
        return {**super().get_config(), "layer": self.layer}

    def _moments(self, inputs: Any, mask: Any) -> Tuple[Any, Any]:
        """Mean and biased variance over all workers, [C]: what Keras's own `call` normalizes with and keeps."""
        axes = tuple(self._reduction_axes)
        if mask is not None and axes != tuple(range(len(inputs.shape) - 1)):
            raise ValueError(f"axis is {self.axis}; it has to be the last one beside a mask, which has all axes but that")
        options: Dict[str, Any] = {"layer": self.layer or self.name, "worker": self.worker}
        backend = keras.backend.backend()
        if backend == "torch":
            return _torch_moments(inputs, axes, mask, options)
        counts = None if mask is None else keras.ops.expand_dims(keras.ops.cast(mask, "bool"), -1)
        if backend == "jax":
            from syncbn import jax

            return jax.moments(inputs, axes, mask=counts, **options)
        if backend == "tensorflow":
            from syncbn import tensorflow

            return tensorflow.moments(inputs, axes, mask=counts, **options)
        raise ValueError(f"keras runs on {backend}; syncbn.keras is for torch, jax and tensorflow")


def _torch_moments(inputs: Any, axes: Tuple[int, ...], mask: Any, options: Dict[str, Any]) -> Tuple[Any, Any]:
    from syncbn import torch

    if inputs.is_meta:  # Keras looks for the output's shape: no worker takes part in that.
        channels = next(size for axis, size in enumerate(inputs.shape) if axis not in axes)
        return inputs.new_zeros(channels), inputs.new_ones(channels)
    if mask is None:
        return torch.moments(inputs, axes, **options)
    return torch.moments(inputs[mask.bool()], 0, **options)
