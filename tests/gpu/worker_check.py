#!/usr/bin/env python3
"""Checks and times the GPU worker on this machine's GPU, through the Python package (SYNCBN_LIBRARY names the library).

    worker_check.py check                errors, types and layouts, a mixed group, training; exits with 1 on a failure
    worker_check.py bench RESULTS.json   a layer's step with 2 and 4 processes against torch's SyncBatchNorm over gloo

--device cpu rehearses on the CPU what does not need a GPU.
"""

import argparse
import datetime
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from queue import Empty

import torch
import torch.multiprocessing

import syncbn
import syncbn.torch

SEED = 20240607
# The device of the tensors: "cuda", or "cpu" in a rehearsal.
DEVICE = "cuda"
# Decorated checks of what only a GPU has.
GPU_ONLY = set()


def gpu_only(function):
    GPU_ONLY.add(function)
    return function


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_name():
    return torch.cuda.get_device_name(0) if DEVICE == "cuda" else "none, on the CPU"


def split(size, parts):
    """Bounds of an uneven split: the first part is the largest."""
    weights = [parts - p + 1 for p in range(parts)]
    bounds, total = [0], sum(weights)
    for p in range(parts):
        bounds.append(bounds[-1] + (size * weights[p] // total if p < parts - 1 else size - bounds[-1]))
    return bounds


def make_model(norm):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1, bias=False), norm(8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False), norm(16), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(16 * 16, 10),
    )


def make_data():
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(60, 1, 8, 8, generator=generator, dtype=torch.float64) * 3 + 1
    return images, torch.randint(0, 10, (60,), generator=generator)


def train(model, images, labels, total, reduce, steps=20):
    """Full-batch gradient descent; the loss is the mean over `total` images, gradients are summed by `reduce`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels, reduction="sum") / total
        loss.backward()
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = reduce(f"grad{index}", parameter.grad)
        optimizer.step()
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def train_worker(rank, target, devices, queue):
    """One member of the group that trains together; its device is its own."""
    try:
        device = devices[rank]
        images, labels = make_data()
        bounds = split(len(images), len(devices))
        mine = slice(bounds[rank], bounds[rank + 1])
        torch.manual_seed(SEED)
        with syncbn.Worker(target=target, group="train", rank=rank, world_size=len(devices), timeout=60.0) as worker:
            model = make_model(torch.nn.BatchNorm2d).double()
            model = syncbn.torch.convert_sync_batchnorm(model, worker).to(device)

            def reduce(name, gradient):
                total = worker.all_reduce(name, gradient.double().cpu().numpy().ravel())
                return torch.from_numpy(total).view_as(gradient).to(gradient)

            state = train(model, images[mine].to(device), labels[mine].to(device), len(images), reduce)
            queue.put((rank, {name: value.numpy() for name, value in state.items()}))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
        raise


def run_processes(function, arguments, world):
    """Runs function(rank, *arguments, queue) in `world` processes; returns what they put, by rank."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=function, args=(rank, *arguments, queue)) for rank in range(world)]
    for process in processes:
        process.start()
    results = {}
    give_up = time.monotonic() + 120
    try:
        while len(results) < world:
            try:
                rank, result = queue.get(timeout=1)
                results[rank] = result
            except Empty:
                # One that was killed puts nothing.
                codes = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
                if codes or time.monotonic() > give_up:
                    missing = world - len(results)
                    raise AssertionError(f"no result from {missing} processes; exit codes {codes}") from None
    finally:
        for process in processes:
            process.join(timeout=30 if len(results) == world else 1)
            if process.is_alive():
                process.kill()
    for rank, result in results.items():
        if isinstance(result, str):
            raise AssertionError(f"rank {rank}:\n{result}")
    return results


