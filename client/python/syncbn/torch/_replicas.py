"""Replicas of a model on threads of one process, which are one worker to the others.

A layer's replicas meet; the last to come merges their moments (Chan et al. 1979, in the order of replicas) and sends
one contribution for all. Their outputs come out of one autograd operation, so that a single backward pass, whichever
thread runs it, goes back through all replicas with one backward round.
"""

import contextlib
import functools
import threading
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from syncbn import _names
from syncbn.core import Moments, Worker
from syncbn.torch import _running, _second, _tensors

_local = threading.local()
_torch: Any = torch  # Where the hints of torch's versions differ.


class Place(NamedTuple):
    """The replica that a thread runs."""

    group: "Group"
    replica: int


def current() -> Optional[Place]:
    return getattr(_local, "place", None)


class _Meeting:
    def __init__(self) -> None:
        self.arguments: Dict[int, Any] = {}
        self.results: Optional[List[Any]] = None


def _autocast() -> List[ContextManager[Any]]:
    """The calling thread's autocast, to be entered on another thread."""
    found: List[ContextManager[Any]] = []
    if _torch.is_autocast_enabled():
        found.append(_torch.autocast("cuda", dtype=_torch.get_autocast_gpu_dtype()))
    try:
        on_cpu, dtype = _torch.is_autocast_enabled("cpu"), _torch.get_autocast_dtype("cpu")
    except TypeError:  # Before torch 2.4.
        on_cpu, dtype = _torch.is_autocast_cpu_enabled(), _torch.get_autocast_cpu_dtype()
    if on_cpu:
        found.append(_torch.autocast("cpu", dtype=dtype))
    return found


class Group:
    """The replicas of one forward pass."""

    def __init__(self, size: int, default_worker: Optional[Worker] = None) -> None:
        self.size = size
        self.default_worker = default_worker
        self._worker: Optional[Worker] = None  # Whose round is under way.
        self._condition = threading.Condition()
        self._calls: Dict[Tuple[int, str], int] = {}
        self._meetings: Dict[Tuple[str, int], _Meeting] = {}
        self._afterwards: List[Callable[[], None]] = []
        self._ended = 0
        self._failure: Optional[BaseException] = None

    def run(self, functions: Sequence[Callable[[], Any]]) -> List[Any]:
        """Each on a thread, as the replica of its index; then what they leave for `afterwards`, here. Raises what went wrong
        first.
        """
        results: List[Any] = [None] * self.size
        gradients, autocast = torch.is_grad_enabled(), [_autocast() for _ in functions]

        def replica(index: int) -> None:
            _local.place = Place(self, index)
            try:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(torch.set_grad_enabled(gradients))
                    for context in autocast[index]:
                        stack.enter_context(context)
                    results[index] = functions[index]()
                with self._condition:
                    self._ended += 1
                    self._check_progress()
            except BaseException as error:
                self._fail(error)

        threads = [
            threading.Thread(target=replica, args=(index,), name=f"syncbn-replica-{index}", daemon=True)
            for index in range(self.size)
        ]
        try:
            for thread in threads:
                thread.start()
            self._join(threads)
        except BaseException as error:  # Ctrl-C.
            self._fail(error)
            self._join([thread for thread in threads if thread.ident], interrupt=True)
            raise
        if self._failure is not None:
            raise self._failure
        for function in self._afterwards:
            function()
        return results

    def afterwards(self, function: Callable[[], None]) -> None:
        """Leaves something to be done once all replicas have ended."""
        with self._condition:
            self._afterwards.append(function)

    def _join(self, threads: List[threading.Thread], interrupt: bool = False) -> None:
        for thread in threads:
            while thread.is_alive():
                if interrupt and self._worker is not None and not self._worker.closed:
                    self._worker.interrupt()
                thread.join(0.05)

    def _fail(self, error: BaseException) -> None:
        with self._condition:
            self._failure = self._failure or error
            self._condition.notify_all()

    def _check_progress(self) -> None:
        """Fails if no replica can go on, because they differ in what they run. Called with the lock held."""
        incomplete = [(key, m.arguments) for key, m in self._meetings.items() if len(m.arguments) < self.size]
        waiting = {index: key for key, arguments in incomplete for index in arguments}
        if waiting and len(waiting) + self._ended == self.size:
            places = ", ".join(f"replica {index} for {key[0]!r}" for index, key in sorted(waiting.items()))
            text = f"the replicas do not run the same layers: {self._ended} have ended, and there wait {places}"
            self._fail(RuntimeError(text))

    def meet(self, index: int, layer: str, argument: Any, function: Callable[[List[Any]], List[Any]]) -> Any:
        """One replica's part of `function(arguments of all)`, which the last replica to come runs for all."""
        with self._condition:
            calls = self._calls[index, layer] = self._calls.get((index, layer), 0) + 1
            key = (layer, calls)
            meeting = self._meetings.setdefault(key, _Meeting())
            meeting.arguments[index] = argument
            if len(meeting.arguments) < self.size:
                self._check_progress()
                while meeting.results is None and self._failure is None:
                    self._condition.wait()
                if meeting.results is None:
                    raise RuntimeError("another replica failed") from self._failure
                return meeting.results[index]
        results = function([meeting.arguments[i] for i in range(self.size)])  # Its error fails the group, in `run`.
        with self._condition:
            meeting.results = results
            del self._meetings[key]
            self._condition.notify_all()
        return results[index]

    def round(self, worker: Worker, start: Callable[[], Any]) -> Any:
        """The outcome of a round for all replicas."""
        self._worker = worker
        try:
            return start().result()
        finally:
            self._worker = None


