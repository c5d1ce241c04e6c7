"""Replicas of a model on threads of one process, which are one worker to the others.

A layer's replicas meet; the last to come merges their moments (Chan et al. 1979, in the order of replicas) and sends
one contribution for all. Their outputs come out of one autograd operation, so that a single backward pass, whichever
thread runs it, goes back through all replicas with one backward round.
"""

import contextlib
import threading
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from syncbn.core import Moments, Worker

_local = threading.local()
_torch: Any = torch  # Where the hints of torch's versions differ.


class Place(NamedTuple):
    """Which replica this thread runs."""

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
        self._ended = 0
        self._failure: Optional[BaseException] = None

    def run(self, functions: Sequence[Callable[[], Any]]) -> List[Any]:
        """Each on a thread, as the replica of its index. Raises what went wrong first."""
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
        return results

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


def _reduced(x: torch.Tensor) -> List[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _spread(vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[C], on x's device and in float64, to the shape in which it broadcasts over x."""
    return vector.to(x.device, torch.float64).view([1, -1] + [1] * (x.dim() - 2))


def merge(moments: List[Tuple[int, np.ndarray, np.ndarray]]) -> Tuple[int, np.ndarray, np.ndarray]:
    """(count, mean [C], M2 [C]) of all, merged in their order; one of count 0 changes nothing."""
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
    var, mean = torch.var_mean(x.detach().double(), _reduced(x), unbiased=False)
    return count, mean.cpu().numpy(), var.cpu().numpy() * count


class _Pass:
    """What forward leaves to backward."""

    def __init__(self, worker: Worker, layer: Any, moments: Moments, takes_part: bool, size: int) -> None:
        self.worker, self.name, self.size = worker, layer.layer, size
        self.sequence, self.count = moments.sequence, moments.count
        self.mean, var = torch.from_numpy(moments.mean), torch.from_numpy(moments.var)
        clamp = layer.eps_mode == "clamp"
        self.invstd = (var.clamp(min=layer.eps) if clamp else var + layer.eps).rsqrt()
        # Where epsilon clamps, invstd does not depend on x.
        self.depends = (~(var < layer.eps) if clamp else torch.ones_like(var, dtype=torch.bool)).double()
        counted = worker.rank not in moments.missing_ranks
        self.has_round = takes_part and moments.backward_required and moments.count > 0 and counted
        self.done = False


class _Normalize(torch.autograd.Function):
    """All replicas' outputs, in float64 arithmetic. Tensors: every x, then every weight, then every bias, an anchor."""

    @staticmethod
    def forward(ctx: Any, state: _Pass, *tensors: Any) -> Tuple[torch.Tensor, ...]:
        n = state.size
        ctx.state = state
        ctx.save_for_backward(*tensors[: 3 * n])
        outputs = []
        for x, weight, bias in zip(tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n]):
            y = (x.double() - _spread(state.mean, x)) * _spread(state.invstd, x)
            y = y if weight is None else y * _spread(weight, x)
            outputs.append((y if bias is None else y + _spread(bias, x)).to(x.dtype))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        state: _Pass = ctx.state
        if state.done and state.has_round:
            raise RuntimeError("replicas go back through one forward pass only once")
        state.done = True
        n, saved = state.size, ctx.saved_tensors
        xs, weights, biases = saved[:n], saved[n : 2 * n], saved[2 * n :]
        centred = [x.double() - _spread(state.mean, x) for x in xs]
        sum_dy = [dy.double().sum(_reduced(dy)) for dy in dys]
        sum_dy_xmu = [(dy.double() * xmu).sum(_reduced(dy)) for dy, xmu in zip(dys, centred)]
        # In the order of replicas.
        totals: List[Any] = [sum(part.cpu() for part in parts) for parts in (sum_dy, sum_dy_xmu)]
        if state.has_round:
            merged = state.worker.synchronize_backward(
                state.name, state.sequence, *(total.numpy() for total in totals)
            )
            totals = [torch.from_numpy(merged.sum_dy), torch.from_numpy(merged.sum_dy_xmu)]
        count = max(1, state.count)
        offset, slope = totals[0] / count, state.invstd.square() * state.depends * totals[1] / count
        needed = ctx.needs_input_grad[1:]
        gradients: List[Optional[torch.Tensor]] = [None] * (3 * n)
        for i, (x, weight, bias, dy, xmu) in enumerate(zip(xs, weights, biases, dys, centred)):
            if needed[i]:
                dx = (dy.double() - _spread(offset, x) - xmu * _spread(slope, x)) * _spread(state.invstd, x)
                gradients[i] = (dx if weight is None else dx * _spread(weight, x)).to(x.dtype)
            if needed[n + i]:
                gradients[n + i] = (sum_dy_xmu[i] * state.invstd.to(x.device)).to(weight.dtype)
            if needed[2 * n + i]:
                gradients[2 * n + i] = sum_dy[i].to(bias.dtype)
        return (None, *gradients, None)


def _update(layer: Any, moments: Moments) -> None:
    """The running statistics of replica 0, which are the model's own."""
    if not layer.track_running_stats or layer.running_mean is None or moments.count == 0:
        return
    rate, unbiased = layer._count_batch(), moments.var * (moments.count / (moments.count - 1))
    with torch.no_grad():
        for running, new in ((layer.running_mean, moments.mean), (layer.running_var, unbiased)):
            running.copy_(running.double() * (1 - rate) + torch.from_numpy(new).to(running.device) * rate)


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
        _update(first, moments)
        state = _Pass(worker, first, moments, role is not False, group.size)
        parameters = [layer.weight for layer, _ in places] + [layer.bias for layer, _ in places]
        # Something differentiable, where only another worker calls for this one's part in the backward round.
        anchor = torch.empty(0, requires_grad=True) if role is None and moments.backward_required else None
        return list(_Normalize.apply(state, *xs, *parameters, anchor))

    result: torch.Tensor = group.meet(place.replica, layer.layer, (layer, x), all_replicas)
    return result
