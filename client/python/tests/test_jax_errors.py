"""Errors of rounds under JAX, where several could be meant: an older one, or one of another thread."""

import concurrent.futures
import threading

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import syncbn
import syncbn.jax as sync


def normalized(worker, layer, rows):
    return jax.jit(lambda x: sync.sync_batch_norm(x, layer=layer, worker=worker)[0])(rows)


def test_an_error_is_not_an_older_one_that_was_caught_outside(master):
    bad = jnp.full((3, 2), jnp.nan)
    with syncbn.Worker(master.target, "jax older errors", 0, 1) as worker:
        with pytest.raises(RuntimeError, match="NotFinite"):
            jax.block_until_ready(normalized(worker, "first", bad))
        with pytest.raises(syncbn.NotFinite) as caught, sync.typed_errors():
            jax.block_until_ready(normalized(worker, "second", bad))
    assert caught.value.layer == "second"


def test_errors_of_workers_on_threads_are_typed_on_each(master):
    met = threading.Barrier(2, timeout=60)

    def run(rank):
        layer = f"layer {rank}"
        with syncbn.Worker(master.target, f"jax threads {rank}", 0, 1) as worker:
            try:
                with sync.typed_errors():
                    try:
                        jax.block_until_ready(normalized(worker, layer, jnp.full((3, 2), jnp.nan)))
                    finally:
                        met.wait()  # Both have failed.
            except syncbn.NotFinite as error:
                return error.layer == layer
        return False

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [True, True]


def test_after_a_step_that_raised_on_one_worker_alone_all_go_on(group):
    """They agree by a deadlock, or by deadlines where JAX calls back on several threads."""

    def run(worker):
        def layer(name):
            return jax.block_until_ready(normalized(worker, name, jnp.arange(12.0).reshape(4, 3)))

        failed, outputs, step = [], [], 0
        while len(outputs) < 3:
            assert step < 12, f"no step succeeds any more: {failed}"
            try:
                with sync.typed_errors():
                    layer("first")
                    if (worker.rank, step) == (0, 1):
                        raise KeyError("a batch that is missing")
                    outputs.append(layer("second").tolist())
            except (KeyError, syncbn.Error) as error:
                failed.append((step, type(error)))
            step += 1
        return failed, outputs[-1]

    # Long enough for a busy machine, whose other rounds must not fail.
    (failed, output), (others_failed, others_output) = group(2, run, timeout=10.0)
    assert failed[0] == (1, KeyError)
    assert len(failed) <= 4 and len(others_failed) <= 3
    assert output == others_output