def check_training():
    """Two GPU processes and a CPU worker in one group end where one CPU process with the whole batch ends."""
    torch.manual_seed(SEED)
    images, labels = make_data()
    model = make_model(torch.nn.BatchNorm2d).double()
    expected = train(model, images, labels, len(images), lambda name, gradient: gradient)
    with syncbn.Master(address="127.0.0.1:0") as master:
        gpu = "cuda:0" if DEVICE == "cuda" else "cpu"
        results = run_processes(train_worker, (master.target, [gpu, gpu, "cpu"]), 3)
    for rank, state in results.items():
        for name, value in expected.items():
            torch.testing.assert_close(torch.from_numpy(state[name]), value, rtol=1e-7, atol=1e-9,
                                       msg=lambda text: f"rank {rank}, {name}: {text}")


def compare_with_torch(worker, x, dtype, tolerance):
    """One worker is the whole group, so torch's own batch normalization is the reference."""
    ours = syncbn.torch.SyncBatchNorm(x.size(1), worker=worker, layer=f"{tuple(x.shape)}{dtype}{x.stride()}").to(DEVICE)
    if dtype == torch.float64:
        ours.double()  # Else its gradients would be of float32.
    theirs = torch.nn.BatchNorm1d if x.dim() <= 3 else torch.nn.BatchNorm2d
    theirs = theirs(x.size(1)).to(DEVICE).double()
    a = x.detach().to(DEVICE, dtype, copy=True).requires_grad_()
    b = a.detach().double().requires_grad_()
    y, reference = ours(a), theirs(b)
    assert y.dtype == dtype and y.stride() == a.stride(), (y.dtype, y.stride(), a.stride())
    dy = torch.randn_like(a)
    y.backward(dy)
    reference.backward(dy.double())
    for what, got, want in [
        ("y", y, reference), ("dx", a.grad, b.grad), ("weight", ours.weight.grad, theirs.weight.grad),
        ("bias", ours.bias.grad, theirs.bias.grad), ("mean", ours.running_mean, theirs.running_mean),
        ("var", ours.running_var, theirs.running_var),
    ]:
        scale = max(1.0, want.abs().max().item())
        torch.testing.assert_close(got.double() / scale, want / scale, rtol=tolerance, atol=tolerance,
                                   msg=lambda text: f"{what} of {tuple(x.shape)} {dtype}: {text}")


def check_types_and_layouts(worker):
    torch.manual_seed(SEED)
    for size in [(16, 8), (4, 3, 7, 7), (8, 64, 14, 14), (2, 5, 33)]:
        x = torch.randn(size) * 2 + 3
        for dtype, tolerance in [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.float16, 4e-3),
                                 (torch.bfloat16, 3e-2)]:
            compare_with_torch(worker, x, dtype, tolerance)
            if x.dim() == 4:
                compare_with_torch(worker, x.contiguous(memory_format=torch.channels_last), dtype, tolerance)


@gpu_only
def check_streams(worker):
    """A side stream, busy with other work, orders the pass."""
    layer = syncbn.torch.SyncBatchNorm(64, worker=worker, layer="streams").cuda()
    x = torch.zeros(32, 64, 56, 56, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.normal_(5.0, 2.0)
        y = layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True), rtol=1e-4, atol=1e-4)


@gpu_only
def check_autocast(worker):
    layer = syncbn.torch.SyncBatchNorm(16, worker=worker, layer="autocast").cuda()
    convolution = torch.nn.Conv2d(3, 16, 3).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(convolution(torch.randn(4, 3, 8, 8, device="cuda")))
    assert y.dtype == torch.bfloat16, y.dtype
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and convolution.weight.grad is not None


@gpu_only
def check_capture(worker):
    """A graph is refused with words, and the layer works afterwards."""
    layer = syncbn.torch.SyncBatchNorm(4, worker=worker, layer="capture").cuda()
    x = torch.randn(8, 4, device="cuda")
    layer(x)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x)
    except RuntimeError as error:
        assert "CUDA graph" in str(error), error
    else:
        raise AssertionError("a capture was not refused")
    layer(x)


