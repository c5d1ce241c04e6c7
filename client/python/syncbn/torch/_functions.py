"""The differentiable operations under the modules.

    Normalize          y of x, weight, bias and, with an activation, z            a forward round
    its backward       dx, d_weight, d_bias and d_z of dy, x and weight          a backward round
    _Gradients         the same as an operation, where autograd records it       that round
    its backward       the gradients of dy, x and weight                         a round of sums, in _second.py

Where autograd records the last of them too, _second.Last refuses to be differentiated.
"""

import functools
from typing import Any, List, Optional, Tuple

import torch

from syncbn import _passes
from syncbn._library import ADDRESS_SIZE, BACKWARD_INPUTS, BACKWARD_OUTPUTS, FORWARD_OUTPUTS
from syncbn.torch import _graphs, _running, _second, _supported, _tensors

_NO_BATCHES = (0, False)  # The number of batches, as _count says of it.

_Gradients3 = Tuple[Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]


# Outputs of the forward half of a pass: y; four structs Vector: weight, bias, and the running statistics to be updated;
# these four if `readable` has made them, to be kept for as long, else nothing; and the step that counts the batch and has
# the running statistics, if it is tracked.
Outputs = Tuple[torch.Tensor, bytes, Tuple[Optional[torch.Tensor], ...], Any]


class Pass:
    """A forward pass of the library over tensors of torch, for its operation and for the backward passes through it.

    It keeps no output, and of the tensors that it reads only their forms: the others are autograd's to save.
    """

    __slots__ = ("forward_pass", "shape", "packed", "channels_last", "types", "_forms", "open_gate", "needed")

    def __init__(
        self,
        forward_pass: _passes.ForwardPass,
        shape: torch.Size,
        packed: bytes,
        channels_last: bool,
        types: Optional[_tensors.Types],
        forms: Tuple[Optional[_tensors.Form], ...],
        open_gate: Optional[torch.Tensor],
    ) -> None:
        """The round of `forward_pass` has begun, or has ended.

        Args:
          shape, packed: of x, and the struct Tensor that describes it.
          types: those of the tensors, if they were described at sight; else `forms` are those of weight and bias.
          open_gate: with a ReLU: memory for a bit for each element of y, in memory order; 1: it is positive.
        """
        self.forward_pass = forward_pass
        self.shape, self.packed, self.channels_last = shape, packed, channels_last
        self.types, self._forms = types, forms
        self.open_gate = open_gate
        self.needed: Tuple[bool, ...] = ()  # The gradients of x, weight, bias and z; known with the operation.

    @property
    def x(self) -> _tensors.Form:
        """The form of x."""
        return _tensors.tensor_form(self.shape, self.packed)

    @property
    def vectors(self) -> Tuple[Optional[_tensors.Form], ...]:
        """The forms of weight and bias."""
        return self._forms if self.types is None else _tensors.vector_forms(self.types)

    def wait(self) -> Optional[int]:
        """Values in each channel, over all workers. None: not known yet, but at least 2, since it is stream-ordered, and
        smaller batches are host-driven. Refuses a single one.
        """
        forward_pass = self.forward_pass
        if forward_pass.stream_ordered:
            return None
        forward_pass.wait()
        return self._more_than_one(forward_pass.count)

    def _more_than_one(self, count: int) -> int:
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(self.shape)} "
                "and nothing from the other workers"
            )
        return count

    def _count(self, step: Any, y: torch.Tensor) -> Tuple[float, Tuple[int, bool]]:
        """Counts the batch. The new values' weight in the running statistics, and the members of the library's struct for
        the count and for whether the weight follows from it.

        The library needs the count of a pass that nobody waits for, to take the batch back if its round fails. And it
        finds a weight there for which the host would have to wait until the GPU has counted.
        """
        momentum: Optional[float] = step._count_batch()
        if momentum is not None and not self.forward_pass.stream_ordered:
            return momentum, _NO_BATCHES
        batches = step._tracked_batches()
        address = _tensors.count_address(batches, y)
        if momentum is not None:
            return momentum, (address, False)
        return (0.0, (address, True)) if address else (_running.reciprocal(batches), _NO_BATCHES)

    def finish(self, outputs: Outputs, z: Optional[torch.Tensor]) -> None:
        """Waits for the round and writes the outputs.

        The wait comes as late as it can: nothing after it could be done before. So the batch is counted before it, and no
        longer counted if nothing comes of it.
        """
        y, vectors, own, step = outputs
        momentum, (address, cumulative) = (0.0, _NO_BATCHES) if step is None else self._count(step, y)
        gate, z_at = self.open_gate, 0
        if z is not None:
            z = _tensors.readable_as(z, self.channels_last)  # A copy lives until the library is through with it.
            z_at = _tensors.address(z, self.channels_last) or 0
        gate_at = 0 if gate is None else gate.data_ptr()
        written = FORWARD_OUTPUTS.pack(
            FORWARD_OUTPUTS.size,
            vectors,
            momentum,
            z_at,
            gate is not None,
            gate_at,
            y.data_ptr(),
            self.packed[ADDRESS_SIZE:],
            address,
            cumulative,
        )
        taken: List[int] = []
        try:
            self._end(written, taken)
        finally:
            if not taken and step is not None:
                step._uncount_batch()
        if not taken:  # No worker has a value.
            size, _, _, *rest, _, _ = FORWARD_OUTPUTS.unpack(written)
            unchanged = FORWARD_OUTPUTS.pack(size, without_running(vectors), 0.0, *rest, *_NO_BATCHES)
            self.forward_pass.finish(self.packed, unchanged)
        elif own and step is not None:
            _tensors.write_back(step.running_mean, own[2])
            _tensors.write_back(step.running_var, own[3])

    def _end(self, written: bytes, taken: List[int]) -> None:
        """Waits for the round and writes the outputs, unless no worker has a value. `taken` is no longer empty once they are
        written, or the work is enqueued.
        """
        forward_pass = self.forward_pass
        if not forward_pass.stream_ordered:
            self._more_than_one(forward_pass.end(self.packed, written, taken))
            return
        self.wait()
        forward_pass.finish(self.packed, written)
        taken.append(2)  # It has two values at least.


