# distconc 0.1.0.  Copyright (C) 2026 the distconc authors.
# Permission to use, copy, modify, and/or distribute this software for any purpose with or
# without fee is hereby granted.  THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL
# WARRANTIES.  IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY DAMAGES WHATSOEVER.  (0BSD)
"""Threads with mailboxes that send to each other, in one process or on many machines.

Factor's concurrency.distributed for Python, in the line of Erlang and Termite.  One process:

    from distconc import *

    def log_message():
        print(receive())
        return True

    start_node(9000)
    spawn_server(log_message, name="logger", register=True)

and another, which sends to it by name:

    from distconc import *
    send("hello", RemoteThread(9000, "logger"))

What is promised.  Messages from one thread to another arrive in the order sent, at most once,
unaltered; after a lost connection never an old one after a new one.  `send` returns when a
message is accepted here; only a reply proves that it arrived.  A call ends in its reply or in
an error that says what is known: never in a hang while the other side is gone.  A slow or dead
node delays nobody but those who send to it.

What is dangerous.  Messages are pickles, so whoever has the key can run any code here, unless
`allow=` is narrow.  Frames cannot be forged or altered on their way, but they can be read: for
secrecy use `ssh -L` or WireGuard.

Words.  A node is a process that can be addressed; its incarnation, a random number, tells it
from earlier ones at that address.  A thread has a mailbox.  A handle means a thread: a `Thread`
of this node, or a `RemoteThread` of any.  A debt is an outcome that a thread owes to whoever
awaits it.

    node A                                                   node B
    Thread ── send ──> _Connection                           _threads: who is meant
                         │ the sender; or outbox, then writer    ↑
                         └──── frames, sealed ────> reader of B's _Connection
                                                                 │ put
    _awaited[tag] <── reader <──── REPLY, FAILED ────            ↓
    a call, link or monitor                                  Thread: Mailbox ── receive ──> ...
    that is settled once                                     _debts[tag]: who hears of its end

The locks, in the order taken: `_settling` (outcomes), `_starting` (which node this is),
`Node._lock` (its tables), `_registry` (names and ends of threads), `_losing` (the log of
losses), each connection's `_writing`, `_clocking` (the trace).  Only `_writing` is held while
waiting for the network.  Mailboxes need none.

The wire.  After the stock challenge of `multiprocessing.connection` with the key (the dialler
answers first, then challenges), each side sends with `send_bytes` one hello, its fields joined
by NUL: "distconc 3", its role ("dialler" or "acceptor"), 16 random bytes in hex, its
incarnation in hex, its heartbeat, its max_message, its address ("host:port", a path, or "" if
it does not listen); the dialler also the address it dialled and the one it reached, of which
one must be the acceptor's.  Then frames, on the bare socket: the lengths of body (at most 64
MiB) and tail (at most max_message, or 64 KiB if that is more), 4 bytes each, big-endian; MAC
(16 bytes); body; tail.  MAC: BLAKE2b, 16 bytes, with the direction's key, of all frames in that
direction up to this one, but without their MACs, and with SHA-256 of a body of more than 2048
bytes, or of any tail, in its place.  The direction's key is HMAC-SHA256(authkey, role of the
writer + SHA-256(dialler's hello) + SHA-256(acceptor's hello)).  A body is a pickled pair: the
heads of messages, and their payloads; if the last of these is None, the tail is meant.  No
heads are a tick: who has nothing else to say owes five in the smaller of the two heartbeats.
To end is to shut down one's writing half (in the middle of a frame, that was none), and to read
the other's to its end.  The first frame each way, the dialler's first, has one head, a pair:
the number that the writer gives this connection, counting from 1, and that of the oldest
between the two that it still counts.  The other heads are these (a target is a pair of
incarnation, or 0 for any, and id or name; id 0 is the node, which does a call's ("ps",) or
("spawn", func, args, name, register, link)):

    0 SEND    target                                   the payload is the message, pickled
    1 ASK     target, caller's id, tag                 a call, so too; or, of 0, a monitor
    2 REPLY   tag                                      the payload is the reply, pickled
    3 FAILED  tag, error          of this module; payload: a ThreadDied's reason, up to 64 KiB
    4 FORGET  tag                                      who asked needs no answer any more
    5 LOST    id or name, why, how many                sends that nobody could take
    6 STAMP   an event (incarnation in hex, thread, clock), then another head, sent in it
"""

import atexit
import hashlib
import hmac
import io
import itertools
import os
import pickle
import random
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache, partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener, answer_challenge, deliver_challenge
from time import monotonic, sleep, time
from typing import Any, Union

__all__ = """
    Mailbox Thread RemoteThread spawn spawn_linked spawn_server current_thread threads
    send receive receive_if
    Synchronous Reply send_synchronous reply_synchronous handle_synchronous
    Node start_node stop_node local_node nodes connect disconnect ChildNode spawn_node
    register_remote_thread unregister_remote_thread get_remote_thread serialize deserialize
    Monitor Down monitor demonitor
    DistconcError LinkedError NodeDown NodeUnreachable NoSuchThread ThreadDied
    SynchronousToSelfError SerializationError RemoteError AuthenticationError
    trace chart faults
""".split()
__version__ = "0.1.0"

Handle = Union["Thread", "RemoteThread"]
Address = Union[tuple[str, int], str]
Target = tuple[int, Union[int, str]]  # incarnation (0: any), and id or name
Head = tuple[Any, ...]  # of a message on the wire: its kind, then what the module's head says
NodeLike = Union[int, Address, "os.PathLike[str]", "Node", "ChildNode"]
Predicate = Union[Callable[[Any], Any], type, tuple[type, ...], types.UnionType]


######## Errors: what a caller may see, each with what it is about


class DistconcError(Exception):
    """The base of this module's errors; its text is the last of its `args`."""

    def __str__(self) -> str:
        return str(self.args[-1]) if self.args else ""


class LinkedError(DistconcError):
    """A linked thread failed: `.error` is why, `.thread` which.  Factor: linked-error."""

    def __init__(self, error: BaseException, thread: Handle) -> None:
        super().__init__(error, thread)
        self.error, self.thread = error, thread

    def __str__(self) -> str:
        return f"{self.thread} failed: {type(self.error).__name__}: {self.error}"


class NodeDown(DistconcError, ConnectionError):
    """Contact with a node was lost, or never made; what was under way may have arrived."""


class NodeUnreachable(NodeDown):
    """The node could not be connected to, so nothing was delivered."""


class NoSuchThread(DistconcError, LookupError):
    """No living thread has that id or name there; nothing was delivered."""


class ThreadDied(DistconcError):
    """The thread ended before it replied, of `.reason` (None: it returned).

    If it failed, `__cause__` is a RemoteError whose text is (the end of) the traceback.
    """

    reason = property(lambda self: self.args[0])

    def __init__(self, reason: BaseException | None, cause: "RemoteError | None",
                 text: str) -> None:
        super().__init__(reason, cause, text)
        self.__cause__ = cause


class SynchronousToSelfError(DistconcError):
    """Who calls itself would wait for ever.  Factor: cannot-send-synchronous-to-self."""


class SerializationError(DistconcError, ValueError):
    """The message cannot be copied to another node; it was not sent."""


class RemoteError(DistconcError):
    """Stands in for what could not cross: `.type` is its name, the text its traceback."""

    type = property(lambda self: self.args[0])


################ Part one: one process ################
######## Waiting: deadlines, and locks that serve as bells


def _deadline(timeout: float | None) -> float | None:
    try:
        return None if timeout is None else monotonic() + timeout
    except TypeError:
        raise TypeError(f"a timeout is seconds, or None, not {timeout!r}") from None


def _left(deadline: float | None) -> float:
    """The seconds until `deadline`, as `Lock.acquire` takes them: -1 means for ever."""
    if deadline is None:
        return -1
    return min(max(deadline - monotonic(), 0), threading.TIMEOUT_MAX)


def _bell() -> threading.Lock:
    """A lock that is held until someone rings: to wait for it is to acquire it."""
    bell = threading.Lock()
    bell.acquire()
    return bell


def _hear(bell: threading.Lock, timeout: float) -> bool:
    """Wait for a bell that is rung once, for all: who hears it rings it for the next."""
    for heard in map(bell.acquire, (True,), (timeout,)):  # so Ctrl-C cannot come before `try`
        try:
            return heard
        finally:
            if heard:
                bell.release()
    return False  # never reached


def _ring(bell: threading.Lock) -> None:
    """Wake who waits for `bell`, or spare the next wait.  Never blocks; twice is once."""
    if bell.locked():
        try:
            bell.release()
        except RuntimeError:
            pass  # another thread rang it between the two lines


######## Mailbox: put, get, get_if, get_all, empty


_NOTHING: Any = object()  # what a mailbox gives instead of a message, and no default given
_TAKEN: list[Any] = []  # a cell whose message was taken equals it


class Mailbox:
    """A queue from which the oldest message that fits can be taken.  Factor: mailbox.

    Each message lies in a cell of its own, a list of one.  To take it is `del cell[0]`: only
    one thread succeeds, without a lock, and Ctrl-C cannot strike between that and the
    `return`.  The empty cell is swept out by who meets it next.  Any number of threads may put
    and get.
    """

    __slots__ = ("_cells", "_waiters")

    def __init__(self) -> None:
        self._cells: deque[list[Any]] = deque()  # oldest first, some of them empty
        self._waiters: dict[threading.Lock, list[list[Any]]] = {}  # by bell: what is new

    def put(self, message: Any) -> None:
        """Add `message` as the newest.  Never blocks, not even in a signal handler.

        Factor: mailbox-put.
        """
        self._add([message])

    def _add(self, *cells: list[Any]) -> None:
        try:
            self._cells.extend(cells)
        finally:  # Ctrl-C may come between the two
            if self._waiters:
                for bell, news in self._waiters.copy().items():
                    news.extend(cells)
                    _ring(bell)

    def get(self, timeout: float | None = None) -> Any:
        """Remove and return the oldest message.

        Blocks at most `timeout` seconds (None: for ever; 0 or less: not at all).  Raises
        TimeoutError, leaving the mailbox as it was.  Factor: mailbox-get, mailbox-get-timeout.
        """
        message = self._get(timeout)
        if message is _NOTHING:
            raise TimeoutError("no message came within the time-out")
        return message

    def _get(self, timeout: float | None) -> Any:
        cells = self._cells
        while cells:
            try:
                cell = cells[0]
                if cell:
                    message = cell[0]
                    del cell[0]
                    return message
                cells.remove(_TAKEN)
            except (IndexError, ValueError):
                pass  # another thread took it first, or swept first
        return self._get_if(None, timeout)

    def get_if(self, pred: Predicate, timeout: float | None = None) -> Any:
        """Remove and return the oldest message for which `pred` is true; the others stay.

        A class, or a tuple of classes, stands for its `isinstance`.  `pred` runs in this thread
        with no lock held, once for each message.  Blocks at most `timeout` seconds (None: for
        ever; 0 or less: not at all).  Raises TimeoutError, or what `pred` raises, leaving the
        mailbox as it was.

        Factor: mailbox-get?, mailbox-get-timeout?.
        """
        message = self._get_if(_accepts(pred), timeout)
        if message is _NOTHING:
            raise TimeoutError("no such message came within the time-out")
        return message

    def _get_if(self, accepts: Callable[[Any], Any] | None, timeout: float | None) -> Any:
        deadline = None if timeout is None else _deadline(timeout)
        bell = _bell()
        news: list[list[Any]] = []
        self._waiters[bell] = news  # before looking: nothing may slip in unseen
        try:
            return self._search(accepts, deadline, bell, news)
        finally:
            del self._waiters[bell]

    def _search(self, accepts: Callable[[Any], Any] | None, deadline: float | None,
                bell: threading.Lock, news: list[list[Any]]) -> Any:
        """Look through what is here, then through what is new each time that the bell rings.

        A function of its own, as what guards a loop must stand outside of it: from Python 3.12
        on, Ctrl-C can strike as a loop goes round, and the `try` around it does not see that.
        """
        if self._cells:
            try:
                self._cells.remove(_TAKEN)  # each call leaves one at most, and sweeps one
            except ValueError:
                pass
        here = cells = list(self._cells)
        seen: set[int] | None = None
        while True:
            for cell in cells:
                for message in cell:  # none, if it was taken
                    if accepts is None or accepts(message):
                        try:
                            message = cell[0]
                            del cell[0]
                            return message
                        except IndexError:
                            pass  # another thread took it first
            left = -1 if deadline is None else _left(deadline)
            if not left or not bell.acquire(True, left):
                return _NOTHING
            cells = news[:]
            del news[:len(cells)]
            if here:  # a put that was under way may be both there and here
                seen = seen or set(map(id, here))
                cells = [cell for cell in cells if id(cell) not in seen]

    def get_all(self, timeout: float | None = None) -> list[Any]:
        """Wait for a message, then remove and return all there are, oldest first.

        Blocks and raises as `get` does.  Factor: mailbox-get-all, mailbox-get-all-timeout.
        """
        taken = [self.get(timeout)]
        try:
            self._take_rest(taken)
        except BaseException:  # Ctrl-C
            self._cells.extendleft([message] for message in reversed(taken))
            raise
        return taken

    def _take_rest(self, taken: list[Any]) -> None:
        for _ in range(len(self._cells)):  # no more: others may put faster than we take
            if (message := self._get(0)) is not _NOTHING:
                taken.append(message)

    def empty(self) -> bool:
        """Whether no message is here now.  Never blocks; it may change at once."""
        return not any(list(self._cells))


def _accepts(pred: Predicate, also: tuple[type, ...] = ()) -> Callable[[Any], Any]:
    """Return what says whether a message fits `pred`, or is of a class in `also`."""
    if isinstance(pred, (type, tuple, types.UnionType)):
        kinds: Any = pred, also
        return lambda message: isinstance(message, kinds)
    if not callable(pred):
        raise TypeError(f"a predicate, or a class, is what messages are chosen by: {pred!r}")
    return lambda message: isinstance(message, also) or pred(message)


######## Outcomes: whatever awaits one is one entry in one table, settled once

_awaited: dict[str, "_Await"] = {}  # by tag: what this process waits for
_Debts = dict[str, tuple[int, bool]]  # of a thread, by tag: which node hears of its end, linked
_debts: dict[str, _Debts] = {}  # by tag: where it stands
_settling = threading.RLock()  # guards: to take from _awaited and to tell who waits is one step