def check_captured_evaluation(_):
    """An evaluation by the C interface, with all its gradients, in a graph: replays read everything anew."""
    library = syncbn._library
    x, y, dx = (torch.empty(8, 6, 5, 5, device=DEVICE) for _ in range(3))
    mean, var, weight, bias, d_weight, d_bias = (torch.empty(6, device=DEVICE) for _ in range(6))

    def tensor(of):
        return library.Tensor(of.data_ptr(), 8, 6, 25, 0, 0, int(of.is_cuda), of.device.index or 0)

    def vector(of):
        return library.Vector(of.data_ptr(), 0)

    def evaluate():
        stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else None
        options = library.EvaluateOptions(
            num_threads=1, stream=stream, mean=vector(mean), var=vector(var), weight=vector(weight), bias=vector(bias),
            eps=0.25, relu=1)
        inputs = library.BackwardInputs(
            dy=tensor(x), x=x.data_ptr(), weight=vector(weight), bias=vector(bias), relu=1)
        outputs = library.BackwardOutputs(dx=dx.data_ptr(), d_weight=vector(d_weight), d_bias=vector(d_bias))
        library.call(library.lib.syncbn_evaluate, bytes(tensor(x)), bytes(options), y.data_ptr())
        library.call(library.lib.syncbn_evaluate_backward, bytes(inputs), bytes(options), bytes(outputs))

    replay = evaluate
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            evaluate()
        replay = graph.replay
    torch.manual_seed(SEED)
    for _ in range(3):
        for values in (x, mean, weight, bias):
            values.normal_()
        var.uniform_(0.5, 2)
        replay()
        synchronize()
        wanted = [values.double().requires_grad_() for values in (x, weight, bias)]
        out = torch.relu(torch.nn.functional.batch_norm(wanted[0], mean.double(), var.double(), *wanted[1:], eps=0.25))
        out.backward(x.double())
        for got, want in zip([y, dx, d_weight, d_bias], [out] + [values.grad for values in wanted]):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def check_master_gone(_):
    """A round whose master has ended raises in time, and leaves a stream that goes on."""
    with syncbn.Master(address="127.0.0.1:0") as master:
        worker = syncbn.Worker(target=master.target, rank=0, world_size=1, timeout=2.0, join_timeout=2.0)
        layer = syncbn.torch.SyncBatchNorm(4, worker=worker, layer="orphan").to(DEVICE)
        x = torch.randn(8, 4, device=DEVICE)
        layer(x)
    try:
        begin = time.monotonic()
        try:
            layer(x)
        except syncbn.Error:
            assert time.monotonic() - begin < 30
            assert torch.isfinite((x * 2).sum()).item()
        else:
            raise AssertionError("a round without a master succeeded")
    finally:
        worker.close()


def check_strides(worker):
    """Tensors that are not dense give what dense copies give, forward and backward, for any strides of y's gradient."""
    torch.manual_seed(SEED)
    x = torch.randn(6, 10, 8, 4, device=DEVICE)
    views = [x[:, ::2], x.transpose(2, 3), x[:, :, 1:7], x[1].unsqueeze(0).expand(3, -1, -1, -1)]
    for index, view in enumerate(views):
        results = []
        for kind, given in enumerate([view, view.contiguous()]):
            layer = syncbn.torch.SyncBatchNorm(view.size(1), worker=worker, layer=f"strides{index}.{kind}").to(DEVICE)
            a = given.detach().requires_grad_()
            y = layer(a)
            weights = torch.arange(float(y.size(2)), device=DEVICE).view(1, 1, -1, 1)
            y.backward(weights.expand(y.shape))
            results.append((y, a.grad))
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def check_empty_batch(worker):
    layer = syncbn.torch.SyncBatchNorm(4, worker=worker, layer="empty").to(DEVICE)
    x = torch.empty(0, 4, 3, 3, device=DEVICE, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))
    assert torch.equal(layer.running_var, torch.ones_like(layer.running_var))


