"""Ends a run in which a rank makes no progress, and names that rank, on every rank and node.

    each rank   publishes phase, step and age of its latest progress in the rendezvous store, and
                reads the verdict and rank 0's state there, once a second
    rank 0      reads what all ranks published; if one exceeds its limit, writes the verdict
    each rank   after a verdict: dumps its stacks, prints the verdict, exits; a rank whose
                connections end first waits for the verdict, which says more (`verdict`)
                if rank 0's store does not answer, or rank 0 publishes nothing: the same, naming
                rank 0

A rank that fails, or sees another one of its machine die, writes the verdict itself (`tell`): the
store reaches other nodes, where a collective may wait for its timeout. Store operations may block,
and a blocked main thread handles no signal: two daemon threads do this work.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from fgpt.distributed.agreements import gather_json
from fgpt.distributed.launch import World
from fgpt.distributed.peers import lost_rank
from fgpt.distributed.progress import Progress, describe
from fgpt.utils.deadlines import within
from fgpt.utils.files import no_follow

INTERVAL_S = 1.0
SILENT_S = 4.0
"""A rank whose thread has published nothing for this long is stopped, or its host is cut off."""
VERDICT_GRACE_S = 4.0
"""Time for the main thread to notice the same by itself and say more, in seconds."""
STACKS_S = 3.0
"""Limit for writing the stacks, in seconds: a file system that hangs may be what ends the run."""
VERDICT_WAIT_S = 3.0
"""How long a rank that lost a connection waits for the verdict that names the cause, in seconds."""
LINGER_S = 1.5
"""Rank 0 keeps the store alive for this long, so that the others read the verdict, in seconds."""

Leave = Callable[[str], NoReturn]
"""Prints why this rank leaves, and exits."""


@dataclass(frozen=True)
class RankState:
    """What a rank publishes."""

    rank: int
    host: str
    beat: int
    """Counts publications: a rank that is stopped publishes none."""
    ticks: int
    phase: str
    step: int
    age_s: float
    """Time since its latest progress, in seconds."""
    limit_s: float | None
    """The most that its phase may take; None: any time."""
    place: str
    """Where its main thread is."""
    waits: bool
    """Whether that waits for other ranks."""
    left: bool = False
    """It has nothing more to do with the others."""

    @property
    def name(self) -> str:
        """The rank and its host, for messages."""
        return f"rank {self.rank} on {self.host}"


def find_stalled(states: Sequence[RankState], silent_s: Sequence[float]) -> str | None:
    """Return what stalls the run, if a rank exceeds its limit, else None.

    `silent_s`: for how long each rank has published nothing, in seconds.
    """
    # 1. is one too late? a rank that has published nothing has made no progress either
    active = [pair for pair in zip(states, silent_s, strict=True) if not pair[0].left]
    late_s = [
        state.age_s + silent
        for state, silent in active
        if state.limit_s is not None and state.age_s + silent > state.limit_s
    ]
    if not late_s:
        return None
    # 2. ranks that do not publish explain the others' wait
    if silent := [(state, s) for state, s in active if s > SILENT_S]:
        who = _listed([state.name for state, _ in silent])
        state, seconds = silent[0]
        return (
            f"{who} sent no sign of life for {seconds:.0f} s: stopped, or the host is gone or cut"
            f" off; last word in {describe(state.phase, state.step)}"
        )
    # 3. else the ranks with the fewest ticks; among them, those outside of a collective
    least = min(state.ticks for state, _ in active)
    behind = [state for state, _ in active if state.ticks == least]
    behind = [state for state in behind if not state.waits] or behind
    first = behind[0]
    who = _listed([state.name for state in behind])
    if len(behind) == len(active) > 1:  # on GPUs the host waits for its device, not for a rank
        who = f"all {len(active)} ranks alike,"
    where = f" (at {first.place})" if first.place else ""
    return (
        f"no progress for {max(late_s):.0f} s: {who} stuck in"
        f" {describe(first.phase, first.step)}{where}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class Watchdog:
    """Watches the progress of all ranks, from `start` to `stop`."""

    def __init__(
        self,
        world: World,
        progress: Progress,
        limit_s: float,
        *,
        leave: Leave,
        kill: Callable[[], None] = lambda: None,
        stacks: Path | None = None,
    ):
        """`limit_s`: see `Progress.limit_s`; 0: nothing is watched, verdicts are still read.

        `leave` ends this process. `kill` is called before it: ends local ranks that do not answer.
        `stacks`: directory for the stacks of every thread; None: they go to stderr.
        """
        self.world, self.progress, self.watchdog_s = world, progress, limit_s
        self.leave, self.kill, self.stacks = leave, kill, stacks
        self.host = socket.gethostname()
        self._stop = threading.Event()
        self._store: dist.Store | None = None
        self._has_store = False
        self._answered_s = time.monotonic()
        """When the store last had news of rank 0."""
        self._rank0_beat = 0
        self._paused_s = -SILENT_S
        """When this process last went on after a pause."""
        self._store_lost = False
        self._verdict: str | None = None
        self._judged = threading.Event()
        """Set once the verdict is known."""
        self._is_stalled = False
        """Whether the verdict says so: this process is about to end."""
        self._left = False
        self._beat = 0
        self._seen: dict[int, tuple[int, float]] = {}
        """Of each rank: its latest beat, and when rank 0 saw it first."""

    def start(self, device: torch.device, store: dist.Store | None) -> None:
        """Start the threads. All ranks call this. `store`: that of the process group."""
        token = gather_json(os.urandom(8).hex(), device)[0]
        if self.world.size > 1 and store is not None:
            # an own connection: another thread's wait in the same one would block it
            connection: Any = store  # torch's stubs have no clone
            own = dist.PrefixStore(f"fgpt/watchdog/{token}", connection.clone())
            self._publish(own)
            self._store, self._has_store = own, True
            gather_json(None, device)  # from here on every rank's state is in the store
            threading.Thread(target=self._exchange, name="fgpt-store", daemon=True).start()
        threading.Thread(target=self._watch, name="fgpt-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer; the others do not wait for this rank any more."""
        self._left = True
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # rank 0 may have ended
                self._publish(self._store)  # watched until here: it may block
        self._stop.set()

    def tell(self, reason: str, *, stalled: bool = False) -> None:
        """Have all ranks leave because of `reason`; returns when rank 0 has passed it on.

        `stalled`: they wait for each other; else their main threads may notice by themselves.
        """
        if self._write_verdict(reason, stalled) and self.world.is_rank0:
            time.sleep(LINGER_S)

    def tell_of_death(self, rank: int) -> None:
        """Have all ranks leave because a rank of this host has died; returns at once."""
        self._write_verdict(lost_rank(rank), stalled=False)

    def _write_verdict(self, reason: str, stalled: bool) -> bool:
        """Write the verdict unless there is one: the first knows the cause. False: no store."""
        store, self._store = self._store, None
        if store is None:
            return False
        verdict, self._is_stalled = {"reason": reason, "stalled": stalled}, stalled
        with contextlib.suppress(RuntimeError):  # rank 0, who serves the store, may be the dead one
            verdict = json.loads(store.compare_set("verdict", "", json.dumps(verdict)))
        if not stalled:
            self._know(str(verdict["reason"]))
        return True

    def _know(self, verdict: str) -> None:
        self._verdict = verdict
        self._judged.set()

    def verdict(self) -> str | None:
        """Return why another rank leaves, waiting a moment for it; None if no rank says so.

        For a main thread whose connections ended. In a stalled run the watchdog's own thread ends
        the process meanwhile.
        """
        if not self._has_store:
            return None
        if not self._judged.wait(VERDICT_WAIT_S):
            if self._is_stalled:
                time.sleep(STACKS_S + VERDICT_WAIT_S)
            return None
        if self.world.is_rank0:
            time.sleep(LINGER_S)
        return self._verdict

    def _state(self) -> RankState:
        progress = self.progress
        limit_s = progress.limit_s(self.watchdog_s) if self.watchdog_s else float("inf")
        place, waits = progress.place()
        self._beat += 1
        return RankState(
            self.world.rank,
            self.host,
            self._beat,
            progress.ticks,
            progress.phase,
            progress.step,
            progress.age_s(),
            limit_s if limit_s < float("inf") else None,
            place,
            waits,
            self._left,
        )

    def _publish(self, store: dist.Store) -> None:
        store.set(f"rank/{self.world.rank}", json.dumps(asdict(self._state())))

    def _exchange(self) -> None:
        """Publish, read the verdict; on rank 0 judge. Blocks while rank 0 does not answer."""
        keys = [f"rank/{rank}" for rank in range(self.world.size)]
        woke_s = time.monotonic()
        while not self._stop.wait(INTERVAL_S) and (store := self._store) is not None:
            woke_s = self._note_pause(woke_s)
            try:
                self._publish(store)
                if store.check(["verdict"]):
                    self._obey(json.loads(store.get("verdict")))
                    return
                if self.world.is_rank0 and self.watchdog_s:
                    states = [RankState(**json.loads(text)) for text in store.multi_get(keys)]
                    if reason := self._judge(states):
                        self.tell(reason, stalled=True)
                        self._end(reason)
                rank0 = RankState(**json.loads(store.get(keys[0])))
            except RuntimeError:  # rank 0's process has ended
                self._store_lost = True
                return
            # its store answers in a thread of its own, also where Python's threads stand still
            if rank0.beat != self._rank0_beat or rank0.left:
                self._rank0_beat, self._answered_s = rank0.beat, time.monotonic()

    def _judge(self, states: Sequence[RankState]) -> str | None:
        now = time.monotonic()
        for state in states:
            if self._seen.get(state.rank, (0, 0.0))[0] != state.beat:
                self._seen[state.rank] = state.beat, now
        if now - self._paused_s < SILENT_S:
            return None
        since_s = [max(self._seen[state.rank][1], self._paused_s) for state in states]
        return find_stalled(states, [now - seen_s for seen_s in since_s])

    def _note_pause(self, woke_s: float) -> float:
        """Start the clocks again if this process was stopped since `woke_s` (Ctrl-Z, fg; a job that
        its scheduler suspends): the other ranks were, too, and go on at other times.

        Returns the time.
        """
        now = time.monotonic()
        if now - woke_s > INTERVAL_S + SILENT_S:
            self.progress.restart_clock()
            self._answered_s = self._paused_s = now
        return now

    def _watch(self) -> None:
        """End this rank where no verdict can come: rank 0 does not answer, or there is one rank."""
        woke_s = time.monotonic()
        while not self._stop.wait(INTERVAL_S):
            woke_s = self._note_pause(woke_s)
            if self._store_lost:
                if not self._stop.wait(VERDICT_GRACE_S):
                    self._end(lost_rank(0), dump=False)
                return
            silent_s = time.monotonic() - self._answered_s
            alone = self._store is None
            margin_s = 0.0 if alone else 2 * INTERVAL_S + VERDICT_GRACE_S
            late = self.watchdog_s and self.progress.age_s() > margin_s + self.progress.limit_s(
                self.watchdog_s
            )
            if late and alone and self.world.size == 1:
                self._end(find_stalled([self._state()], [0.0]) or "no progress")
            elif late and silent_s > SILENT_S:
                self._end(
                    f"rank 0 sent no sign of life for {silent_s:.0f} s: stopped, or its host is"
                    " gone or cut off"
                )

    def _obey(self, verdict: Mapping[str, Any]) -> None:
        """Leave because of another rank's verdict, unless the main thread does so by itself."""
        stalled = self._is_stalled = bool(verdict["stalled"])
        if not stalled:
            self._know(str(verdict["reason"]))
        if stalled or not self._stop.wait(VERDICT_GRACE_S):
            self._end(str(verdict["reason"]), dump=stalled)

    def _end(self, reason: str, dump: bool = True) -> None:
        if self._stop.is_set():
            return
        try:
            if dump:
                stacks = within(STACKS_S, self._dump_stacks, None)
                reason += f"; {stacks or 'no stacks: the run directory does not answer'}"
            self.kill()
            self.leave(reason)
        finally:
            os._exit(1)  # whatever fails on the way

    def _dump_stacks(self) -> str:
        """Write the stacks of all threads; returns where they are, in words."""
        if self.stacks is not None:
            path = self.stacks / f"rank_{self.world.rank:05d}.txt"
            with contextlib.suppress(OSError):
                self.stacks.mkdir(parents=True, exist_ok=True)
                if self.stacks.is_symlink():
                    raise NotADirectoryError(self.stacks)
                with open(path, "w", opener=no_follow) as file:
                    faulthandler.dump_traceback(file)
                return f"stacks in {self.stacks}"
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        return "stacks above"