class _Await:
    """What awaits a reply, the end of a thread or the loss of a node.  As it is, a call."""

    peer = 0  # the incarnation of the node whose loss settles it; 0: this node

    def __init__(self, thread: "Thread") -> None:
        self.thread = thread
        self.tag = os.urandom(8).hex()  # not to be guessed, so that nobody can forge an outcome
        self.settled = _bell()
        _awaited[self.tag] = self

    def settle(self, error: DistconcError | None, reply: Any = None) -> None:
        """Take the outcome; must not block."""
        self.error, self.reply, self.cause = error, reply, _here.cause
        self.settled.release()

    def excuse(self) -> None:
        """Whoever owes it need not tell any more: it came another way, or nobody waits."""
        if self.peer:
            local_node()._post(self.peer, (FORGET, self.tag))
        else:
            _strike(self.tag)


def _settle(tag: str, error: DistconcError | None, reply: Any = None, peer: int = 0) -> bool:
    """Give what is awaited its outcome, which came from `peer`; False if nobody hears it."""
    awaited = _awaited.get(tag)
    if awaited and not (peer and awaited.peer == peer):
        awaited.excuse()  # who was called had passed it on, perhaps
    with _settling:
        if awaited := _awaited.pop(tag, None):
            awaited.settle(error, reply)
    return awaited is not None and not awaited.thread._ended


def _strike(tag: str) -> tuple[int, bool] | None:
    """Nobody needs to hear any more of the debt `tag`; return it, if it stood."""
    return _debts.pop(tag, {}).pop(tag, None)


def _pay(tag: str, error: DistconcError) -> bool:
    """Settle the debt `tag` with `error`; False if nobody hears it."""
    debt = _strike(tag)
    return debt is not None and _fail(debt[0], tag, error)


class _Link(_Await):
    """A parent that wants to hear of its child's failure."""

    child: Handle | None = None  # unknown yet if the child ends before its start has answered
    failure: BaseException | None = None

    def settle(self, error: DistconcError | None, reply: Any = None) -> None:
        self.failure = error.reason if isinstance(error, ThreadDied) else error
        self.deliver()

    def deliver(self) -> None:
        """Send the failure, once both that and the child are known; `_settling` is held."""
        if self.child and self.failure is not None:
            self.thread._put(LinkedError(self.failure, self.child))
            self.failure = None


######## Threads: Thread, current_thread, threads, spawn, spawn_linked, spawn_server

_incarnation = int.from_bytes(os.urandom(8), "big")  # of this process; never 0 but by a miracle
_ids = itertools.count(1)
_threads: dict[Target, "Thread"] = {}  # the living: by incarnation and id, by 0 and name
_registry = threading.RLock()  # guards: a thread's end and the change of its names is one step