def check_evaluation(worker):
    """With the running statistics; in 16 bits, too, where parameters stay in 32."""
    torch.manual_seed(SEED)
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]:
        layer = syncbn.torch.SyncBatchNorm(5, worker=worker, layer=f"evaluation{dtype}").to(DEVICE)
        with torch.no_grad():
            layer(torch.randn(64, 5, 3, 3, device=DEVICE) * 2 + 1)
        layer.eval()
        a = (torch.randn(8, 5, 3, 3, device=DEVICE) * 2 + 1).to(dtype).requires_grad_()
        b = a.detach().float().requires_grad_()
        y = layer(a)
        reference = torch.nn.functional.batch_norm(b, layer.running_mean, layer.running_var, layer.weight, layer.bias)
        dy = torch.randn_like(a)
        y.backward(dy)
        reference.backward(dy.float())
        assert y.dtype == dtype
        for got, want in [(y, reference), (a.grad, b.grad)]:
            torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


def check_backward_twice(worker):
    """A retained graph: the second backward pass adds the same again."""
    layer = syncbn.torch.SyncBatchNorm(6, worker=worker, layer="twice").to(DEVICE)
    x = torch.randn(16, 6, 4, device=DEVICE, requires_grad=True)
    y, dy = layer(x), torch.randn(16, 6, 4, device=DEVICE)
    y.backward(dy, retain_graph=True)
    once = [x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()]
    y.backward(dy)
    for total, first in zip([x.grad, layer.weight.grad, layer.bias.grad], once):
        torch.testing.assert_close(total, 2 * first, rtol=1e-4, atol=1e-5)


def check_missing_worker(_):
    """A round that fails raises in time, and leaves a stream that goes on."""
    with syncbn.Master(address="127.0.0.1:0") as master:
        with syncbn.Worker(target=master.target, rank=0, world_size=2, timeout=1.0) as worker:
            layer = syncbn.torch.SyncBatchNorm(4, worker=worker, layer="lonely").to(DEVICE)
            x = torch.randn(8, 4, device=DEVICE)
            begin = time.monotonic()
            try:
                layer(x)
            except syncbn.Error as error:
                assert "lonely" in str(error) or error.layer == "lonely", error
            else:
                raise AssertionError("a round without its other worker succeeded")
            assert time.monotonic() - begin < 30
            assert torch.isfinite((x * 2).sum()).item()


# ---- Stream-ordered passes ----


def ahead_group(target, name, timeout=60.0):
    """A stream-ordered worker for the GPU, and the other worker of its group, for the CPU."""
    return (syncbn.Worker(target, name, 0, 2, timeout, stream_ordered=True), syncbn.Worker(target, name, 1, 2, timeout))


def ahead_step(layer, x):
    """Forward and back through a layer; returns y and dx."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.pow(3).sum().backward()
    return y, x.grad


def warm_up(target, sizes):
    """Memory and kernels, ours and torch's, are there before a stream waits."""
    with syncbn.Worker(target, "warm-up", 0, 1, stream_ordered=True) as worker:
        for size in sizes:
            layer = syncbn.torch.SyncBatchNorm(size[1], worker=worker, layer=f"warm-up{size}").cuda().double()
            ahead_step(layer, torch.randn(size, device="cuda", dtype=torch.float64))
            torch.cuda.synchronize()