def merge(moments: List[Tuple[int, np.ndarray, np.ndarray]]) -> Tuple[int, np.ndarray, np.ndarray]:
    """(count, mean [C], M2 [C]) of all, merged in their order as kernels/moments.h does; count 0 changes nothing."""
    count, mean, m2 = moments[0]
    for other_count, other_mean, other_m2 in moments[1:]:
        if other_count == 0:
            continue
        total = count + other_count
        delta = other_mean - mean
        mean = mean + delta * (other_count / total)
        m2 = m2 + other_m2 + delta * delta * (count * (other_count / total))
        count = total
    return count, mean, m2


def _moments(x: torch.Tensor) -> Tuple[int, np.ndarray, np.ndarray]:
    channels = x.size(1)
    count = x.numel() // channels
    if count == 0:
        return 0, np.zeros(channels), np.zeros(channels)
    var, mean = torch.var_mean(x.detach().double(), _second.others(x), unbiased=False)
    return count, mean.cpu().numpy(), var.cpu().numpy() * count


class _Pass:
    """State of a forward pass for its backward passes."""

    def __init__(self, worker: Worker, layer: Any, moments: Moments, takes_part: bool, size: int) -> None:
        self.worker, self.name, self.size = worker, layer.layer, size
        self.sequence, self.count = moments.sequence, moments.count
        self.statistics = _second.Statistics.make(
            moments.count, moments.mean, moments.var, layer.eps, layer.eps_mode == "clamp"
        )
        counted = worker.rank not in moments.missing_ranks
        self.has_round = takes_part and moments.backward_required and moments.count > 0 and counted
        self.backward_passes = 0
        # Each replica's x, weight and bias, and which gradients are needed, in this order.
        self.forms: List[Optional[_tensors.Form]] = []
        self.needed: Sequence[bool] = ()

    def given_back(self, xs: Sequence[torch.Tensor], name: str) -> List[torch.Tensor]:
        """Tensors of the forms of x, as autograd hands them to a backward pass."""
        forms: List[Any] = self.forms[: self.size]
        return [_tensors.given_back(name, x, form, False) for x, form in zip(xs, forms)]

    def weights(self, weights: Sequence[Optional[torch.Tensor]]) -> List[Optional[torch.Tensor]]:
        forms = self.forms[self.size : 2 * self.size]
        return [_tensors.vector_given_back("the weight", weight, form) for weight, form in zip(weights, forms)]

    def merged(self, sum_dy: torch.Tensor, sum_dy_xmu: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The sums over all workers; later passes travel as those of `Worker::StartBackwardAgain`."""
        self.backward_passes += 1
        if not self.has_round:
            return sum_dy, sum_dy_xmu
        if self.backward_passes == 1:
            sums = self.worker.synchronize_backward(self.name, self.sequence, sum_dy.numpy(), sum_dy_xmu.numpy())
            return torch.from_numpy(sums.sum_dy), torch.from_numpy(sums.sum_dy_xmu)
        both = self.worker.all_reduce(_names.derived(self.name, "/retained"), torch.cat([sum_dy, sum_dy_xmu]).numpy())
        first, second = torch.from_numpy(both).chunk(2)
        return first, second


_Tensors = Tuple[Optional[torch.Tensor], ...]


def _backward(state: _Pass, *tensors: Any) -> _Tensors:
    """The gradients of every x, weight and bias, of every dy, x and weight."""
    n, statistics = state.size, state.statistics
    dys = state.given_back(tensors[:n], "the output's gradient")
    xs = state.given_back(tensors[n : 2 * n], "the input")
    weights = state.weights(tensors[2 * n :])
    centred = [x.double() - _second.spread(statistics.mean, x) for x in xs]
    sum_dy = [dy.double().sum(_second.others(dy)) for dy in dys]
    sum_dy_xmu = [(dy.double() * xmu).sum(_second.others(dy)) for dy, xmu in zip(dys, centred)]
    # In the order of replicas.
    totals: List[Any] = [sum(part.cpu() for part in parts) for parts in (sum_dy, sum_dy_xmu)]
    totals = list(state.merged(*totals))
    count = max(1, state.count)
    offset, slope = totals[0] / count, statistics.invstd.square() * statistics.depends * totals[1] / count
    needed, forms = state.needed, state.forms
    gradients: List[Optional[torch.Tensor]] = [None] * (3 * n)
    for i, (weight, dy, xmu) in enumerate(zip(weights, dys, centred)):
        if needed[i]:
            centred_dy = dy.double() - _second.spread(offset, dy) - xmu * _second.spread(slope, dy)
            dx = centred_dy * _second.spread(statistics.invstd, dy)
            gradients[i] = _tensors.rounded(dx if weight is None else dx * _second.spread(weight, dy), dy.dtype)
        of_weight, of_bias = forms[n + i], forms[2 * n + i]
        if needed[n + i] and of_weight is not None:
            d_weight = sum_dy_xmu[i] * statistics.invstd.to(dy.device)
            gradients[n + i] = _tensors.rounded(d_weight, of_weight.dtype).reshape(of_weight.shape)
        if needed[2 * n + i] and of_bias is not None:
            gradients[2 * n + i] = _tensors.rounded(sum_dy[i], of_bias.dtype).reshape(of_bias.shape)
    return tuple(gradients)


def _second_backward(state: _Pass, needed: Sequence[bool], *tensors: Any) -> _Tensors:
    """The gradients of every dy, x and weight, of these and those of the gradients of every x, weight and bias."""
    n = state.size
    dys, xs = state.given_back(tensors[:n], "the output's gradient"), state.given_back(tensors[n : 2 * n], "the input")
    weights = state.weights(tensors[2 * n : 3 * n])
    cotangents = [
        None if value is None or form is None else _tensors.given_back("a second gradient", value, form, False)
        for value, form in zip(tensors[3 * n :], state.forms)
    ]
    parts = [
        _second.Part(xs[i], dys[i], weights[i], cotangents[i], cotangents[n + i], cotangents[2 * n + i])
        for i in range(n)
    ]
    sums: Any = sum(_second.local_sums(part, state.statistics) for part in parts)
    if state.has_round:
        sums = _second.merged(state.worker, state.name, state.sequence, sums)
    found = [
        _second.gradients(part, state.statistics, sums, (needed[i], needed[n + i], needed[2 * n + i]))
        for i, part in enumerate(parts)
    ]
    return tuple(gradients[kind] for kind in range(3) for gradients in found)


class _Gradients(torch.autograd.Function):
    """A backward pass as an operation that has a derivative. Tensors: every dy, then every x, then every weight."""

    @staticmethod
    def forward(ctx: Any, state: _Pass, *tensors: Any) -> _Tensors:
        ctx.set_materialize_grads(False)
        ctx.state = state
        ctx.save_for_backward(*tensors)
        return _backward(state, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> _Tensors:
        function = functools.partial(_second_backward, ctx.state, ctx.needs_input_grad[1:])
        return (None, *_second.last(function, *ctx.saved_tensors, *cotangents))


class _Normalize(torch.autograd.Function):
    """All replicas' outputs, in float64 arithmetic. Tensors: every x, then every weight, then every bias, an anchor."""

    @staticmethod
    def forward(ctx: Any, state: _Pass, *tensors: Any) -> Tuple[torch.Tensor, ...]:
        n = state.size
        state.forms = [_tensors.form(tensor) for tensor in tensors[: 3 * n]]
        state.needed = ctx.needs_input_grad[1 : 1 + 3 * n]
        ctx.state = state
        ctx.save_for_backward(*tensors[: 2 * n])
        outputs = []
        for x, weight, bias in zip(tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n]):
            y = (x.double() - _second.spread(state.statistics.mean, x)) * _second.spread(state.statistics.invstd, x)
            y = y if weight is None else y * _second.spread(weight, x)
            outputs.append((y if bias is None else y + _second.spread(bias, x)).to(x.dtype))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> _Tensors:
        tensors = (*dys, *ctx.saved_tensors)
        if torch.is_grad_enabled():  # create_graph.
            return (None, *_Gradients.apply(ctx.state, *tensors), None)
        return (None, *_backward(ctx.state, *tensors), None)