def without_running(vectors: bytes) -> bytes:
    """Four structs Vector, less the running statistics."""
    return vectors[: len(vectors) // 2] + _tensors.NO_VECTOR * 2


def _buffer(form: Optional[_tensors.Form], needed: bool) -> Optional[torch.Tensor]:
    """Memory for the gradient of a parameter of that form, if it has one."""
    return torch.empty(form.shape, dtype=form.dtype, device=form.device) if form is not None and needed else None


def _looked_at(
    saved: Pass, dy: torch.Tensor, x: torch.Tensor, weight: Optional[torch.Tensor], gate: Optional[torch.Tensor]
) -> _tensors.Backward:
    """The arguments of a backward pass over tensors of any kind."""
    form = saved.x
    x = _tensors.given_back("the input", x, form, saved.channels_last)
    dy = _tensors.given_back("the output's gradient", dy, form, saved.channels_last)
    weight_form, bias_form = saved.vectors
    if weight is not None and weight_form is not None:
        weight_form.check("the weight", weight)
    weight, vector = _tensors.readable_vector(weight)
    needs_x, needs_weight, needs_bias, needs_z = saved.needed[:4]
    fused_dz = gate is not None and needs_z
    dx = torch.empty_like(x) if needs_x or fused_dz else None  # The library computes dz beside dx alone.
    d_weight, d_bias = _buffer(weight_form, needs_weight), _buffer(bias_form, needs_bias)
    dz = None if not needs_z else torch.empty_like(x) if fused_dz else dy
    inputs = BACKWARD_INPUTS.pack(
        BACKWARD_INPUTS.size,
        dy.data_ptr(),
        saved.packed[ADDRESS_SIZE:],  # dy is given back in the form of x.
        x.data_ptr(),
        vector + _tensors.NO_VECTOR,  # The bias: a gate is given instead.
        gate is not None,
        0 if gate is None else gate.data_ptr(),
    )
    outputs = BACKWARD_OUTPUTS.pack(
        BACKWARD_OUTPUTS.size,
        0 if dx is None else dx.data_ptr(),
        dz.data_ptr() if fused_dz and dz is not None else 0,
        _tensors.packed_vector(d_weight) + _tensors.packed_vector(d_bias),
    )
    return (dx if needs_x else None, d_weight, d_bias, dz), inputs, outputs, (dy, x, weight, dx)


def _backward(
    saved: Pass, dy: torch.Tensor, x: torch.Tensor, weight: Optional[torch.Tensor], gated: bool = True
) -> _tensors.Gradients:
    """dx, d_weight, d_bias and d_z, those that are needed, by one backward pass. gated: a ReLU, if any, is part of it."""
    _supported.check_modes()
    gate, found = saved.open_gate if gated else None, None
    if saved.types is not None and not torch.is_grad_enabled():
        found = _tensors.backward_sight(dy, x, weight, saved.shape, saved.packed, saved.types, saved.needed, gate)
    gradients, inputs, outputs, kept = _looked_at(saved, dy, x, weight, gate) if found is None else found
    threads, stream = _tensors.execution(x)
    saved.forward_pass.backward(inputs, outputs, num_threads=threads, stream=stream)
    del kept
    return gradients


def _opened(saved: Pass, dy: torch.Tensor) -> torch.Tensor:
    """dy where the ReLU let values through, 0 elsewhere: an operation that autograd records."""
    bits = saved.open_gate
    if bits is None:
        return dy
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    one = torch.ones((), dtype=torch.uint8, device=bits.device)
    flags = torch.bitwise_and(torch.bitwise_right_shift(bits.unsqueeze(1), places), one).reshape(-1)[: dy.numel()]
    shape = saved.shape
    if saved.channels_last:
        flags = flags.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return dy.masked_fill(flags.reshape(shape) == 0, 0.0)


class Normalize(torch.autograd.Function):
    """y = weight * (x - mean) * invstd + bias, mean and invstd those of a forward pass over all workers; with `relu`,
    max(0, y + z).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        z: Optional[torch.Tensor],
        anchor: Optional[torch.Tensor],
        made: Pass,
        outputs: Outputs,
    ) -> torch.Tensor:
        """x is as the pass describes it, dense. `anchor` makes y differentiable where nothing else does."""
        # The bias is not saved: no gradient needs its values, and a program may change it before backward.
        ctx.save_for_backward(x, weight)
        ctx.saved, made.needed = made, ctx.needs_input_grad
        made.finish(outputs, z)
        return outputs[0]

    @staticmethod
    @_graphs.outside_of_graphs
    def backward(ctx: Any, dy: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        x, weight = ctx.saved_tensors
        saved: Pass = ctx.saved
        if torch.is_grad_enabled():  # create_graph.
            dz = _opened(saved, dy)
            gradients = (*_Gradients.apply(dz, x, weight, saved), dz if saved.needed[3] else None)
        else:
            gradients = _backward(saved, dy, x, weight)
        return (*gradients, None, None, None)


class _Gradients(torch.autograd.Function):
    """A backward pass as an operation that has a derivative."""

    @staticmethod
    def forward(
        ctx: Any, dy: torch.Tensor, x: torch.Tensor, weight: Optional[torch.Tensor], saved: Pass
    ) -> _Gradients3:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight)
        ctx.saved = saved
        return _backward(saved, dy, x, weight, gated=False)[:3]

    @staticmethod
    @_graphs.outside_of_graphs
    def backward(ctx: Any, *cotangents: Optional[torch.Tensor]) -> Tuple[Optional[torch.Tensor], ...]:
        function = functools.partial(_second_backward, ctx.saved, tuple(ctx.needs_input_grad[:3]))
        return (*_second.last(function, *ctx.saved_tensors, *cotangents), None)


def _second_backward(
    saved: Pass,
    needed: Tuple[bool, bool, bool],
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: Optional[torch.Tensor],
    *cotangents: Optional[torch.Tensor],
) -> _Gradients3:
    """The gradients of dy, x and weight, from those of dx, d_weight and d_bias."""
    forward_pass = saved.forward_pass
    given: List[Any] = [
        None
        if cotangent is None or form is None
        else _tensors.given_back(f"the gradient of {name}", cotangent, form, last)
        for cotangent, name, form, last in zip(
            cotangents,
            ("dx", "d_weight", "d_bias"),
            (saved.x, *saved.vectors),
            (saved.channels_last, False, False),
        )
    ]
    part = _second.Part(
        x=_tensors.given_back("the input", x, saved.x, saved.channels_last),
        dy=_tensors.given_back("the output's gradient", dy, saved.x, saved.channels_last),
        weight=_tensors.vector_given_back("the weight", weight, saved.vectors[0]),
        of_dx=given[0],
        of_d_weight=given[1],
        of_d_bias=given[2],
    )
    statistics = _second.Statistics.of(forward_pass, x.size(1))
    local = _second.local_sums(part, statistics)
    sums = local
    if forward_pass.has_backward_round:
        sums = _second.merged(forward_pass.worker, forward_pass.layer, forward_pass.sequence, local)
    return _second.gradients(part, statistics, sums, needed)