@gpu_only
def check_stream_order_runs_ahead(_):
    """By one thread: forward and backward return, and the stream waits, before the other worker has begun."""
    sizes = [(8, 16, 14, 14), (4, 16, 14, 14)]
    whole = torch.nn.BatchNorm2d(16, momentum=None).double()
    x = torch.randn(12, 16, 14, 14, dtype=torch.float64) * 2 + 1
    expected_y, expected_dx = ahead_step(whole, x)
    with syncbn.Master(address="127.0.0.1:0") as master:
        warm_up(master.target, sizes)
        ahead, other = ahead_group(master.target, "ahead")
        with ahead, other:
            average = {"momentum": None, "layer": "bn"}  # Its weights are only known on the GPU.
            layer = syncbn.torch.SyncBatchNorm(16, worker=ahead, **average).cuda().double()
            there = syncbn.torch.SyncBatchNorm(16, worker=other, **average).double()
            y, dx = ahead_step(layer, x[:8].cuda())
            assert not ahead.settle(0.0), "the round had ended without its other worker"
            assert not torch.cuda.current_stream().query(), "the stream does not wait"
            other_y, other_dx = ahead_step(there, x[8:])
            assert ahead.settle(30.0)
            torch.testing.assert_close(torch.cat([y.cpu(), other_y]), expected_y, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(torch.cat([dx.cpu(), other_dx]), expected_dx, rtol=1e-10, atol=1e-9)
            torch.testing.assert_close(layer.running_var.cpu(), whole.running_var)


@gpu_only
def check_stream_order_failures(_):
    """A deadline, an interrupt and a close: the stream goes on with NaN, and the error comes once."""
    with syncbn.Master(address="127.0.0.1:0") as master:
        warm_up(master.target, [(8, 4)])
        for name in ["deadline", "interrupt", "close"]:
            ahead, other = ahead_group(master.target, name, 1.0 if name == "deadline" else 60.0)
            with other:
                layer = syncbn.torch.SyncBatchNorm(4, worker=ahead, layer="bn").cuda().double()
                x = torch.randn(8, 4, device="cuda", dtype=torch.float64)
                y, dx = ahead_step(layer, x)
                if name == "interrupt":
                    ahead.interrupt()
                elif name == "close":
                    ahead.close()
                torch.cuda.synchronize()
                for value in (y, dx, layer.weight.grad, layer.bias.grad):
                    assert value.isnan().all(), f"{name}: {value}"
                assert (layer.running_mean == 0).all() and (layer.running_var == 1).all(), name
                assert int(layer.num_batches_tracked) == 0, name
                try:
                    layer(x)
                except syncbn.Error as error:
                    assert isinstance(error, {"deadline": syncbn.DeadlineExceeded, "interrupt": syncbn.Cancelled,
                                              "close": syncbn.FailedPrecondition}[name]), repr(error)
                else:
                    raise AssertionError(f"{name}: the error did not surface")
                if name != "close":
                    assert ahead.settle(0.0)
                    ahead.close()


@gpu_only
def check_stream_order_frees_memory(_):
    """Memory of CUDA's is freed and got, which waits for streams, while one of them waits for a round."""
    with syncbn.Master(address="127.0.0.1:0") as master:
        warm_up(master.target, [(8, 4)])
        ahead, other = ahead_group(master.target, "memory")
        with ahead, other:
            layer = syncbn.torch.SyncBatchNorm(4, worker=ahead, layer="bn").cuda().double()
            there = syncbn.torch.SyncBatchNorm(4, worker=other, layer="bn").double()
            wide = syncbn.torch.SyncBatchNorm(4099, worker=ahead, layer="wide").cuda()
            there_wide = syncbn.torch.SyncBatchNorm(4099, worker=other, layer="wide")
            x = torch.randn(8, 4, device="cuda", dtype=torch.float64)
            wide_x, there_x = torch.randn(64, 4099, 5, device="cuda"), torch.randn(2, 4, dtype=torch.float64)
            # torch has its memory already: what it gets from CUDA with Python's lock held would keep `complete` out.
            blocks = [torch.empty_like(wide_x) for _ in range(8)]
            del blocks

            def complete():
                ahead_step(there, there_x)
                ahead_step(there_wide, torch.randn(2, 4099, 5))

            ahead_step(layer, x)
            thread = threading.Thread(target=complete)
            thread.start()
            _, dx = ahead_step(wide, wide_x)
            thread.join()
            assert ahead.settle(30.0)
            assert dx.isfinite().all()


def train_both_ways_worker(rank, target, devices, queue):
    """As train_worker, once with stream-ordered passes and once with host-driven ones."""
    try:
        device = devices[rank]
        images, labels = make_data()
        bounds = split(len(images), len(devices))
        mine = slice(bounds[rank], bounds[rank + 1])
        states = []
        for ordered in (True, False):
            torch.manual_seed(SEED)
            with syncbn.Worker(target, f"train-{ordered}", rank, len(devices), 60.0, stream_ordered=ordered) as worker:
                model = make_model(torch.nn.BatchNorm2d).double()
                model = syncbn.torch.convert_sync_batchnorm(model, worker).to(device)

                def reduce(name, gradient):
                    total = worker.all_reduce(name, gradient.double().cpu().numpy().ravel())
                    return torch.from_numpy(total).view_as(gradient).to(gradient)

                state = train(model, images[mine].to(device), labels[mine].to(device), len(images), reduce)
                states.append({name: value.numpy() for name, value in state.items()})
        queue.put((rank, states))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
        raise


def check_stream_order_trains(_):
    """Two GPU processes and a CPU worker: both modes end alike."""
    gpu = "cuda:0" if DEVICE == "cuda" else "cpu"
    with syncbn.Master(address="127.0.0.1:0") as master:
        results = run_processes(train_both_ways_worker, (master.target, [gpu, gpu, "cpu"]), 3)
    for rank, (ahead, driven) in results.items():
        for name, value in driven.items():
            torch.testing.assert_close(torch.from_numpy(ahead[name]), torch.from_numpy(value), rtol=1e-9, atol=1e-11,
                                       msg=lambda text: f"rank {rank}, {name}: {text}")


def stream_order_checks():
    """Those for this device; none, with a word, if its streams cannot wait."""
    if DEVICE == "cuda":
        try:
            syncbn._library.call(syncbn._library.lib.syncbn_stream_order_check, 0)
        except syncbn.Error as error:
            print(f"skipped: stream-ordered passes: {error}")
            return []
    return [check_stream_order_runs_ahead, check_stream_order_failures, check_stream_order_frees_memory,
            check_stream_order_trains]


def check():
    failures = 0
    print(f"{syncbn._library.lib.syncbn_build_info().decode()}; torch {torch.__version__}; GPU: {device_name()}")
    checks = [check_types_and_layouts, check_streams, check_autocast, check_capture, check_missing_worker]
    checks += [check_captured_evaluation]
    checks += [check_master_gone, check_strides, check_empty_batch, check_evaluation, check_backward_twice]
    checks += stream_order_checks()
    with syncbn.Master(address="127.0.0.1:0") as master:
        with syncbn.Worker(target=master.target, rank=0, world_size=1, timeout=60.0) as worker:
            for one in checks:
                failures += not attempt(one, worker)
    failures += not attempt(check_training)
    skipped = 0 if DEVICE == "cuda" else len(GPU_ONLY.intersection(checks))
    print(f"worker: {len(checks) + 1} checks, {failures} failed, {skipped} need a GPU")
    return failures != 0


def attempt(function, *arguments):
    if DEVICE != "cuda" and function in GPU_ONLY:
        print(f"skipped {function.__name__}: it needs a GPU")
        return True
    try:
        function(*arguments)
        synchronize()
    except Exception:
        print(f"FAILED {function.__name__}\n{traceback.format_exc()}")
        return False
    print(f"passed {function.__name__}", flush=True)
    return True


BENCH_SIZES = [(8, 64, 7, 7), (8, 256, 56, 56)]


def time_steps(layer, x, dy):
    """Median milliseconds of a forward and a backward pass."""
    times = []
    steps = 50 if DEVICE == "cuda" else 5
    for step in range(steps + 5):
        synchronize()
        begin = time.perf_counter()
        layer(x).backward(dy)
        synchronize()
        if step >= 5:
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


class OverGloo(torch.autograd.Function):
    """In a rehearsal, the place of torch's SyncBatchNorm, which refuses CPU tensors: its two exchanges and no more."""

    @staticmethod
    def forward(ctx, x):
        mine = torch.cat([x.mean((0, 2, 3)), x.var((0, 2, 3)), torch.ones(1)])
        torch.distributed.all_gather([torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())], mine)
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        torch.distributed.all_reduce(torch.cat([dy.sum((0, 2, 3)), dy.sum((0, 2, 3))]))
        return dy * 2