def normalize(layer: Any, x: torch.Tensor, place: Place, worker: Worker) -> torch.Tensor:
    """A SyncBatchNorm's forward in training, for the replica that this thread runs."""
    group = place.group

    def all_replicas(places: List[Tuple[Any, torch.Tensor]]) -> List[torch.Tensor]:
        first = places[0][0]
        xs = [x for _, x in places]
        differentiable = torch.is_grad_enabled()
        needed = differentiable and any(x.requires_grad for x in xs)
        # True: a backward round follows. None: if another worker wants one. False: none for this worker.
        role = needed or (None if differentiable else False)
        count, mean, m2 = merge([_moments(x) for x in xs])
        vectors = (mean, m2) if count else (None, None)
        moments: Moments = group.round(
            worker, lambda: worker.start_synchronize(first.layer, count, *vectors, backward=role)
        )
        if moments.count == 1:
            raise ValueError("Expected more than 1 value per channel when training, and no other worker had one")
        _running.update(first, moments.count, moments.mean, moments.var)  # Those of replica 0 are the model's own.
        state = _Pass(worker, first, moments, role is not False, group.size)
        parameters = [layer.weight for layer, _ in places] + [layer.bias for layer, _ in places]
        # Something differentiable, where only another worker calls for this one's part in the backward round.
        anchor = torch.empty(0, requires_grad=True) if role is None and moments.backward_required else None
        return list(_Normalize.apply(state, *xs, *parameters, anchor))

    result: torch.Tensor = group.meet(place.replica, layer.layer, (layer, x), all_replicas)
    return result