class _Fixed:
    """Something immutable that is equal to whatever has the same key."""

    __slots__ = ()
    _key: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fixed) and bool(self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def __setstate__(self, state: Any) -> None:
        raise TypeError(f"a {type(self).__name__} cannot be changed, nor by a pickle")


class _Handle(_Fixed):
    """What `Thread` and `RemoteThread` share: they are equal if they mean the same thread."""

    __slots__ = ("_key",)


class Thread(_Handle):
    """A thread with a mailbox, on this node; made by `spawn`.  Factor: thread.  Erlang: pid.

    `.id`, `.name` and `.node` (its address) say which.  Can be put into messages: pickled, it
    turns into a `RemoteThread` that is equal to it; copied, it is itself.
    """

    __slots__ = ("id", "name", "_mailbox", "_owes", "_names", "_ended", "_over", "_began",
                 "_ident")

    def __init__(self, name: str) -> None:
        self.id, self.name = next(_ids), name
        self._began = monotonic()
        self._ident: int | None = None  # what the `threading` module calls it, once it runs
        self._key = (_incarnation, self.id)
        self._mailbox = Mailbox()
        self._owes: _Debts = {}  # who hears of its end
        self._names: tuple[str, ...] = ()  # registered; guarded by _registry
        self._ended = False  # guarded by _registry
        self._over = _bell()  # rung at the end, for all

    node = property(lambda self: local_node().address)

    def is_alive(self) -> bool:
        """Whether the thread has not ended.  Never blocks."""
        return not self._ended

    def join(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds for the thread's end; return whether it has ended.

        Raises RuntimeError in the thread itself, which would wait for ever.
        """
        if _here.thread is self:
            raise RuntimeError("a thread cannot wait for its own end")
        _hear(self._over, _left(_deadline(timeout)))
        return self._ended

    def send(self, message: Any) -> None:
        """Put `message` itself into the thread's mailbox.  Never blocks; see `send`."""
        if _trace or self._ended or message.__class__ is Reply:
            self._send(message)
        else:
            self._mailbox._add([message])

    def _send_all(self, messages: list[Any]) -> None:
        if _trace or self._ended or Reply in map(type, messages):
            for message in messages:
                self.send(message)
        else:
            self._mailbox._add(*[[message] for message in messages])

    def _send(self, message: Any) -> None:
        """Send in the ways less trodden: traced, to the dead, a reply."""
        if _trace and _here.cause is None:
            with _sending(message, self):
                self._send(message)
        elif message.__class__ is Reply:
            if isinstance(message.tag, str):  # it may be forged, and anything
                self._answer(message.data, message.tag)
        elif self._ended:
            _undelivered(self, "it has ended")
        else:
            self._put(message)

    def _answer(self, data: Any, tag: str) -> None:
        _settle(tag, None, data)

    def _put(self, message: Any) -> None:
        self._mailbox._add(_Traced(message, _here.cause) if _trace else [message])

    def _ask(self, awaited: _Await, caller: "Thread | None" = None, data: Any = None) -> None:
        """Owe `awaited` its outcome; with a caller, deliver the message that asks for it."""
        if caller is self:
            raise SynchronousToSelfError(f"{self!r} cannot wait for its own reply")
        if self._owe(awaited.tag) and caller:
            self.send(Synchronous(data, caller, awaited.tag))

    def _owe(self, tag: str, creditor: int = 0, linked: bool = False) -> bool:
        """Have this thread's end told to who awaits `tag`; False if it has ended already."""
        self._owes[tag] = creditor, linked
        _debts[tag] = self._owes
        if self._ended:  # perhaps just now, before it could see this debt
            _pay(tag, NoSuchThread(f"{self!r} has ended"))
        return not self._ended

    def _start(self, func: Callable[..., Any], *args: Any) -> None:
        run = threading.Thread(target=self._run, args=(func, args), name=self.name, daemon=True)
        try:
            run.start()
        except BaseException as error:
            self._end(error, show=False)
            raise

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        _here.thread, self._ident = self, threading.get_ident()
        try:
            func(*args)
        except BaseException as error:
            self._end(None if isinstance(error, SystemExit) else error)
        else:
            self._end(None)

    def _end(self, reason: BaseException | None, show: bool = True) -> None:
        """Take no more messages, print the failure if nobody is linked, pay what is owed.

        In this order: who sees the failure finds the thread ended, and who hears of it might
        end the process.
        """
        crash = _trace and reason is not None and _record(self, "crash", error=_words(reason))
        try:
            with _because(crash or _record(self, "end")):
                with _registry:
                    self._ended = True
                    _threads.pop(self._key, None)
                    for name in self._names:
                        _threads.pop((0, name), None)  # a fork may have cleared them
                self._pay_all(reason, reason if show else None)
        finally:
            self._show_unread()
            _ring(self._over)

    def _pay_all(self, reason: BaseException | None, failure: BaseException | None) -> None:
        """Tell who awaits the end; print the failure if nobody who is linked can hear of it."""
        owed = self._owes.copy()
        links = {tag for tag, (_, linked) in owed.items() if linked}
        try:
            if not links:
                _print_failure(failure)
        finally:
            heard = {tag for tag in owed if _pay(tag, _obituary(self, reason))}
        if links - heard:  # who was linked is gone
            _print_failure(failure)

    def _show_unread(self) -> None:
        """Print the failures of linked threads that nobody can receive any more."""
        for error in itertools.chain(*list(self._mailbox._cells)):
            if isinstance(error, LinkedError):
                _print_failure(error, getattr(error.error, "__traceback__", None))

    def __repr__(self) -> str:
        return f"<Thread {self.id} {self.name!r}{', ended' if self._ended else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteThread, (self.node, self.id, self._key[0])

    def __deepcopy__(self, memo: Any = None) -> "Thread":
        return self

    __copy__ = __deepcopy__


def _print_failure(error: BaseException | None, trace: Any = None) -> None:
    if error is not None:
        about = type(error), error, trace or error.__traceback__, threading.current_thread()
        threading.excepthook(threading.ExceptHookArgs(about))


def _obituary(thread: Thread, reason: BaseException | None) -> ThreadDied:
    """What the end of `thread` is to those who wait for it."""
    if reason is None:
        return ThreadDied(None, None, f"{thread!r} returned without a reply")
    cause = RemoteError(type(reason).__name__, _traceback(reason)[-TEXT:])
    return ThreadDied(reason, cause, f"{thread!r} died before it replied: {_words(reason)}")


def _traceback(error: BaseException, *, whole: bool = True) -> str:
    """The traceback, or its last line; safe even from an error that cannot be printed."""
    try:
        import traceback

        if whole:
            return "".join(traceback.format_exception(error))
        lines = traceback.format_exception_only(error)
        return next((line for line in lines if type(error).__name__ in line), lines[-1])
    except Exception:
        return f"{type(error).__name__} (its traceback cannot be printed)"


def _words(error: BaseException) -> str:
    """The last line of a traceback, cut to size."""
    return _traceback(error, whole=False).strip()[:1000]


class _Guest:
    """Lies in the locals of an adopted thread, to be dropped, and to tell, when that ends."""

    def __init__(self, thread: Thread) -> None:
        self.thread, self.process = thread, os.getpid()

    def __del__(self) -> None:
        if os.getpid() == self.process:  # a fork drops it, too, with locks in any state
            self.thread._end(None)


class _Here(threading.local):
    """What belongs to the running thread."""

    thread: Thread | None = None
    guest: _Guest | None = None
    cause: "Stamp | None" = None  # of what is sent now, unless it is this thread; see _because


_here = _Here()


def current_thread() -> Thread:
    """Return the handle of the calling thread.  Never blocks.  Factor: self.  Erlang: self().

    A thread that `spawn` did not make (the main thread, a `threading.Thread`) is adopted.  When
    it ends, of whatever, that counts as returning.
    """
    if _here.thread is None:
        bearer = threading.current_thread()
        thread = _here.thread = Thread(bearer.name)
        thread._ident = bearer.ident
        _threads[thread._key] = thread
        if bearer is not threading.main_thread():
            _here.guest = _Guest(thread)
    return _here.thread


def threads() -> dict[int, Thread]:
    """Return a new dict of this node's living threads by id.  Never blocks.  In Factor, too."""
    return {id: thread for (run, id), thread in _threads.copy().items() if run}  # type: ignore


def spawn(func: Callable[..., Any], *args: Any, name: str | None = None,
          node: NodeLike | None = None, register: bool = False) -> Handle:
    """Run `func(*args)` in a new daemon thread; return its handle.  Factor, Erlang: spawn.

    `name` defaults to the function's; `register=True` registers it before the thread runs.
    With `node` the thread runs there, where `func` is imported; that blocks until it has
    started, and raises what is raised there, NodeDown, SerializationError, RemoteError,
    AuthenticationError.  Then nothing has started (after NodeDown: perhaps).  For keyword
    arguments use `functools.partial`.
    """
    return _spawn(None, func, args, name, node, register)


def spawn_linked(func: Callable[..., Any], *args: Any, **options: Any) -> Handle:
    """Like `spawn`; if `func` fails or its node is lost, this thread gets a `LinkedError`.

    Exactly one, in its mailbox, raised by the `receive` that takes it.  To return or to raise
    SystemExit is no failure.  Factor: spawn-linked.  Erlang: spawn_link, one way.
    """
    link = _Link(current_thread())
    try:
        link.child = _spawn(link, func, args, **options)
    except BaseException:
        _awaited.pop(link.tag, None)  # what is raised here is the one error
        raise
    with _settling:
        link.deliver()
    return link.child


def spawn_server(func: Callable[..., Any], *args: Any, **options: Any) -> Handle:
    """Like `spawn`, but calls `func(*args)` again while it returns something true.

    Factor: spawn-server.
    """
    return spawn(_serve, func, *args, **options)


def _serve(func: Callable[..., Any], *args: Any) -> None:
    while func(*args):
        pass


def _spawn(link: _Link | None, func: Callable[..., Any], args: Any, name: str | None = None,
           node: NodeLike | None = None, register: bool = False) -> Handle:
    work = args[0] if func is _serve else func
    if not callable(work):
        raise TypeError(f"spawn takes a function and its arguments; {work!r} cannot be called")
    name = name or _name_of(work)
    request = func, args, name, register, link.tag if link else None
    with _because(_record(current_thread(), "spawn", child=name) if _trace else None):
        if node is None or local_node()._is_called(_address(node)):
            return _spawn_here(*request)
        child: RemoteThread = _ask_node(_address(node), "spawn", *request)
    if link:
        local_node()._depend(link, child._key[0])
    return child


def _spawn_here(func: Callable[..., Any], args: tuple[Any, ...], name: str, register: bool,
                link: str | None, parent: int = 0) -> Thread:
    thread = Thread(name)
    if register:
        register_remote_thread(thread)
    _threads[thread._key] = thread
    _record(thread, "start", _here.cause)
    if link:
        thread._owe(link, parent, linked=True)
    thread._start(func, *args)
    return thread


def _name_of(func: Any) -> str:
    while isinstance(func, partial):
        func = func.func
    return str(getattr(func, "__name__", type(func).__name__))


######## Messages: send, receive, receive_if


def send(message: Any, thread: Handle) -> None:
    """Send `message` to `thread`.  Factor: send.  Erlang, Termite: !.

    To a thread of this node: puts the object itself into its mailbox, never blocks, never
    raises.  To another node: sends a copy taken now; connects first if need be (at most
    `connect_timeout` seconds), and waits while too much is queued.  Raises SerializationError,
    NodeDown, AuthenticationError; then it was not sent, or was cut off on its way (a NodeDown
    that is no NodeUnreachable).  To return means accepted here; only a reply proves more.  What
    finds nobody there is dropped there and logged here.
    """
    try:
        thread.send(message)
    except AttributeError:
        if isinstance(thread, _Handle):
            raise
        raise TypeError(f"send(message, thread): {thread!r} is not a thread") from None


def receive(timeout: float | None = None, default: Any = _NOTHING) -> Any:
    """Remove and return the oldest message of the calling thread's mailbox.

    Blocks at most `timeout` seconds (None: for ever; 0 or less: not at all), then returns
    `default`, or raises TimeoutError.  Raises LinkedError if the message is the failure of a
    linked thread.

    Factor: receive, receive-timeout.
    """
    message = (_here.thread or current_thread())._mailbox._get(timeout)
    if message is _NOTHING:
        return _instead(default, "receive", timeout)
    match message:
        case LinkedError():
            raise message
    return message  # with no call since it was taken, hence no place for Ctrl-C to strike


def receive_if(pred: Predicate, timeout: float | None = None, default: Any = _NOTHING) -> Any:
    """Remove and return the oldest message for which `pred` is true; the others stay.

    A class, or a tuple of classes, stands for its `isinstance`.  `pred` runs in this thread
    with no lock held, once for each message.  Blocks, and returns `default` or raises
    TimeoutError, as `receive` does.  Raises LinkedError if the search meets the failure of a
    linked thread, and what `pred` raises, leaving the mailbox as it was.

    Factor: receive-if, receive-if-timeout.  Erlang: selective receive.
    """
    accepts = _accepts(pred, (LinkedError,))
    message = (_here.thread or current_thread())._mailbox._get_if(accepts, timeout)
    if message is _NOTHING:
        return _instead(default, "receive_if", timeout)
    match message:
        case LinkedError():
            raise message
    return message


def _instead(default: Any, what: str, timeout: float | None) -> Any:
    if timeout:
        _record(current_thread(), "timeout", what=what)
    if default is _NOTHING:
        such = "such " if what == "receive_if" else ""
        raise TimeoutError(f"no {such}message came within {timeout} seconds")
    return default


######## Synchronous sends: Synchronous, Reply, send_, reply_, handle_synchronous


class _Value(_Fixed):
    """A message made, matched, compared and pickled by its attributes."""

    __match_args__: tuple[str, ...] = ()
    _key = property(lambda self: self.__reduce__())

    def __setattr__(self, name: str, value: Any = None) -> None:
        raise AttributeError(f"a {type(self).__name__} cannot be changed")

    __delattr__ = __setattr__

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name in self.__match_args__)
        return f"{type(self).__name__}({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in self.__match_args__)


class Synchronous(_Value):
    """A message whose `sender` waits for a reply.  Factor: synchronous."""

    __match_args__ = "data", "sender", "tag"
    data: Any
    sender: Handle
    tag: str

    def __init__(self, data: Any, sender: Handle, tag: str) -> None:
        if not isinstance(sender, _Handle) or not isinstance(tag, str):
            raise TypeError(f"Synchronous(data, sender, tag): not {sender!r}, {tag!r}")
        self.__dict__.update(data=data, sender=sender, tag=tag)


class Reply(_Value):
    """The answer to the `Synchronous` of the same `tag`.  Factor: reply."""

    __match_args__ = "data", "tag"
    data: Any
    tag: str

    def __init__(self, data: Any, tag: str) -> None:
        self.__dict__.update(data=data, tag=tag)


def send_synchronous(message: Any, thread: Handle, timeout: float | None = None) -> Any:
    """Send `message`, wait for its reply, return that.  Factor: send-synchronous.

    Blocks at most `timeout` seconds (None: until there is an outcome), and to connect as `send`
    does.  Leaves the mailbox alone.  Raises SerializationError, NodeUnreachable, NoSuchThread,
    AuthenticationError: nothing was delivered; RemoteError: the other node could not read it;
    ThreadDied, NodeDown, TimeoutError: it may have run, and a reply that still comes is
    dropped.  From a thread to itself: SynchronousToSelfError.
    """
    if not isinstance(thread, _Handle):
        raise TypeError(f"send_synchronous(message, thread): {thread!r} is not a thread")
    deadline = None if timeout is None else _deadline(timeout)
    caller = _here.thread or current_thread()
    call = _Await(caller)
    traced = _trace and _here.cause is None
    try:
        if traced:
            with _sending(message, thread):
                thread._ask(call, caller, message)
        else:
            thread._ask(call, caller, message)
        if not call.settled.acquire(True, -1 if deadline is None else _left(deadline)):
            _record(caller, "timeout", what="call")
            raise TimeoutError(f"no reply within {timeout} seconds; the call may still run")
        if traced:
            _record(caller, "receive", call.cause, message=_shown(call.error or call.reply))
        if call.error is not None:
            raise call.error
        return call.reply
    finally:
        if _awaited.pop(call.tag, None):  # no outcome, and none is wanted any more
            call.excuse()


def reply_synchronous(reply: Any, synchronous: Synchronous) -> None:
    """Answer `synchronous`, from any thread that holds it.  Factor: reply-synchronous.

    Blocks as `send` does.  If the caller is gone or gave up, nobody hears it, which is no
    error.  Raises SerializationError.
    """
    if not isinstance(synchronous, Synchronous):
        raise TypeError(f"reply_synchronous(reply, synchronous): {synchronous!r} is no request")
    try:
        if _trace:
            synchronous.sender.send(Reply(reply, synchronous.tag))
        else:
            synchronous.sender._answer(reply, synchronous.tag)
    except (NodeDown, AuthenticationError) as error:  # a stranger may have its address now
        _undelivered(synchronous.sender, error)


def handle_synchronous(func: Callable[[Any], Any], timeout: float | None = None) -> bool:
    """Take the next `Synchronous`, reply with `func` of its data, return True.

    So `spawn_server(handle_synchronous, func)` serves for ever.  Other messages stay in the
    mailbox.  Blocks at most `timeout` seconds for a request, then raises TimeoutError.  If
    `func` raises, so does this: the server fails as any thread, and with it the call.

    Factor: handle-synchronous.
    """
    request = receive_if(Synchronous, timeout)
    reply_synchronous(func(request.data), request)
    return True


################ Part two: many nodes ################
######## Serializing: serialize, deserialize, and what `allow` lets in


def serialize(obj: Any) -> bytes:
    """Return `obj` as bytes: the copy that a remote `send` makes.  Factor: object>bytes.

    Handles of threads turn into `RemoteThread`; cycles and shared objects survive.  Raises
    SerializationError, which names the part that cannot be pickled.
    """
    try:
        return pickle.dumps(obj, 5)
    except Exception as error:
        text = f"message is a {type(obj).__name__} and cannot be sent to another node"
        with suppress(Exception):  # a part of it may not let itself be looked at, either
            text = _culprit(obj, error)
        raise SerializationError(text) from error


def deserialize(data: bytes) -> Any:
    """Return the object that `data` was made of, if this node's `allow` does.

    Raises whatever unpickling raises, and that is anything.  Factor: bytes>object.
    """
    return local_node()._load(data)


def _culprit(obj: Any, error: Exception, path: str = "message") -> str:
    """Say which part of `obj`, as small as it can be told, cannot be pickled, and why."""
    for where, part in _parts(obj) if len(path) < 500 else ():  # there may be cycles
        try:
            pickle.dumps(part, 5)
        except Exception as inner:
            if part is not obj:
                return _culprit(part, inner, path + where)
    return (f"{path} is a {type(obj).__name__} and cannot be sent to another node ({error}); "
            "send plain data, something importable, or the handle of a thread that keeps it")


def _parts(obj: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(obj, dict):
        return [(f"[{_shown(key)}]", value) for key, value in obj.items()]
    if isinstance(obj, (list, tuple)):
        return [(f"[{index}]", value) for index, value in enumerate(obj)]
    return [(f".{name}", value) for name, value in getattr(obj, "__dict__", {}).items()]


def _loader(allow: str | Sequence[Any]) -> Callable[[Any], Any]:
    """Return what unpickles messages: anything, or plain data and what `allow` lists."""
    if allow == "anything":
        return pickle.loads
    import builtins, datetime as dt, decimal, fractions, uuid  # noqa: E401

    plain = [complex, range, decimal.Decimal, fractions.Fraction, uuid.UUID, dt.date, dt.time,
             dt.datetime, dt.timedelta, dt.timezone, RemoteThread, *_Value.__subclasses__()]
    plain += [kind for kind in (*vars(builtins).values(), *globals().values())
              if isinstance(kind, type) and issubclass(kind, BaseException)]
    for item in allow:
        if not callable(item) or not hasattr(item, "__qualname__"):
            raise TypeError(f"allow= takes classes and functions themselves, not {item!r}")
    known = {(item.__module__, item.__qualname__): item for item in (*plain, *allow)}

    class Narrow(pickle.Unpickler):
        calls: list[Any]

        def find_class(self, module: str, name: str) -> Any:
            item = known.get((module, name))
            if item is None:
                raise _Refused(f"{module}.{name}"[:300] + " is not among what it allows")
            if item in (uuid.UUID, *allow):
                return item
            call = partial(item)  # can be called, but no pickle can change the class through it
            self.calls.append(weakref.ref(call))
            return call

    def load(data: Any) -> Any:
        unpickler = Narrow(io.BytesIO(data))
        calls = unpickler.calls = []
        message = unpickler.load()
        del unpickler  # and its memo, so that what lives on of the calls is in the message
        if any(call() for call in calls):
            raise _Refused("a class itself is not plain data; allow= must list it")
        return message

    return load


class _Refused(pickle.UnpicklingError):
    """A message names something that `allow` does not."""


######## Addresses and keys: what a node is called, and who may come in


def _address(node: Any) -> Address | None:
    """One spelling for all that may stand where a node is asked for; None does not listen."""
    given, node = node, getattr(node, "address", node)
    if isinstance(node, int) and not isinstance(node, bool):
        node = "127.0.0.1", node
    if isinstance(node, str) and "/" not in node and node.rpartition(":")[2].isdecimal():
        node = node.rpartition(":")[0], int(node.rpartition(":")[2])
    match node:
        case None if given is not None:
            return None
        case str() | os.PathLike() if "/" in str(os.fspath(node)):
            return os.path.abspath(node)
        case str(host), int(port) if 0 <= port < 65536 and ":" not in host:
            return "127.0.0.1" if host in ("", "localhost") else host, port
    spelt = "9000, 'host:9000', ('host', 9000), or a path with a slash"
    raise ValueError(f"not a node: {given!r}; say {spelt}")


_checked: Callable[[Any], Any] = lru_cache(1024)(_address)  # for handles that come again


def _text(address: Address | None) -> str:
    return address if isinstance(address, str) else "%s:%d" % address if address else ""


def _family(address: Address | None) -> int:
    return socket.AF_UNIX if isinstance(address, str) else socket.AF_INET


def _on_loopback(address: Address | None) -> bool:
    return not isinstance(address, tuple) or address[0].startswith("127.")


def _authkey(key: bytes | str | None, address: Address | None) -> bytes:
    """The key: `key`, or from the environment, or from the cookie file."""
    source = "authkey="
    if key is None:
        source, key = "DISTCONC_AUTHKEY", os.environ.get("DISTCONC_AUTHKEY")
    if key is None:
        source = os.environ.get("DISTCONC_COOKIE") or os.path.expanduser("~/.distconc.cookie")
        key = _cookie(source)
    if not key:
        raise ValueError(f"the key from {source} is empty; that would let everybody in")
    if len(key) < 16 and not _on_loopback(address):
        raise ValueError(f"the key from {source} is short; off this machine it needs 16 bytes")
    return key.encode() if isinstance(key, str) else key


def _cookie(path: str) -> bytes:
    """Read the cookie file, made first if there is none."""
    if not os.path.exists(path):
        draft = f"{path}.{os.getpid()}.{threading.get_ident()}"
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(os.urandom(32).hex() + "\n")
        with suppress(FileExistsError):
            os.link(draft, path)  # unlike a rename, fails if another process was first
        os.unlink(draft)
    with open(path, "rb") as file:
        if os.name == "posix" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise PermissionError(f"others can read the key in {path}; chmod 600 {path}")
        return file.read().strip()


######## Names and remote handles: RemoteThread, register_, unregister_, get_remote_thread


class RemoteThread(_Handle):
    """A handle of a thread on some node, by id or registered name.  Factor: remote-thread.

    `.node` is the node's address, `.id` the id or name.  Immutable.  One that a `Thread` was
    pickled into equals that thread, on any node; no later run of its node takes it for
    another's.  One made by hand equals one made by hand of the same node and id.
    """

    __slots__ = ("_node", "_id", "_target", "_head", "_route")

    def __init__(self, node: NodeLike | None, id: int | str, incarnation: int = 0) -> None:
        if not isinstance(id, (int, str)) or len(str(id)) > 255 or type(incarnation) is not int:
            raise TypeError(f"an id is an int, or a name of up to 255 letters, not {id!r}")
        if not incarnation:
            self._node: Any = _address(node)
            if self._node is None:  # nobody can dial that node; but it may be this one
                incarnation = node.incarnation  # type: ignore[union-attr]
        else:
            self._node = None if node is None else _checked(node)
        self._id = id = str.__str__(id) if isinstance(id, str) else int(id)  # no subclass's
        self._key = (incarnation or self._node, id)
        self._target = incarnation, id  # what its node knows it by; 0: in whatever run
        self._head = SEND, self._target
        self._route: _Connection | None = None  # the last on which it was reached

    node = property(lambda self: self._node)
    id = property(lambda self: self._id)

    def send(self, message: Any) -> None:
        """Send a copy of `message` to the thread; see `send`."""
        route = self._route
        if not route or route.ending or _trace or _faults or message.__class__ is Reply:
            self._send(message)
            return
        try:
            payload = pickle.dumps(message, 5)
        except Exception:
            payload = serialize(message)  # which says what is wrong
        if len(payload) > route.small or not route.send(self._head, payload):
            self._deliver(self._head, payload)

    def _send(self, message: Any) -> None:
        """Send in the ways less trodden: at first, traced, to this node itself, a reply."""
        if _trace and _here.cause is None:
            with _sending(message, self):
                self._send(message)
        elif message.__class__ is Reply:
            self._answer(message.data, str(message.tag))
        elif self._is_here():
            try:
                get_remote_thread(self._id).send(message)
            except NoSuchThread as error:
                _undelivered(self, error)
        else:
            self._deliver(self._head, serialize(message))

    def _answer(self, data: Any, tag: str) -> None:
        if self._is_here():
            _settle(tag, None, data)
        else:
            self._deliver((REPLY, tag), serialize(data))
            _strike(tag)

    def _ask(self, awaited: _Await, caller: Thread | None = None, message: Any = None) -> None:
        if self._is_here():
            get_remote_thread(self._id)._ask(awaited, caller, message)
        else:
            id, payload = (caller.id, serialize(message)) if caller else (0, b"")
            self._deliver((ASK, self._target, id, awaited.tag), payload, awaited)

    def _deliver(self, head: Head, payload: bytes, awaited: _Await | None = None) -> None:
        """Send over the connection there is, or a new one; again if that ended untaken."""
        for _ in range(2):
            route = self._route
            if route is None or route.ending:
                _check_size(len(payload), local_node()._max_message)
                route = self._route = local_node()._reach(self._node, self._target[0])
            if awaited:
                awaited.peer = route.peer
            if len(payload) > route.small:
                _check_size(len(payload), route.limit)
            stamped = _stamped(head) if _trace else head
            fault = _faults and _fault(route.names)
            send = partial(fault._send, route) if fault else route.send
            if send(stamped, payload):
                return
        raise NodeDown(f"two connections to {_text(self._node)} ended before they took it")

    def _is_here(self) -> bool:
        if self._route and not self._route.ending:  # then it is where that leads
            return False
        if self._target[0]:
            return bool(self._target[0] == _incarnation)
        return local_node()._is_called(self._node)

    def __repr__(self) -> str:
        return f"RemoteThread({_text(self._node) or None!r}, {self._id!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteThread, (self._node, self._id, self._target[0])


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise SerializationError(f"{size} bytes are more than max_message, {limit}")


def register_remote_thread(thread: Thread, name: str | None = None) -> None:
    """Let other nodes reach `thread` by `name`, by default its own.  Never blocks.

    Takes the name from whoever had it; the thread's end frees it.  A thread may have several.
    Raises TypeError unless `thread` is of this node, NoSuchThread if it has ended.
    Factor: register-remote-thread.  Erlang: register.
    """
    name = thread.name if name is None and isinstance(thread, Thread) else name
    if not isinstance(thread, Thread) or not isinstance(name, str):
        raise TypeError(f"only a thread of this node can get a name: not {thread!r} {name!r}")
    name = str.__str__(name)  # an Enum's hash is another
    with _registry:
        if thread._ended:
            raise NoSuchThread(f"{thread!r} cannot be registered any more")
        if (0, name) in _threads:
            unregister_remote_thread(name)
        _threads[0, name] = thread
        thread._names += (name,)


def unregister_remote_thread(name: str) -> None:
    """Forget a registered name.  Never blocks.  Raises NoSuchThread.

    Factor: unregister-remote-thread.  Erlang: unregister.
    """
    with _registry:
        thread = _threads.pop((0, name), None)
        if thread is None:
            raise _no_such_thread(name)
        thread._names = tuple(other for other in thread._names if other != name)


def get_remote_thread(name_or_id: int | str) -> Thread:
    """Return the thread of this node that others reach so.  Never blocks.  Raises NoSuchThread.

    Factor: get-remote-thread.  Erlang: whereis.
    """
    run = _incarnation if isinstance(name_or_id, int) else 0
    thread = _threads.get((run, name_or_id))
    if thread is None:
        raise _no_such_thread(name_or_id)
    return thread


def _no_such_thread(name_or_id: int | str) -> NoSuchThread:
    from difflib import get_close_matches

    if isinstance(name_or_id, int):
        return NoSuchThread(f"no living thread has the id {name_or_id}")
    names = _registered()
    near = get_close_matches(name_or_id, names, cutoff=0.5) or sorted(names)[:5]
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return NoSuchThread(f"no thread is registered as {name_or_id!r}{hint}")


def _registered() -> list[str]:
    return [name for run, name in _threads.copy() if not run]  # type: ignore[misc]


######## The wire: hello, seal, frames and the messages in them

SEND, ASK, REPLY, FAILED, FORGET, LOST, STAMP = range(7)  # the kinds of messages; see the head
KERNEL = 0  # the id of the thread that does what one node asks of another
SIZES = struct.Struct(">II")  # what a frame begins with: the lengths of body and tail
MAC = 16  # bytes, which follow
MOST = 1 << 26  # bytes of a body; MANY heads with two TEXTs each are less
TEXT = 1 << 14  # letters of an error, or of a traceback
ROOM = 1 << 16  # bytes read at once
LARGE = 2048  # bytes: to copy more into a frame with others costs more than a frame of its own
VERSION = b"distconc 3"


class _Hello:
    """What one side says of itself after the stock challenge."""

    def __init__(self, line: bytes) -> None:
        version, self.role, _, number, beat, limit, address, *self.meant = line.split(b"\0")
        if version != VERSION:
            raise AuthenticationError(f"the other side speaks {version!r}, this {VERSION!r}")
        self.line, self.incarnation = line, int(number, 16)
        self.heartbeat, self.limit = min(max(0.01, float(beat)), 1e9), int(limit)
        self.address = _address(address.decode()) if address else None


def _seal(key: bytes, writer: bytes, dialler: _Hello, acceptor: _Hello) -> hashlib.blake2b:
    """Return what makes the MACs of one direction: BLAKE2b, keyed, of all frames up to this.

    So nothing can be left out, repeated or moved.
    """
    hellos = [hashlib.sha256(hello.line).digest() for hello in (dialler, acceptor)]
    key = hmac.digest(key, writer + b"".join(hellos), "sha256")
    return hashlib.blake2b(key=key, digest_size=MAC)


def _mac(seal: hashlib.blake2b, sizes: bytes, body: bytes, tail: bytes | memoryview) -> bytes:
    """Return the MAC of the next frame.

    What is large is there by its SHA-256, which is the faster, but slower to begin.
    """
    short = body if len(body) <= LARGE else hashlib.sha256(body).digest()
    seal.update(sizes + short)
    if tail:
        seal.update(hashlib.sha256(tail).digest())
    return seal.digest()


######## Connection: one sealed connection, its outbox, its reader and its writer

MANY = 400  # messages in a frame
FULL = 2000  # messages in an outbox: who sends more waits for the network
BURST = 50e-6  # seconds: what is sent so soon after a write is one of many


class _Connection:
    """One connection to another node, on which both speak.

    Who sends writes, if the last write was a while ago or something was read since.  What
    follows a write at once is one of many: it goes into the outbox, for the writer thread,
    which runs when the sender pauses or the interpreter switches, and writes hundreds in one
    frame, or a tick when nothing came for a while.  The reader thread never writes, so that two
    nodes that flood each other go on reading; it is the one that shook hands.  Whatever ends
    the connection, be it a silence for which no tick accounts, the reader notices, and cleans
    up.
    """

    def __init__(self, node: "Node", sock: socket.socket, mine: _Hello, peer: _Hello,
                 key: bytes, dialled: Address | None) -> None:
        self.peer, self.address = peer.incarnation, peer.address
        self.names = {peer.address, dialled}  # all addresses by which it is known here
        self.heartbeat = min(mine.heartbeat, peer.heartbeat)
        self.limit, self._limit = min(mine.limit, peer.limit), max(mine.limit, ROOM)  # out, in
        self.small = min(self.limit, LARGE)
        self.stamp = self.peer_stamp = 0  # each side's number for it; see Node._introduce
        self.ending = False  # takes no more messages
        self._node, self._sock = node, sock
        self._file: Any = (open(sock.fileno(), "rb", ROOM, closefd=False)
                           if os.name == "posix" else sock.makefile("rb", ROOM))  # the slower
        self._writing = threading.RLock()  # guards: the seal, the output, emptying the outbox
        self._inside = False  # its holder writes: a signal's handler within that must not
        pair = (mine, peer) if dialled else (peer, mine)
        self._seal, self._check = (_seal(key, side.role, *pair) for side in (mine, peer))
        self._outbox: list[tuple[Head, bytes]] = []
        self._shut = False  # the end has been said; guarded by _writing
        self._bell = _bell()  # wakes the writer
        self._written = _bell()  # rung at the writer's end, for all
        self._wrote = 0.0  # when a frame was written; 0 after a read: an answer may be due
        self.late = 0.0  # until when a fault holds up what is in the outbox
        self.sent = self.received = 0  # messages; the first guarded by _writing
        self._caller = lru_cache(1000)(  # the handle of a thread over there, by id
            lambda id: RemoteThread(peer.address, id, peer.incarnation))
        self._losses: Counter[tuple[Any, ...]] = Counter()  # of the frame being read
        self._on = (self._on_send, self._on_ask, self._on_reply, self._on_failed,
                    self._on_forget, self._on_lost, self._on_stamp)

    def start(self) -> None:
        self.sent = 0  # what introduced it is no message
        silence = round(0.8e6 * self.heartbeat)  # microseconds; what is longer ends a read
        timeval = struct.pack("qq", *divmod(silence, 10 ** 6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO,
                              timeval if os.name == "posix" else silence // 1000)
        _thread("writer", self._write_on)

    def send(self, head: Head, payload: bytes) -> bool:
        """Have a message written; wait while too much waits.

        False if the connection ended before it took it; raises NodeDown if meanwhile.
        """
        outbox, large = self._outbox, len(payload) > LARGE
        if not (outbox or large or self._inside) and monotonic() - self._wrote > BURST:
            if self._alone(self._write, (head,), (payload,)):
                return True
        message = head, payload
        outbox.append(message)
        if large or len(outbox) > FULL:
            self.write()
        if self._bell.locked() and outbox:
            _ring(self._bell)
        return not self.ending or self._has_taken(message)

    def _alone(self, write: Callable[..., None], *what: Any) -> bool:
        """Write, and nobody else meanwhile; False after the end, and within another write."""
        with self._writing:
            if self._inside or self._shut:
                return False
            self._inside = True
            try:
                write(*what)
            finally:
                self._inside = False
            return True

    def _has_taken(self, message: tuple[Head, bytes]) -> bool:
        """Whether the last round of the writer, which is near, takes this, too."""
        with self._writing:
            if self._inside:  # this is a signal's handler, for whose end the writer waits
                return not self._shut
        _hear(self._written, -1)
        with suppress(ValueError):
            self._outbox.remove(message)
            return False
        return True

    def post(self, head: Head, payload: bytes = b"") -> bool:
        """Have a message written soon.  Never blocks: for readers, and threads that end."""
        self._outbox.append((head, payload))
        _ring(self._bell)
        return not self.ending

    def write(self, tick: bool = False) -> None:
        """Write what is in the outbox; if that is nothing, perhaps a tick."""
        while (self._outbox or tick) and self._alone(self._write_waiting):
            tick = False

    def _write_waiting(self) -> None:
        """Write one frame of what is in the outbox, be that nothing; `_writing` is held."""
        waiting = self._outbox[:MANY]
        heads, payloads = zip(*waiting) if waiting else ((), ())
        count, tail = len(waiting), b""
        if max(map(len, payloads), default=0) > LARGE:  # which gets a frame of its own
            count = next(at for at, payload in enumerate(payloads) if len(payload) > LARGE)
            if not count:
                count, tail, payloads = 1, payloads[0], (None,)
        self._write(heads[:count], payloads[:count], count, tail)

    def _write(self, heads: Sequence[Head], payloads: Sequence[bytes | None], waiting: int = 0,
               tail: bytes = b"") -> None:
        """Write one frame, and take as many as were `waiting` from the outbox.

        Ctrl-C before it is begun leaves all as it was.  Later, half a frame may be out, so that
        nothing can follow it; but all before it shall still arrive.
        """
        body = pickle.dumps((heads, payloads), 5)
        try:
            del self._outbox[:waiting]
            if not (_faults and _cut_off(self.names)):
                sizes = SIZES.pack(len(body), len(tail))
                frame = sizes + _mac(self._seal, sizes, body, tail) + body
                self._wrote = monotonic()  # before the answer can be read
                if len(tail) > ROOM:
                    self._sock.sendall(frame)
                    self._sock.sendall(tail)
                else:
                    self._sock.sendall(frame + tail)
                self.sent += len(heads)
        except BaseException as error:
            self._say_end()
            if isinstance(error, OSError):
                text = f"contact with {_text(self.address)} was lost while sending: {error}"
                raise NodeDown(text) from error
            raise

    def _write_on(self) -> None:
        try:
            with suppress(OSError):  # the reader will notice, too
                while not self.ending:
                    rung = self._bell.acquire(True, self.heartbeat / 5)
                    _hold_up(self)
                    self.write(tick=not rung)
                self.write()
        finally:
            with self._writing:
                self._say_end()
            self._written.release()

    def _say_end(self) -> None:
        """Nothing follows what was written; the peer reads that, and then ends it, too."""
        self._shut = self.ending = True
        with suppress(OSError):  # the peer was first
            self._sock.shutdown(socket.SHUT_WR)
        self.close()

    def close(self) -> None:
        """Take no more, write what waits, then say the end.  Never blocks."""
        self.ending = True
        _ring(self._bell)

    def cut(self) -> None:
        """End it now.  Never blocks."""
        _hang_up(self._sock)
        self.close()

    def read_on(self) -> None:
        """Read to the end, of whatever kind, and clean up."""
        _here.cause = UNKNOWN
        try:
            while True:
                self._take(*self.read())
        except EOFError:
            self.close()  # the peer has said all; so may we
        except BaseException as error:  # to load what makes no sense may even raise SystemExit
            self.cut()
            _log("INFO", "the connection to %s ended: %s", _text(self.address), _words(error))
        finally:
            if not _hear(self._written, 0.8 * self.heartbeat):
                self.cut()
            _hear(self._written, -1)
            self._node._forget(self)
            self.release()

    def release(self) -> None:
        """Give the descriptor back, which nobody uses any more."""
        with self._writing:
            self._sock.close()
        self._file.close()  # and its buffer: handles may keep this connection for long
        self._caller.cache_clear()

    def read(self) -> tuple[Sequence[Head], Sequence[Any]]:
        """Wait for a frame, check its seal before all else, return its messages."""
        start: Any = self._file.read(SIZES.size + MAC)
        if start is None:
            raise OSError("nothing was heard for too long")
        if not start:
            raise EOFError
        if len(start) < SIZES.size + MAC:
            start = bytes(self._read_slowly(start, SIZES.size + MAC))
        sizes, mac = start[:SIZES.size], start[SIZES.size:]
        body_size, tail_size = SIZES.unpack(sizes)
        if body_size > MOST or tail_size > self._limit:
            raise OSError(f"a frame of {body_size} + {tail_size} bytes is too large")
        rest: Any = self._file.read1(body_size + tail_size)
        if len(rest) < body_size + tail_size:
            rest = self._read_slowly(rest, body_size + tail_size)
        body = bytes(rest[:body_size])
        tail = memoryview(rest)[body_size:] if tail_size else b""  # not copied
        if not hmac.compare_digest(mac, _mac(self._check, sizes, body, tail)):
            raise OSError("a frame was altered, repeated, lost or moved on its way")
        heads, payloads = self._node._load(body)
        if len(heads) != len(payloads):
            raise ValueError(f"{len(heads)} heads have {len(payloads)} payloads")
        return heads, (*payloads[:-1], tail) if tail else payloads

    def _read_slowly(self, begun: bytes, size: int) -> memoryview:
        """Wait for so many bytes, of which only some are here, `begun`; return all.

        A frame whose length was altered on its way would swallow what follows, perhaps ticks.
        So in here, no more bytes than those in a whole heartbeat are no sign of life.
        """
        whole, here, since, due = memoryview(bytearray(size)), len(begun), 0.0, 0
        whole[:here] = begun
        while here < size:
            count = self._file.raw.readinto(whole[here:])  # as the buffer is empty
            if count == 0:
                raise EOFError  # its writer was interrupted
            here += count or 0
            if count and here > due:
                since, due = monotonic(), here + LARGE
            elif not count or monotonic() > since + self.heartbeat:
                raise OSError("the rest of a frame did not come")
        return whole

    def _take(self, heads: Sequence[Head], payloads: Sequence[bytes]) -> None:
        """Do what the messages of a frame say."""
        self._wrote = 0.0
        if heads and heads[0][0] == SEND and heads.count(heads[0]) == len(heads):
            self._on_sends(heads[0], payloads)  # one of a flood
        else:
            for head, payload in zip(heads, payloads):
                self._on[head[0]](head, payload)
        while self._losses:
            (name_or_id, why, cause), times = self._losses.popitem()
            self.post(_stamped((LOST, name_or_id, why, times), cause))
        self.received += len(heads)
        if len(self._outbox) > 32 * FULL:
            raise OSError("the peer goes on asking and does not read the answers")

    def _on_send(self, head: Head, payload: bytes) -> None:
        self._on_sends(head, (payload,))

    def _on_sends(self, head: Head, payloads: Sequence[bytes]) -> None:
        _, target = head
        messages: list[Any] = []
        load = self._node._load
        for payload in payloads:
            try:
                messages.append(load(payload))  # which may take long
            except BaseException as error:  # and raise anything, SystemExit too
                self._lost(target, error)
        try:
            thread = self._node._threads.get(target) or self._node._find(target)
        except NoSuchThread as error:
            for _ in messages:
                self._lost(target, error)
        else:
            thread._send_all(messages)

    def _lost(self, target: Target, error: BaseException) -> None:
        self._losses[target[1], str(self._refusal(error)), _here.cause] += 1

    def _on_ask(self, head: Head, payload: bytes) -> None:
        _, target, caller, tag = head
        try:
            thread = self._node._threads.get(target) or self._node._find(target)
            data = self._node._load(payload) if caller else None
        except BaseException as error:
            _fail(self.peer, tag, self._refusal(error))
            return
        if thread._owe(tag, self.peer) and caller:
            request = Synchronous(data, self._caller(caller), tag)
            if target[1] == KERNEL:
                with suppress(RuntimeError):  # no thread can be started; who asked is told
                    thread._start(_kernel, request, _here.cause)
            else:
                thread.send(request)

    def _refusal(self, error: BaseException) -> DistconcError:
        """Count a message that cannot be delivered; return what its sender is told."""
        self._node._count("refused" if isinstance(error, _Refused) else "undelivered")
        if isinstance(error, NoSuchThread):
            return NoSuchThread(str(error)[:TEXT])
        if isinstance(error, _Refused):
            return RemoteError("Refused", f"the other node refuses it: {error}")
        text = f"the other node cannot read it: {_words(error)}"
        if "__main__" in text:
            text += "; put that into a file of its own, which both can import"
        return RemoteError(type(error).__name__, text)

    def _on_reply(self, head: Head, payload: bytes) -> None:
        _, tag = head
        try:
            _settle(tag, None, self._node._load(payload), self.peer)
        except BaseException as error:
            text = f"the reply cannot be read here: {_words(error)}"
            _settle(tag, RemoteError(type(error).__name__, text), None, self.peer)

    def _on_failed(self, head: Head, payload: bytes) -> None:
        _, tag, error = head
        if isinstance(error, NoSuchThread):
            error = NoSuchThread(f"at {_text(self.address)}: {error}")
        elif isinstance(error, ThreadDied):
            (_, cause, text), reason = error.args, None
            with suppress(BaseException):
                reason = self._node._load(payload)
            known = isinstance(reason, BaseException)
            error = ThreadDied(reason if known else cause, cause, text)
        elif not isinstance(error, RemoteError):
            raise TypeError(f"{error!r} is no failure")
        _settle(tag, error, None, self.peer)

    def _on_forget(self, head: Head, _: bytes) -> None:
        _strike(head[1])

    def _on_stamp(self, head: Head, payload: bytes) -> None:
        stamp, head = head[1], head[2:]
        process, id, clock = str(stamp[0])[:16], int(stamp[1]), int(stamp[2])
        known = 0 <= id < 1 << 52 and 0 < clock < 1 << 52  # or ours would be pushed too far
        with _because((process, id, clock) if known else UNKNOWN):
            self._on[head[0]](head, payload)

    def _on_lost(self, head: Head, _: bytes) -> None:
        _, name_or_id, why, times = head
        _lose(f"{name_or_id!r} at {_text(self.address) or 'its node'}", why, times)


def _thread(part: str, run: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=run, args=args, name=f"distconc {part}", daemon=True)
    thread.start()
    return thread


def _log(level: str, text: str, *about: Any) -> None:
    with suppress(OSError):  # out of descriptors, not even this can be imported
        import logging

        logging.getLogger("distconc").log(getattr(logging, level), text, *about)


def _hang_up(sock: socket.socket) -> None:
    """Wake all who read or write `sock` with its end; its owner closes it."""
    with suppress(OSError):  # it ended before
        sock.shutdown(socket.SHUT_RDWR)


######## Node: start_node, stop_node, local_node, nodes, connect, disconnect

CROWD = 256  # strangers who may knock at once: for one more, the oldest has to go
_node: "Node | None" = None
_starting = threading.RLock()  # guards: _node
_stamps = itertools.count(1)  # the numbers of this process's connections
_ours: "weakref.WeakSet[Any]" = weakref.WeakSet()  # what a fork closes in its child


def _listener(address: Address) -> Listener:
    try:
        return Listener(address, backlog=128)
    except OSError as error:
        cure = "does a node run there? Choose another address, or 0 for a free port"
        text = f"cannot listen at {_text(address)}: {error.strerror or error}; {cure}"
        raise OSError(error.errno, text) from None


class _Meeting:
    """One handshake, with whom we dial or with a stranger, for all who wait for it."""

    connection: Any = None  # there at the end, unless there is an error
    error: Exception | None = None
    sock: socket.socket | None = None

    def __init__(self, dialled: Any) -> None:
        self.dialled = dialled  # an address, or None
        self.done = _bell()  # rung at the end, for all

    def limit(self, seconds: float) -> None:
        """Give it so long; the work of its timer, which ends when it does."""
        if not _hear(self.done, seconds):
            text = f"{_text(self.dialled)} did not answer within {seconds:g} seconds"
            self.give_up(NodeUnreachable(text))

    def give_up(self, error: Exception) -> None:
        """Have it end, and nobody wait for that.  Never blocks."""
        self.error = self.error or error
        _ring(self.done)
        if self.sock:
            _hang_up(self.sock)


class Node(AbstractContextManager["Node"]):
    """This process, as others address it.  Made by `start_node`, or when first needed.

    As a context manager, leaving it stops the node.  Its threads: the accepter, from the start
    to the stop; a reader for each stranger who knocks and for each dial, who first shakes
    hands, while a timer, a thread of its own, limits the wait; a writer for each connection.
    """

    def __init__(self) -> None:
        self.address: Address | None = None  # what others dial
        self.incarnation = _incarnation
        self._threads = _threads  # who can be reached; of a stopped node, nobody
        self._bound: Address | None = None  # where it listens
        self._started = self._stopped = False
        self._lock = threading.RLock()  # guards: changes of the tables below
        self._changed = threading.Condition(self._lock)  # a connection came or went
        self._open: set[_Connection] = set()  # all, the half-made and the ending ones, too
        self._live: list[_Connection] = []  # those that went live, in that order
        self._meetings: list[_Meeting] = []  # under way, the oldest first
        self._counts = Counter(
            sent=0, received=0, undelivered=0, refused=0, lost=0, strangers=0)
        self._accepter: threading.Thread | None = None  # there, if it listens
        self._configure(None, None, None, None, 10.0, 5.0, 1 << 28)  # as `start_node` does

    def _configure(self, address: NodeLike | None, authkey: Any, advertise: NodeLike | None,
                   allow: Any, heartbeat: float, connect_timeout: float,
                   max_message: int) -> None:
        """Take the options of `start_node`, and listen; raise for bad ones before any change."""
        if heartbeat <= 0 or connect_timeout <= 0:
            raise ValueError("heartbeat= and connect_timeout= are seconds above zero")
        if not 0 < max_message < 1 << 32:
            raise ValueError("max_message= is bytes, above zero and below 4 GiB")
        known = None if advertise is None else _address(advertise)
        bound = None if address is None else _address(address)
        if allow is None:
            allow = "anything" if _on_loopback(bound) else ()
        allow = allow if allow == "anything" else tuple(allow)
        load = _loader(allow)
        if bound:
            authkey = _authkey(authkey, bound)
            listener = _listener(bound)
            _ours.add(listener)
            self._bound = _address(listener.address)
        self._key, self._allow, self._load = authkey, allow, load
        self._heartbeat, self._connect_timeout = heartbeat, connect_timeout
        self._max_message = max_message
        self.address = known or self._bound
        if self.address and self.address[0] == "0.0.0.0":
            self.address = socket.gethostname(), int(self.address[1])
        if bound:
            self._accepter = _thread("accepter", self._accept_on, listener)

    def stats(self) -> dict[str, int]:
        """Count what passed: messages `sent` and `received`; `undelivered` (nobody here is
        meant, or it could not be read) and `refused` by `allow` of those received; `lost` of
        those sent, as this node or others say; `strangers` who did not get in.  Never blocks.
        """
        with self._lock:
            counts = self._counts.copy()
            for connection in self._open:
                counts.update(sent=connection.sent, received=connection.received)
            return dict(counts)

    def stop(self, timeout: float = 5.0) -> None:
        """Stop the node; see `stop_node`."""
        if self.incarnation != _incarnation:
            return  # this is a fork's child, and the node its parent's
        deadline = monotonic() + timeout
        with self._lock:
            again, self._stopped = self._stopped, True
            for meeting in self._meetings:
                meeting.give_up(NodeDown("this node was stopped"))
        with _registry:
            for name in [] if again else _registered():
                unregister_remote_thread(name)
        if self._bound and self._accepter and self._accepter.is_alive():
            at = self._bound
            if at[0] == "0.0.0.0":
                at = "127.0.0.1", int(at[1])
            with suppress(OSError), socket.socket(_family(at)) as knock:
                knock.settimeout(_left(deadline))  # nothing else wakes `accept`
                knock.connect(at)
            self._accepter.join(_left(deadline))
        self._end(self._open.copy(), _left(deadline))
        self._threads = {}
        for connection in self._open.copy():  # something is being loaded there, for too long
            self._forget(connection)
        _report()

    def _end(self, these: Iterable[_Connection], timeout: float) -> None:
        """Have these connections write what waits there, and end; cut those that do not."""
        for end, share in (_Connection.close, 0.9), (_Connection.cut, 0.1):
            for connection in these:
                end(connection)
            with self._lock:
                self._changed.wait_for(lambda: self._open.isdisjoint(these), timeout * share)

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def __str__(self) -> str:
        return _text(self.address)

    def __repr__(self) -> str:
        stopped = ", stopped" if self._stopped else ""
        return f"<Node {str(self) or 'that does not listen'}{stopped}>"

    # Who is who

    def _is_called(self, address: Address | None) -> bool:
        return address is not None and address in (self.address, self._bound)

    def _count(self, name: str, times: int = 1) -> None:
        with self._lock:
            self._counts[name] += times

    def _check_allowed(self, func: Any) -> None:
        """Raise unless a message may have `func` called; to load it may be allowed, as data."""
        if self._allow != "anything" and func not in self._allow:
            self._count("refused")
            text = f"the other node refuses it: {_name_of(func)} is not among what it allows"
            raise RemoteError("Refused", text)

    def _find(self, target: Target) -> Thread:
        """Find who is meant by a target that is not in the table as it is."""
        run, name_or_id = target
        if run not in (0, self.incarnation) or self._threads is not _threads:
            raise NoSuchThread(f"{name_or_id!r} was a thread of an earlier run of this node")
        return get_remote_thread(name_or_id) if name_or_id != KERNEL else Thread("kernel")

    # Sending

    def _post(self, peer: int, head: Head, payload: bytes = b"") -> bool:
        """Send if there is contact.  Never blocks."""
        connection = self._speaking(peer)
        stamped = _stamped(head) if _trace else head
        return connection is not None and connection.post(stamped, payload)

    def _depend(self, awaited: _Await, peer: int) -> None:
        """Have the loss of `peer` settle `awaited`."""
        awaited.peer = peer
        if not self._speaking(peer):  # lost before that was said
            _settle(awaited.tag, NodeDown("contact was lost at once"))

    def _reach(self, address: Address | None, incarnation: int = 0) -> _Connection:
        """Return the connection to speak on; dial if there is none, once for all who wait."""
        def settled() -> bool:
            last = self._speaking(incarnation, address)
            return last is None or not last.ending
        deadline = monotonic() + self._connect_timeout
        with self._lock:
            if not self._changed.wait_for(settled, self._connect_timeout):
                raise NodeUnreachable(f"the last connection to {_text(address)} still ends")
            connection = self._speaking(incarnation, address)
            if connection:
                return connection
            if _cut_off({address}):
                raise NodeUnreachable(f"faults(drop=1) cuts {_text(address)} off")
            if self._stopped:
                raise NodeDown("this node was stopped; start_node starts it again")
            if address is None:
                raise NodeUnreachable("that node does not listen, and contact with it was lost")
            dials = (one for one in self._meetings if one.dialled == address and not one.error)
            dial = next(dials, None) or self._meet(address, _authkey(self._key, address))
        while not _hear(dial.done, min(0.2, _left(deadline))):  # Ctrl-C may strike only between
            if monotonic() > deadline:  # two waits, if it comes as one begins
                raise NodeUnreachable(f"{_text(address)} did not answer in time")
        if dial.error:
            raise dial.error
        return self._speaking(dial.connection.peer) or dial.connection  # the peer's was first

    def _speaking(self, incarnation: int, address: Address | None = None) -> _Connection | None:
        """Return the connection to that node: of several, the first, for the sake of order."""
        live = self._live.copy()
        peers = [incarnation] + [one.peer for one in live if address and address in one.names]
        return next((one for peer in peers for one in live if one.peer == peer), None)

    # Shaking hands

    def _accept_on(self, listener: Listener) -> None:
        while not self._stopped:
            try:
                stranger = listener.accept()
                if not self._stopped:  # else it was `stop` that knocked
                    self._meet(None, self._key, stranger)
                    self._thin_out(CROWD)
            except (OSError, RuntimeError) as error:  # out of descriptors, or of threads
                _log("INFO", "nobody can be let in just now: %s", error)
                self._thin_out(0)
                sleep(0.05)
        listener.close()

    def _thin_out(self, most: int) -> None:
        """Of more than `most` strangers who knock, let the oldest go."""
        knocking = [one for one in self._meetings.copy() if not (one.dialled or one.error)]
        if len(knocking) > most:
            knocking[0].give_up(NodeDown("too many knock"))

    def _meet(self, dialled: Address | None, key: Any, stranger: Any = None) -> _Meeting:
        """Have a thread dial a node, or let a stranger in, and then read what comes."""
        meeting = _Meeting(dialled)
        with self._lock:
            _thread("reader", self._meet_on, meeting, key, stranger)
            self._meetings.append(meeting)
        return meeting

    def _meet_on(self, meeting: _Meeting, key: bytes, stranger: Any) -> None:
        try:
            _thread("timer", meeting.limit, self._connect_timeout)
            with stranger or Client(meeting.dialled) as stranger:
                meeting.connection = self._shake(meeting, key, stranger)
        except BaseException as error:
            if meeting.sock:
                meeting.sock.close()
            if not meeting.dialled:
                self._count("strangers")
                _log("INFO", "a stranger was not let in: %s: %s", type(error).__name__, error)
            meeting.give_up(_unreachable(_text(meeting.dialled), error))
        with self._lock, suppress(ValueError):
            self._meetings.remove(meeting)
        _ring(meeting.done)
        if meeting.connection:
            meeting.connection.read_on()

    def _shake(self, meeting: _Meeting, key: bytes, stranger: Any) -> _Connection:
        """Exchange challenges, and hellos, by which all is sealed; return what is live then."""
        dialled = meeting.dialled
        family = _family(dialled or self._bound)
        sock = meeting.sock = socket.fromfd(stranger.fileno(), family, socket.SOCK_STREAM)
        _ours.add(sock)
        if meeting.error or self._stopped:
            raise NodeDown("nobody waits for it any more")
        if family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for step in (answer_challenge, deliver_challenge)[:: 1 if dialled else -1]:
            step(stranger, key)
        mine = self._hello(sock, dialled)
        stranger.send_bytes(mine.line)
        peer = _Hello(stranger.recv_bytes(4096))
        self._check_hello(mine, peer, sock)
        connection = _Connection(self, sock, mine, peer, key, dialled)
        try:
            self._introduce(connection, dialled)
        except BaseException:
            self._forget(connection)
            raise
        return connection

    def _hello(self, sock: socket.socket, dialled: Address | None) -> _Hello:
        fields = [VERSION.decode(), "dialler" if dialled else "acceptor", os.urandom(16).hex(),
                  f"{self.incarnation:x}", self._heartbeat, self._max_message, self]
        if dialled:
            fields += [_text(dialled), _text(sock.getpeername())]
        return _Hello("\0".join(map(str, fields)).encode())

    def _check_hello(self, mine: _Hello, peer: _Hello, sock: socket.socket) -> None:
        if {mine.role, peer.role} != {b"dialler", b"acceptor"}:
            raise AuthenticationError("our own words came back to us")
        names = self.address, self._bound, sock.getsockname()
        called = {_text(name).encode() for name in names}
        if peer.role == b"dialler" and not called & set(peer.meant):
            raise AuthenticationError(f"{peer.meant!r} was dialled, which is not this node; "
                                      "behind NAT or a tunnel, start_node needs advertise=")
        if _cut_off({peer.address}):
            raise NodeUnreachable("faults(drop=1) cuts it off")

    def _introduce(self, connection: _Connection, dialled: Address | None) -> None:
        """Exchange the first sealed frames, outlive older connections, then go live.

        Each side numbers its connections, and says the number of this one and of the oldest
        that it still counts between the two nodes.  An older one is lost over there: it is read
        to its end before the new one may speak, so that no old message comes after a new one.
        """
        for mine in (True, False) if dialled else (False, True):
            if mine:
                with self._lock:
                    connection.stamp = next(_stamps)
                    self._open.add(connection)
                    oldest = min(c.stamp for c in self._open if c.peer == connection.peer)
                connection.send((connection.stamp, oldest), b"")
            else:
                [(connection.peer_stamp, oldest)], _ = connection.read()
                self._outlive(connection, oldest)
        with self._lock:
            if self._stopped:
                raise NodeDown("this node was stopped")
            connection.start()
            self._live.append(connection)
            self._changed.notify_all()

    def _outlive(self, connection: _Connection, oldest: int) -> None:
        """Wait for the end of what the peer counts no more, or what is ending here."""
        def older() -> list[_Connection]:
            return [c for c in self._open if c is not connection and c.peer == connection.peer
                    and c.peer != self.incarnation and (c.ending or 0 < c.peer_stamp < oldest)]
        with self._lock:
            for other in older():
                other.cut()
            if not self._changed.wait_for(lambda: not older(), self._connect_timeout):
                raise NodeUnreachable("the connection before this one does not end")

    def _forget(self, connection: _Connection) -> None:
        """A connection has been read to its end: contact with its peer is lost, all of it.

        One that never went live takes no other with it, but may be the last to go.
        """
        with self._lock:
            lost = connection in self._open and self._remove(connection)
        if lost:
            _contact_lost(_text(connection.address) or "a node that does not listen", *lost)

    def _remove(self, connection: _Connection) -> "tuple[list[_Await], list[str]] | None":
        """Take it from the tables; return what awaits its peer, and what is owed to that."""
        peer = connection.peer
        self._open.remove(connection)
        self._counts.update(sent=connection.sent, received=connection.received)
        rest = [other for other in self._open if other.peer == peer]
        if connection in self._live:
            self._live.remove(connection)
            for other in rest:
                other.cut()
        self._changed.notify_all()
        return None if rest else (
            [each for each in list(_awaited.values()) if each.peer == peer],
            [tag for tag, owes in list(_debts.items()) if owes.get(tag, (0,))[0] == peer])


def _unreachable(name: str, why: BaseException) -> Exception:
    """What those are told who dialled the node of that name."""
    if isinstance(why, AuthenticationError):
        text = f"{name} and this node do not trust each other: {why}; "
        return AuthenticationError(text + "do both have the same key?")
    if isinstance(why, (ConnectionRefusedError, FileNotFoundError)):
        return NodeUnreachable(f"no node listens at {name}; is that where it was started?")
    return NodeUnreachable(f"cannot connect to {name}: {str(why) or 'it hung up'}")


def start_node(address: NodeLike | None = 0, *, authkey: bytes | str | None = None,
               advertise: NodeLike | None = None, allow: Any = None, heartbeat: float = 10.0,
               connect_timeout: float = 5.0, max_message: int = 1 << 28) -> Node:
    """Listen at `address`; return this process's node.  Blocks for no longer than that takes.

    Port 0 is any free one, None does not listen.  `authkey`: or the environment's
    DISTCONC_AUTHKEY, or the cookie file's.  `advertise`: what others dial, if not `address`.
    `allow`: the classes and functions that messages may name besides plain data; "anything";
    None, the default: anything on loopback, plain data beyond.  `heartbeat`: the seconds within
    which the loss of a node is noticed.  `connect_timeout`: seconds to dial and shake hands.
    `max_message`: bytes.

    Raises RuntimeError if started already, ValueError, TypeError, PermissionError for a bad
    argument or key, OSError if it cannot listen there; nothing has started then.
    Factor: start-node.  Erlang: net_kernel:start.
    """
    global _node
    with _starting:
        node = Node() if _node and _node._stopped else local_node()
        if node._started:
            raise RuntimeError(f"{node!r} runs in this process already; stop_node() first")
        node._configure(address, authkey, advertise, allow, heartbeat, connect_timeout,
                        max_message)
        node._started, _node = True, node
        return node


def stop_node(timeout: float = 5.0) -> None:
    """Send what is queued, close everything, forget the names, release the address.

    Blocks until that is done, at most `timeout` seconds.  From any thread, at any time, twice;
    also at exit.  After it a remote `send` raises NodeDown, until `start_node`.
    Factor: stop-node.
    """
    if _node:
        _node.stop(timeout)


@atexit.register
def _at_exit() -> None:
    stop_node()
    for thread in threads().values():
        thread._show_unread()


def local_node() -> Node:
    """Return this process's node.  Never blocks.  Factor: local-node.  Erlang: node().

    Without `start_node` it does not listen: it can send, and be answered over the connections
    that it opened.
    """
    global _node
    if _node is None:
        with _starting:
            _node = _node or Node()
    return _node


def nodes() -> list[Address]:
    """Return the addresses of the nodes now connected (those that listen).  Never blocks.

    Erlang: nodes(), without the hidden ones.
    """
    live = local_node()._live.copy()
    return sorted({one.address for one in live if one.address and not one.ending}, key=_text)


def connect(node: NodeLike) -> None:
    """Connect to `node` now, so that what is wrong shows here.  Never needed.  Factor: connect.

    Blocks at most `connect_timeout` seconds.  Raises NodeDown (once this node was stopped; else
    NodeUnreachable), AuthenticationError, ValueError, PermissionError.
    """
    if not local_node()._is_called(_address(node)):
        local_node()._reach(_address(node))


def disconnect(node: NodeLike) -> None:
    """Send what is queued for `node` and close the connection, if there is one.

    Blocks until that is done, at most `connect_timeout` seconds.  Who waits for that node gets
    NodeDown, here and there.  The next `send` connects anew.
    Factor: disconnect.  Erlang: disconnect_node.
    """
    here = local_node()
    connection = here._speaking(0, _address(node))
    if connection:
        here._end([connection], here._connect_timeout)


######## Other processes: what nodes ask of each other, spawn_node, ChildNode


def _ask_node(address: Address | None, *request: Any, timeout: float | None = None) -> Any:
    answer = send_synchronous(request, RemoteThread(address, KERNEL), timeout)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _kernel(request: Synchronous, cause: "Stamp") -> None:
    """Do one thing that another node asks for.  Erlang: net_kernel."""
    _here.cause = cause  # that node's act, not this thread's
    answer: Any = ValueError("a node of this version cannot do that")
    try:
        match request.data:
            case "spawn", func, args, name, register, link:
                local_node()._check_allowed(func)
                answer = _spawn_here(func, args, name, register, link, request.sender._key[0])
            case ("ps",):
                answer = [_describe(thread) for thread in threads().values()]
    except Exception as error:
        answer = error
    reply_synchronous(answer, request)


def _describe(thread: Thread) -> tuple[Any, ...]:
    """What `ps` shows: id, name, registered names, unread messages, seconds, what it does."""
    unread = sum(map(len, list(thread._mailbox._cells)))
    return (thread.id, thread.name, " ".join(thread._names), unread,
            monotonic() - thread._began, _doing(thread))


def _doing(thread: Thread) -> str:
    """Which public function of this module a thread is in, and where it was called."""
    frame, word = sys._current_frames().get(thread._ident or 0), "running"
    while frame and frame.f_code.co_filename == _doing.__code__.co_filename:
        if frame.f_code.co_name in __all__:
            word = frame.f_code.co_name
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename == threading.__file__:
        return word
    return f"{word} at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


class ChildNode(AbstractContextManager["ChildNode"]):
    """A node in a process of its own, made by `spawn_node`; it ends with its parent.

    `.address` and `.pid` say which.  As a context manager, leaving it stops the child.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", address: Address) -> None:
        self._process, self.address, self.pid = process, address, process.pid
        _ours.add(process.stdin)  # whose end is the child's
        self._printer = _thread("printer", _print_on, process.stdout)

    def is_alive(self) -> bool:
        """Whether the process has not ended.  Never blocks."""
        return self._process.poll() is None

    def stop(self, timeout: float = 5.0) -> None:
        """Have the child stop its node and end; after `timeout` seconds, kill it."""
        with suppress(OSError, ValueError), self._process.stdin as orders:  # type: ignore
            orders.write(b"stop")
        try:
            self._process.wait(timeout)
            self._printer.join(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """End the process at once, as a crash would; return when it has ended."""
        self._process.kill()
        self.stop()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def __str__(self) -> str:
        return _text(self.address)

    def __repr__(self) -> str:
        return f"<ChildNode {self}, pid {self.pid}{'' if self.is_alive() else ', ended'}>"


def spawn_node(address: NodeLike = 0, **options: Any) -> ChildNode:
    """Start a node in a new Python process, with `start_node`'s options; return it.

    Blocks until it listens.  It gets this process's key and `sys.path`, prints where this one
    prints, and ends when this one does, however that is.  Raises what `start_node` raises
    there; RuntimeError if the process ends before that.  Erlang: peer:start.
    """
    if options.get("authkey") is None:
        options["authkey"] = _authkey(local_node()._key, _address(address))
    boot = ("import sys, pickle; sys.path[:] = pickle.load(sys.stdin.buffer); "
            f"from {__name__} import _be_child; _be_child()")
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "DISTCONC_TRACE": _trace},
        start_new_session=True)  # Ctrl-C at the terminal is for the parent, which may go on
    try:
        assert process.stdin and process.stdout
        options["address"] = _address(address)
        process.stdin.write(pickle.dumps(sys.path) + pickle.dumps(options))
        process.stdin.flush()
        answer = pickle.load(process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return ChildNode(process, answer)
    except BaseException as error:
        process.kill()
        process.communicate()  # closes its pipes and waits for it
        if isinstance(error, (EOFError, BrokenPipeError)):
            raise RuntimeError(f"its process ended with status {process.returncode}") from None
        raise


def _be_child() -> None:
    """Be the process of a `ChildNode`; standard input says what to do, and when to end."""
    orders, answers = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)  # what is printed meanwhile is no answer
    try:
        answer: Any = start_node(**pickle.load(orders)).address
    except Exception as error:
        answer = error
    os.write(answers, pickle.dumps(answer))
    os.dup2(answers, 1)
    os.close(answers)
    orders.read(1)  # the parent's word, or its end
    stop_node()


def _print_on(source: Any) -> None:
    """Print what a child prints to this `sys.stdout`, be it a notebook's or a test's."""
    with source:
        for line in source:
            with suppress(OSError, ValueError):  # this process's own output may be closed
                print(line.decode(errors="replace"), end="", flush=True)


def _after_fork() -> None:
    """Leave the parent its connections: a forked child is another node, not started."""
    global _incarnation, _node, _here, _reporting
    global _registry, _settling, _losing, _starting, _clocking
    for connection in _node._open if _node else ():
        connection.ending = True
    for each in _ours:
        each.close()
    _incarnation, _node, _here = int.from_bytes(os.urandom(8), "big"), None, _Here()
    _reporting = False
    for thread in _threads.values():
        thread._ended = True
        _ring(thread._over)
    for table in _threads, _awaited, _debts, _losses, _faults, _clocks:
        table.clear()
    _registry, _settling, _losing, _starting, _clocking = (
        threading.RLock() for _ in range(5))
    trace(_trace or None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


################ Part three: when things fail ################
######## Monitors: Monitor, Down, monitor, demonitor


class Monitor(_Value):
    """What `monitor` returned: `target` is watched.  Erlang: a monitor's reference."""

    __match_args__ = "target", "tag"
    target: Any
    tag: str

    def __init__(self, target: Any, tag: str) -> None:
        self.__dict__.update(target=target, tag=tag)


class Down(_Value):
    """The message that `target` ended of `reason`; see `monitor`.  Erlang: 'DOWN'."""

    __match_args__ = "monitor", "target", "reason"
    monitor: Monitor
    target: Any
    reason: BaseException | None

    def __init__(self, monitor: Monitor, target: Any, reason: BaseException | None) -> None:
        self.__dict__.update(monitor=monitor, target=target, reason=reason)


class _Watch(_Await):
    """A thread that wants to hear of an end."""

    monitor: Monitor

    def settle(self, error: DistconcError | None, reply: Any = None) -> None:
        reason = error.reason if isinstance(error, ThreadDied) else error
        self.thread._put(Down(self.monitor, self.monitor.target, reason))


def monitor(thread_or_node: Handle | NodeLike) -> Monitor:
    """Have one `Down` message sent to this thread when a thread ends or a node is lost.

    Its `reason`: None (the thread returned), the exception it died of (or a RemoteError),
    NoSuchThread, or NodeDown.  It comes after all that the thread had sent here.  Blocks as
    `send` does, but raises nothing for what it cannot reach.  Erlang: monitor, monitor_node.

    NodeDown says that contact was lost, not that anything ended: what was only cut off goes on,
    and can be sent to when it is back.  But a monitor or link that has told of a loss is over.
    Nothing more comes of it, also when the thread ends indeed; monitor it anew.
    """
    watch = _Watch(current_thread())
    watch.monitor = Monitor(thread_or_node, watch.tag)
    try:
        if isinstance(thread_or_node, _Handle):
            thread_or_node._ask(watch)
        elif not local_node()._is_called(_address(thread_or_node)):
            local_node()._depend(watch, local_node()._reach(_address(thread_or_node)).peer)
    except (NodeDown, NoSuchThread) as error:
        _settle(watch.tag, error)
    except AuthenticationError as error:
        _settle(watch.tag, NodeUnreachable(str(error)))
    except BaseException:
        _awaited.pop(watch.tag, None)
        raise
    return watch.monitor


def demonitor(monitor: Monitor) -> None:
    """End `monitor`: when this returns, no `Down` of it is in this thread's mailbox, nor comes.

    Never blocks; to end it twice does nothing.  Erlang: demonitor with flush.
    """
    with _settling:
        watch = _awaited.pop(monitor.tag, None)
    if watch:
        watch.excuse()
    current_thread()._mailbox._get_if(
        lambda message: isinstance(message, Down) and message.monitor == monitor, 0)


######## Loss: of nodes, and of messages that nobody could take


def _fail(peer: int, tag: str, error: DistconcError) -> bool:
    """Tell who awaits `tag`, here (0) or on another node; False if nobody hears it."""
    if not peer:
        return _settle(tag, error)
    payload = b""
    if isinstance(error, ThreadDied):
        reason, cause, text = error.args
        error = ThreadDied(cause, cause, text)  # which must do, if the reason cannot cross
        with suppress(BaseException):
            payload = serialize(reason)
    small = payload if len(payload) <= ROOM else b""
    return local_node()._post(peer, (FAILED, tag, error), small)


def _contact_lost(name: str, awaited: list[_Await], owed: list[str]) -> None:
    """Settle what awaited this node; what is owed to it, nobody awaits any more."""
    text = f"contact with {name} was lost"
    with _because(None if local_node()._stopped else _record(None, "down", why=text)):
        for each in awaited:
            _settle(each.tag, NodeDown(text), None, each.peer)  # which needs no excuse
    for tag in owed:
        _strike(tag)


_losses: dict[str, tuple[int, str]] = {}  # by target: how many since its last line, and why
_reporting = False  # a thread does, while there are any
_losing = threading.RLock()  # guards: _losses, _reporting


def _undelivered(target: Handle, why: object) -> None:
    local_node()._count("undelivered")
    _lose(repr(target), str(why))


def _lose(target: str, why: str, times: int = 1) -> None:
    """Log lost messages: at once, or, if any were in the last second, when that is over.

    So there is at most one line a second for a target, and the counts add up to all.
    """
    global _reporting
    local_node()._count("lost", times)
    _record(None, "lost", _here.cause, why=f"{times} to {target}: {why}")
    with _losing:
        _losses[target] = _losses.get(target, (0,))[0] + times, why
        first, _reporting = not _reporting, True
    if first:
        try:
            _thread("reporter", _report_on)
        except RuntimeError:  # at exit, no thread starts any more
            _reporting = False
        _report()


def _report() -> None:
    global _losses
    with _losing:
        losses, _losses = _losses, {}
    for target, (times, why) in losses.items():
        _log("WARNING", "lost %d message%s to %s: %s", times, "s" * (times > 1), target, why)


def _report_on() -> None:
    """Once a second, log what was lost since; end when nothing was."""
    global _reporting
    while True:
        sleep(1)
        with _losing:
            if not _losses:
                _reporting = False
                return
        _report()


######## Faults: a network that can be broken

_faults: list["faults"] = []  # those entered, the last of which counts


class faults:
    """While it is entered, make worse what this node sends to others.

    Each message is lost with the probability `drop`, sent twice with the probability
    `duplicate`, and held up for up to `delay` seconds, in order: those that wait go together.
    `seed` makes the same of the same messages from one thread.  `to` is the node it concerns
    (None: all); of several that concern one, the last entered counts.  `drop=1` cuts the node
    off, on this side: nothing goes there, heartbeats included, nor can it be dialled or dial
    this one; so each takes the other for lost.  What is dropped, nobody is told; what is still
    held up goes out when the fault is left, or when it is too much (2,000 messages for a node).
    Entering and leaving never block.  Raises ValueError for what is no probability.
    """

    def __init__(self, *, to: NodeLike | None = None, drop: float = 0, delay: float = 0,
                 duplicate: float = 0, seed: Any = None) -> None:
        if not (0 <= drop <= 1 and 0 <= duplicate <= 1 and delay >= 0):
            raise ValueError("drop= and duplicate= are from 0 to 1, delay= is seconds")
        self._to = None if to is None else _address(to)
        self._drop, self._delay, self._duplicate, self._seed = drop, delay, duplicate, seed

    def __enter__(self) -> "faults":
        self._random = random.Random(self._seed)
        _faults.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        with suppress(ValueError):  # a fork has cleared them
            _faults.remove(self)
        for connection in local_node()._open.copy():
            other = _fault(connection.names)
            if connection.late and not (other and other._delay):
                connection.late = 0.0
                _ring(connection._bell)

    def _send(self, connection: _Connection, head: Head, payload: bytes) -> bool:
        """Send, or not, or twice; what is to be late waits in the outbox, so in order."""
        drop, duplicate, delay = (self._random.random() for _ in range(3))
        if drop < self._drop:
            _record(None, "lost", _here.cause, why="dropped by faults")
            return True
        copies = [(head, payload)] * (1 + (duplicate < self._duplicate))
        waiting = len(connection._outbox)
        if not waiting:
            connection.late = monotonic() + delay * self._delay
        if not self._delay or waiting >= FULL:
            return any([connection.send(*copy) for copy in copies])
        for copy in copies:
            connection.post(*copy)
        return not connection.ending or connection._has_taken((head, payload))


def _hold_up(connection: _Connection) -> None:
    """Keep the writer waiting while a fault has what it would write be late; ticks go out."""
    while _faults and not connection.ending and (left := _left(connection.late)):
        connection._bell.acquire(True, min(left, connection.heartbeat / 5))
        beat = monotonic() > connection._wrote + connection.heartbeat / 5
        with connection._writing:
            if beat and not connection._shut:
                connection._write((), ())


def _fault(names: set[Address | None]) -> faults | None:
    """The fault that concerns the node of these addresses."""
    return next((one for one in reversed(_faults.copy()) if one._to in (None, *names)), None)


def _cut_off(names: set[Address | None]) -> bool:
    fault = _fault(names)
    return fault is not None and fault._drop >= 1


################ Part four: seeing ################
######## Traces: trace

Stamp = tuple[Any, ...]  # an event of a trace: incarnation, thread's id, its Lamport clock
UNKNOWN: Stamp = ()
_trace, _file = "", -1  # the directory, and the file of this process there; "": no trace
_clocks: dict[int, int] = {}  # Lamport's, by thread's id; 0 is the node
_clocking = threading.RLock()  # guards: an event's clock and its line are one step


def trace(directory: "str | os.PathLike[str] | None") -> None:
    """Record what happens in this process to a file of its own in `directory`; None: stop.

    That is: spawns, starts, ends and crashes of threads, sends, receives, time-outs, lost
    messages and lost nodes, each with the thread's Lamport clock.  Nodes made by `spawn_node`
    from now on do so, too, and so does every process with DISTCONC_TRACE=directory in its
    environment.  The directory is made if there is none; each record is written at once, so
    kill -9 loses none.
    Raises OSError, and goes on as before.  Should the disk be full later, the trace ends, with
    a warning.  See `chart`.  Erlang: seq_trace.
    """
    global _trace, _file
    new, file = "", -1
    if directory is not None:
        new = os.path.abspath(os.fsdecode(directory))
        os.makedirs(new, exist_ok=True)
        path = os.path.join(new, f"{_incarnation:016x}.jsonl")
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with _clocking:
        old, _trace, _file = _file, new, file
        if old >= 0:
            os.close(old)


def _record(thread: Thread | None, event: str, cause: Stamp | None = None,
            **about: Any) -> Stamp:
    """Record an event of `thread`, unless it has ended, or of the node; return its stamp.

    The clock of a thread counts its events, and jumps ahead of the cause of each: so it is
    later in what comes of an event than in the event.
    """
    if not _trace or thread and thread._key not in _threads:
        return UNKNOWN
    import json

    id, name = (thread.id, thread.name) if thread else (0, "node")
    about.update(process=f"{_incarnation:016x}", node=str(local_node()), thread=id, name=name)
    if cause:
        about["cause"] = cause
    with _clocking:
        seen = [_clocks.get(id, 0)] if id else _clocks.values()  # a node saw all before
        clock = _clocks[id] = max([0, *seen, *(cause or UNKNOWN)[2:]]) + 1
        about.update(event=event, clock=clock, time=time())
        try:
            if _trace:  # it may have ended just now
                os.write(_file, json.dumps(about).encode() + b"\n")
        except OSError as error:  # a full disk is no reason to stop the program
            trace(None)
            _log("WARNING", "the trace of this process ends here: %s", error)
    return about["process"], id, clock


class _because:
    """While it is entered, what this thread sends is caused by `cause`, and no event itself."""

    def __init__(self, cause: Stamp | None) -> None:
        self._cause = cause

    def __enter__(self) -> None:
        self._before, _here.cause = _here.cause, self._cause

    def __exit__(self, *_: Any) -> None:
        _here.cause = self._before


class _sending(_because):
    """This thread sends `message`, which is the cause of what comes of it meanwhile."""

    def __init__(self, message: Any, thread: Handle) -> None:
        to = thread.name if isinstance(thread, Thread) else f"{_text(thread.node)}/{thread.id}"
        super().__init__(_record(current_thread(), "send", message=_shown(message), to=to))

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        super().__exit__()
        if isinstance(error, Exception):
            _record(current_thread(), "lost", self._cause, why=_words(error))


def _stamped(head: Head, cause: Stamp | None = None) -> Head:
    cause = cause or _here.cause
    return (STAMP, cause, *head) if cause else head


class _Traced(list[Any]):
    """The cell of a message in a mailbox, which records that it is taken.

    Who only looks iterates over it; `cell[0]` is for who takes.
    """

    def __init__(self, message: Any, cause: Stamp | None) -> None:
        super().__init__([message])
        self._cause = cause

    def __getitem__(self, index: Any) -> Any:
        message = super().__getitem__(index)
        _record(current_thread(), "receive", self._cause, message=_shown(message))
        return message


def _shown(message: Any) -> str:
    """A message as a trace shows it, in one short line; safe even from a bad __repr__."""
    import reprlib

    match message:
        case Synchronous(data) | Reply(data):
            return _shown(data)
        case Down(_, target, reason):
            return f"Down: {_shown(target)}, {_shown(reason)}"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    try:
        return short.repr(message[:200] if type(message) is bytes else message)
    except Exception:  # it is too large a number, or another thread changes it
        return f"<a {type(message).__name__}>"


if os.environ.get("DISTCONC_TRACE") and __name__ != "__main__":
    trace(os.environ["DISTCONC_TRACE"])


######## Charts: chart, the traces it reads, and three ways to draw them


def chart(directory: "str | os.PathLike[str]", format: str = "svg", *, first: int = 0,
          last: float = float("inf"), threads: str | Iterable[str] = ()) -> str:
    """Return the traces in `directory` as one space-time diagram.

    A column is a thread; time runs down, so no arrow points up.  `format` is "svg" (a page for
    any browser: point at what you want to know more of), "text" (for a terminal, 80 characters
    wide for up to 20 threads) or "shiviz" (vector clocks, for the tool of that name).  `first`
    and `last` narrow it to these Lamport clocks, `threads` to those called so, such as "logger"
    or "logger,127.0.0.1:9001/MainThread", or a list of such.

    What is damaged is left out, and logged.  Raises FileNotFoundError if no trace is there;
    ValueError for another format, and if nothing is left to draw.
    """
    formats = {"svg": _as_svg, "text": _as_text, "shiviz": _as_shiviz}
    if format not in formats:
        raise ValueError(f"{format!r} is no format of a chart; there are {', '.join(formats)}")
    wanted = {threads} if isinstance(threads, str) else {*threads}
    past = _read_traces(directory)
    shown = [event for event in past if first <= event.clock <= last and (
        not wanted or wanted & {event.name, f"{event.node}/{event.name}"})]
    if not shown:
        raise ValueError("nothing is left to draw: no event is of such a clock and thread")
    return formats[format](shown, past)


_MARKS = {  # of an event: in text and in SVG, what it means, what it tells
    "start": ("o\u25cb", "start", ""),
    "spawn": ("++", "spawn", "spawns {child}"),
    "send": ("*\u25cf", "message", "{message}"),
    "receive": ("*\u25cf", "message", "{message}"),
    "end": ("=\u2534", "end", ""),
    "crash": ("XX", "crash", "{error}"),
    "lost": ("xx", "lost", "lost: {why}"),
    "down": ("!!", "node lost", "{why}"),
    "timeout": ("??", "time-out", "{what} timed out"),
}
_BAR = "|\u2502"  # of a lifeline
_Event = types.SimpleNamespace  # a line of a trace; _name_columns, _rows and _draw tell it more
_Row = list[_Event]
_Column = tuple[int, int, str]  # the place of the node, the thread's id, what it is called


def _read_traces(directory: "str | os.PathLike[str]") -> list[_Event]:
    """Return all events, by their clocks, which say where they belong."""
    from pathlib import Path

    paths = sorted(path for path in Path(directory).glob("*.jsonl") if path.is_file())
    if not paths:
        raise FileNotFoundError(f"there are no traces (*.jsonl) in {os.fspath(directory)!r}")
    found: dict[Stamp, _Event] = {}
    for path in paths:
        lines = path.read_bytes().splitlines()
        bad = len(lines)
        for line in lines:
            with suppress(Exception):  # of as many kinds as there are ways to damage a file
                event = _read_event(line)
                bad -= found.setdefault(event.key, event) is event
        if bad:
            _log("WARNING", "%s: %d of its lines are no events, and left out", path, bad)
    events = sorted(found.values(), key=lambda event: (event.clock, event.time, event.key))
    _name_columns(events)
    return events


def _read_event(line: bytes) -> _Event:
    """Raise some exception for what is no event.  A cause is older: so there are no cycles."""
    import json

    given = json.loads(line)
    text = {field: _plain(value) for field, value in given.items() if isinstance(value, str)}
    process, thread, clock = given.get("cause", ("", 0, -1))
    event = _Event(
        process=text["process"], node=text["node"], name=text["name"], event=text["event"],
        words=_MARKS[text["event"]][2].format_map(text), to=text.get("to", ""),
        clock=int(given["clock"]), time=float(given["time"]),
        cause=(str(process), int(thread), int(clock)))
    event.key = event.process, int(given["thread"]), event.clock
    if not (-1 <= event.cause[2] < event.clock < 1 << 64 and 0 <= event.time):
        raise ValueError(given)
    return event


def _plain(text: str) -> str:
    """`text` in one line, fit for XML: as in a repr, if not all of it is printable."""
    return text if text.isprintable() else repr(text)[1:-1]


def _name_columns(events: list[_Event]) -> None:
    """Tell events their column.  The last address of a node is the one to know it by."""
    homes = {event.process: event.node for event in events if event.node}
    names = {event.key[:2]: event.name for event in events}
    places, alike = dict[str, int](), dict[str, dict[Any, int]]()
    for event in events:
        place = places.setdefault(event.process, len(places))
        event.node = homes.get(event.process, f"process {event.process[:4]}")
        event.who = f"{event.node}/{names[event.key[:2]]}".replace(" ", "_")
        numbers = alike.setdefault(event.who, {})
        number = numbers.setdefault(event.key[:2], len(numbers) + 1)
        event.who += f"#{number}" if number > 1 else ""  # of a later run of the node, perhaps
        event.column = place, event.key[1], event.who


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most - 2] + ".."


def _rows(shown: list[_Event]) -> list[_Row]:
    """An event is put into the row of its cause, if its thread does nothing in between.

    So rows are in an order that causes allow, and mostly a message takes one.  Tell events
    their `origin`: their cause, or, if that is not shown, themselves.
    """
    rows, latest, before = list[_Row](), dict[_Column, int](), dict[Stamp, _Event]()
    for event in shown:
        event.row = -1  # in none yet
        event.origin = before.get(event.cause, event)
        event.row = event.origin.row
        if event.row <= latest.get(event.column, -1) or len(rows[event.row]) > 1:
            event.row = len(rows)
            rows.append([])
        rows[event.row].append(event)
        latest[event.column] = event.row
        before[event.key] = event
    return rows


def _draw(shown: list[_Event], svg: bool) -> Iterator[tuple[str, _Row]]:
    """Yield the lines of the picture, each with the row of events that it shows, if one.

    They have 80 characters at most; more, if there are more than 20 columns; and more for SVG,
    which draws the arrows by itself.  The columns are named again and again, as the first names
    scroll away.  Tell events their `x`, in characters.
    """
    columns = sorted({event.column for event in shown})
    pitch = max(2, min(6, 40 // len(columns))) * (2 if svg else 1)
    at = {column: 7 + pitch * place for place, column in enumerate(columns)}
    width, alive = 7 + pitch * len(columns), set[int]()
    most, often = max(80, width + (80 if svg else 33)), 30 + 2 * len(columns)
    for number, row in enumerate(_rows(shown)):
        for place, (*_, name) in enumerate(columns if number % often == 0 else ()):
            yield f"{'':7}{_BAR[svg].ljust(pitch) * place}{name[-33:]}", []
        for event in row:
            event.x = at[event.column]
        line = _picture(f"{row[0].clock:>5}".ljust(width), row, alive, svg)
        yield _cut(line + _told(row), most), row
    marks = dict.fromkeys(f"{mark[svg]} {what}" for mark, what, _ in _MARKS.values())
    yield from (("", []), ("  ".join(marks), []))


def _picture(blank: str, row: _Row, alive: set[int], svg: bool) -> str:
    """Draw the lifelines and the arrow of a row; afterwards, `alive` is where others go on."""
    line, start, stop = list(blank), row[-1].x if svg else row[-1].origin.x, row[-1].x
    alive.update(event.x for event in row)
    for x in alive | {start}:
        line[x] = _BAR[svg]
    if start < stop:
        line[start + 1:stop] = ">".rjust(stop - start - 1, "-")
    elif stop < start:
        line[stop + 1:start] = "<".ljust(start - stop - 1, "-")
    for event in row:
        line[event.x] = _MARKS[event.event][0][svg]
    alive.difference_update(event.x for event in row if event.event in ("end", "crash"))
    return "".join(line)


def _told(row: _Row) -> str:
    told = "; ".join(dict.fromkeys(event.words for event in row if event.words))
    return f"{told} to {row[-1].to}" if row[-1].event == "send" else told


def _as_text(shown: list[_Event], _: Any) -> str:
    return "".join(f"{line.rstrip()}\n" for line, _ in _draw(shown, svg=False))


_STYLE = """<style>
svg { color-scheme: light dark; background: Canvas; font: 13.3px ui-monospace, monospace }
text { fill: CanvasText; white-space: pre }
path { fill: none; stroke: #2f7de1; stroke-width: 1.3; marker-end: url(#tip) }
.start path { stroke: #888; stroke-dasharray: 2 3 } .lost path { marker-end: none }
:is(.crash, .down, .lost) text { fill: #e5484d } :is(.crash, .lost) path { stroke: #e5484d }
g:hover path { stroke-width: 3 } #tip path { fill: context-stroke; stroke: none }
</style><marker id="tip" viewBox="0 0 10 10" refX="14" refY="5" markerWidth="9"
markerHeight="9" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 1 10 5 0 9z"/>
</marker>"""


def _as_svg(shown: list[_Event], _: Any) -> str:
    """Typeset the picture, with arrows that slope, in characters 8 pixels wide and 16 high."""
    from html import escape

    drawn, wide, y = list[str](), 0, 0
    for line, row in _draw(shown, svg=True):
        y, wide = y + 16, max(wide, 8 * len(line))
        line = f'<text y="{y + 5}" textLength="{8 * len(line)}">{escape(line)}</text>'
        if row:  # pointing there tells all of it
            for event in row:
                event.y = y
            ends = row[-1:] if row[-1].origin is row[-1] else [row[-1].origin, row[-1]]
            path = "L".join(f"{8 * each.x + 4} {each.y}" for each in ends)
            arrow = f'<path d="M{path}"/>' if len(ends) > 1 else ""
            where = (f"{each.event} at {each.who}, clock {each.clock}" for each in ends)
            title = escape("\n".join([_told(row), *where]).lstrip("\n"))
            kinds = " ".join(event.event for event in row)
            line = f'<g class="{kinds}"><title>{title}</title>{arrow}{line}</g>'
        drawn.append(line)
    size = f'width="{wide + 20}" height="{y + 20}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{_STYLE}'
    svg = "\n".join([svg, *drawn, "</svg>\n"])
    return svg.encode("ascii", "xmlcharrefreplace").decode()  # for any encoding


def _as_shiviz(shown: list[_Event], past: list[_Event]) -> str:
    """Each event with how many events of each thread it may depend on: its vector clock."""
    import json

    known: dict[Stamp, Counter[str]] = {}  # by event; by thread, its latest
    drawn, lines = {event.key for event in shown}, ""
    for event in past:  # what is not drawn hands on what it knows, too
        clock = known.get(event.key[:2], Counter()) | known.get(event.cause, Counter())
        if event.key in drawn:
            clock[event.who] += 1
            lines += f"{event.who} {json.dumps(clock)}\n{event.words or event.event}\n"
        known[event.key] = known[event.key[:2]] = clock
    return lines


######## At the shell: demo, node, send, call, ps, chart


def _demo() -> None:
    """Run the example that started it all, on two nodes."""
    with tempfile.TemporaryDirectory() as directory:
        if not _trace:
            trace(directory)
        with start_node() as node, spawn_node() as child:
            print(f"node {node} has pid {os.getpid()}, its child {child} has pid {child.pid}")
            spawn_server(_log_message, node=child, name="logger", register=True)
            logger = RemoteThread(child, "logger")
            send("hello", logger)
            shouter = spawn(handle_synchronous, str.upper, name="shouter", node=child)
            print("a call:", send_synchronous("can you hear me?", shouter), flush=True)
            send(current_thread(), logger)
            spawn(send, "thank you", current_thread(), name="thanker", node=child)
            print("through a handle that travelled:", receive())
        print("\nAll of it, time running down:\n\n" + chart(_trace, "text").rstrip())


def _log_message() -> bool:
    print("logger:", receive(), flush=True)
    return True


def _run_node(address: str | int = 0, script: str = "") -> None:
    """Run a node, with a Python prompt, or with SCRIPT, after which it stays up.

    ADDRESS is 9000, host:9000, or a path; without it, a free port is taken.
    """
    import code

    if os.path.isfile(str(address)):
        raise ValueError(f"{address} is a file; say: node ADDRESS {address}")
    main = sys.modules["__main__"] = types.ModuleType("__main__")  # none of what runs it
    with start_node(address) as node:
        print(f"node {node}, pid {os.getpid()}", flush=True)
        if script:
            _run_script(script, main)
            threading.Event().wait()
        main.__dict__.update({name: globals()[name] for name in __all__})
        banner = "All names of distconc are here; Ctrl-D ends the node."
        code.interact(banner, local=main.__dict__, exitmsg="")


def _run_script(path: str, main: types.ModuleType) -> None:
    """Run a file as Python would, as the module `main`; end the process if it fails."""
    with open(path, "rb") as file:
        source = file.read()
    sys.argv, main.__file__ = [path], path
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        exec(compile(source, path, "exec"), main.__dict__)
    except Exception as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


def _send(target: str, message: str, *, timeout: float = 10.0) -> None:
    """Send MESSAGE to TARGET; wait --timeout seconds (10) for it to be there; 1 if it was lost.

    TARGET is such as 127.0.0.1:9000/logger; MESSAGE a Python literal, such as '("hello", 1)'.
    """
    thread = _target(target)
    send(_literal(message), thread)
    _ask_node(thread.node, "ps", timeout=timeout)  # whose answer comes after news of a loss
    sys.exit(local_node().stats()["lost"] and 1)


def _call(target: str, message: str, *, timeout: float = 10.0) -> None:
    """Send MESSAGE to TARGET as `send` does, and print the reply.

    Without one within the --timeout, of 10 seconds, it fails.
    """
    print(repr(send_synchronous(_literal(message), _target(target), timeout)))


def _target(text: str) -> RemoteThread:
    node, _, name = text.rpartition("/")
    if not node or not name:
        raise ValueError(f"{text!r} is no target; say 127.0.0.1:9000/logger")
    return RemoteThread(node, int(name) if name.isdecimal() else name)


def _literal(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        such = "such as 7, '(\"hello\", 1)' or '\"hello\"'"
        raise ValueError(f"{_cut(text, 60)} is no Python literal, {such}") from None


def _ps(node: str) -> None:
    """List the threads of NODE, such as 9000 or 127.0.0.1:9000."""
    rows = [("id", "name", "registered", "unread", "age", "in")]
    for id, name, names, unread, age, doing in _ask_node(_address(node), "ps"):
        rows.append((str(id), name, names, str(unread), f"{age:.0f} s", doing))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(map(str.ljust, map(_plain, row), widths)).rstrip())


def _chart(directory: str, *, output: str = "", format: str = "svg", first: int = 0,
           last: float = float("inf"), thread: Sequence[str] = ()) -> None:
    """Draw what was traced to DIRECTORY: as svg, text or shiviz; to standard output, or -o.

    --from and --to narrow it to these Lamport clocks, --thread to the threads of that name,
    such as logger or 127.0.0.1:9000/logger; it may be repeated.
    """
    drawing = chart(directory, format, first=first, last=last, threads=thread)
    with open(output, "w", encoding="utf-8") if output else nullcontext(sys.stdout) as file:
        file.write(drawing)


_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": _demo, "node": _run_node, "send": _send, "call": _call, "ps": _ps, "chart": _chart}
_FLAGS = {"output": "-o", "first": "--from", "last": "--to"}


def main(arguments: list[str] | None = None) -> None:
    """Threads that send, on any node.

    In the environment: DISTCONC_AUTHKEY, the key; DISTCONC_COOKIE, the file that has it
    otherwise; DISTCONC_TRACE, a directory to write traces to.
    """
    import argparse
    import inspect
    import logging

    for stream in sys.stdout, sys.stderr:  # any text can be printed there, or to nowhere
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logging.basicConfig(format="distconc: %(message)s")
    parser = argparse.ArgumentParser("distconc", description=main.__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, run in _COMMANDS.items():  # which takes what its function does
        sub = commands.add_parser(command, help=run.__doc__, description=run.__doc__,
                                  argument_default=argparse.SUPPRESS)
        sub.set_defaults(run=run)
        for name, given in inspect.signature(run).parameters.items():
            if given.kind is given.KEYWORD_ONLY:
                flag, default = _FLAGS.get(name, f"--{name}"), given.default
                kind = {"type": type(default)} if default != () else {"action": "append"}
                sub.add_argument(flag, dest=name, **kind)
            else:
                sub.add_argument(name, nargs=None if given.default is given.empty else "?")
    options = vars(parser.parse_args(arguments))
    try:
        options.pop("run")(**options)
    except KeyboardInterrupt:
        sys.exit(130)
    except (DistconcError, AuthenticationError, OSError, ValueError) as error:
        sys.exit(f"distconc: {_plain(str(error))}")


if __name__ == "__main__":
    try:
        import distconc  # this file by its name: its classes are those that messages name
    except OSError as error:
        sys.exit(f"distconc: DISTCONC_TRACE: {error}")

    distconc.main()