def time_over_gloo(size, x, dy):
    """Milliseconds of torch's own layer, or why it does not run. Where a rank fails, all do: they are alike."""
    try:
        layer = torch.nn.SyncBatchNorm(size[1]).to(DEVICE) if DEVICE == "cuda" else OverGloo.apply
        return time_steps(layer, x, dy)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).splitlines()[0]


def bench_worker(rank, world, target, port, device, queue):
    """Puts, for each size, the milliseconds of our layer's step and of torch's, or the reason why there are none."""
    global DEVICE
    DEVICE = device
    try:
        results = {}
        with syncbn.Worker(target=target, group=f"bench{world}", rank=rank, world_size=world) as worker:
            # Nobody starts timing before the last has loaded its libraries.
            worker.wait_for_members(60.0)
            for size in BENCH_SIZES if DEVICE == "cuda" else BENCH_SIZES[:1]:
                torch.manual_seed(rank)
                x = torch.randn(size, device=DEVICE).requires_grad_()
                dy = torch.randn(size, device=DEVICE)
                layer = syncbn.torch.SyncBatchNorm(size[1], worker=worker, layer=f"bn{size}").to(DEVICE)
                results[size] = [time_steps(layer, x, dy), "one process exchanges nothing"]
        if world > 1:
            compare_over_gloo(rank, world, port, results)
        queue.put((rank, results))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
        raise


