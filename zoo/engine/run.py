"""The run: plans, hands units out to seats, and says what came of it. Does not import torch."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from zoo.engine.lock import Lock
from zoo.engine.nursery import Nursery
from zoo.engine.parts import FORMAT
from zoo.engine.places import whole_place
from zoo.engine.plan import Plan, create
from zoo.engine.plan import extend as extend_plan
from zoo.engine.report import Totals, totals_of, write_failures
from zoo.engine.seat import InlineSeat, ProcessSeat, Seat, StoppedError
from zoo.engine.sources import Choice, Listing
from zoo.engine.store import Store
from zoo.engine.work import Done, Hello, Job, Loading, Work
from zoo.errors import ArgumentError, InputError, listing

if TYPE_CHECKING:
    from zoo.tokenizer import Tokenizer

#: Where units end by default; the first ones are smaller.
UNIT_ITEMS = 512
UNIT_MB = 128
#: Workers for each GPU: one prepares items while the other one's are encoded.
PER_GPU = 2

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Summary:
    """Result of a run.

    Attributes:
        out: folder of the parts.
        tokenizer, fingerprint: as of `zoo.Tokens`.
        units, items: in the whole data set.
        failures: items that failed, in the whole data set; ``failures.parquet`` lists them.
        encoded: items that this run worked on.
        ids, bytes, extent: of these; ``extent`` in ``extent_unit``, such as hours.
        extent_unit: ``None`` where there is none.
        seconds: that this run took; ``cpu_seconds`` that its workers worked.
        workers: how many there were.
        vanished: keys of items that are in the data set, but no longer in the sources; up to 20, and with ``extend`` only.
        skipped: files that were left out when the sources were listed.
    """

    out: str
    tokenizer: str
    fingerprint: str
    units: int
    items: int
    failures: int
    encoded: int
    ids: int
    bytes: int
    extent: float
    extent_unit: str | None
    seconds: float
    cpu_seconds: float
    workers: int
    vanished: tuple[str, ...] = ()
    skipped: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"vanished": list(self.vanished)}


def tokenize(
    tokenizer: str | Tokenizer[Any],
    sources: Source | Sequence[Source],
    out: Source,
    *,
    encode: Mapping[str, Any] | None = None,
    column: str | None = None,
    keep: Sequence[str] | None = None,
    unit_items: int | None = None,
    unit_mb: float | None = None,
    workers: int | None = None,
    device: str | None = None,
    files: Mapping[str, str] | None = None,
    parts: Sequence[str] | None = None,
    memory_mb: int = 2048,
    item_seconds: float = 300.0,
    max_seconds: float | None = None,
    accept_missing: bool = False,
    patience: float = 120.0,
    extend: bool = False,
    new: bool = False,
    cluster: str | None = None,
    gpus: int | None = None,
    progress: bool = False,
    on_event: Callable[[dict[str, Any]], object] | None = None,
) -> Summary:
    """Encode a data set to a folder of parts; called again with the same arguments, go on where it stopped.

    Every item is in exactly one part, with the ids that it gets alone or with the reason why it failed. Parts are written
    whole, and are the same byte for byte whatever the number of workers, and whatever was killed in between.

    Args:
        tokenizer: a name, as for `zoo.load`, or a tokenizer.
        sources: folders, files, glob patterns or URLs; tars (WebDataset), tables (Parquet, Arrow) and JSON lines hold many
            items.
        out: folder of the parts, or its URL.
        encode: options of encoding, such as ``{"tokens": 64}``.
        column: column of tables, field of JSON lines or extension in tars that holds the media; found where there is one.
        keep: columns that are carried over, ``["*"]`` for all; by default all of JSON lines and none of others.
        unit_items, unit_mb: where units end: items, 10⁶ bytes of input. By default 128, and 16 items that become up to 512.
        workers: processes with one thread each, by default one a core, or two a GPU. 0 works in this very process, where a
            crash of a library is its end and nothing limits the time of an item.
        device, files, parts: as for `zoo.load`.
        memory_mb: of a worker, beside the model.
        item_seconds: that reading and preparing one item may take.
        max_seconds: longer recordings fail.
        accept_missing: items that vanished since they were listed fail; otherwise their unit is not done, which is an error.
        patience: seconds to wait for a source while its file system is away.
        extend: list the sources again, and add what is new in units at the end.
        new: begin a data set; an error if there is one.
        cluster: address of a Ray cluster, ``"auto"`` for the one that is running; ``"local"`` starts one here.
        gpus: that are used; all of them if the device is ``cuda``.
        progress: show a progress bar.
        on_event: called with a dictionary whenever a unit is done.

    Returns:
        The summary. Items that failed are counted in it and are no error.

    Raises:
        ArgumentError: the folder is another run's, of another checkpoint, of other options, or something else; two items have
            one key; an option is wrong.
        InputError: sources vanished or changed; all other units are done.
        OutputError: a part cannot be written.
        KeyboardInterrupt: Ctrl-C; the units in flight are done. A second one stops at once.
    """
    start = time.monotonic()
    options = json.loads(json.dumps(dict(encode or {})))
    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    wholes = tuple(map(whole_place, given))
    if not wholes:
        raise ArgumentError("there are no sources")
    for name, value in (
        ("unit_items", unit_items),
        ("unit_mb", unit_mb),
        ("memory_mb", memory_mb),
        ("item_seconds", item_seconds),
    ):
        if value is not None and not 0 < value < math.inf:
            raise ArgumentError(f"{name} must be a number above 0, not {value}")
    store = Store(whole_place(out))
    if Plan.read(store) is not None and new:
        raise ArgumentError(f"{store.place} holds a run already: choose another folder for a new one")
    settings: dict[str, Any] = {"device": device, "files": dict(files or {}), "parts": None if parts is None else tuple(parts)}
    loading: Any = tokenizer if workers == 0 and not isinstance(tokenizer, str) else Loading.of(tokenizer, **settings)
    crew = _Crew(loading, options, workers, gpus, cluster)
    with Lock(store) as lock, crew:
        store.sweep()
        hello = crew.hello
        limits = _limits(hello, max_seconds=max_seconds)
        choice = Choice(hello.header.modality, hello.extensions, column, None if keep is None else tuple(keep))
        identity = run_identity(hello, options, limits, choice)
        vanished: list[str] = []
        found = Listing(wholes, choice, store.place)
        plan = Plan.read(store)
        if plan is None:
            ends = (unit_items or UNIT_ITEMS, int((unit_mb or UNIT_MB) * 1e6))
            loaded = tokenizer if isinstance(tokenizer, str) else ""
            plan = create(store, Plan(hello.header, identity, wholes, (), *ends, loaded, growing=unit_items is None), found)
        else:
            _require_same(plan, identity, wholes, unit_items, unit_mb, extend, store)
            if extend:
                plan, vanished = extend_plan(store, plan, wholes, found)
        work = Work(
            store.place,
            hello.header,
            options,
            limits,
            plan.carried,
            budget=max(memory_mb // 4, 1) << 20,
            patience=patience,
            accept_missing=accept_missing,
            item_seconds=item_seconds,
        )
        tally = _Tally(plan, hello, start, progress, on_event, crew)
        done = plan.done(store)
        tally.begin(done, plan, store)
        wanted = set(range(plan.units)) - done.keys()
        try:
            crew.run(work, plan, store, wanted, tally, lock)
        finally:
            tally.end()
        totals = totals_of(store)
        write_failures(store, totals)
    if tally.absent:
        raise InputError(
            f"{len(wanted) - tally.units} of {plan.units} units are not done, because sources are not what was listed: "
            f"{listing(tally.absent)}. Put them back and call this again, or let them count as failed with --accept-missing"
        )
    return _summary(store, plan, hello, tally, totals, start, crew.count, vanished, str(found.skipped))


def _limits(hello: Hello, **given: Any) -> dict[str, Any]:
    """Limits of the modality that were given."""
    limits = {name: value for name, value in given.items() if value is not None}
    if unknown := [name for name in limits if name not in hello.limits]:
        raise ArgumentError(f"{hello.header.tokenizer} takes no --{unknown[0].replace('_', '-')}")
    return limits


def run_identity(hello: Hello, options: Mapping[str, Any], limits: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    """Settings that a run must have in common with an earlier one in the same folder."""
    return {
        "tokenizer": hello.header.tokenizer,
        "fingerprint": hello.header.fingerprint,
        "format": FORMAT,
        "options": dict(options),
        "limits": dict(limits),
        "column": choice.column,
        "keep": None if choice.keep is None else list(choice.keep),
    }


def _require_same(
    plan: Plan,
    identity: Mapping[str, Any],
    sources: tuple[str, ...],
    unit_items: int | None,
    unit_mb: float | None,
    extend: bool,
    store: Store,
) -> None:
    """Refuse to go on with a run as another one.

    Raises:
        ArgumentError: they differ; says in what.
    """
    planned = "growing" if plan.growing else plan.unit_items
    then = dict(plan.identity) | {"unit_items": planned, "unit_mb": plan.unit_bytes / 1e6}
    now = dict(identity) | {"unit_items": unit_items or planned, "unit_mb": unit_mb or plan.unit_bytes / 1e6}
    if not extend:
        then["sources"], now["sources"] = list(plan.sources), list(sources)
    changed = [f"{name} was {then.get(name)!r} and is now {now[name]!r}" for name in now if then.get(name) != now[name]]
    if changed:
        advice = "begin another one with -o FOLDER --new"
        if changed[0].startswith("sources"):
            advice += ", or add what is new in the sources to this one with --extend"
        raise ArgumentError(f"{store.place} holds another run: {'; '.join(changed)}. Go on with what it was, or {advice}")


def _summary(
    store: Store,
    plan: Plan,
    hello: Hello,
    tally: _Tally,
    totals: Totals,
    start: float,
    workers: int,
    vanished: Sequence[str],
    skipped: str,
) -> Summary:
    return Summary(
        out=store.place,
        tokenizer=plan.header.tokenizer,
        fingerprint=plan.header.fingerprint,
        units=plan.units,
        items=totals.items,
        failures=totals.failures,
        encoded=tally.items,
        ids=tally.ids,
        bytes=tally.bytes,
        extent=tally.extent,
        extent_unit=hello.extent_unit,
        seconds=time.monotonic() - start,
        cpu_seconds=tally.cpu_seconds,
        workers=workers,
        vanished=tuple(vanished),
        skipped=skipped,
    )


class _Tally:
    """Counts what is done, behind a progress bar and for machines."""

    def __init__(
        self,
        plan: Plan,
        hello: Hello,
        start: float,
        shown: bool,
        on_event: Callable[[dict[str, Any]], object] | None,
        crew: _Crew,
    ) -> None:
        self._plan, self._hello, self._start, self._on_event, self._crew = plan, hello, start, on_event, crew
        self._bar: Any = None
        self._shown = shown
        self._before = 0
        self.units = self.items = self.failures = self.ids = self.bytes = 0
        self.extent = self.cpu_seconds = 0.0
        self.absent: list[str] = []

    def begin(self, done: Mapping[int, str], plan: Plan, store: Store) -> None:
        """Start the bar where an earlier run stopped."""
        self._start = time.monotonic()
        self._before = plan.items if len(done) == plan.units else min(plan.items, len(done) * plan.items // plan.units)
        if self._shown:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=plan.items, initial=self._before, desc="tokenize", unit="item", dynamic_ncols=True)

    def add(self, done: Done, worker: int) -> None:
        """A unit."""
        self.units += 1
        self.items += done.items
        self.failures += done.failures
        self.ids += done.ids
        self.bytes += done.bytes
        self.extent += done.extent
        self.cpu_seconds += done.seconds
        self.show()
        if self._on_event is not None:
            self._on_event({"event": "unit", "unit": done.unit, "worker": worker} | self._figures(done))

    def _figures(self, done: Done) -> dict[str, Any]:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self.items / seconds
        left = self._plan.items - self._before - self.items
        figures = {
            "items": done.items,
            "failures": done.failures,
            "cpu_seconds": round(done.seconds, 3),
            "items_done": self._before + self.items,
            "items_total": self._plan.items,
            "failures_total": self.failures,
            "items_per_second": round(rate, 3),
            "seconds_left": round(max(left, 0) / rate, 1),
        }
        unit = self._hello.extent_unit
        return figures | ({f"{unit}_per_second": round(self.extent / seconds, 6)} if unit else {})

    def show(self) -> None:
        """Bring the bar up to date, with the items that are being worked on."""
        if self._bar is None:
            return
        seconds = max(time.monotonic() - self._start, 1e-9)
        figures: dict[str, Any] = {"failed": self.failures}
        if self._hello.extent_unit:
            figures[f"{self._hello.extent_unit}/s"] = f"{self.extent / seconds:.3g}"
        self._bar.n = min(self._before + self.items + self._crew.begun, self._plan.items)
        self._bar.set_postfix(figures, refresh=False)
        self._bar.refresh()

    def end(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self.show()
            self._bar.close()


class _Crew:
    """The seats of a run; the first one is taken at once, to learn what the tokenizer is."""

    def __init__(
        self, loading: Any, options: Mapping[str, Any], workers: int | None, gpus: int | None, cluster: str | None
    ) -> None:
        self._loading, self._options, self._workers, self._gpus, self._cluster = loading, options, workers, gpus, cluster
        self._seats: list[Seat] = []
        self._nurseries: dict[str | None, Nursery] = {}
        self._stack = ExitStack()
        self.count = 0

    def __enter__(self) -> _Crew:
        if self._cluster is not None:
            from zoo.engine.cluster import connected

            self._stack.enter_context(connected(self._cluster))
        try:
            first = self._seat(0)
            self._seats.append(first)
            self.hello = first.hello()
        except BaseException:
            self.__exit__()
            raise
        if self._workers is None:
            cuda = self.hello.device == "cuda"
            self._workers = PER_GPU * (self._gpus or self.hello.devices) if cuda else _cores(self._cluster)
        return self

    def __exit__(self, *_: object) -> None:
        for seat in self._seats:
            seat.stop()
        for nursery in self._nurseries.values():
            nursery.close()
        self._stack.close()

    def _seat(self, number: int) -> Seat:
        if self._workers == 0:
            return InlineSeat(self._loading, self._options)
        loading = self._loading
        if self._cluster is not None:
            from zoo.engine.cluster import RemoteSeat

            return RemoteSeat(loading, self._options)
        if isinstance(loading, Loading) and loading.device == "cuda" and number:
            gpus = self._gpus or self.hello.devices
            loading = replace(loading, device=f"cuda:{number % gpus}")
        # One for each device.
        if loading.device not in self._nurseries:
            self._nurseries[loading.device] = Nursery(loading, self._options)
        return ProcessSeat(self._nurseries[loading.device])

    @property
    def begun(self) -> int:
        """Items at work, or in units that are not done."""
        return sum(seat.begun for seat in self._seats)

    def run(self, work: Work, plan: Plan, store: Store, wanted: set[int], tally: _Tally, lock: Lock) -> None:
        """Work on the wanted units, each on the next free seat.

        Raises:
            KeyboardInterrupt: after the units in flight are done; at a second Ctrl-C at once.
        """
        self.count = min(self._workers or 1, max(len(wanted), 1))
        if not wanted:
            return
        jobs = _Jobs(plan.rows(store, wanted.__contains__))
        results: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        while len(self._seats) < self.count:
            self._seats.append(self._seat(len(self._seats)))
        for number, seat in enumerate(self._seats):
            threading.Thread(target=_serve, args=(number, seat, work, jobs, results), daemon=True).start()
        working = self.count
        with _two_interrupts(jobs.stop) as interrupted:
            failure: BaseException | None = None
            while working:
                try:
                    number, result = results.get(timeout=0.5)
                except Empty:
                    tally.show()
                    continue
                if isinstance(result, Done):
                    self._seats[number].begun = 0
                    tally.add(result, number)
                    try:
                        lock.require()
                    except ArgumentError as error:
                        failure = failure or error
                        jobs.stop()
                elif isinstance(result, _Absent):
                    tally.absent.append(result.reason)
                else:
                    working -= 1
                    if result is not None:
                        failure = failure or result
                        jobs.stop()
            if failure is not None:
                raise failure
        if interrupted():
            raise KeyboardInterrupt


@dataclass(frozen=True)
class _Absent:
    """A unit that cannot be done, because a source is not what was listed."""

    reason: str


class _Jobs:
    """Units that are handed out one at a time, until it is stopped."""

    def __init__(self, units: Iterator[tuple[int, list[Any]]]) -> None:
        self._units = units
        self._lock = threading.Lock()
        self._stopped = False

    def next(self) -> Job | None:
        """The next unit; ``None`` if there is none."""
        with self._lock:
            found = None if self._stopped else next(self._units, None)
        return None if found is None else Job(*found)

    def stop(self) -> None:
        """Hand out no more."""
        self._stopped = True


def _serve(number: int, seat: Seat, work: Work, jobs: _Jobs, results: SimpleQueue[tuple[int, Any]]) -> None:
    """Work on units on one seat until there are no more; then say so, with the error if there was one."""
    from zoo.engine.contents import SourceError

    try:
        while (job := jobs.next()) is not None:
            try:
                results.put((number, seat.run(work, job)))
            except SourceError as error:
                results.put((number, _Absent(error.reason)))
    except StoppedError:
        results.put((number, None))
    except BaseException as error:
        results.put((number, error))
    else:
        # Before it is said that the work is done: on a cluster others may wait for the place.
        seat.stop()
        results.put((number, None))


@contextmanager
def _two_interrupts(stop: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C once calls ``stop``, and twice raises `KeyboardInterrupt`; what is given says whether there was one."""
    count = 0

    def handle(*_: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt
        stop()

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _cores(cluster: str | None) -> int:
    """Cores that workers may have."""
    if cluster is not None:
        from zoo.engine.cluster import cores

        return cores()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
