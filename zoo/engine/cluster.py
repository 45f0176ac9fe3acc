"""Ray: seats on the machines of a cluster. The work on a unit is the same as here, so its bytes are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from zoo.engine.nursery import Nursery
from zoo.engine.seat import ProcessSeat, StoppedError
from zoo.engine.work import Done, Hello, Job, Loading, Work, WorkerError
from zoo.engine.worker import portable
from zoo.errors import ArgumentError, MissingExtraError

#: Share of a GPU that a seat takes: one prepares items while the other one's are encoded.
_GPU_SHARE = 0.5


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("a cluster needs Ray: pip install 'tokenizer-zoo[ray]'") from error
    return ray


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a cluster: the running one for ``"auto"``, one that is started here for ``"local"``.

    Raises:
        ArgumentError: there is no cluster at that address.
    """
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == "local":
            ray.init(include_dashboard=False, **settings)
        else:
            ray.init(address=address, **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"there is no Ray cluster at {address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def cores() -> int:
    """Cores of the cluster."""
    return max(1, int(_ray().cluster_resources().get("CPU", 1)))


class _Host:
    """What runs on a machine of the cluster: a worker process, and what shields it."""

    def __init__(self, loading: Loading, options: Mapping[str, Any]) -> None:
        self._seat = ProcessSeat(Nursery(loading, options))

    def hello(self) -> Hello | Exception:
        try:
            return self._seat.hello()
        except Exception as error:
            return portable(error)

    def run(self, work: Work, job: Job) -> Done | Exception:
        try:
            return self._seat.run(work, job)
        except Exception as error:
            return portable(error)


class RemoteSeat:
    """A worker process on a machine of the cluster; where the machine is lost, the unit begins anew on another one."""

    def __init__(self, loading: Loading, options: Mapping[str, Any]) -> None:
        self.begun = 0
        gpus = _GPU_SHARE if (loading.device or "").startswith("cuda") else 0
        settings = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": -1}
        self._host = _ray().remote(_Host).options(**settings).remote(loading, options)
        self._stopped = False

    def hello(self) -> Hello:
        hello: Hello = self._result(self._host.hello.remote())
        return hello

    def run(self, work: Work, job: Job) -> Done:
        done: Done = self._result(self._host.run.remote(work, job))
        return done

    def _result(self, reference: Any) -> Any:
        ray = _ray()
        try:
            result = ray.get(reference)
        except ray.exceptions.RayError as error:
            if self._stopped:
                raise StoppedError from error
            raise WorkerError(f"the cluster lost a worker: {error}") from error
        if isinstance(result, Exception):
            raise result
        return result

    def stop(self) -> None:
        self._stopped = True
        with suppress(Exception):
            _ray().kill(self._host)