def compare_over_gloo(rank, world, port, results):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        for result in results.values():
            result[1] = "torch is without gloo"
        return
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
                                         timeout=datetime.timedelta(seconds=30))
    for size, result in results.items():
        torch.manual_seed(rank)
        x = torch.randn(size, device=DEVICE).requires_grad_()
        result[1] = time_over_gloo(size, x, torch.randn(size, device=DEVICE))
    torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def bench(results):
    """Writes the rows of report.py's step table."""
    rows, notes = [], []
    for world in (1, 2, 4):
        with syncbn.Master(address="127.0.0.1:0") as master:
            try:
                measured = run_processes(bench_worker, (world, master.target, free_port(), DEVICE), world)[0]
            except Exception as error:
                notes.append(f"a layer in {world} processes: {str(error).strip().splitlines()[-1]}")
                print(f"FAILED {world} processes\n{traceback.format_exc()}")
                continue
        for size, (ours, theirs) in measured.items():
            row = {"processes": world, "shape": "x".join(map(str, size)), "syncbn_ms": ours}
            row.update({"why": theirs} if isinstance(theirs, str) else {"torch_ms": theirs})
            rows.append(row)
            print(row, flush=True)
        # Each as soon as it is known: whoever stops this keeps it.
        with open(results, "w", encoding="utf-8") as file:
            json.dump({"rows": rows, "notes": notes}, file)
    print(f"a layer's step: {len(rows)} timed, {len(notes)} failed")
    return len(notes) > 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "bench"])
    parser.add_argument("results", nargs="?", default=os.devnull)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    global DEVICE
    DEVICE = options.device
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("skipped: torch has no NVIDIA GPU")
        return 0
    return check() if options.what == "check" else bench(options.results)


if __name__ == "__main__":
    sys.exit(main())
