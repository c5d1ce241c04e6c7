"""The worker of a process that a launcher or torch.distributed has started, without further configuration."""

from typing import Any, Optional

from syncbn import _environment, _places, _settings
from syncbn.core import Worker


def init_worker(
    group: Optional[str] = None, target: Optional[Any] = None, *, process_group: Optional[Any] = None, **options: Any
) -> Worker:
    """Joins this process's worker to those of the other processes, and starts a master for them if none is named.

        with syncbn.torch.init_worker() as worker:
            model = syncbn.torch.convert_sync_batchnorm(model, worker)
            ...

    This is `syncbn.Worker(target, group, **options)`, except that it refuses to be the only worker where nothing says that
    there is one alone, and that it takes a process group. `join` is another name of it.

    Args:
      process_group: a process group of torch.distributed's (new_group) that the worker is to stand for: its ranks, its
        number of processes, a group of its own name, and a master of its own unless `target` names one.
      options: the worker's: rank, world_size, timeout, min_workers and so on.

    Returns: the worker, for a `with` block.
    Errors: those of `syncbn.Worker`; ValueError where there is neither a launcher nor a process group, and where this process
    is no member of `process_group`.
    """
    if process_group is not None:
        place = _places.in_process_group(process_group)
        return Worker(target, group or place.group, _place=place, **options)
    alone = options.get("rank") is None and options.get("world_size") is None and _places.find() is None
    if alone and not target and _environment.text("SYNCBN_TARGET") is None:
        raise _settings.Missing(
            "init_worker finds no other worker: neither RANK nor another launcher's variable is set, and torch.distributed is "
            "not initialized. Start the script with torchrun, or call torch.distributed.init_process_group first; a process by "
            "itself needs syncbn.Worker() alone"
        )
    return Worker(target, group, **options)


join = init_worker
