# distconc 0.2.0.  Copyright (C) 2026 the distconc authors.
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

and another process, which sends to that thread by name:

    from distconc import *
    send("hello", RemoteThread(9000, "logger"))

Promises.  Messages from one thread to another arrive in the order sent, at most once,
unaltered; after a lost connection never an old one after a new one.  `send` returns when a
message is accepted here; only a reply proves its arrival.  A call ends in its reply, or in an
error that says how much is known, and never hangs while the other side is gone.  A slow or
dead node delays only the threads that send to that node.

Danger.  Messages are pickles, so anyone with the key can run any code here, unless `allow=` is
narrow.  Frames cannot be forged or altered on their way, but they can be read: for secrecy use
`ssh -L` or WireGuard.

Python 3.10 or later, and no packages.

Words.  A *node* is a process that can be addressed.  Its *incarnation* is a random number drawn
once per process, which tells the process from earlier ones at that address.  A *thread* has a
*mailbox*.  A *handle* denotes a thread: a `Thread` of this node, or a `RemoteThread` of any.
An *entry* is a message in a mailbox.  A *pending* is one reply or one end that a thread here
waits for, and a *tag* is the random text that names a pending; a *watcher* is told when a
thread ends.  A *connection* joins this node and its *peer*; a *header* says for whom a message
on a connection is, and its *payload* is the message, pickled.  A *cause* is the event that led
to another, if a trace records events.

    node A                                                  node B

    Thread                                                  Thread
      | send                                                  ^ receive
      v                                                       |
    RemoteThread                                            Mailbox
      | header, payload                                       ^ put
      v                                                       |
    connection: outbox, writer  == frames, sealed ==>  connection: reader
    connection: reader         <== replies, failures ==  connection: outbox, writer
      |                                                       ^
      v                                                       | notify
    pending calls, links, monitors                          watchers of a Thread
"""

# An older Python stops here, with a SyntaxError that shows this line.
match "distconc needs Python 3.10 or later; this one is older":
    case _:
        pass

import atexit
import errno
import hashlib
import hmac
import io
import itertools
import os
import pickle
import random
import signal
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
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache, partial
from multiprocessing import AuthenticationError, Pipe, current_process, parent_process, util
from multiprocessing.connection import (
    Client, Connection, Listener, answer_challenge, deliver_challenge, wait)
from operator import itemgetter
from time import monotonic, sleep, thread_time, time
from typing import Any, ClassVar, NamedTuple, Optional, Union, overload

__all__ = [
    "Mailbox", "Thread", "RemoteThread", "spawn", "spawn_linked", "spawn_server",
    "current_thread", "threads",
    "send", "receive", "receive_if",
    "Synchronous", "Reply", "send_synchronous", "reply_synchronous", "handle_synchronous",
    "Node", "start_node", "stop_node", "local_node", "nodes", "connect", "disconnect",
    "ChildNode", "spawn_node",
    "register_remote_thread", "unregister_remote_thread", "get_remote_thread",
    "serialize", "deserialize",
    "Monitor", "Down", "monitor", "demonitor",
    "DistconcError", "LinkedError", "NodeDown", "NodeUnreachable", "NoSuchThread", "ThreadDied",
    "SynchronousToSelfError", "SerializationError", "RemoteError", "AuthenticationError",
    "trace", "chart", "faults",
]
__version__ = "0.2.0"

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection
else:
    import fcntl

Handle = Union["Thread", "RemoteThread"]
Address = Union[tuple[str, int], str]
NodeLike = Union[int, Address, "os.PathLike[str]", "Node", "ChildNode"]
Predicate = Union[Callable[[Any], Any], type, tuple[type, ...], types.UnionType]


######## Errors: all that a caller may see, each with its data


class DistconcError(Exception):
    """The base of this module's errors.

    All data of an error is in its `args`, from which pickle makes the copy.  The last of them
    is the text, except in a LinkedError, which has no text of its own.
    """

    def __str__(self) -> str:
        return str(self.args[-1]) if self.args else ""


class LinkedError(DistconcError):
    """A linked thread, `.thread`, failed of `.error`.  Factor: linked-error."""

    def __init__(self, error: BaseException, thread: Handle) -> None:
        super().__init__(error, thread)
        self.error = error
        self.thread = thread

    def __str__(self) -> str:
        return f"{self.thread} failed: {type(self.error).__name__}: {self.error}"


class NodeDown(DistconcError, ConnectionError):
    """Contact with a node was lost, or never made; a message under way may have arrived."""


class NodeUnreachable(NodeDown):
    """No connection to the node could be made, so nothing was delivered."""


class NoSuchThread(DistconcError, LookupError):
    """No living thread has that id or name there; nothing was delivered."""


class ThreadDied(DistconcError):
    """The thread ended before it replied; `.reason` is its error, or None if it returned.

    After a failure, `__cause__` is a RemoteError with (the end of) the traceback as its text.
    """

    def __init__(self, reason: BaseException | None, cause: "RemoteError | None",
                 text: str) -> None:
        super().__init__(reason, cause, text)
        self.reason = reason
        self.__cause__ = cause


class SynchronousToSelfError(DistconcError):
    """A thread called itself, and would wait for ever.

    Factor: cannot-send-synchronous-to-self.
    """


class SerializationError(DistconcError, ValueError):
    """The message cannot be copied to another node, and was not sent."""


class RemoteError(DistconcError):
    """A stand-in for an error that could not cross.

    `.type` is the name of that error, the text its traceback.
    """

    def __init__(self, type: str, *text: str) -> None:
        super().__init__(type, *text)
        self.type = type


################ Part one: one process ################
#
# This part is local, and runs without the rest of the file.  Its code uses later parts in six
# places, each of which says so: `_Observer` (part three records the events), `spawn` with
# `node=`, `monitor` of a node, and three places of Thread, which are `node`, `__reduce__`, and
# the methods in the child of a fork.

######## Where the promises are kept
#
# Order      Of a mailbox: `Mailbox._entries`.  Of a connection: its `_write_lock`, under which
#            the outbox is written out, and a lone message only if the outbox is empty; and one
#            reader at the other end.  Over a lost connection and the next one:
#            `_Handshake._exchange_serials`, `Node._connection_to`, `Node._connection_closed`.
# A late     No reply enters a mailbox.  `_PendingTable.resolve` gives a reply to the call that
# reply      waits for its tag; if none does any more, nobody hears of the reply.
# A lost     `_Connection.read_loop` notices the loss, by the connection's end or by silence;
# node       `Node._contact_lost` tells all that wait for that node.
# The end    `Thread._end` tells the watchers; by `_Registry.lock`, each is told, or is refused.
# A handle   `RemoteThread._is_local` recognizes the handle; a message sent to it goes straight
# sent home  into the mailbox of its thread.
#
# Locks.  Each stands beside the data that it guards:
#
#   _PendingTable._lock         failures and removals of pendings
#   _Registry.lock              living threads, their names, watchers and ends
#   _Connection._write_lock     frames, their MACs, and taking from the outbox
#   Node._lock                  connections, handshakes, counts
#   _Process.lock               the node
#   ChildNode._control_lock     the pipe to a child
#   _LogThread, _LimitedLog     lines that wait to be logged
#   _Recorder._lock             clocks, and the file of a trace
#
# A mailbox and an outbox have none.  Each lock is taken alone, but for `_Process.lock`, which
# the thread that starts a node takes before all others.  The holder of a `_write_lock` may have
# to wait for the peer, that of `_Process.lock` for the address of a name; no other holder waits
# for the network.  No lock is held while code of the user's runs, but for an argument of
# `start_node`, and for a `__del__`, which may interrupt any line.  A `__del__` that sends there
# does not wait, either, unless the socket has no room for its message; then it waits until the
# peer reads: see `_must_not_wait`.

######## Waiting: deadlines, and queues of threads that wait


def _deadline(timeout: float | None) -> float | None:
    """Return the time at which a wait of `timeout` seconds ends; None means never.

    A time-out below 0 is like 0, because callers compute the rest of one.  Raises TypeError or
    ValueError for a value that is no time-out.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
        raise TypeError(f"a timeout is seconds, or None, not {timeout!r:.100}")
    if not timeout < threading.TIMEOUT_MAX:
        raise ValueError(f"{timeout!r:.100} is no timeout; to wait for ever, say None")
    return monotonic() + max(timeout, 0)


def _bounded_deadline(timeout: float) -> float:
    """Return the deadline of a wait that must end, for which None is no time-out."""
    deadline = _deadline(timeout)
    if deadline is None:
        raise TypeError("this timeout is seconds, not None: what stops something must end")
    return deadline


def _remaining(deadline: float | None) -> float:
    """Return the seconds until `deadline` as `Lock.acquire` takes them: -1 means for ever."""
    if deadline is None:
        return -1
    return max(deadline - monotonic(), 0)


# The slice is 0 where Ctrl-C ends the main thread's wait for a lock.  On Windows before Python
# 3.14, Ctrl-C is noticed only after the wait, so there the main thread waits in short slices.
WAIT_SLICE = 0.0  # seconds
if sys.platform == "win32" and sys.version_info < (3, 14):
    WAIT_SLICE = 0.1


def _acquire(lock: threading.Lock, deadline: float | None) -> bool:
    """Acquire a lock for which a thread may wait long; return False at the deadline."""
    if not WAIT_SLICE or threading.current_thread() is not threading.main_thread():
        return lock.acquire(timeout=_remaining(deadline))
    while True:
        remaining = _remaining(deadline)
        if 0 <= remaining <= WAIT_SLICE:
            return lock.acquire(timeout=remaining)
        if lock.acquire(timeout=WAIT_SLICE):
            return True


# Every lock that is taken by `with` is a `_Lock`, which is re-entrant because a `__del__` that
# sends may interrupt the holder.
if sys.version_info[:2] != (3, 14):
    _Lock = threading.RLock
else:

    class _Lock(type(threading.RLock())):  # type: ignore[misc]
        """An RLock that Ctrl-C cannot leave held.

        On Python 3.14 alone, Ctrl-C may strike when `with` has acquired a lock, but has not
        begun its block; then nobody would release the lock.
        """

        def __enter__(self) -> None:
            try:
                self.acquire()
            except BaseException:
                try:
                    self.release()
                except RuntimeError:
                    # Ctrl-C came before the lock was acquired.
                    pass
                raise


class _WaitQueue:
    """A queue of threads that wait for a condition.  Linux: wait queue.  trio: ParkingLot.

    The queue works like `threading.Condition`, with two differences.  A thread sleeps holding
    no lock, so Ctrl-C cannot strike while the thread tries to get one back.  And `wake_all`
    takes no lock, so a `__del__` that sends may call `wake_all` in the middle of any line.
    """

    __slots__ = ("_sleepers", "_may_sleep")

    def __init__(self) -> None:
        # One lock for each waiting thread, which sleeps by acquiring the lock, though that is
        # held already.  To wake the thread is to release the lock.  Only the thread itself puts
        # its lock into the list, and takes it out.
        self._sleepers: list[threading.Lock] = []

        # Whether a thread may sleep that nobody has woken.  Of a thousand messages that come
        # before the woken thread runs, only the first has to wake it: this makes a local flood
        # a tenth faster.
        self._may_sleep = False

    def wait_until(self, is_true: Callable[[], bool], deadline: float | None) -> bool:
        """Block until `is_true()`; return False if that is still false at the deadline.

        The thread that makes the condition true calls `wake_all` afterwards.
        """
        if is_true():
            return True
        sleeper = threading.Lock()
        sleeper.acquire()
        try:
            self._sleepers.append(sleeper)
            while True:
                # The test comes last, so no `wake_all` is missed.
                self._may_sleep = True
                if is_true():
                    return True
                if not _acquire(sleeper, deadline):
                    return is_true()
        finally:
            # Ctrl-C may have come before the lock was in the list.
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)

    def wake_all(self) -> None:
        """Have every waiting thread test its condition again.  Never blocks."""
        if not self._may_sleep:
            return
        self._may_sleep = False
        try:
            for sleeper in self._sleepers.copy():
                # The lock is free if the thread has been woken, but has not run yet.
                if sleeper.locked():
                    _release(sleeper)
        except BaseException:
            # After Ctrl-C, those that are left are woken now.
            self._may_sleep = True
            self.wake_all()
            raise


def _release(lock: threading.Lock) -> None:
    """Release a lock, unless another thread has just released it."""
    try:
        lock.release()
    except RuntimeError:
        pass


######## Mailbox: put, get, get_if, get_all, empty

# Stands for an argument that was not given.
_MISSING: Any = object()

# Names an event of a trace (part three): incarnation in hex, thread's id, Lamport clock.
_EventId = tuple[str, int, int]

# The event that led to another; None if nobody records events.
_Cause = Optional[_EventId]


class _Entry:
    """A message in a mailbox, and the event of its sending (None: nobody records events)."""

    __slots__ = ("message", "cause")

    # The thread that takes a message from another node loads it (part two): loading runs the
    # user's code, which may take long, and must hold up nobody else.
    needs_loading = False

    def __init__(self, message: Any, cause: _Cause = None) -> None:
        self.message = message
        self.cause = cause

    def load(self) -> bool:
        """Make `message` usable, if need be; return False for a message that nobody gets."""
        return True


class Mailbox:
    """A queue from which the oldest message that fits can be taken.  Factor: mailbox.

    Any number of threads may put and get.  Ctrl-C while a call waits leaves the mailbox as it
    was.  (In the microseconds in which a message is taken, Ctrl-C may cost that message, as
    with queue.Queue.)
    """

    __slots__ = ("_entries", "_arrival")

    def __init__(self) -> None:
        # The messages, oldest first.  There is no lock: to put or to take one is one step of a
        # deque, and of two threads that remove an entry, one gets a ValueError.  So a `__del__`
        # may send in the middle of any line here, and no predicate holds up other threads.
        self._entries: deque[_Entry] = deque()

        # Every put wakes the threads that wait here, in a get, get_if or get_all.
        self._arrival = _WaitQueue()

    def put(self, message: Any) -> None:
        """Add `message` as the newest.  Never blocks.  Factor: mailbox-put."""
        self._put(_Entry(message))

    def _put(self, entry: _Entry) -> None:
        try:
            self._entries.append(entry)
        finally:
            # If Ctrl-C comes in between, the message is there all the same.
            self._arrival.wake_all()

    def _put_all(self, entries: Iterable[_Entry]) -> None:
        self._entries.extend(entries)
        self._arrival.wake_all()

    def get(self, timeout: float | None = None) -> Any:
        """Remove and return the oldest message.

        Blocks at most `timeout` seconds (None: for ever; 0 or less: not at all).  Raises
        TimeoutError, leaving the mailbox as it was.  Factor: mailbox-get, mailbox-get-timeout.
        """
        entry = self._get(_deadline(timeout))
        if entry is None:
            raise TimeoutError("no message came within the time-out")
        return entry.message

    def _get(self, deadline: float | None) -> _Entry | None:
        """Remove and return the oldest entry that can be loaded; None at the deadline."""
        while self._entries or self._arrival.wait_until(self._has_entries, deadline):
            try:
                entry = self._entries.popleft()
            except IndexError:
                # Another thread was faster.
                continue
            if not entry.needs_loading:
                return entry
            try:
                if entry.load():
                    return entry
            except BaseException:
                # After Ctrl-C the mailbox is as before.
                self._put_back([entry])
                raise
        return None

    def _put_back(self, entries: list[_Entry]) -> None:
        """Put back entries that were taken, as the oldest ones."""
        self._entries.extendleft(reversed(entries))
        self._arrival.wake_all()

    def get_if(self, pred: Predicate, timeout: float | None = None) -> Any:
        """Remove and return the oldest message for which `pred` is true; the others stay.

        A class, or a tuple of classes, stands for its `isinstance`.  `pred` runs in this thread
        with no lock held, once for each message.  Blocks at most `timeout` seconds (None: for
        ever; 0 or less: not at all).  Raises TimeoutError, or any error of `pred`, leaving the
        mailbox as it was.

        Factor: mailbox-get?, mailbox-get-timeout?.
        """
        entry = self._get_if(_as_predicate(pred), _deadline(timeout))
        if entry is None:
            raise TimeoutError("no such message came within the time-out")
        return entry.message

    def _get_if(self, accepts: Callable[[Any], Any], deadline: float | None,
                also: tuple[type, ...] = ()) -> _Entry | None:
        """Remove and return the oldest entry with a message that fits; None at the deadline.

        A message fits if `accepts` says so, or if its class is in `also`.
        """
        refused: set[_Entry] = set()
        has_newer: Callable[[], bool] = self._has_entries
        while self._arrival.wait_until(has_newer, deadline):
            newer = self._newer_than(refused)
            for entry in newer:
                if entry.needs_loading and not entry.load():
                    self._take(entry)
                    continue
                is_wanted = isinstance(entry.message, also) or accepts(entry.message)
                if is_wanted and self._take(entry):
                    return entry
            # The first look is at the oldest few, so even without time there is a second one.
            # Without time there is no third: others may put messages as fast as this one looks.
            if refused and _remaining(deadline) == 0:
                return None
            refused.update(newer)
            if len(refused) > 2 * len(self._entries) + 100:
                # Other threads have taken most of these, which need not be kept here.
                refused.intersection_update(self._copy())
            has_newer = partial(self._has_newer_than, refused)
        return None

    def _take(self, entry: _Entry) -> bool:
        """Remove an entry; return False if another thread was faster."""
        try:
            self._entries.remove(entry)
        except ValueError:
            return False
        return True

    def _newer_than(self, refused: set[_Entry]) -> list[_Entry]:
        """Return entries that are not among those refused, oldest first.

        At first, with none refused, these are the oldest few, which are mostly enough.  Later
        they are all: the newest 20 are copied, or 40, 80 and so on, until one that was refused
        is among them.  So the work of one call is linear in the number of messages.
        """
        few = 20
        try:
            if not refused:
                return list(itertools.islice(self._entries, few))
            if self._entries[0] not in refused:
                # Another thread has put back what it had taken.
                few = len(self._entries)
            newest = list(itertools.islice(reversed(self._entries), few))
            while len(newest) == few and newest[-1] not in refused:
                few *= 2
                newest = list(itertools.islice(reversed(self._entries), few))
        except (RuntimeError, IndexError):
            # Another thread, or a `__del__`, has changed the deque meanwhile.
            newest = self._copy()[::-1]
        return [entry for entry in reversed(newest) if entry not in refused]

    def _has_newer_than(self, refused: set[_Entry]) -> bool:
        try:
            return self._entries[-1] not in refused or self._entries[0] not in refused
        except IndexError:
            return False

    def _copy(self) -> list[_Entry]:
        """Return all entries, oldest first, also while other threads put and take some."""
        with suppress(RuntimeError):
            return list(self._entries)
        # One by one, from the newest on.  A put moves no entry, and a take moves some towards
        # the oldest end.  So an entry may be met twice, but none is left out, unless Ctrl-C in
        # another thread has just put some back.
        entries: dict[_Entry, None] = {}
        for index in reversed(range(len(self._entries))):
            with suppress(IndexError):
                entries[self._entries[index]] = None
        return list(reversed(entries))

    def get_all(self, timeout: float | None = None) -> list[Any]:
        """Wait for a message, then remove and return all messages, oldest first.

        Of several threads that do so at once, each may get a part.  Blocks and raises as `get`
        does.  Factor: mailbox-get-all, mailbox-get-all-timeout.
        """
        deadline = _deadline(timeout)
        while self._entries or self._arrival.wait_until(self._has_entries, deadline):
            taken: list[_Entry] = []
            try:
                with suppress(IndexError):
                    for _ in range(len(self._entries)):
                        taken.append(self._entries.popleft())
                messages = [entry.message for entry in taken if entry.load()]
            except BaseException:
                # After Ctrl-C the mailbox is as before.
                self._put_back(taken)
                raise
            if messages:
                return messages
        raise TimeoutError("no message came within the time-out")

    def _has_entries(self) -> bool:
        return bool(self._entries)

    def empty(self) -> bool:
        """Return whether no message is here now, which may change at once.  Never blocks."""
        return not self._entries


def _as_predicate(pred: Predicate) -> Callable[[Any], Any]:
    """Return `pred` as a function of a message; raise TypeError if that cannot be."""
    if type(pred) is type:
        # Most are plain classes, for which there is nothing to check.
        return lambda message: isinstance(message, pred)
    # A type of `typing`, such as Union[int, str], has an origin, and is no function.
    if isinstance(pred, (type, tuple, types.UnionType)) or hasattr(pred, "__origin__"):
        classes: Any = pred
        _check_class(classes)
        return lambda message: isinstance(message, classes)
    if not callable(pred):
        raise TypeError("messages are chosen by a function, a class, or a tuple of classes, "
                        f"not by {pred!r:.100}")
    return pred


def _check_class(kind: Any) -> None:
    """Raise TypeError unless a message can be an instance of `kind`, a class or some classes.

    Every class is looked at, as `isinstance` would stop at the first that fits.
    """
    kinds = kind
    if isinstance(kind, types.UnionType):
        kinds = kind.__args__
    if isinstance(kinds, tuple):
        for each in kinds:
            _check_class(each)
        return
    try:
        isinstance(None, kind)
    except TypeError as error:
        text = f"no message can be an instance of {kind!r:.100}: {error}"
        raise TypeError(text) from None


######## Observer: hears of all that happens in this process


class _Observer:
    """A listener that hears of every event in this process, and ignores them all.

    Part three puts another observer in its place, which records events, and counts and logs
    messages that nobody could take.
    """

    is_recording = False

    def record(self, thread: "Thread | None", event: str, cause: _Cause = None,
               **about: Any) -> _Cause:
        """Record an event of `thread` (None: of the node); return the event's id.

        `cause` is the event that led to this one.
        """
        return None

    def record_send(self, message: Any, thread: Handle) -> _Cause:
        """Record that the calling thread sends `message`."""
        return None

    def record_receive(self, message: Any, cause: _Cause) -> None:
        """Record that the calling thread takes `message`, which the event `cause` sent."""

    def message_lost(self, thread: Handle, why: object, cause: _Cause) -> None:
        """Hear that a message reached nobody."""

    def after_fork(self) -> None:
        """Go on in the child of a fork."""


_observer = _Observer()


######## Pending: the replies and ends that threads of this process wait for


class _Failure:
    """The reason why a pending failed, as the error that its waiter gets."""

    def __init__(self, error: DistconcError) -> None:
        self._error = error

    def error(self) -> DistconcError:
        """Return the error.  The waiter calls this, as data of another node may be loaded."""
        return self._error

    def is_return(self) -> bool:
        """Return whether the thread just returned, which to a linked parent is no failure."""
        return isinstance(self._error, ThreadDied) and self._error.reason is None

    def reason(self) -> BaseException | None:
        """Return the reason that a Down or a LinkedError tells; None if the thread returned."""
        error = self.error()
        if isinstance(error, ThreadDied):
            return error.reason
        return error


class _FailureEntry(_Entry):
    """An entry that tells of a failure; the thread that takes the entry makes its message.

    The data of a failure may have to be loaded: see `_Entry.load`.
    """

    __slots__ = ("_failure",)
    needs_loading = True

    def __init__(self, failure: _Failure, cause: _Cause) -> None:
        self._failure: _Failure | None = failure
        self.cause = cause

    def load(self) -> bool:
        if self._failure is not None:
            self.message = self._make_message(self._failure)
            self._failure = None
        return True

    def _make_message(self, failure: _Failure) -> Any:
        raise NotImplementedError


class _Pending:
    """A reply, or an end, that a thread of this process waits for.

    A pending is in `_pending` from its making until it has its outcome, or nobody waits any
    more.  The one outcome is a reply, or a failure: the watched thread ended, or contact with
    its node was lost.  A watched thread of this process has the pending itself as its watcher.
    """

    is_link = False

    def __init__(self, waiter: "Thread") -> None:
        self.waiter = waiter
        # Threads that have not been told the tag cannot guess it, nor forge an outcome.
        self.tag = os.urandom(8).hex()

        # The Thread, or the _Peer of part two, that reports the end, until its method
        # `remove_watcher` is called.
        self.watched: Any = None
        _pending.add(self)

    def resolve(self, reply: _Entry) -> None:
        """Pass the reply on to the waiter.  Must not block, as readers call this.

        Nobody replies to a monitor or a link, except by a forged reply.
        """

    def fail(self, failure: _Failure, cause: _Cause) -> None:
        """Pass the failure on to the waiter.  Must not block: the table is locked."""
        raise NotImplementedError

    def notify(self, error: DistconcError, cause: _Cause) -> bool:
        """Tell the waiter of the watched thread's end; return whether the waiter can hear."""
        return _pending.fail(self.tag, _Failure(error), cause) and self.waiter.is_alive()

    def cancel(self) -> None:
        """Stop waiting.  No failure is passed on after this returns.

        A reply may be, at which nobody looks any more.
        """
        if _pending.remove(self.tag):
            self.stop_watching()

    def stop_watching(self) -> None:
        """Tell the watched thread, or its node, that its end need not be reported any more."""
        if self.watched is not None:
            self.watched.remove_watcher(self.tag)


class _PendingTable:
    """The pendings of this process, by tag."""

    def __init__(self) -> None:
        # Held while a pending fails or is removed, and while a link gets its child.  So when
        # `remove` returns, the failure has been passed on already, or never will be.  A reply
        # needs no lock: `pop` gives the pending to one thread alone, and if the caller has
        # given up, the reply sets a field at which nobody looks any more.
        self._lock = _Lock()
        self._by_tag: dict[str, _Pending] = {}

    def add(self, pending: _Pending) -> None:
        self._by_tag[pending.tag] = pending

    def remove(self, tag: str) -> _Pending | None:
        with self._lock:
            return self._by_tag.pop(tag, None)

    def resolve(self, tag: str, reply: _Entry, replier: Any = None) -> bool:
        """Give the pending of that tag its reply, from `replier` (None: this process).

        Returns False if there is none.  A node that watches the called thread for the caller,
        and itself replies, has stopped watching.  In any other case, as after a reply from this
        process, the watched thread or node is told to stop.
        """
        pending = self._by_tag.pop(tag, None)
        if pending is None:
            return False
        pending.resolve(reply)
        if replier is None or replier != pending.watched:
            pending.stop_watching()
        return True

    def fail(self, tag: str, failure: _Failure, cause: _Cause = None) -> bool:
        """Fail the pending of that tag; return False if there is none any more."""
        with self._lock:
            pending = self._by_tag.pop(tag, None)
            if pending is None:
                return False
            pending.fail(failure, cause)
            return True

    def watching(self, watched: Any) -> list[_Pending]:
        """Return every pending for which `watched` reports the end."""
        with self._lock:
            return [each for each in self._by_tag.copy().values() if each.watched == watched]


_pending = _PendingTable()


######## Threads: Thread, current_thread, threads

# Tells this process from all others.
_own_incarnation = int.from_bytes(os.urandom(8), "big")

_thread_ids = itertools.count(1)


class _Immutable:
    """A value that is equal to, and hashes as, every other with the same identity."""

    __slots__ = ()
    _identity: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Immutable) and bool(self._identity == other._identity)

    def __hash__(self) -> int:
        return hash(self._identity)

    def __setstate__(self, state: Any) -> None:
        # A pickle could otherwise change a handle that is in use here.
        raise TypeError(f"a {type(self).__name__} cannot be changed, nor by a pickle")


class _Handle(_Immutable):
    """The base of `Thread` and `RemoteThread`, equal if they denote the same thread."""

    __slots__ = ("_identity", "__weakref__")


class Thread(_Handle):
    """A thread of this node, with a mailbox.  Factor: thread.  Erlang: pid.

    Made by `spawn`, or adopted by `current_thread`.  `.id`, `.name` and `.node` (its address)
    identify the thread.  The handle can be put into messages: pickled, a Thread becomes an
    equal `RemoteThread`; copied, a Thread remains itself.

    In the child of a fork, a handle of the parent still denotes the parent's thread, and does
    all that a `RemoteThread` does (part two).
    """

    __slots__ = ("id", "name", "_mailbox", "_watchers", "_registered_names", "_ended",
                 "_end_was_told", "_end_waiters", "_started_at", "_os_ident", "_remote")

    def __init__(self, name: str) -> None:
        _check_name(name)
        self.id = next(_thread_ids)
        self.name = name
        self._identity = (_own_incarnation, self.id)
        self._mailbox = Mailbox()
        self._started_at = monotonic()

        # The thread's own `threading.get_ident()`, once the thread runs.
        self._os_ident: int | None = None

        # The lock of `_registry` (below) guards these three.  An ended thread takes no message.
        self._watchers: dict[str, Any] = {}  # tag -> _Pending, or _RemoteWatcher of part two
        self._registered_names: tuple[str, ...] = ()
        self._ended = False

        # When all watchers have been told of the end, this is set, and `join` returns.
        self._end_was_told = False
        self._end_waiters = _WaitQueue()

        # In the child of a fork, this is the handle of the parent's thread.
        self._remote: RemoteThread | None = None

    @property
    def node(self) -> Address | None:
        """The address of the thread's node (part two)."""
        if self._remote:
            return self._remote.node
        return local_node().address

    def is_alive(self) -> bool:
        """Return whether the thread has not ended.  Never blocks."""
        if self._remote:
            return self._remote.is_alive()
        return not self._ended

    def join(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds for the thread's end; return whether it has ended.

        Raises RuntimeError in the thread itself, which would wait for ever.
        """
        if self._remote:
            return self._remote.join(timeout)
        if _local.thread is self:
            raise RuntimeError("a thread cannot wait for its own end")
        self._end_waiters.wait_until(lambda: self._end_was_told, _deadline(timeout))
        return self._ended

    def send(self, message: Any) -> None:
        """Put `message` itself into the thread's mailbox.  Never blocks; see `send`.

        A Reply goes to the call that waits for it.
        """
        if self._remote:
            self._remote.send(message)
            return
        cause = None
        if _observer.is_recording:
            cause = _observer.record_send(message, self)
        if message.__class__ is Reply:
            self._reply(message.data, message.tag, cause)
        elif self._ended:
            _observer.message_lost(self, "it has ended", cause)
        else:
            self._mailbox._put(_Entry(message, cause))

    def _reply(self, data: Any, tag: str, cause: _Cause) -> None:
        """Give this thread the reply to its call.  A forged `tag` may be anything."""
        if self._remote:
            self._remote._reply(data, tag, cause)
        elif isinstance(tag, str):
            _pending.resolve(tag, _Entry(data, cause))

    def _call(self, call: "_PendingCall", message: Any, cause: _Cause) -> None:
        """Put the request `message` to this thread for `call`, which waits for the reply."""
        if self._remote:
            self._remote._call(call, message, cause)
            return
        if call.waiter is self:
            raise SynchronousToSelfError(f"{self!r} cannot wait for its own reply")
        if self._watch(call, cause):
            self._mailbox._put(_Entry(Synchronous(message, call.waiter, call.tag), cause))

    def _watch(self, pending: _Pending, cause: _Cause = None) -> bool:
        """Have `pending` told of this thread's end.

        Returns False if the thread had ended already; then `pending` has been told so.
        """
        if self._remote:
            return self._remote._watch(pending)
        if _registry.add_watcher(self, pending):
            return True
        pending.notify(NoSuchThread(f"{self!r} has ended"), cause)
        return False

    def remove_watcher(self, tag: str) -> None:
        """Forget a watcher, which need not be told of the end any more.

        No two watchers have the same tag, so the registry needs no more than the tag.
        """
        _registry.remove_watcher(tag)

    def _start(self, func: Callable[..., Any], *args: Any) -> None:
        os_thread = threading.Thread(
            target=self._run, args=(func, args), name=self.name, daemon=True)
        try:
            os_thread.start()
        except BaseException as error:
            self._end(error, print_it=False)
            raise

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        _local.thread = self
        self._os_ident = threading.get_ident()
        try:
            func(*args)
        except SystemExit:
            self._end(None)
        except BaseException as error:
            self._end(error)
        else:
            self._end(None)

    def _end(self, reason: BaseException | None, print_it: bool = True) -> None:
        """End the thread, of `reason` (None: it returned, or raised SystemExit).

        The order of the steps matters:

        1. The end is recorded, so that all its consequences come later in the trace.
        2. The thread ends, so that a reaction to the next steps finds an ended thread.
        3. A failure that no link will report is printed.  This comes before the next step,
           because a watcher may react by ending the process.
        4. The watchers are told.
        5. A failure that its link could not report after all is printed, and so are the
           failures of linked threads that this thread has not received.
        6. The threads that wait in `join` go on.
        """
        event = None
        if _observer.is_recording:
            event = self._record_end(reason)
        watchers = _registry.end(self)
        try:
            is_linked = any(watcher.is_link for watcher in watchers)
            if print_it and not is_linked:
                _print_failure(reason)
            link_heard = self._notify_watchers(watchers, reason, event)
            if print_it and is_linked and not link_heard:
                _print_failure(reason)
            self._print_unread_failures()
        finally:
            self._end_was_told = True
            self._end_waiters.wake_all()

    def _record_end(self, reason: BaseException | None) -> _Cause:
        if reason is None:
            return _observer.record(self, "end")
        return _observer.record(self, "crash", error=_last_line(reason))

    def _notify_watchers(self, watchers: list[Any], reason: BaseException | None,
                         event: _Cause) -> bool:
        """Tell all watchers of the end; return whether a linked parent could hear."""
        link_heard = False
        if not watchers:
            return link_heard
        # To show a traceback takes long, so that is done once for all watchers.
        text, cause = _describe_end(self, reason)
        for watcher in watchers:
            # Each gets an error of its own, as raising an error changes its traceback.
            heard = watcher.notify(ThreadDied(reason, cause, text), event)
            link_heard = link_heard or (heard and watcher.is_link)
        return link_heard

    def _print_unread_failures(self) -> None:
        """Print the failures of linked threads that nobody can receive any more."""
        for entry in self._mailbox._copy():
            if isinstance(entry, _LinkedEntry):
                entry.load()
            error = getattr(entry, "message", None)
            if isinstance(error, LinkedError):
                _print_failure(error, getattr(error.error, "__traceback__", None))

    def __repr__(self) -> str:
        ended = ", ended" if self._ended and not self._remote else ""
        return f"<Thread {self.id} {self.name!r}{ended}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Part two: a pickled handle arrives as a RemoteThread.
        return RemoteThread, (self.node, self.id, self._identity[0])

    def __deepcopy__(self, memo: Any = None) -> "Thread":
        return self

    __copy__ = __deepcopy__


def _print_failure(error: BaseException | None, traceback: Any = None) -> None:
    """Show an uncaught error as the threading module does.

    `threading.excepthook` is the user's, and may fail; then both errors are printed.
    """
    if error is None:
        return
    traceback = traceback or error.__traceback__
    about = type(error), error, traceback, threading.current_thread()
    try:
        threading.excepthook(threading.ExceptHookArgs(about))
    except BaseException as hook_error:
        with suppress(BaseException):
            sys.__excepthook__(type(error), error, traceback)
        with suppress(BaseException):
            sys.__excepthook__(type(hook_error), hook_error, hook_error.__traceback__)


def _describe_end(thread: Thread,
                  reason: BaseException | None) -> tuple[str, RemoteError | None]:
    """Return the text and the cause of the ThreadDied that waiters get when `thread` ends."""
    if reason is None:
        return f"{thread!r} returned without a reply", None
    traceback_end = _format_traceback(reason)[-MAX_ERROR_TEXT:]
    cause = RemoteError(type(reason).__name__, traceback_end)
    return f"{thread!r} died before it replied: {_last_line(reason)}", cause


# The most letters of a traceback that is told elsewhere, and of an error on one line.
MAX_ERROR_TEXT = 1 << 14
MAX_LINE = 1000


def _format_traceback(error: BaseException) -> str:
    """Return the traceback of `error`, even if parts of it cannot be printed."""
    try:
        import traceback

        return "".join(traceback.format_exception(error))
    except Exception:
        return f"{type(error).__name__} (its traceback cannot be printed)"


def _last_line(error: BaseException) -> str:
    """Return the line of the traceback that names the error, without its notes."""
    name = type(error).__name__
    try:
        import traceback

        lines = traceback.format_exception_only(error)
    except Exception:
        return f"{name} (its traceback cannot be printed)"
    for line in lines:
        if name in line:
            return line.strip()[:MAX_LINE]
    return lines[-1].strip()[:MAX_LINE]


class _Registry:
    """The living threads of this node, their names, and their watchers."""

    def __init__(self) -> None:
        # Guards the tables, and the watchers, the names and the end of every thread.  So a
        # watcher is either told of a thread's end or refused: there is nothing in between.
        self.lock = _Lock()
        self.by_id: dict[int, Thread] = {}
        self.by_name: dict[str, Thread] = {}  # registered name -> thread
        self.by_watcher: dict[str, Thread] = {}  # watcher's tag -> watched thread

    def add(self, thread: Thread) -> None:
        with self.lock:
            self.by_id[thread.id] = thread

    def end(self, thread: Thread) -> list[Any]:
        """End `thread`; return its watchers, which have to be told."""
        with self.lock:
            thread._ended = True
            self.by_id.pop(thread.id, None)
            for name in thread._registered_names:
                self.by_name.pop(name, None)
            watchers = thread._watchers
            thread._watchers = {}
            for tag in watchers:
                self.by_watcher.pop(tag, None)
            return list(watchers.values())

    def register(self, name: str, thread: Thread) -> None:
        """Give `thread` a name, which any other thread of that name loses."""
        with self.lock:
            if thread._ended:
                raise NoSuchThread(f"{thread!r} cannot be registered any more")
            if name in self.by_name:
                self.unregister(name)
            self.by_name[name] = thread
            thread._registered_names += (name,)

    def unregister(self, name: str) -> bool:
        """Forget a name; return False if no thread has it."""
        with self.lock:
            thread = self.by_name.pop(name, None)
            if thread is None:
                return False
            others = [other for other in thread._registered_names if other != name]
            thread._registered_names = tuple(others)
            return True

    def add_watcher(self, thread: Thread, watcher: Any) -> bool:
        """Have `watcher` told when `thread` ends; return False if that was earlier."""
        with self.lock:
            watcher.watched = thread
            if thread._ended:
                return False
            if watcher.tag in self.by_watcher:
                # A peer uses a tag twice.  The earlier one could not be removed any more.
                self.remove_watcher(watcher.tag)
            thread._watchers[watcher.tag] = watcher
            self.by_watcher[watcher.tag] = thread
            return True

    def remove_watcher(self, tag: str) -> Any:
        """Forget the watcher with that tag, and return it; None if there is none."""
        with self.lock:
            thread = self.by_watcher.pop(tag, None)
            if thread is None:
                return None
            return thread._watchers.pop(tag, None)

    def forget_names(self) -> None:
        with self.lock:
            for name in list(self.by_name):
                self.unregister(name)

    def remove_watchers_of(self, peer: Any) -> None:
        """Forget all watchers on another node, with which contact is lost (part two)."""
        with self.lock:
            for tag, thread in list(self.by_watcher.items()):
                if getattr(thread._watchers.get(tag), "peer", None) == peer:
                    self.remove_watcher(tag)


_registry = _Registry()


class _ExitHook:
    """A hook that reports the end of an adopted thread.

    The only reference to the hook is in the thread's local storage.  Python frees that storage
    when the thread ends, and calls `__del__`.
    """

    def __init__(self, thread: Thread) -> None:
        self._thread = thread
        self._process = os.getpid()

    def __del__(self) -> None:
        # A fork frees the storage of other threads in the child, where they have not ended.
        if os.getpid() == self._process:
            self._thread._end(None)


class _Local(threading.local):
    """Data of the running thread."""

    # The handle of the running thread.
    thread: Thread | None = None

    # Reports the end of the thread, if that is adopted.
    exit_hook: _ExitHook | None = None

    # The connection with the message that is being unpickled (part two).
    loading_from: Any = None

    # True in readers, writers, the timer and the accept thread, and within a write, because
    # others wait for these.
    must_not_wait = False

    # True while a logging handler of the user's runs.
    is_logging = False


_local = _Local()


def current_thread() -> Thread:
    """Return the handle of the calling thread.  Never blocks.  Factor: self.  Erlang: self().

    A thread that `spawn` did not make (the main thread, a `threading.Thread`) is adopted.  Its
    end, for whatever reason, counts as returning.
    """
    if _local.thread is None:
        os_thread = threading.current_thread()
        thread = Thread(os_thread.name[:MAX_NAME] or "unnamed")
        thread._os_ident = os_thread.ident
        _local.thread = thread
        _registry.add(thread)
        if os_thread is not threading.main_thread():
            _local.exit_hook = _ExitHook(thread)
    return _local.thread


def threads() -> dict[int, Thread]:
    """Return a new dict of this node's living threads by id.  Never blocks.

    Factor: threads.
    """
    return _registry.by_id.copy()


######## Spawning: spawn, spawn_linked, spawn_server


class _LinkedEntry(_FailureEntry):
    """An entry whose message is a LinkedError."""

    __slots__ = ("_child",)

    def __init__(self, failure: _Failure, child: Handle, cause: _Cause) -> None:
        super().__init__(failure, cause)
        self._child = child

    def _make_message(self, failure: _Failure) -> LinkedError:
        return LinkedError(failure.reason(), self._child)  # type: ignore[arg-type]


class _PendingLink(_Pending):
    """The wait of a parent for a LinkedError, which comes when its child fails."""

    is_link = True

    def __init__(self, parent: Thread) -> None:
        # A child may fail before `spawn_linked` has its handle; then the failure waits here.
        self._child: Handle | None = None
        self._failure: _Failure | None = None
        self._cause: _Cause = None
        # This comes last, as it puts the link into the table.
        super().__init__(parent)

    def fail(self, failure: _Failure, cause: _Cause) -> None:
        self._failure = failure
        self._cause = cause
        self._send_if_complete()

    def set_child(self, child: Handle) -> None:
        # The holder of this lock calls `fail`, too.
        with _pending._lock:
            self._child = child
            self._send_if_complete()

    def _send_if_complete(self) -> None:
        """Send the LinkedError once both the failure and the child are known."""
        if self._child is None or self._failure is None:
            return
        if not self._failure.is_return():
            entry = _LinkedEntry(self._failure, self._child, self._cause)
            self.waiter._mailbox._put(entry)
        self._failure = None


class _SpawnRequest(NamedTuple):
    """The data with which a thread is started, here or on another node."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    name: str
    register: bool

    # Call `func` again and again while the result is true.
    is_server: bool


@overload
def spawn(func: Callable[..., Any], *args: Any, name: str | None = None, node: None = None,
          register: bool = False) -> Thread: ...
@overload
def spawn(func: Callable[..., Any], *args: Any, name: str | None = None, node: NodeLike,
          register: bool = False) -> Handle: ...
def spawn(func: Callable[..., Any], *args: Any, name: str | None = None,
          node: NodeLike | None = None, register: bool = False) -> Handle:
    """Run `func(*args)` in a new daemon thread; return its handle.  Factor, Erlang: spawn.

    `name` defaults to the function's; `register=True` registers the name before the thread
    runs.  With `node` the thread runs on that node, where `func` is imported; `spawn` blocks
    until the start, and raises any error from there, NodeDown, SerializationError, RemoteError,
    AuthenticationError; then nothing has started (after NodeDown: perhaps).  For keyword
    arguments use `functools.partial`.
    """
    return _spawn(_request(func, args, name, register), node, None)


@overload
def spawn_linked(func: Callable[..., Any], *args: Any, name: str | None = None,
                 node: None = None, register: bool = False) -> Thread: ...
@overload
def spawn_linked(func: Callable[..., Any], *args: Any, name: str | None = None,
                 node: NodeLike, register: bool = False) -> Handle: ...
def spawn_linked(func: Callable[..., Any], *args: Any, name: str | None = None,
                 node: NodeLike | None = None, register: bool = False) -> Handle:
    """Spawn a thread; if `func` fails or the node is lost, this thread gets a `LinkedError`.

    The arguments are those of `spawn`.  Exactly one LinkedError comes into the mailbox; the
    `receive` that takes the error raises it.  To return or to raise SystemExit is no failure.
    Factor: spawn-linked.  Erlang: spawn_link, one way.
    """
    request = _request(func, args, name, register)
    link = _PendingLink(current_thread())
    try:
        child = _spawn(request, node, link)
    except BaseException:
        # The caller gets this error, and must not get a LinkedError as well.
        _pending.remove(link.tag)
        raise
    link.set_child(child)
    return child


@overload
def spawn_server(func: Callable[..., Any], *args: Any, name: str | None = None,
                 node: None = None, register: bool = False) -> Thread: ...
@overload
def spawn_server(func: Callable[..., Any], *args: Any, name: str | None = None,
                 node: NodeLike, register: bool = False) -> Handle: ...
def spawn_server(func: Callable[..., Any], *args: Any, name: str | None = None,
                 node: NodeLike | None = None, register: bool = False) -> Handle:
    """Spawn a thread that calls `func(*args)` again and again while the result is true.

    The arguments are those of `spawn`.  Factor: spawn-server.
    """
    request = _request(func, args, name, register)._replace(is_server=True)
    return _spawn(request, node, None)


def _request(func: Callable[..., Any], args: tuple[Any, ...], name: str | None,
             register: bool) -> _SpawnRequest:
    if not callable(func):
        raise TypeError(f"spawn takes a function and its arguments; {func!r} cannot be called")
    if name is None:
        name = _function_name(func)
    _check_name(name)
    if not isinstance(register, bool):
        raise TypeError(f"register= is True or False, not {register!r:.100}; the name is name=")
    return _SpawnRequest(func, args, name, register, is_server=False)


def _function_name(func: Any) -> str:
    while isinstance(func, partial):
        func = func.func
    name = getattr(func, "__name__", type(func).__name__)
    return str(name)[:MAX_NAME]


# The most letters of a thread's name.
MAX_NAME = 255


def _check_name(name: object) -> None:
    """Raise TypeError or ValueError unless `name` can be the name of a thread."""
    if not isinstance(name, str):
        raise TypeError(f"a name is a text, not {name!r:.100}")
    if not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"a name has 1 to {MAX_NAME} letters; {name!r:.100} has {len(name)}")


def _check_tag(tag: object) -> None:
    """Raise TypeError unless `tag` can be the tag of a pending."""
    if not isinstance(tag, str):
        raise TypeError(f"a tag is a text that this module has made, not {tag!r:.100}")


def _spawn(request: _SpawnRequest, node: NodeLike | None, link: _PendingLink | None) -> Handle:
    event = None
    if _observer.is_recording:
        event = _observer.record(current_thread(), "spawn", child=request.name)
    if node is not None:
        # Part two: the thread may have to be started on another node.
        return _spawn_at(node, request, link, event)
    return _spawn_here(request, link, event)


def _spawn_here(request: _SpawnRequest, watcher: Any, cause: _Cause) -> Thread:
    """Start a thread on this node; `watcher` is that of its linked parent, if there is one."""
    thread = Thread(request.name)
    if request.register:
        _registry.register(request.name, thread)
    _registry.add(thread)
    _observer.record(thread, "start", cause)
    if watcher is not None:
        _registry.add_watcher(thread, watcher)
    if request.is_server:
        thread._start(_run_server, request.func, *request.args)
    else:
        thread._start(request.func, *request.args)
    return thread


def _run_server(func: Callable[..., Any], *args: Any) -> None:
    while func(*args):
        pass


######## Messages: send, receive, receive_if


def send(message: Any, thread: Handle) -> None:
    """Send `message` to `thread`.  Factor: send.  Erlang, Termite: !.

    To a thread of this node, `send` puts the object itself into its mailbox, never blocks and
    never raises.  To another node, `send` sends a copy taken now; connects first if need be (at
    most `connect_timeout` seconds), and waits while too much is queued.  Raises
    SerializationError, AuthenticationError, NodeUnreachable: the message was not sent; any
    other NodeDown: perhaps it was, and was cut off on its way.  A return means that the message
    is accepted here; only a reply proves more.  If there is no such thread, the message is
    dropped there and logged here.
    """
    try:
        thread.send(message)
    except AttributeError:
        if isinstance(thread, _Handle):
            raise
        raise TypeError(f"send(message, thread): {thread!r} is not a thread") from None


def receive(timeout: float | None = None, default: Any = _MISSING) -> Any:
    """Remove and return the oldest message of the calling thread's mailbox.

    Blocks at most `timeout` seconds (None: for ever; 0 or less: not at all), then returns
    `default`, or raises TimeoutError.  Raises LinkedError if the message is the failure of a
    linked thread.

    Factor: receive, receive-timeout.
    """
    thread = _local.thread or current_thread()
    entry = thread._mailbox._get(_deadline(timeout))
    if entry is None:
        return _default_or_timeout("receive", "message", timeout, default)
    return _received(entry)


def receive_if(pred: Predicate, timeout: float | None = None, default: Any = _MISSING) -> Any:
    """Remove and return the oldest message for which `pred` is true; the others stay.

    A class, or a tuple of classes, stands for its `isinstance`.  `pred` runs in this thread
    with no lock held, once for each message.  Blocks, and returns `default` or raises
    TimeoutError, as `receive` does.  Raises LinkedError if the search meets the failure of a
    linked thread, and any error of `pred`, leaving the mailbox as it was.

    Factor: receive-if, receive-if-timeout.  Erlang: selective receive.
    """
    fits = _as_predicate(pred)
    thread = _local.thread or current_thread()
    entry = thread._mailbox._get_if(fits, _deadline(timeout), also=(LinkedError,))
    if entry is None:
        return _default_or_timeout("receive_if", "such message", timeout, default)
    return _received(entry)


def _received(entry: _Entry) -> Any:
    """Return the message of an entry that was taken, or raise the message, a LinkedError."""
    message = entry.message
    if _observer.is_recording:
        _observer.record_receive(message, entry.cause)
    if isinstance(message, LinkedError):
        raise message
    return message


def _default_or_timeout(function: str, expected: str, timeout: float | None,
                        default: Any) -> Any:
    """Return the default of a receive that has waited in vain, or raise TimeoutError."""
    if timeout:
        _observer.record(current_thread(), "timeout", what=function)
    if default is _MISSING:
        raise TimeoutError(f"no {expected} came within {timeout} seconds")
    return default


######## Synchronous sends: Synchronous, Reply, send_, reply_, handle_synchronous


class _Message(_Immutable):
    """A message that is made, matched, compared and pickled by its attributes.

    (`dataclasses` would do the same, and double the time that importing this file takes.)
    """

    __match_args__: tuple[str, ...] = ()

    @property
    def _identity(self) -> Any:
        return self.__reduce__()

    def __setattr__(self, name: str, value: Any = None) -> None:
        raise AttributeError(f"a {type(self).__name__} cannot be changed")

    __delattr__ = __setattr__

    def __repr__(self) -> str:
        fields = [f"{name}={getattr(self, name)!r}" for name in self.__match_args__]
        return f"{type(self).__name__}({', '.join(fields)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in self.__match_args__)


class Synchronous(_Message):
    """A message with a `sender` that waits for a reply.  Factor: synchronous.

    Two of the same `tag` are equal, and have the same hash, even if their `data` differs.
    """

    __match_args__ = ("data", "sender", "tag")
    data: Any
    sender: Handle
    tag: str

    def __init__(self, data: Any, sender: Handle, tag: str) -> None:
        if not isinstance(sender, _Handle):
            raise TypeError(f"the sender of a Synchronous is a thread, not {sender!r:.100}")
        _check_tag(tag)
        self.__dict__.update(data=data, sender=sender, tag=tag)

    @property
    def _identity(self) -> Any:
        return Synchronous, self.tag


class Reply(_Message):
    """The answer to the `Synchronous` of the same `tag`.  Factor: reply."""

    __match_args__ = ("data", "tag")
    data: Any
    tag: str

    def __init__(self, data: Any, tag: str) -> None:
        _check_tag(tag)
        self.__dict__.update(data=data, tag=tag)


class _PendingCall(_Pending):
    """The wait of a thread in `send_synchronous`."""

    def __init__(self, caller: Thread) -> None:
        if _local.loading_from is not None:
            raise RuntimeError(
                "a message that is being loaded cannot call, nor wait for another thread: its "
                "receiver waits for it; send instead, or call once it has been received")
        self._reply: _Entry | None = None
        self._failure: _Failure | None = None
        self._cause: _Cause = None

        # This lock is held until there is an outcome; the caller waits by acquiring the lock.
        # (A _WaitQueue would do as well, at ten times the cost.)
        self._is_pending = threading.Lock()
        self._is_pending.acquire()
        super().__init__(caller)

    def resolve(self, reply: _Entry) -> None:
        self._reply = reply
        self._is_pending.release()

    def fail(self, failure: _Failure, cause: _Cause) -> None:
        self._failure = failure
        self._cause = cause
        self._is_pending.release()

    def wait(self, deadline: float | None) -> bool:
        """Wait for the outcome; return False at the deadline."""
        return _acquire(self._is_pending, deadline)

    def result(self) -> Any:
        """Return the reply, or raise the failure.  Data of another node is loaded now."""
        if self._reply is not None:
            self._reply.load()
            if _observer.is_recording:
                self._record(self._reply.message, self._reply.cause)
            return self._reply.message
        assert self._failure is not None
        error = self._failure.error()
        if _observer.is_recording:
            self._record(error, self._cause)
        raise error

    def _record(self, outcome: Any, cause: _Cause) -> None:
        _observer.record_receive(outcome, cause)


def send_synchronous(message: Any, thread: Handle, timeout: float | None = None) -> Any:
    """Send `message`, wait for the reply, and return that.  Factor: send-synchronous.

    Blocks at most `timeout` seconds (None: until there is an outcome), and to connect as `send`
    does.  Leaves the mailbox alone.  After SerializationError, NodeUnreachable, NoSuchThread or
    AuthenticationError, nothing was delivered.  After RemoteError, the other node could not
    read the message; or the call has run, but the reply was too large or unreadable here.
    After ThreadDied, NodeDown or TimeoutError, the call may have run, and a reply that still
    comes is dropped.

    Raises SynchronousToSelfError from a thread to itself, and RuntimeError while a message is
    being loaded (from a `__setstate__`, say), or while this thread imports a module for which
    the thread that would have to answer waits.
    """
    if not isinstance(thread, _Handle):
        raise TypeError(f"send_synchronous(message, thread): {thread!r} is not a thread")
    deadline = _deadline(timeout)
    caller = _local.thread or current_thread()
    call = _PendingCall(caller)
    try:
        cause = None
        if _observer.is_recording:
            cause = _observer.record_send(message, thread)
        thread._call(call, message, cause)
        if not call.wait(deadline):
            _observer.record(caller, "timeout", what="call")
            raise TimeoutError(f"no reply within {timeout} seconds; the call may still run")
    except BaseException:
        # After a time-out or Ctrl-C no outcome is wanted any more, here or there.
        call.cancel()
        raise
    return call.result()


def reply_synchronous(reply: Any, synchronous: Synchronous) -> None:
    """Answer `synchronous`, from any thread that holds it.  Factor: reply-synchronous.

    Blocks as `send` does.  If the caller is gone or gave up, nobody hears the reply, which is
    no error.  Raises SerializationError.

    A request that came from another node never makes this node dial, as the address of its
    sender may be made up.  If the caller's node is not connected to this one, the reply goes
    back to the node that passed the request on, and from there to the caller.
    """
    if not isinstance(synchronous, Synchronous):
        raise TypeError(f"reply_synchronous(reply, synchronous): {synchronous!r} is no request")
    sender = synchronous.sender
    cause = None
    if _observer.is_recording:
        cause = _observer.record_send(reply, sender)
    try:
        sender._reply(reply, synchronous.tag, cause)
    except (NodeDown, AuthenticationError) as error:
        # The caller is gone.  (AuthenticationError: its port may be another node's by now.)
        _observer.message_lost(sender, error, cause)


def handle_synchronous(func: Callable[[Any], Any], timeout: float | None = None) -> bool:
    """Take the next `Synchronous`, reply with `func` of its data, and return True.

    So `spawn_server(handle_synchronous, func)` serves for ever.  Other messages stay in the
    mailbox.  Blocks at most `timeout` seconds for a request, then raises TimeoutError.  An
    error of `func` is raised here; if it ends the server's thread, the call fails, too.

    Factor: handle-synchronous.
    """
    if not callable(func):
        raise TypeError(f"handle_synchronous takes a function, not {func!r}")
    request = receive_if(Synchronous, timeout)
    reply_synchronous(func(request.data), request)
    return True


######## Monitors: Monitor, Down, monitor, demonitor


class Monitor(_Message):
    """The result of `monitor`: `target` is watched.  Erlang: a monitor's reference."""

    __match_args__ = ("target", "tag")
    target: Any
    tag: str

    def __init__(self, target: Any, tag: str) -> None:
        _check_tag(tag)
        self.__dict__.update(target=target, tag=tag)


class Down(_Message):
    """The message that `target` ended of `reason`; see `monitor`.  Erlang: 'DOWN'."""

    __match_args__ = ("monitor", "target", "reason")
    monitor: Monitor
    target: Any
    reason: BaseException | None

    def __init__(self, monitor: Monitor, target: Any, reason: BaseException | None) -> None:
        if not isinstance(monitor, Monitor):
            raise TypeError(f"a Down is of what monitor returned, not of {monitor!r:.100}")
        if reason is not None and not isinstance(reason, BaseException):
            raise TypeError(f"the reason of a Down is an error or None, not {reason!r:.100}")
        self.__dict__.update(monitor=monitor, target=target, reason=reason)


class _DownEntry(_FailureEntry):
    """An entry whose message is a Down."""

    __slots__ = ("_monitor",)

    def __init__(self, failure: _Failure, monitor: Monitor, cause: _Cause) -> None:
        super().__init__(failure, cause)
        self._monitor = monitor

    def _make_message(self, failure: _Failure) -> Down:
        return Down(self._monitor, self._monitor.target, failure.reason())


class _PendingMonitor(_Pending):
    """The wait of a thread for a Down, which comes when another ends or a node is lost."""

    def __init__(self, waiter: Thread, target: Any) -> None:
        super().__init__(waiter)
        self.monitor = Monitor(target, self.tag)

    def fail(self, failure: _Failure, cause: _Cause) -> None:
        self.waiter._mailbox._put(_DownEntry(failure, self.monitor, cause))


def monitor(thread_or_node: Handle | NodeLike) -> Monitor:
    """Have one `Down` message sent to this thread when a thread ends or a node is lost.

    Its `reason` is None (the thread returned), the exception that ended the thread (or a
    RemoteError), a NoSuchThread, or a NodeDown.  The Down comes after all that the thread had
    sent here.  Blocks as `send` does, but raises nothing for a target that cannot be reached.
    Erlang: monitor, monitor_node.

    NodeDown says that contact was lost, not that anything ended: a node that was only cut off
    goes on, and can be sent to when it is back.  But a monitor or link that has told of a loss
    is over: nothing more comes, even if the thread does end.  For that, monitor anew.
    """
    watch = _PendingMonitor(current_thread(), thread_or_node)
    try:
        if isinstance(thread_or_node, _Handle):
            thread_or_node._watch(watch)
        else:
            # Part two: anything else denotes a node.
            _watch_node(watch, thread_or_node)
    except (NodeDown, NoSuchThread) as error:
        _pending.fail(watch.tag, _Failure(error))
    except AuthenticationError as error:
        _pending.fail(watch.tag, _Failure(NodeUnreachable(str(error))))
    except BaseException:
        watch.cancel()
        raise
    return watch.monitor


def demonitor(monitor: Monitor) -> None:
    """End `monitor`: from then on no `Down` of it is in this thread's mailbox, nor comes.

    Never blocks; to end a monitor twice does nothing.  Erlang: demonitor with flush.
    """
    if not isinstance(monitor, Monitor):
        raise TypeError(f"demonitor takes what monitor returned, not {monitor!r}")
    watch = _pending.remove(monitor.tag)
    if watch:
        watch.stop_watching()
    current_thread()._mailbox._get_if(
        lambda message: isinstance(message, Down) and message.monitor == monitor, monotonic())


################ Part two: many nodes ################
#
######## The way of a message, and that of a call and its reply
#
# Each line is a step, and jumps to wherever its function stands in this file.  Small tools are
# left out, such as `serialize`, `_encode_header`, `_Seal.mac` and `_WaitQueue`.
#
#   the sender         RemoteThread.send             pickles the message
#                      _Connection.send              has it written at once; or one of many
#                      _Connection.post              waits in the outbox for the writer
#                      _Connection._write_frame      seals a frame, and writes it
#   the peer's reader  _Connection.read_loop         waits for a frame
#                      _Connection._read_frame       checks its seal
#                      _Connection._hand_out         takes the messages out of it
#                      _Connection._dispatch         tells their kinds apart
#                      _Connection._on_send          finds the thread
#                      Mailbox._put_all              wakes the thread
#   the receiver       Mailbox._get                  takes the entry, in `receive`
#                      _RemoteEntry.load             unpickles the message
#
# A call goes the same way, but for its two ends:
#
#   the caller         send_synchronous              makes a _PendingCall, which enters _pending
#                      RemoteThread._call            makes the header, with the call's tag
#                      _PendingCall.wait             waits for the outcome
#   the peer's reader  _Connection._on_call          finds the thread
#                      _Registry.add_watcher         has it watched for the caller
#                      Mailbox._put                  wakes the thread
#   the server         handle_synchronous            wants the next request
#                      receive_if                    looks for it
#                      Mailbox._get_if               takes the entry
#                      _RemoteCallEntry._unwrap      makes a Synchronous of the message
#                      RemoteThread._reply           sends the reply, for `reply_synchronous`
#                      _Registry.remove_watcher      ends the watch
#   the caller's       _Connection._on_reply         has the reply
#   reader             _PendingTable.resolve         finds the call by its tag
#                      _PendingCall.resolve          wakes the caller
#   the caller         _RemoteReply.load             unpickles it, for `_PendingCall.result`
#
# Without a connection, `RemoteThread._transmit` comes to `Node._connection_to`, and a reader is
# started, which shakes hands in `_Handshake._run`.
#
# If the server ends before it replies, its `Thread._end` tells the `_RemoteWatcher`, which
# sends a failure.  If the node is lost, `Node._connection_closed` comes to
# `Node._contact_lost`.  Both lead to `_PendingTable.fail`, and `_PendingCall.fail` wakes the
# caller.

######## Serializing: serialize, deserialize, and what `allow` lets in


def serialize(obj: Any) -> bytes:
    """Return `obj` as bytes: the copy that a remote `send` makes.

    Handles of threads turn into `RemoteThread`; cycles and shared objects survive.
    Never blocks.  Raises SerializationError, which names the part that cannot be
    pickled.

    Factor: object>bytes.  Erlang: term_to_binary.
    """
    try:
        return pickle.dumps(obj, 5)
    except Exception as error:
        text = f"message is a {type(obj).__name__} and cannot be sent to another node"
        # A part of the message may refuse even to be looked at.
        with suppress(Exception):
            text = _why_unpicklable(obj, error)
        raise SerializationError(text) from error


def deserialize(data: bytes) -> Any:
    """Return the object that `data` was made of, if this node's `allow` lets it in.

    Never blocks, unless an object's own code does.  Raises UnpicklingError for an
    object that is not allowed.  Unpickling may raise any other exception, too.

    Factor: bytes>object.  Erlang: binary_to_term.
    """
    return local_node().load(data)


MAX_PATH = 500  # letters


def _why_unpicklable(obj: Any, error: Exception, path: str = "message") -> str:
    """Say which part of `obj` cannot be pickled, and why.  The part is as small as possible."""
    children = _children(obj)
    if len(path) >= MAX_PATH:
        # The object may contain itself, and then its path has no end.
        children = []
    for step, child in children:
        try:
            pickle.dumps(child, 5)
        except Exception as child_error:
            if child is not obj:
                return _why_unpicklable(child, child_error, path + step)
    kind = type(obj).__name__
    return (f"{path} is a {kind} and cannot be sent to another node ({error}); "
            "send plain data, something importable, or the handle of a thread that keeps it")


def _children(obj: Any) -> list[tuple[str, Any]]:
    """Return the parts of `obj`, each with the step that leads there."""
    if isinstance(obj, dict):
        return [(f"[{_short_repr(key)}]", value) for key, value in obj.items()]
    if isinstance(obj, (list, tuple)):
        return [(f"[{index}]", value) for index, value in enumerate(obj)]
    attributes = getattr(obj, "__dict__", {})
    return [(f".{name}", value) for name, value in attributes.items()]


# A module and a name -> the class or function that a pickle means by them.
_Names = dict[tuple[str, str], Any]


class _NotAllowed(pickle.UnpicklingError):
    """A message contains something that `allow` does not let in."""


class _NeedsCare(Exception):
    """A message names something that only the careful unpickler may handle."""


def _check_allow(allow: Any) -> "str | tuple[Any, ...]":
    """Return `allow` as "anything" or a tuple; raise TypeError for any other value.

    The tuple has classes and functions of modules, and nothing else: a pickle can
    name no other callable, so to list one would be a mistake.
    """
    if isinstance(allow, str):
        if allow == "anything":
            return allow
        raise TypeError('allow= is "anything", or a list of classes and functions, '
                        f"not {allow!r:.300}")
    listed = tuple(allow)
    for item in listed:
        if not _is_class(item) and not _is_function(item):
            raise TypeError("allow= takes classes and functions of modules themselves, "
                            f"not {item!r:.300}")
    return listed


def _is_class(item: Any) -> bool:
    """Say whether `item` is a class; list[int] only pretends to be one."""
    return issubclass(type(item), type)


def _is_function(item: Any) -> bool:
    """Say whether `item` is a function of a module, and no method, bound or not."""
    if type(item) is types.FunctionType:
        return "." not in item.__qualname__
    # A built-in function belongs to its module, a built-in method to its object.
    if type(item) is types.BuiltinFunctionType:
        return isinstance(item.__self__, types.ModuleType)
    return False


def _make_loader(allow: Any, module: str = __name__) -> Callable[[Any], Any]:
    """Return the function that unpickles messages: any message, or those that `allow` lets in.

    `module` is the name by which the sender imports this file.
    """
    allow = _check_allow(allow)
    if allow == "anything":
        if module == __name__:
            return pickle.loads
        return partial(_load_from_copy, module)
    import copyreg
    import uuid

    # The pickle of a UUID makes an empty UUID first, for which the class itself is needed.  So
    # UUIDs go to the careful unpickler, too.
    as_listed = {_pickled_name(item): item for item in (uuid.UUID, *allow)}
    # A listed class stands before the constructor of the same name.
    simple = _without_listed(_simple_constructors(), as_listed)
    exceptions = _without_listed(_exception_constructors(), as_listed)
    simple = _named_as_in(module, simple)
    all_constructors = {**simple, **_named_as_in(module, exceptions)}
    as_listed = _named_as_in(module, as_listed)
    # The table has no public name, but each pickle module imports the table by this name.
    extension_codes: dict[int, Any] = copyreg._inverted_registry  # type: ignore[attr-defined]

    def load(data: Any) -> Any:
        if not extension_codes:
            try:
                return _unpickle(_RestrictedUnpickler, data, simple, {})
            except _NeedsCare:
                pass
        # No code of the user's has run so far, so the message may be loaded from the start.
        return _unpickle(_CarefulUnpickler, data, all_constructors, as_listed)

    return load


def _named_as_in(module: str, names: _Names) -> _Names:
    """Return the table with this file's own names as the pickles of that copy have them."""
    renamed = {}
    for (own, name), item in names.items():
        if own == __name__:
            own = module
        renamed[own, name] = item
    return renamed


def _load_from_copy(module: str, data: Any) -> Any:
    """Return the message in `data`, from a node on which this file has the name `module`."""
    return _CopyUnpickler(module, data).load()


class _CopyUnpickler(pickle.Unpickler):
    """Takes the names of another copy of this file for the names of this file."""

    def __init__(self, module: str, data: Any) -> None:
        super().__init__(io.BytesIO(data))
        self._module = module

    def find_class(self, module: str, name: str) -> Any:
        if module == self._module:
            module = __name__
        return super().find_class(module, name)


def _pickled_name(item: Any) -> tuple[str, str]:
    """Return the module and the name by which pickles mean this class or function."""
    return item.__module__, item.__qualname__


def _without_listed(constructors: _Names, as_listed: _Names) -> _Names:
    return {name: function for name, function in constructors.items() if name not in as_listed}


def _unpickle(kind: Any, data: Any, constructors: _Names, as_listed: _Names) -> Any:
    """Return the message in `data`; raise the errors of that kind of unpickler."""
    unpickler = kind(io.BytesIO(data))
    unpickler.constructors = constructors
    unpickler.as_listed = as_listed
    unpickler.handed_out = []
    handed_out = unpickler.handed_out
    message = unpickler.load()
    # The unpickler's memory goes with the unpickler.  A constructor that still lives is a part
    # of the message.
    del unpickler
    if any(constructor() is not None for constructor in handed_out):
        raise _NotAllowed("a class itself is not plain data; allow= must list it")
    return message


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickles messages of plain data fast, and leaves all others to the careful unpickler.

    A pickle is a program for a small machine, and any peer with the key can write one.
    These are the attacks, each with its defence:

    - To name something that is not allowed.  `find_class` looks names up in a table
      and never imports a module.
    - To change a class through the object that `find_class` returns: the instruction
      BUILD calls its `__setstate__`, writes into its `__dict__` or sets its attributes,
      and APPEND and SETITEM call other methods.  The pickle therefore gets no class, but
      a `_Constructor` in its place, which can be called and is otherwise inert.
    - To chain such stand-ins through their state until C's stack overflows, as can be
      done with `functools.partial`.  A `_Constructor` has no state that BUILD could set.
    - To pass a class itself off as plain data.  `_unpickle` finds a constructor that is
      left in the message.
    - To name something by a number that the program registered with `copyreg`.  A
      number seen before bypasses `find_class`, so a program which registers any gets
      the careful unpickler for all its messages.
    - To fill an exception with values that do harm when the exception is printed, and to
      change a listed class or function.  To refuse both, each BUILD must be checked, and
      C offers no way.  So a message which names an exception, or anything listed, goes
      to the careful unpickler.  One that names the unknown goes there to be refused.

    The functions that can run here have no effects but their results, so a message
    may be loaded half, dropped, and loaded again.
    """

    # These are the functions that make plain data, and weak references to those handed out.
    constructors: _Names
    handed_out: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        function = self.constructors.get((module, name))
        if function is None:
            raise _NeedsCare
        constructor = _Constructor(function)
        self.handed_out.append(weakref.ref(constructor))
        return constructor


# Every version of Python has this unpickler, written in Python, which the one in C replaces.
class _CarefulUnpickler(pickle._Unpickler):
    """Unpickles in Python, about ten times slower, messages whose every BUILD is checked.

    A listed class or function comes as itself: the pickle may call it, and it may be a part
    of the message.  So BUILD is refused for every class, function and module, whether listed
    or returned by a listed function, and an exception's state is checked.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**pickle._Unpickler.dispatch}
    constructors: _Names
    as_listed: _Names
    handed_out: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.as_listed:
            return self.as_listed[module, name]
        function = self.constructors.get((module, name))
        if function is None:
            full_name = f"{module}.{name}"[:300]
            raise _NotAllowed(f"{full_name} is not among what it allows")
        constructor = _Constructor(function)
        self.handed_out.append(weakref.ref(constructor))
        return constructor

    def get_extension(self, code: int) -> Any:
        raise _NotAllowed(f"copyreg's extension code {code} is not among what it allows")

    def load_build(self) -> None:
        """Set the state on top of the stack in the object below it."""
        instance = self.stack[-2]
        if isinstance(instance, _UNCHANGEABLE):
            raise _NotAllowed("no message may change a class, a function or a module")
        if _has_plain_exception_state(instance):
            _set_exception_state(instance, self.stack.pop())
        else:
            super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


_UNCHANGEABLE = (type, types.ModuleType, types.FunctionType, types.MethodType,
                 types.BuiltinFunctionType)


class _Constructor:
    """Stands for a class while a message is loaded, and can only be called."""

    __slots__ = ("_function", "__weakref__")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _NotAllowed("no message may change a class")


def _simple_constructors() -> _Names:
    """Return the functions that make plain data which the fast unpickler can load."""
    import datetime
    import decimal
    import fractions

    constructors: _Names = {}
    for kind in (complex, range, decimal.Decimal, fractions.Fraction, datetime.timedelta,
                 datetime.timezone, RemoteThread, *_Message.__subclasses__()):
        constructors[_pickled_name(kind)] = kind
    for kind in (datetime.date, datetime.time, datetime.datetime):
        constructors[_pickled_name(kind)] = partial(_build_date, kind)
    return constructors


def _build_date(kind: Any, *arguments: Any) -> Any:
    """Return a date or time whose fields have been checked; a pickle's fields have not."""
    return kind(*arguments).replace()


def _exception_constructors() -> _Names:
    """Return the functions that make Python's built-in exceptions, and this file's own."""
    import builtins

    constructors: _Names = {}
    for kind in (*vars(builtins).values(), *globals().values()):
        if isinstance(kind, type) and issubclass(kind, BaseException):
            constructors[_pickled_name(kind)] = partial(_build_exception, kind)
    return constructors


_UNICODE_ERROR_FIELDS: dict[type[BaseException], list[type]] = {
    UnicodeDecodeError: [str, bytes, int, int, str],
    UnicodeEncodeError: [str, str, int, int, str],
    UnicodeTranslateError: [str, int, int, str],
}


def _build_exception(kind: type[BaseException], *arguments: Any) -> BaseException:
    """Return an exception of that kind, if printing the exception does no harm.

    Printing a Unicode error reads memory at its offsets.  Printing a syntax error opens
    the file that the error names, and writes as many carets as the error says.
    """
    if kind in _UNICODE_ERROR_FIELDS and not _has_good_offsets(kind, arguments):
        raise _NotAllowed(f"a {kind.__name__} with offsets outside of its object")
    if issubclass(kind, SyntaxError) and len(arguments) > 1:
        raise _NotAllowed(f"a {kind.__name__} with the place of the error")
    return kind(*arguments)


def _has_good_offsets(kind: type[BaseException], arguments: tuple[Any, ...]) -> bool:
    """Say whether the offsets of a Unicode error are within the object at fault."""
    if list(map(type, arguments)) != _UNICODE_ERROR_FIELDS[kind]:
        return False
    *_, faulty, start, end, _ = arguments
    return bool(0 <= start <= end <= len(faulty))


def _has_plain_exception_state(instance: Any) -> bool:
    """Say whether this is an exception whose class leaves its state to BaseException."""
    if not isinstance(instance, BaseException):
        return False
    setter: Any = type(instance).__setstate__
    return bool(setter == BaseException.__setstate__)


def _set_exception_state(error: BaseException, state: Any) -> None:
    """Give `error` those attributes that do no harm when the error is printed.

    Attributes of the class itself, such as a `__cause__` or a Unicode error's offsets,
    are refused: they were checked when the exception was made, or no pickle sets them.
    The names that an ImportError or AttributeError is about are texts.  A `name_from` is
    dropped: for a hint, Python 3.12 would import the module of an ImportError with one.
    """
    if type(state) is not dict:
        raise _NotAllowed("the state of an exception is a dict")
    for name, value in state.items():
        if name == "__notes__" and type(value) is list and set(map(type, value)) <= {str}:
            # The pickle may still add notes to its own list, but not to this copy.
            vars(error)[name] = value.copy()
        elif name in ("name", "path") and isinstance(value, (str, type(None))):
            setattr(error, name, value)
        elif name in ("name_from", "args"):
            continue
        elif type(name) is str and not _is_built_in_attribute(error, name):
            vars(error)[name] = value
        else:
            kind = type(error).__name__
            raise _NotAllowed(f"no message may set {name!r:.100} of a {kind}")


def _is_built_in_attribute(error: BaseException, name: str) -> bool:
    """Say whether `name` has a meaning to Python, and not only to a program."""
    if name.startswith("__"):
        return True
    built_in = (base for base in type(error).__mro__ if base.__module__ == "builtins")
    return any(name in vars(base) for base in built_in)


######## Addresses and keys: what a node is called, and who may come in

_SPELLINGS = "9000, 'host:9000', ('host', 9000), or a path with a slash"


def _parse_address(node: Any) -> Address | None:
    """Return the address of `node`, which may be spelled in many ways, in its one form.

    None stands for a node that does not listen.  Raises ValueError if `node` is no node.
    """
    address = getattr(node, "address", node)
    if address is None and node is not None:
        return None
    parsed = _parse_path(address) or _parse_host_and_port(address)
    if parsed is None:
        raise ValueError(f"not a node: {node!r:.300}{_ipv6_hint(address)}; say {_SPELLINGS}")
    return parsed


def _ipv6_hint(address: Any) -> str:
    """Return the words that an error adds for an IPv6 address, which no node has."""
    if isinstance(address, tuple) and address:
        address = f"{address[0]}:"
    if isinstance(address, str) and address.count(":") > 1:
        return " is an IPv6 address, and nodes have those of IPv4"
    return ""


# These are the control characters, and the two separators at which Python splits lines.
_UNPRINTABLE = frozenset(map(chr, (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)))


# No system has sockets with a longer path.
MAX_SOCKET_PATH = 4096  # letters


def _parse_path(address: Any) -> str | None:
    """Return the absolute path of a Unix socket, or None if `address` is no path.

    Bytes that are no text stand in the path as they do in Python's file names.
    """
    if not isinstance(address, (str, bytes, os.PathLike)):
        return None
    path = os.fsdecode(address)
    if len(path) > MAX_SOCKET_PATH:
        raise ValueError(f"{path[:100]!r}... is too long for the path of a socket")
    if "/" not in path or not _UNPRINTABLE.isdisjoint(path):
        return None
    return os.path.abspath(path)


def _parse_host_and_port(address: Any) -> tuple[str, int] | None:
    """Return the host and the port that are meant, or None if `address` has no such form."""
    if isinstance(address, str):
        address = _split_host_and_port(address)
    elif isinstance(address, int):
        address = "127.0.0.1", address
    if not isinstance(address, (tuple, list)) or len(address) != 2:
        return None
    host, port = address
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
        return None
    if not isinstance(host, str) or not _is_host(host):
        return None
    if host == "localhost":
        host = "127.0.0.1"
    return host, int(port)


MAX_PORT_DIGITS = 5


def _split_host_and_port(text: str) -> tuple[str, int] | None:
    """Return the two parts of "host:9000"; "9000" alone is a port of this machine."""
    host, colon, digits = text.rpartition(":")
    if not colon:
        host = "127.0.0.1"
    # A text of a million digits must not be turned into a number.
    if not digits.isdecimal() or len(digits) > MAX_PORT_DIGITS:
        return None
    return host, int(digits)


# By the rules of DNS.
MAX_HOST = 253  # letters


def _is_host(host: str) -> bool:
    """Say whether `host` can be a host's name or its IPv4 address."""
    if not 0 < len(host) <= MAX_HOST or not host.isprintable():
        return False
    return not any(character in host for character in " :/")


def _parse_address_cached(node: Any) -> Address | None:
    """Return the same as `_parse_address`, fast for the addresses that come again.

    Strangers' addresses do not fill the memory: one that is too long is an error.
    """
    if isinstance(node, (tuple, str)):
        return _parse_and_keep(node)
    return _parse_address(node)


_parse_and_keep: Callable[[Any], Address | None] = lru_cache(1024)(_parse_address)


def _format_address(address: Address | None) -> str:
    """Return the text of `address`; '' for a node that does not listen."""
    if address is None:
        return ""
    if isinstance(address, str):
        return address
    host, port = address
    return f"{host}:{port}"


def _address_family(address: Address | None) -> int:
    """Return the family of the sockets at such an address."""
    return socket.AF_UNIX if isinstance(address, str) else socket.AF_INET


def _is_loopback(address: Address | None) -> bool:
    """Say whether only this machine can reach the address."""
    if not isinstance(address, tuple):
        return True
    return _numeric_host(address[0]).startswith(b"\x7f")


def _is_wildcard(address: Address | None) -> bool:
    """Say whether the address stands for all addresses of this machine."""
    return isinstance(address, tuple) and _numeric_host(address[0]) == bytes(4)


def _numeric_host(host: str) -> bytes:
    """Return the four bytes of an IPv4 address in digits; b"" for the name of a host."""
    try:
        return socket.inet_aton(host)
    except (OSError, ValueError):
        return b""


def _advertised_address(bound: Address | None, advertise: Any) -> Address | None:
    """Return the address that other nodes dial to reach the bound address.

    If `advertise` is given, that is the address; a host alone takes the port that is bound.
    Raises ValueError if no node could dial the address.
    """
    if advertise is None:
        if isinstance(bound, tuple) and _is_wildcard(bound):
            return _network_host(), bound[1]
        return bound
    if _is_host_alone(advertise) and isinstance(bound, tuple):
        advertise = advertise, bound[1]
    address = _parse_address(advertise)
    is_free_port = isinstance(address, tuple) and address[1] == 0
    if is_free_port:
        raise ValueError(f"advertise={advertise!r:.300}: nobody can dial port 0; leave the "
                         "port out, and it is the one at which the node listens")
    if address is None or _is_wildcard(address):
        raise ValueError(f"advertise={advertise!r:.300} is nothing that others can dial; say "
                         "this machine's address on the network, such as '192.168.1.17'")
    return address


def _is_host_alone(advertise: Any) -> bool:
    """Say whether `advertise` is a host without a port; digits alone are a port."""
    if not isinstance(advertise, str) or advertise.isdecimal():
        return False
    return _is_host(advertise)


def _network_host() -> str:
    """Return the IPv4 address at which this machine is reached from its network.

    Names would be of no use, for in a classroom nobody can look them up.  Connecting a
    UDP socket sends nothing: the system only chooses the address to send from.  Without
    a network, the loopback address is returned.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Any address beyond the router will do, even one that no machine has.
        with suppress(OSError):
            probe.connect(("10.255.255.255", 1))
            return str(probe.getsockname()[0])
    for index, _ in socket.if_nameindex():
        address = _host_of_interface(index), 0
        # An interface may have no address of its own.
        if not _is_loopback(address) and not _is_wildcard(address):
            return address[0]
    return "127.0.0.1"


def _host_of_interface(index: int) -> str:
    """Return the IPv4 address of that network interface, or another if there is none.

    This works on a network without a router, too: the system need not know a way to a
    multicast address, as the socket is told which interface to use.
    """
    # The bytes are C's ip_mreqn: two addresses that do not matter, and the interface.
    interface = struct.pack("@8xi", index)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
        probe.connect(("224.0.0.1", 1))
        return str(probe.getsockname()[0])
    return "127.0.0.1"


# A node that other machines can reach needs a key of at least this length.
MIN_KEY = 16  # bytes
MAKE_KEY = f"python3 {os.path.basename(__file__)} key"


def _find_key(key: bytes | str | None, address: Address | None) -> bytes:
    """Return `key`, or the parent's, the environment's, or the cookie file's: the first given.

    Raises TypeError if `key` is neither bytes nor text, and ValueError for a key that is
    empty, or too short for an address that other machines reach.
    """
    source = "authkey="
    if key is None:
        key = _inherited_key()
    if key is None:
        source = "DISTCONC_AUTHKEY"
        key = _environment_key()
    if key is None:
        source = _cookie_path()
        key = _read_cookie(source)
    if isinstance(key, str):
        key = key.encode("utf-8", "surrogateescape")
    if not isinstance(key, bytes):
        raise TypeError(f"authkey= is bytes or a str, not a {type(key).__name__}")
    if not key:
        raise ValueError(f"the key from {source} is empty; that would let everybody in")
    if len(key) < MIN_KEY and not _is_loopback(address):
        raise ValueError(f"the key from {source} is short; off this machine it needs "
                         f"{MIN_KEY} bytes, and random ones, which nobody can guess: "
                         f"`{MAKE_KEY}` prints such a key")
    return bytes(key)


def _environment_key() -> bytes | None:
    """Return the key in the environment, byte for byte, or None."""
    key = os.environ.get("DISTCONC_AUTHKEY")
    if key is None:
        return None
    return os.fsencode(key)


def _cookie_path() -> str:
    """Return the path of the file with the key of this user's nodes."""
    return os.environ.get("DISTCONC_COOKIE") or os.path.expanduser("~/.distconc.cookie")


def _read_cookie(path: str) -> bytes:
    """Return the key in the cookie file, which is made at first use.

    Raises OSError where there can be no such file, PermissionError if the file is not
    this user's alone, ValueError if the file is empty.  Blocks for a second at most,
    while another process makes the file.
    """
    try:
        if not os.path.lexists(path):
            _create_cookie(path)
        file = open(path, "rb")
    except OSError as error:
        reason = error.strerror or str(error)
        text = (f"there is no key in {path}: {reason}; give one with authkey=, in the "
                "environment's DISTCONC_AUTHKEY, or in a file that DISTCONC_COOKIE names")
        raise OSError(error.errno, text) from None
    with file:
        _check_private(file.fileno(), path)
        key = _read_when_written(file)
    if not key:
        raise ValueError(f"the key from {path} is empty; remove the file to have one made")
    return key


def _create_cookie(path: str) -> None:
    """Make the cookie file with a fresh random key, unless another process is first.

    The file is made in its place, without a draft that could be left behind.  Of all
    processes that try, O_EXCL lets one make the file; the others wait for its key.
    """
    key = os.urandom(32).hex() + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    try:
        with open(descriptor, "wb") as file:
            file.write(key.encode())
    except BaseException:
        # The disk may be full, and an empty file would be in the way of the next try.
        os.unlink(path)
        raise


def _check_private(descriptor: int, path: str) -> None:
    """Raise PermissionError if another user could have read the key, or set it."""
    # On Windows neither owners nor modes say who can read a file.
    if os.name != "posix":
        return
    status = os.fstat(descriptor)
    if status.st_uid != os.getuid():
        raise PermissionError(f"the key in {path} belongs to another user; "
                              "name a file of your own in DISTCONC_COOKIE")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise PermissionError(f"others can read the key in {path}; chmod 600 {path}")


def _read_when_written(file: Any) -> bytes:
    """Return the key in `file`; wait for the key if another process has just made the file."""
    deadline = monotonic() + 1.0
    key: bytes = file.read().strip()
    while not key and monotonic() < deadline:
        sleep(0.01)
        file.seek(0)
        key = file.read().strip()
    return key


######## The wire: handshake, frames, headers
#
# A connection is made like this.  Steps 1 and 2 are `multiprocessing.connection`'s own, with
# the key; 3 is one `send_bytes` each way; from 4 on everything is a frame.
#
#      dialler                                 acceptor
#   1  answers the challenge          <--      sends a challenge
#   2  sends a challenge              -->      answers the challenge
#   3  sends its hello                <->      sends its hello
#   4  reads the tick                 <--      sends a tick
#   5  sends "serials"                -->      waits for older connections to end
#   6  waits for older connections    <--      sends "serials"
#   7  is established                          is established
#
# By its first MAC each side shows that it has the key and has sent that hello: the acceptor's
# is that of the tick, the dialler's that of "serials".  Until then all is a stranger's claim.
#
# A hello is these fields, as text, joined by NUL:
#
#   protocol       "distconc 7"
#   role           "dialler" or "acceptor"
#   nonce          16 random bytes, in hex
#   incarnation    of the sender, in hex
#   heartbeat      seconds; the smaller of the two counts
#   max_message    bytes
#   address        where the sender listens: "host:port", a path, or "" for nowhere
#   dialled        from the dialler alone: the address that the dialler wanted to reach
#   reached        from the dialler alone: the address that its socket is connected to
#   module         the name by which the sender imports this file; its pickles say so, too
#
# A frame has a body of at most 4 MiB, which has no meaning until the frame's MAC is right.  All
# numbers are big-endian:
#
#   bytes   meaning
#   4       length of the body
#   4       length of the large payload that follows this frame, or 0
#   ...     body: any number of groups
#   16      MAC of all bytes before
#
# A group is one message, or several in a row that have the same header:
#
#   bytes   meaning
#   4       number of messages
#   4       length of all that follows the name
#   1       kind
#   8       incarnation: of the process that the handle is from; 0: of any at that address
#   8       id: a thread's, or 0 if the thread's registered name is given
#   8       caller: the id of the thread that calls
#   16      tag: a random text (hex digits), by which the outcome is told
#   8 8 8   cause: the event that the message was sent by, its incarnation, thread and clock; a
#           clock of 0: the event was not recorded
#   2       length of the name, at most 1020
#   ...     name: the registered one, in UTF-8, with lone surrogates
#   4 ...   of several messages: the length of the payload of each
#   ...     payloads
#
# From the kind to the name this is the header.  Fields that a kind does not use are 0.
#
# A message with a payload of more than 2048 bytes is alone in its frame, and its payload is
# empty there.  The payload follows the frame, with a MAC of its own.  So no memory is taken for
# a length that was altered on its way.  And since a frame must come whole within a heartbeat, a
# false length does not swallow the next frames for longer.  A frame has 65,536 messages at
# most.
#
# A MAC is BLAKE2b, keyed, of all frames and large payloads of that direction so far, without
# their MACs.  Of each that is longer than 2048 bytes, the SHA-256 is taken instead.  The key
# is HMAC-SHA256(authkey, role of the sender + SHA-256(dialler's hello) + SHA-256(acceptor's
# hello)).
#
# A frame with an empty body is a tick: a side that has nothing to send sends one every fifth of
# the heartbeat.  Silence for four fifths of a heartbeat ends the connection.  The last message
# of a side has the kind "end"; then that side shuts down its writing half, and reads to the
# other's end.  A direction that ends without "end" was cut off: messages that were sent last
# may be lost.
#
# These are the kinds, the fields that each uses, and its payload:
#
#   0  "send"         incarnation, id, cause               the message, pickled
#   1  "call"         incarnation, id, caller, tag, cause  the message, pickled
#   2  "reply"        tag, cause                           the reply, pickled
#   3  "failed"       tag, cause                           a failure, see below
#   4  "monitor"      incarnation, id, tag                 empty; "failed" answers, at the end
#   5  "unwatch"      tag                                  empty; the end need not be reported
#   6  "request"      tag, cause                           the request to the node, pickled
#   7  "undelivered"  id, cause                            the number (4 bytes) of sends that
#                                                          nobody could take, and why, in UTF-8
#   8  "serials"      none                                 serial, oldest serial (8 bytes each):
#                                                          see _Handshake._exchange_serials
#   9  "end"          none                                 empty; nothing follows
#
# A failure:
#
#   bytes     meaning
#   1         kind: 0 "no thread", 1 "returned", 2 "died", or 3 "unreadable"
#   4 4 4 4   lengths of these four, of which all but the first may be empty:
#   ...       what happened, in UTF-8
#   ...       the name of the error, in UTF-8
#   ...       the traceback, or why the message is unreadable, in UTF-8
#   ...       the exception that ended the thread, pickled; at most 65,536 bytes
#
# A thread may pass a call on to a third node, which may know no way to the caller.  The reply
# then goes to the node that passed the call on, and that node sends the reply to the caller's
# node.
#
# A request is ("ps",), ("is alive", incarnation, id), or ("spawn", func, args, name, register,
# is_server, link): link is a tag, for which a failure of the new thread is reported, or None.

_Bytes = Union[bytes, memoryview]

PROTOCOL = "distconc 7"
MAX_HELLO = 4096  # bytes
FRAME_START = struct.Struct(">II")
# The sizes of a group precede its header.
SIZES = struct.Struct(">II")
HEADER = struct.Struct(">BQQQ16sQQQH")
SIZES_AND_HEADER = struct.Struct(SIZES.format + HEADER.format[1:])
SERIALS = struct.Struct(">QQ")
COUNT = struct.Struct(">I")
FAILURE = struct.Struct(">BIIII")
FAILURE_KINDS = ("no thread", "returned", "died", "unreadable")
KINDS = ("send", "call", "reply", "failed", "monitor", "unwatch", "request", "undelivered",
         "serials", "end")
MAC_SIZE = 16  # bytes
# So many that MAX_BATCH messages (below) fit, however long their names.
MAX_FRAME = 1 << 22  # bytes
MAX_PAYLOADS = 1 << 16  # in a frame
# A larger payload follows its frame, as copying costs more.
SMALL_PAYLOAD = 2048  # bytes
# Every node accepts this much, whatever its `max_message`.  Failures are less.
MIN_PAYLOAD = 1 << 20  # bytes
# Of an error with a larger pickled reason, only the text and the traceback are sent.
MAX_REASON = 1 << 16  # bytes
# Bytes that are received at once.  Few, as the rest is moved whenever a frame is taken out.
RECEIVE_SIZE = 1 << 14
# A larger payload is not joined with its frame, as copying costs more than a second write.
MAX_JOINED = 1 << 16  # bytes
# Memory for the first bytes of a large payload.
FIRST_ROOM = 1 << 16  # bytes
# The most that a thread's id or a clock may be in a peer's cause.
MAX_CLOCK = 1 << 63
# A letter takes four bytes at most.
MAX_NAME_SIZE = 4 * MAX_NAME  # bytes


class _Hello(NamedTuple):
    """The introduction that each side sends, once both challenges are passed."""

    role: str
    incarnation: int
    heartbeat: float
    max_message: int
    address: Address | None
    # From the dialler alone: the address that was dialled, and the address that was reached.
    dialled: tuple[str, ...]
    module: str
    # The whole hello, as sent.
    line: bytes

    @classmethod
    def make(cls, role: str, node: "Node", dialled: Sequence[str]) -> "_Hello":
        fields = [PROTOCOL, role, os.urandom(16).hex(), f"{_own_incarnation:x}",
                  repr(node._heartbeat), str(node._max_message), str(node), *dialled,
                  __name__]
        return cls.decode(os.fsencode("\0".join(fields)))

    @classmethod
    def decode(cls, line: bytes) -> "_Hello":
        """Return the hello in `line`; raise ValueError or AuthenticationError for any other."""
        # A path keeps its bytes of the file system, in every locale.
        fields = os.fsdecode(line).split("\0")
        if fields[0] != PROTOCOL:
            raise AuthenticationError(
                f"the other side speaks {fields[0][:100]!r}, this {PROTOCOL!r}")
        _, role, _, incarnation, heartbeat, max_message, address, *dialled, module = fields
        hello = cls(
            role=role, incarnation=int(incarnation, 16), heartbeat=float(heartbeat),
            max_message=int(max_message), address=_parse_address(address) if address else None,
            dialled=tuple(dialled), module=module, line=line)
        hello._check_ranges()
        return hello

    def _check_ranges(self) -> None:
        if not 0 < self.incarnation < 1 << 64:
            raise ValueError(f"{self.incarnation} is no incarnation")
        if not MIN_HEARTBEAT <= self.heartbeat <= MAX_SECONDS:
            raise ValueError(f"{self.heartbeat} is no heartbeat")
        if not 0 < self.max_message < MAX_MAX_MESSAGE:
            raise ValueError(f"{self.max_message} is no max_message")


class _Seal:
    """Makes the MACs of one direction of a connection.

    Each MAC is of all bytes of that direction so far.  So if a piece is altered, left out,
    repeated or moved, the next MAC is wrong.
    """

    def __init__(self, key: bytes, sender: _Hello, dialler: _Hello, acceptor: _Hello) -> None:
        transcript = hashlib.sha256(dialler.line).digest()
        transcript += hashlib.sha256(acceptor.line).digest()
        direction_key = hmac.digest(key, sender.role.encode() + transcript, "sha256")
        self._state = hashlib.blake2b(key=direction_key, digest_size=MAC_SIZE)

    def mac(self, piece: _Bytes) -> bytes:
        """Return the MAC of all earlier pieces followed by this one."""
        if len(piece) > SMALL_PAYLOAD:
            # SHA-256 is twice as fast per byte as BLAKE2b, but slower to begin.
            piece = hashlib.sha256(piece).digest()
        self._state.update(piece)
        return self._state.digest()


def _encode_header(kind: str, incarnation: int | None = None, id: int | str = 0,
                   caller: int = 0, tag: str = "", cause: _Cause = None) -> bytes:
    """Return a header with these fields."""
    name = b""
    if isinstance(id, str):
        name = id.encode("utf-8", "surrogatepass")
        id = 0
    origin = thread = clock = 0
    if cause is not None:
        origin, thread, clock = int(cause[0], 16), cause[1], cause[2]
    # A tag that this module has not made may be any text, of which 16 letters count.
    tag_bytes = str.encode(tag, "latin-1", "replace")
    return HEADER.pack(KINDS.index(kind), incarnation or 0, id, caller, tag_bytes,
                       origin, thread, clock, len(name)) + name


def _encode_message(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
    """Return the body of a frame with this message, and the large payload that follows it."""
    if len(payload) > SMALL_PAYLOAD:
        return SIZES.pack(1, 0) + header, payload
    return SIZES.pack(1, len(payload)) + header + payload, b""


def _encode_batch(messages: Sequence[tuple[bytes, bytes, object]]) -> tuple[bytes, bytes]:
    """Return the body of a frame with these messages, and the large payload that follows it."""
    if len(messages) == 1:
        header, payload, _ = messages[0]
        return _encode_message(header, payload)
    # Of several, all payloads are small: see `_Connection._take_batch`.
    groups = []
    for header, members in itertools.groupby(messages, key=itemgetter(0)):
        groups.append(_encode_group(header, [payload for _, payload, _ in members]))
    return b"".join(groups), b""


def _encode_group(header: bytes, payloads: list[bytes]) -> bytes:
    data = b"".join(payloads)
    if len(payloads) > 1:
        data = struct.pack(f">{len(payloads)}I", *map(len, payloads)) + data
    return SIZES.pack(len(payloads), len(data)) + header + data


def _decode_cause(incarnation: int, thread: int, clock: int) -> _Cause:
    """Return a peer's cause; None if there is none, or none that an event here could follow."""
    if not 0 < clock < MAX_CLOCK or thread >= MAX_CLOCK:
        return None
    return f"{incarnation:016x}", thread, clock


def _split(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Cut `data` into pieces of these sizes; raise ValueError if that cannot be."""
    pieces = []
    end = 0
    for size in sizes:
        start = end
        end += size
        pieces.append(data[start:end])
    if end != len(data):
        raise ValueError(f"{len(data)} bytes are no pieces of {end}")
    return pieces


def _one_line(text: object, limit: int = MAX_LINE) -> str:
    """Return a peer's text fit for a log: one line, cut, and without control characters."""
    line = str(text)[:limit]
    if line.isprintable():
        return line
    return repr(line)[1:-1]


def _clean_lines(text: object) -> str:
    """Return a peer's text of several lines, such as a traceback, fit to be printed."""
    lines = str(text)[:MAX_ERROR_TEXT].split("\n")
    return "\n".join(_one_line(line, MAX_ERROR_TEXT) for line in lines)


######## Connection: one sealed connection, its outbox, its reader and its writer

MAX_BATCH = 400  # messages in a frame
# A frame must come whole within a heartbeat, over a slow network, too.
MAX_BATCH_SIZE = 1 << 15  # bytes of payloads
# A sender of more messages waits for the network.
MAX_QUEUED = 2000  # messages in an outbox
# A peer that asks for more answers reads none of them, and is cut off.
MAX_UNREAD = 64_000  # answers in an outbox
# A peer with more requests that wait for the node is cut off.
MAX_REQUESTS = 1000
# A write of more is likely to wait for the network.
LONG_WRITE = 1 << 18  # bytes
# A message so soon after a write is one of many.
BURST_SECONDS = 50e-6
# A write to a lost peer must not kill the process.  On macOS this is an option of the socket,
# for whose number Python has no name.
NO_SIGPIPE = getattr(socket, "MSG_NOSIGNAL", 0)
SO_NOSIGPIPE = 0x1022


class _Peer(NamedTuple):
    """The node at the other end of a connection, which watches threads for this node."""

    incarnation: int

    def remove_watcher(self, tag: str) -> None:
        """Tell the node that the thread's end need not be reported any more.  Never blocks."""
        local_node()._post(self.incarnation, _encode_header("unwatch", tag=tag))


def _must_not_wait() -> bool:
    """Return whether others would wait for this thread, which therefore must not wait.

    This is true in readers, writers, the timer and the accept thread, and within a write.  It
    is also true when a `__del__` that sends has struck while its thread held a lock which the
    readers take.
    (They do not take `_process.lock`, nor the `_write_lock` of another connection.)
    """
    if _local.must_not_wait:
        return True
    locks = [_registry.lock, _pending._lock, local_node()._lock, _log_thread._lock,
             _losses._lock, _wrong_keys._lock, _noise._lock, _tracer._lock]
    return any(map(_is_held, locks))


def _is_held(lock: Any) -> bool:
    """Return whether this thread holds the lock: only the holder may notify."""
    try:
        threading.Condition(lock).notify()
    except RuntimeError:
        return False
    return True


class _Connection:
    """One sealed connection to another node, on which both sides speak.

    A message that comes alone is written by its sender, at once.  Of many, each goes into the
    outbox.  The *writer* thread takes all that wait there and writes them as one frame, or
    writes a tick when nothing came for a while.  The *reader* thread, which has shaken hands
    before, reads frames and hands out their messages.  The reader never writes, so two nodes
    that flood each other both go on reading.  Nor does it run any code of the user's, which
    could hold the connection up.

        established --close--> closing: takes no more messages, the writer empties the outbox
             |                    |
             | abort              | the writer has written all, and "end"
             v                    v
           aborted ----------> closed: the reader has read to the peer's end, and cleans up

    `close` is called by `disconnect` and `stop_node`, and by the reader after the peer's "end".
    `abort` is called by the reader when the connection is broken, silent, or slow to close;
    by the node when an established connection to that peer has ended; and by a `disconnect` or
    `stop_node` that has waited long enough.
    """

    __slots__ = (
        "_node", "_socket", "_unread", "_frame_deadline", "peer", "address", "addresses",
        "heartbeat", "max_outgoing", "_max_incoming", "_leaves_nothing_queued", "_outgoing",
        "_incoming", "is_local", "load", "serial", "peer_serial", "_outbox", "closing", "_work",
        "_room", "delayed_until", "_write_lock", "_is_writing", "_last_write",
        "_has_ended_output", "is_over", "_writer_has_ended", "_writer_end", "_has_read_end",
        "broken_by", "sent", "received", "_lost", "_requests", "_last_caller")

    def __init__(self, node: "Node", sock: socket.socket, key: bytes, mine: _Hello,
                 peer: _Hello, dialled: Address | None) -> None:
        self._node = node
        self._socket = sock
        # The bytes that the reader has received, but not yet read; and when the frame that has
        # begun to come must be whole (0: none has).
        self._unread = b""
        self._frame_deadline = 0.0

        # The results of the handshake.
        self.peer = _Peer(peer.incarnation)
        self.address: Address | None = peer.address
        self.addresses = {peer.address, dialled} - {None}
        self.heartbeat = min(mine.heartbeat, peer.heartbeat)
        self.max_outgoing = min(mine.max_message, peer.max_message)

        # A daemonic process of multiprocessing, such as a pool's worker, is ended by a signal
        # once its tasks are done.  So there a sender writes by itself, and leaves nothing to
        # the writer, which may have no time left.
        self._leaves_nothing_queued = current_process().daemon
        self._max_incoming = max(mine.max_message, MIN_PAYLOAD)
        dialler, acceptor = (mine, peer) if dialled else (peer, mine)
        self._outgoing = _Seal(key, mine, dialler, acceptor)
        self._incoming = _Seal(key, peer, dialler, acceptor)
        self.is_local = _is_same_host(sock)
        self.load = node._loader_for(self.is_local, peer.module)

        # Each side's number for this connection, and 0 before the number is known; see
        # `_Handshake._exchange_serials`.
        self.serial = 0
        self.peer_serial = 0

        # `deque.append` and `popleft` are atomic, so putting messages here needs no lock: see
        # `post`.  Only a holder of `_write_lock` takes messages out; `post` may take its own.
        self._outbox: deque[tuple[bytes, bytes, object]] = deque()
        self.closing = False
        # The writer waits for messages, or for the connection to close; senders wait for room.
        self._work = _WaitQueue()
        self._room = _WaitQueue()
        # A fault holds the outbox up until then.
        self.delayed_until = 0.0

        # The writer or a sender holds this lock while it makes and writes a frame.  So frames,
        # and the MACs in them, are in one order.  The network may make the holder wait.
        self._write_lock = _Lock()
        # Whether a thread is making or writing a frame just now.
        self._is_writing = False
        # The time of the last write; 0 after a read, as the next message may be an answer.
        self._last_write = 0.0
        # Whether no frame may follow.  `abort` sets this without the lock.
        self._has_ended_output = False

        # Set, under the node's lock, by the thread that reports the end.
        self.is_over = False
        self._writer_has_ended = False
        # The reader waits here for the writer's end.
        self._writer_end = _WaitQueue()
        # Whether the peer's "end" has come, or else the error that ended the connection.
        self._has_read_end = False
        self.broken_by = ""
        # How many messages were sent, guarded by `_write_lock`, and how many were received.
        self.sent = 0
        self.received = 0
        # How many of the messages sent the peer has told to be lost.
        self._lost = 0
        # The peer's requests to this node.
        self._requests: Mailbox | None = None
        self._last_caller: RemoteThread | None = None

    @property
    def name(self) -> str:
        """The peer's address, in the form for errors."""
        return _one_line(_format_address(self.address)) or "a node that does not listen"

    # Sending

    def send(self, header: bytes, payload: bytes) -> bool:
        """Have a message written; wait while too much is queued.

        Returns False if the connection closes and does not take the message.  Raises NodeDown
        if contact was lost during the write.
        """
        if _local.must_not_wait or self._is_one_of_many(payload):
            return self.post(header, payload)
        is_slow = self._outbox or self._is_writing or len(payload) > LONG_WRITE
        if is_slow and _must_not_wait():
            return self.post(header, payload)
        try:
            # A `__del__` that runs in this thread meanwhile must not wait: it would wait for
            # its own thread, or for another that waits for this one.
            _local.must_not_wait = True
            return self._write_at_once(header, payload) or self._write_in_turn(header, payload)
        finally:
            # That is what it was before, see above.
            _local.must_not_wait = False

    def post(self, header: bytes, payload: bytes = b"") -> bool:
        """Queue a message; return False if the connection closes without taking the message.

        Never blocks.  For threads that must not wait: readers, and threads that end.
        """
        # The third item makes the message unlike any other, so that `remove` takes no other.
        message = (header, payload, object())
        self._outbox.append(message)
        if self.closing:
            # After `closing` was set, the writer empties the outbox once more.  Either the
            # writer has taken this message, or the message came too late and is still there.
            try:
                self._outbox.remove(message)
            except ValueError:
                return True
            return False
        self._work.wake_all()
        return True

    def encode_reply(self, tag: str, payload: bytes, cause: _Cause) -> tuple[bytes, bytes]:
        """Return the header and payload of a reply, or of a failure in place of a large one."""
        if len(payload) <= self.max_outgoing:
            return _encode_header("reply", tag=tag, cause=cause), payload
        error = RemoteError("SerializationError", f"the reply has {len(payload)} bytes, more "
                            f"than the max_message of the caller's node, {self.max_outgoing}")
        return _encode_failure(tag, error, cause)

    def _has_room(self) -> bool:
        return self.closing or len(self._outbox) < MAX_QUEUED

    def _is_one_of_many(self, payload: bytes) -> bool:
        """Return whether a message is better queued, for the writer, than written at once.

        A write in the sender's thread saves waking the writer, which costs as much as all the
        rest of a call.  But a message right after a write is one of many: hundreds share a
        frame if they queue up while the writer waits for its turn, and that makes a flood
        three times as fast.
        """
        if len(payload) > SMALL_PAYLOAD or self._leaves_nothing_queued:
            return False
        if self._outbox or self._is_writing or _faults.are_active:
            # If there is no room, the sender waits for some: see `_write_in_turn`.
            return len(self._outbox) < MAX_QUEUED
        return monotonic() - self._last_write < BURST_SECONDS

    def _write_at_once(self, header: bytes, payload: bytes) -> bool:
        """Write a message; return False if it has to queue, or the connection closes."""
        if self._outbox or _faults.are_active:
            # A message that has to queue must not wait for the lock, which the writer may hold
            # for as long as the network takes.
            return False
        with self._write_lock:
            if self._outbox or self.closing:
                return False
            self._write_frame(*_encode_message(header, payload), 1)
            return True

    def _write_in_turn(self, header: bytes, payload: bytes) -> bool:
        """Wait for room, then queue a message; return False if the connection closes."""
        if len(self._outbox) >= MAX_QUEUED:
            self._room.wait_until(self._has_room, None)
        was_taken = self.post(header, payload)
        if was_taken and (self._leaves_nothing_queued or len(payload) > SMALL_PAYLOAD):
            # The sender writes a large message by itself, so it cannot queue a second one.
            self._write_waiting()
        return was_taken

    def _write_waiting(self) -> None:
        """Write the messages in the outbox, also those that other threads put there meanwhile.

        When this returns, the frame that another thread was writing is out, too.
        """
        while True:
            with self._write_lock:
                if self._has_ended_output or not self._outbox:
                    return
                taken: list[tuple[bytes, bytes, object]] = []
                try:
                    self._take_batch(taken)
                    body, large = _encode_batch(taken)
                except BaseException:
                    # Ctrl-C: most of these are other threads' messages.
                    self._outbox.extendleft(reversed(taken))
                    raise
                self._write_frame(body, large, len(taken))

    def _take_batch(self, taken: list[tuple[bytes, bytes, object]]) -> None:
        """Take the messages of one frame from the outbox: many small ones, or a large one.

        They are in `taken` even if Ctrl-C interrupts this.
        """
        size = 0
        while self._outbox and len(taken) < MAX_BATCH and size < MAX_BATCH_SIZE:
            try:
                message = self._outbox.popleft()
            except IndexError:
                # The sender has taken its message back, since the connection closes.
                break
            taken.append(message)
            size += len(message[1])
            if len(message[1]) > SMALL_PAYLOAD:
                if len(taken) > 1:
                    self._outbox.appendleft(taken.pop())
                break
        self._room.wake_all()

    def _write_frame(self, body: bytes = b"", large: bytes = b"", count: int = 0) -> None:
        """Write one frame; `_write_lock` is held.  `count` is how many messages are in it.

        If a fault cuts the peer off, the messages are lost.  If the network fails, or Ctrl-C
        interrupts the write, half a frame may be out, and no other can follow: this side's
        output ends.
        """
        if _faults.are_active and _faults.cut_off(self.addresses):
            return
        self._is_writing = True
        try:
            pieces = self._make_frame(body, large)
            # Both are set before the peer can answer: a read resets the time, and the peer may
            # tell that some were lost.
            self._last_write = monotonic()
            self.sent += count
            for piece in pieces:
                self._socket.sendall(piece, NO_SIGPIPE)
        except BaseException as error:
            self._has_ended_output = True
            self._shut_down_writing()
            if isinstance(error, OSError):
                raise NodeDown(
                    f"contact with {self.name} was lost while sending: {error}") from error
            raise
        finally:
            self._is_writing = False

    def _make_frame(self, body: bytes, large: bytes) -> Sequence[_Bytes]:
        """Return a frame's bytes, in one piece unless joining costs too much."""
        frame = FRAME_START.pack(len(body), len(large)) + body
        frame += self._outgoing.mac(frame)
        if not large:
            return [frame]
        mac = self._outgoing.mac(large)
        if len(large) > MAX_JOINED:
            return [frame, *_cut(large), mac]
        return [frame + large + mac]

    # The writer

    def _write_loop(self) -> None:
        """Run the writer: write queued messages, or a tick if none come for a while."""
        _local.must_not_wait = True
        try:
            while not (self.closing and not self._outbox):
                next_tick = monotonic() + self.heartbeat / 5
                if self._outbox and not self._is_due():
                    self._work.wait_until(self._is_due, min(next_tick, self.delayed_until))
                elif self._work.wait_until(self._has_work, next_tick) and self._is_due():
                    self._write_waiting()
                self._write_tick()
                if self._has_ended_output:
                    break
            self._write_end()
        except NodeDown:
            # The reader finds that contact is lost, too, and reports the loss.
            pass
        finally:
            self._end_output()
            self._writer_has_ended = True
            self._writer_end.wake_all()

    def _has_work(self) -> bool:
        return self.closing or bool(self._outbox)

    def _is_due(self) -> bool:
        """Return whether no fault holds the outbox up."""
        return self.closing or monotonic() >= self.delayed_until

    def _write_tick(self) -> None:
        """Show the peer that this node lives, unless something was written of late."""
        if monotonic() - self._last_write < self.heartbeat / 10:
            return
        with self._write_lock:
            if not self._has_ended_output:
                self._write_frame()

    def _write_end(self) -> None:
        """Tell the peer that nothing follows."""
        with self._write_lock:
            if not self._has_ended_output:
                self._write_frame(*_encode_message(_encode_header("end"), b""))

    def _end_output(self) -> None:
        with self._write_lock:
            self._has_ended_output = True
        self._shut_down_writing()

    def _shut_down_writing(self) -> None:
        """Write nothing more; the peer reads to the end of this side, and then ends, too."""
        self.closing = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._work.wake_all()
        self._room.wake_all()

    # The handshake's last steps, and the reader

    def send_tick(self) -> None:
        with self._write_lock:
            self._write_frame()

    def read_tick(self) -> None:
        body, large = self._read_frame()
        if body or large is not None:
            raise ValueError("the peer speaks before its turn")

    def register_and_send_serials(self) -> None:
        """Register this connection; tell the peer its number, and that of the oldest here."""
        oldest = self._node._add_connection(self)
        with self._write_lock:
            serials = SERIALS.pack(self.serial, oldest)
            self._write_frame(*_encode_message(_encode_header("serials"), serials))

    def read_serials(self) -> int:
        """Read the peer's number for this connection; return the number of its oldest one."""
        body, _ = self._read_frame()
        start = SIZES.pack(1, SERIALS.size) + _encode_header("serials")
        if not body.startswith(start):
            raise ValueError("the peer speaks before it has told its serials")
        serial, oldest = SERIALS.unpack(body[len(start):])
        if not 0 < oldest <= serial:
            raise ValueError(f"{serial} and {oldest} are no serials")
        self.peer_serial = serial
        return int(oldest)

    def start(self) -> None:
        """Start the writer; from now on silence ends the connection."""
        _limit_silence(self._socket, 0.8 * self.heartbeat)
        _start_daemon("writer", self._write_loop)

    def read_loop(self) -> None:
        """Run the reader: hand out messages until the connection ends, then clean up."""
        _local.must_not_wait = True
        try:
            while not self._has_read_end:
                body, large = self._read_frame()
                # After a read, the next message may be an answer, which is not one of many.
                self._last_write = 0.0
                self._hand_out(body, large)
                if len(self._outbox) > MAX_UNREAD:
                    raise OSError("the peer goes on asking and does not read the answers")
            self.close()
        except BaseException as error:
            # Nonsense under the seal may raise anything.
            self.abort()
            self.broken_by = _one_line(_last_line(error))
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        """Wait until the writer has ended, and report that contact is lost."""
        deadline = monotonic() + 0.8 * self.heartbeat
        if not self._writer_end.wait_until(lambda: self._writer_has_ended, deadline):
            self.abort()
            self._writer_end.wait_until(lambda: self._writer_has_ended, None)
        if self._requests is not None:
            self._requests.put(None)
        # A call whose message is dropped here watches the peer already, so it hears of the loss
        # below.  A message that is queued later is taken back by `post`.
        self._outbox.clear()
        self._node._connection_closed(self)
        self._release()

    def _read_frame(self) -> tuple[bytes, memoryview | None]:
        """Wait for a frame; check its MAC; return its body and the large payload, if any.

        Raises EOFError or OSError if the connection ends, if it is silent for too long, or if
        bytes come that the peer has not written.
        """
        self._frame_deadline = 0.0
        self._receive(FRAME_START.size)
        body_size, large_size = FRAME_START.unpack_from(self._unread)
        if body_size > MAX_FRAME:
            raise OSError(f"a frame of {body_size} bytes is too large")
        end = FRAME_START.size + body_size
        self._receive(end + MAC_SIZE)
        unread = self._unread
        self._unread = unread[end + MAC_SIZE:]
        frame = unread[:end]
        self._check_mac(frame, unread[end:end + MAC_SIZE])
        large = None
        if large_size:
            large = self._read_large(large_size)
        return frame[FRAME_START.size:], large

    def _receive(self, size: int) -> None:
        """Receive until `size` bytes are unread.

        Silence of 0.8 heartbeats ends the connection.  So does a frame that is still incomplete
        so long after its first bytes were received.
        """
        if len(self._unread) >= size:
            return
        pieces = [self._unread]
        received = len(self._unread)
        while True:
            try:
                piece = self._socket.recv(RECEIVE_SIZE)
            except (BlockingIOError, TimeoutError):
                raise OSError("nothing was heard for too long") from None
            if not piece:
                raise EOFError("it was cut off: the other side had not said that it ends")
            pieces.append(piece)
            received += len(piece)
            if received >= size:
                self._unread = b"".join(pieces)
                return
            now = monotonic()
            self._frame_deadline = self._frame_deadline or now + 0.8 * self.heartbeat
            if now > self._frame_deadline:
                raise OSError("a frame came too slowly: its length may have been altered")

    def _read_large(self, size: int) -> memoryview:
        """Return the payload that follows a frame.

        A peer may announce more than it sends.  So each time memory is taken for as much as has
        come already.
        """
        if size > self._max_incoming:
            raise OSError(f"a message of {size} bytes is too large")
        end = size + MAC_SIZE
        data = bytearray(self._unread[:end])
        self._unread = self._unread[end:]
        while len(data) < end:
            start = len(data)
            data += bytes(min(max(start, FIRST_ROOM), end - start))
            with memoryview(data) as view:
                self._receive_into(view[start:])
        whole = memoryview(data)
        self._check_mac(whole[:size], whole[size:])
        return whole[:size]

    def _receive_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes from the socket."""
        while view:
            try:
                received = self._socket.recv_into(view)
            except (BlockingIOError, TimeoutError):
                raise OSError("nothing was heard for too long") from None
            if not received:
                raise EOFError("it was cut off in the middle of a message")
            view = view[received:]

    def _check_mac(self, piece: _Bytes, mac: _Bytes) -> None:
        if not hmac.compare_digest(self._incoming.mac(piece), mac):
            raise OSError("a frame was altered, repeated, lost or moved on its way")

    def _hand_out(self, body: bytes, large: memoryview | None) -> None:
        """Handle the messages of a frame; raise an error for nonsense."""
        # Where the last group has ended, and the next one begins.
        end = 0
        messages = 0
        while end < len(body):
            (count, size, kind, incarnation, id, caller, tag, origin, thread, clock,
             name_size) = SIZES_AND_HEADER.unpack_from(body, end)
            name_start = end + SIZES_AND_HEADER.size
            start = name_start + name_size
            end = start + size
            messages += count
            if end > len(body) or messages > MAX_PAYLOADS:
                raise ValueError("a frame has less than its sizes say, or too many messages")
            data = body[start:end]
            payloads: Sequence[_Bytes] = [data]
            if large is not None:
                if count != 1 or size or end < len(body):
                    raise ValueError("a large payload is not alone")
                payloads = [large]
            elif count != 1:
                sizes = struct.unpack_from(f">{count}I", data)
                payloads = _split(data[4 * count:], sizes)
            target: int | str = id
            if name_size > MAX_NAME_SIZE:
                raise ValueError("a name is too long")
            if name_size:
                target = body[name_start:start].decode("utf-8", "surrogatepass")
            cause = None
            if clock:
                # Only a trace needs this.
                cause = _decode_cause(origin, thread, clock)
            self._dispatch(KINDS[kind], incarnation or None, target, caller,
                           tag.decode("latin-1"), cause, payloads)

    def _dispatch(self, kind: str, incarnation: int | None, id: int | str, caller: int,
                  tag: str, cause: _Cause,
                  payloads: Sequence[_Bytes]) -> None:
        """Handle the messages with this header."""
        if kind == "end":
            self._has_read_end = True
            return
        self.received += len(payloads)
        if kind == "send":
            self._on_send(payloads, incarnation, id, cause)
            return
        for payload in payloads:
            if kind == "call":
                self._on_call(payload, incarnation, id, caller, tag, cause)
            elif kind == "reply":
                self._on_reply(payload, tag, cause)
            elif kind == "failed":
                _pending.fail(tag, _RemoteFailure(self, payload), cause)
            elif kind == "monitor":
                self._find_and_watch(incarnation, id, tag, cause)
            elif kind == "unwatch":
                _registry.remove_watcher(tag)
            elif kind == "request":
                self._on_request(payload, tag, cause)
            elif kind == "undelivered":
                self._on_undelivered(payload, id, cause)
            else:
                raise ValueError(f"{kind!r} comes at the wrong time")

    def _on_send(self, payloads: Sequence[_Bytes], incarnation: int | None,
                 id: int | str, cause: _Cause) -> None:
        """Put messages into the mailbox; the thread that takes one loads its payload."""
        try:
            thread = self._node._find(incarnation, id)
        except NoSuchThread as error:
            self._node._count("undelivered", len(payloads))
            self._post_undelivered(id, len(payloads), str(error), cause)
            return
        thread._mailbox._put_all(
            [_RemoteEntry(payload, self, id, cause) for payload in payloads])

    def _on_call(self, payload: _Bytes, incarnation: int | None, id: int | str,
                 caller: int, tag: str, cause: _Cause) -> None:
        """Put a call into the mailbox; see to it that the caller hears of a failure."""
        thread = self._find_and_watch(incarnation, id, tag, cause)
        if thread is not None:
            entry = _RemoteCallEntry(payload, self, self._caller(caller), tag, cause)
            thread._mailbox._put(entry)

    def _caller(self, id: int) -> "RemoteThread":
        """Return the handle of a peer's thread; keep it, as more calls are likely to follow."""
        handle = self._last_caller
        if handle is None or handle._id != id:
            handle = RemoteThread(self.address, id, self.peer.incarnation)
            handle._named_by = self
            self._last_caller = handle
        return handle

    def _find_and_watch(self, incarnation: int | None, id: int | str, tag: str,
                        cause: _Cause) -> "Thread | None":
        """Watch a thread for the peer and return it; if there is none, tell the peer so."""
        try:
            thread = self._node._find(incarnation, id)
        except NoSuchThread as error:
            self._fail_call(tag, error, cause)
            return None
        if not _registry.add_watcher(thread, _RemoteWatcher(tag, self.peer)):
            self._fail_call(tag, NoSuchThread(f"{thread!r} has ended"), cause)
            return None
        return thread

    def _on_reply(self, payload: _Bytes, tag: str, cause: _Cause) -> None:
        """Give the reply to the waiting caller, which loads the payload."""
        if not _pending.resolve(tag, _RemoteReply(payload, self, cause), self.peer):
            self._pass_reply_on(payload, tag, cause)

    def _pass_reply_on(self, payload: _Bytes, tag: str, cause: _Cause) -> None:
        """Hand on the reply to a call that a thread of this node has passed on to the peer.

        The call first came to a thread here.  Until the reply, the caller's node is a watcher
        of that thread, and the watcher tells where the reply goes.
        """
        watcher = _registry.remove_watcher(tag)
        if isinstance(watcher, _RemoteWatcher):
            caller = self._node._established_with(watcher.peer.incarnation, None)
            if caller is not None:
                caller.post(*caller.encode_reply(tag, bytes(payload), cause))

    def _on_request(self, payload: _Bytes, tag: str, cause: _Cause) -> None:
        """Queue a request for a separate thread, since requests may run the user's code."""
        if self._requests is None:
            self._requests = Mailbox()
            _start_daemon("requests", _serve_requests, self, self._requests)
        if len(self._requests._entries) > MAX_REQUESTS:
            raise OSError("the peer asks for more than this node can do")
        self._requests.put((tag, cause, payload))

    def _on_undelivered(self, payload: _Bytes, id: int | str, cause: _Cause) -> None:
        """Log that messages from here reached no thread."""
        [count] = COUNT.unpack_from(payload)
        why = str(payload[COUNT.size:], "utf-8", "replace")
        if not 0 < count <= self.sent - self._lost:
            raise ValueError(f"{count} messages cannot be lost")
        self._lost += count
        target = f"{_one_line(repr(id), MAX_NAME)} at {self.name}"
        _losses.add(target, _one_line(why), count, cause)

    def _post_undelivered(self, id: int | str, count: int, why: str, cause: _Cause) -> None:
        """Tell the peer that nobody could take so many of its messages."""
        payload = COUNT.pack(count) + why[:MAX_LINE].encode("utf-8", "replace")
        self.post(_encode_header("undelivered", id=id, cause=cause), payload)

    def _delivery_error(self, error: BaseException) -> DistconcError:
        """Count a message that no thread got; return the error for its sender."""
        if isinstance(error, NoSuchThread):
            self._node._count("undelivered")
            return NoSuchThread(str(error)[:MAX_ERROR_TEXT])
        if isinstance(error, _NotAllowed):
            self._node._count("refused")
            return RemoteError("Refused", f"the other node refuses it: {error}")
        self._node._count("undelivered")
        text = f"the other node cannot read it: {_last_line(error)}"
        if "__main__" in text:
            text += ("; put that into a file of its own, which both can import (in a notebook: "
                     "begin its cell with %%writefile mymodule.py, then import mymodule)")
        return RemoteError(type(error).__name__, text)

    def _fail_call(self, tag: str, error: BaseException, cause: _Cause) -> None:
        """Tell the peer that its call, monitor or request `tag`, sent by `cause`, failed."""
        self.post(*_encode_failure(tag, self._delivery_error(error), cause))

    # Ending

    def abort(self) -> None:
        """End the connection now.  Never blocks."""
        _shut_down_socket(self._socket)
        # The writer need not try to say "end".
        self._has_ended_output = True
        self.close()

    def close(self) -> None:
        """Take no more messages, have the queued ones written, then end.  Never blocks."""
        self.closing = True
        self._work.wake_all()
        self._room.wake_all()

    def _release(self) -> None:
        """Close the descriptor, which no thread uses any more."""
        with self._write_lock:
            self._socket.close()


# Whether `shutdown` wakes a thread that is blocked in a read or a write of that socket.  On
# Windows the thread sleeps on, so there both have a time-out, in handshakes as well.
SHUTDOWN_WAKES = sys.platform != "win32"


def _limit_silence(sock: socket.socket, seconds: float) -> None:
    """Have a read end after so many seconds without a byte.

    `settimeout` would limit writes as well, and all duplicates of the socket.
    """
    _set_timeout(sock, socket.SO_RCVTIMEO, seconds)
    if not SHUTDOWN_WAKES:
        _set_timeout(sock, socket.SO_SNDTIMEO, seconds)


def _set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Set one of the system's own time-outs, in the form of that system.

    The form is two numbers, seconds and microseconds, of 8 bytes each or, on some machines of
    32 bits, of 4; or one number, of milliseconds (Windows).
    """
    microseconds = round(seconds * 1_000_000)
    size = len(sock.getsockopt(socket.SOL_SOCKET, option, 16))
    if size == 4:
        value = struct.pack("=i", microseconds // 1000)
    else:
        form = {8: "=ii", 16: "=qq"}[size]
        value = struct.pack(form, *divmod(microseconds, 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, option, value)


def _cut(body: _Bytes) -> Sequence[_Bytes]:
    """Return `body` in the pieces to write: small ones where each write has a time-out."""
    if SHUTDOWN_WAKES:
        return [body]
    view = memoryview(body)
    return [view[start:start + MAX_JOINED] for start in range(0, len(body), MAX_JOINED)]


def _shut_down_socket(sock: socket.socket) -> None:
    """Have all reads and writes of `sock` end; the owner of the socket still closes it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _start_daemon(name: str, function: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(
        target=function, args=args, name=f"distconc {name}", daemon=True)
    thread.start()
    return thread


######## Arrivals: what a connection puts into mailboxes, and among watchers


class _RemoteWatcher:
    """A caller or watcher on another node, to be told when a thread of this node ends."""

    def __init__(self, tag: str, peer: _Peer, is_link: bool = False) -> None:
        self.tag = tag
        self.peer = peer
        self.is_link = is_link
        self.watched: Thread | None = None

    def notify(self, error: DistconcError, cause: _Cause) -> bool:
        """Send the failure to that node; return False if contact is lost."""
        header, payload = _encode_failure(self.tag, error, cause)
        return local_node()._post(self.peer.incarnation, header, payload)


def _encode_failure(tag: str, error: DistconcError, cause: _Cause) -> tuple[bytes, bytes]:
    """Return the header and the payload that tell a waiter on another node of `error`."""
    kind = "died"
    name = ""
    lines = ""
    reason = b""
    if isinstance(error, NoSuchThread):
        kind = "no thread"
    elif isinstance(error, RemoteError):
        kind = "unreadable"
        name = error.type
        lines = str(error)
    elif not isinstance(error, ThreadDied) or error.reason is None:
        kind = "returned"
    else:
        remote_error: Any = error.__cause__
        name = remote_error.type
        lines = str(remote_error)
        # A reason that cannot be pickled, or is too large, is sent as its traceback alone.
        with suppress(BaseException):
            reason = serialize(error.reason)
        if len(reason) > MAX_REASON:
            reason = b""
    parts = [text[:MAX_ERROR_TEXT].encode("utf-8", "backslashreplace")
             for text in (str(error), name[:MAX_NAME], lines)]
    parts.append(reason)
    payload = FAILURE.pack(FAILURE_KINDS.index(kind), *map(len, parts)) + b"".join(parts)
    return _encode_header("failed", tag=tag, cause=cause), payload


class _RemoteFailure(_Failure):
    """A failure that another node has reported.  The waiter loads the reason."""

    def __init__(self, connection: "_Connection", payload: _Bytes) -> None:
        self._connection = connection
        self._traceback: RemoteError | None = None
        kind, *sizes = FAILURE.unpack_from(payload)
        if sizes[-1] > MAX_REASON:
            raise ValueError("a failure has too large a reason")
        *texts, reason = _split(bytes(payload[FAILURE.size:]), sizes)
        text, name, lines = [str(part, "utf-8", "replace") for part in texts]
        if name:
            self._traceback = RemoteError(_one_line(name, MAX_NAME), _clean_lines(lines))
        self._kind = FAILURE_KINDS[kind]
        self._text = _clean_lines(text)
        self._reason = reason

    def is_return(self) -> bool:
        return self._kind == "returned"

    def error(self) -> DistconcError:
        if self._kind == "no thread":
            address = _format_address(self._connection.address)
            return NoSuchThread(f"at {address}: {self._text}")
        if self._kind == "unreadable":
            return self._traceback or RemoteError("unknown", self._text)
        if self._kind == "returned":
            return ThreadDied(None, None, self._text)
        reason: BaseException | None = self._traceback
        if self._reason:
            with suppress(BaseException):
                loaded = _load(self._connection, self._reason)
                if isinstance(loaded, BaseException):
                    reason = loaded
        return ThreadDied(reason, self._traceback, self._text)


def _load(connection: "_Connection", payload: _Bytes | None) -> Any:
    """Return the object that came over a connection as `payload`.

    The user's code that runs meanwhile can make no call, for the call would wait for a thread
    that may wait for this one.  See `_PendingCall`.
    """
    outer = _local.loading_from
    try:
        _local.loading_from = connection
        return connection.load(payload)
    finally:
        _local.loading_from = outer


# Stands for a message that no thread gets.
_UNREADABLE: Any = object()


class _RemoteEntry(_Entry):
    """An entry from another node.  The thread that takes the entry loads its payload."""

    __slots__ = ("payload", "connection", "target")
    needs_loading = True

    def __init__(self, payload: _Bytes, connection: "_Connection",
                 target: int | str, cause: _Cause) -> None:
        self.payload: _Bytes | None = payload
        self.connection = connection
        self.target = target
        self.cause = cause

    def load(self) -> bool:
        if self.payload is not None:
            try:
                self.message = self._unwrap(_load(self.connection, self.payload))
            except (Exception, SystemExit) as error:
                self.message = _UNREADABLE
                self._tell_sender(error)
            self.payload = None
        return self.message is not _UNREADABLE

    def _unwrap(self, loaded: Any) -> Any:
        """Return the message that the receiver gets, once the payload has been loaded."""
        if loaded.__class__ is not Reply:
            return loaded
        # Replies have a kind of their own, so a peer made this one by hand.  It counts like any
        # other, since the peer knows the tag, and belongs to no mailbox.
        if isinstance(loaded.tag, str):
            _pending.resolve(loaded.tag, _Entry(loaded.data, self.cause))
        return _UNREADABLE

    def _tell_sender(self, error: BaseException) -> None:
        """Report that the message could not be loaded."""
        why = str(self.connection._delivery_error(error))
        self.connection._post_undelivered(self.target, 1, why, self.cause)


class _RemoteCallEntry(_RemoteEntry):
    """A call from another node.  Its message becomes a Synchronous."""

    __slots__ = ("caller", "tag")

    def __init__(self, payload: _Bytes, connection: "_Connection",
                 caller: "RemoteThread", tag: str, cause: _Cause) -> None:
        # A call is failed by its tag, so it needs no `target`.
        self.payload = payload
        self.connection = connection
        self.cause = cause
        self.caller = caller
        self.tag = tag

    def _unwrap(self, loaded: Any) -> Synchronous:
        return Synchronous(loaded, self.caller, self.tag)

    def _tell_sender(self, error: BaseException) -> None:
        _registry.remove_watcher(self.tag)
        self.connection._fail_call(self.tag, error, self.cause)


class _RemoteReply(_Entry):
    """A reply from another node.  The caller loads the payload."""

    __slots__ = ("payload", "connection")

    def __init__(self, payload: _Bytes, connection: "_Connection", cause: _Cause) -> None:
        self.payload = payload
        self.connection = connection
        self.cause = cause

    def load(self) -> bool:
        try:
            self.message = _load(self.connection, self.payload)
        except (Exception, SystemExit) as error:
            text = f"the reply cannot be read here: {_last_line(error)}"
            raise RemoteError(type(error).__name__, text) from None
        return True


######## Handshake: from a socket and a key to a connection


class _Handshake:
    """A connection in the making: with a node that we dial, or with a stranger that knocks.

    A thread of its own shakes hands, and goes on as the connection's reader.  The node's timer
    aborts a handshake that takes too long.  Threads that want to reach the node wait for the
    end.
    """

    def __init__(self, node: "Node", dialled: Address | None, key: bytes,
                 channel: Any = None) -> None:
        self.dialled = dialled
        # A stranger's host, and whether the stranger has answered our challenge.
        self.host = ""
        self.has_proved_key = False
        # The address in the peer's hello.
        self.peer_name = ""
        self.connection: _Connection | None = None
        self.error: Exception | None = None
        self._node = node
        self._key = key
        # A stranger's `multiprocessing.connection.Connection`.
        self._channel = channel
        self._socket: socket.socket | None = None
        self._is_over = False
        self.deadline = monotonic() + node._connect_timeout
        # Threads wait here for the connection.
        self._end = _WaitQueue()

    def start(self) -> None:
        _start_daemon("reader", self._run)

    def wait(self, deadline: float) -> bool:
        """Wait for the end of the handshake; return False at the deadline."""
        return self._end.wait_until(lambda: self._is_over, deadline)

    def abort(self, error: Exception) -> None:
        """End the handshake and its thread; wake all that wait for the end.  Never blocks."""
        if not self._is_over:
            self.error = error
            self._finish()
        if self._socket:
            _shut_down_socket(self._socket)

    def time_out(self) -> None:
        """Abort the handshake, which has taken too long.  Never blocks."""
        self.abort(NodeUnreachable(
            f"{_format_address(self.dialled)} did not answer within "
            f"{self._node._connect_timeout:g} seconds{_network_hint(self.dialled)}"))

    def _finish(self) -> None:
        self._is_over = True
        self._end.wake_all()

    def _run(self) -> None:
        """Shake hands, then run the connection's reader, all in the handshake's thread."""
        _local.must_not_wait = True
        try:
            connection = self._connect()
        except BaseException as error:
            self._fail(error)
            return
        self._node._handshake_ended(self)
        self.connection = connection
        self._finish()
        connection.read_loop()

    def _fail(self, error: BaseException) -> None:
        if self._socket:
            self._socket.close()
        if not self.dialled:
            self._node._count("strangers")
            _log_stranger(self.host, error)
        self.abort(_dial_error(self.dialled, error, self.peer_name))
        self._node._handshake_ended(self)

    def _connect(self) -> _Connection:
        """Dial, if this side dials; shake hands; return the established connection."""
        with self._channel or Client(self.dialled or "") as channel:
            sock = self._duplicate(channel)
            # Here `channel` writes, which knows nothing of NO_SIGPIPE.
            with _without_broken_pipe_signal():
                self._exchange_challenges(channel)
                mine, peer = self._exchange_hellos(channel, sock)
            connection = _Connection(self._node, sock, self._key, mine, peer, self.dialled)
        try:
            self._exchange_serials(connection)
            self._node._establish(connection)
        except BaseException:
            self._node._connection_closed(connection)
            connection._release()
            raise
        return connection

    def _duplicate(self, channel: Any) -> socket.socket:
        """Return a socket for the channel's connection, which other threads can shut down."""
        family = _address_family(self.dialled or self._node._listen_address)
        sock = socket.fromfd(channel.fileno(), family, socket.SOCK_STREAM)
        # The program may have set a default time-out, which would make `channel` fail, too.
        sock.settimeout(None)
        self._socket = sock
        _close_after_fork.add(sock)
        if self._is_over or self._node._stopped:
            raise NodeDown("nobody waits for it any more")
        if family == socket.AF_INET:
            # Otherwise a second small frame would wait for the peer's acknowledgement (Nagle).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not SHUTDOWN_WAKES:
            _limit_silence(sock, self._node._connect_timeout)
        if sys.platform == "darwin":
            sock.setsockopt(socket.SOL_SOCKET, SO_NOSIGPIPE, 1)
        return sock

    def _exchange_challenges(self, channel: Any) -> None:
        if self.dialled:
            answer_challenge(channel, self._key)
            deliver_challenge(channel, self._key)
        else:
            deliver_challenge(channel, self._key)
            self.has_proved_key = True
            answer_challenge(channel, self._key)

    def _exchange_hellos(self, channel: Any, sock: socket.socket) -> tuple[_Hello, _Hello]:
        """Send this side's hello; return both sides' hellos.

        The challenges alone are not enough: an attacker between two nodes can pass them on.
        But the keys of the seals come from both hellos, which name the roles and the address
        that was meant: an attacker that passes on or alters a hello cannot make a valid frame.
        """
        if self.dialled:
            reached = _format_address(sock.getpeername())
            mine = _Hello.make(
                "dialler", self._node, [_format_address(self.dialled), reached])
        else:
            mine = _Hello.make("acceptor", self._node, [])
        channel.send_bytes(mine.line)
        peer = _Hello.decode(channel.recv_bytes(MAX_HELLO))
        self.peer_name = _one_line(_format_address(peer.address))
        self._check(mine, peer, sock)
        return mine, peer

    def _check(self, mine: _Hello, peer: _Hello, sock: socket.socket) -> None:
        if {mine.role, peer.role} != {"dialler", "acceptor"}:
            raise AuthenticationError("our own words came back to us")
        if peer.role == "dialler":
            ours = [self._node.address, self._node._listen_address, sock.getsockname()]
            names = [_format_address(address) for address in ours]
            if not set(names) & set(peer.dialled):
                raise AuthenticationError(
                    f"{peer.dialled!r} was dialled, which is not this node; "
                    "behind NAT or a tunnel, start_node needs advertise=")
        if _faults.cut_off({peer.address}):
            raise NodeUnreachable("faults(drop=1) cuts it off")

    def _exchange_serials(self, connection: _Connection) -> None:
        """Wait until older connections to that node have ended, before this one speaks.

        Messages may still be on their way over a connection that the peer has lost.  They must
        come before all messages over this one:

            peer   serial 1  lost ......   serial 2  dials, and says: 2, oldest 2
            here   serial 7  being read    serial 8  waits until 7 is read to its end

        So each side numbers its connections, and tells the number of this one, and that of its
        oldest connection to the other side that is not closing.  Connections older than that
        are over for the peer; their end is on its way here, as the peer's "end" or as silence.
        This node waits for that end, and does nothing to hasten the end.  So a node that claims
        to be the peer of a living connection does not take its place.  But whoever has the key
        may say that it is that peer, and when its connection ends, the true peer's is ended,
        too: see `Node._connection_closed`.

        A stranger at an address that this node dials may claim to be any node.  The tick shows
        that the peer has the key, before the connection gets a number and counts as that
        node's oldest.
        """
        if self.dialled:
            connection.read_tick()
            connection.register_and_send_serials()
            self._node._wait_for_older(connection, connection.read_serials())
        else:
            connection.send_tick()
            self._node._wait_for_older(connection, connection.read_serials())
            connection.register_and_send_serials()


def _dial_error(address: Address | None, why: BaseException, own_name: str = "") -> Exception:
    """Return the error for the threads that dialled a node, with the cause and a likely remedy.

    `own_name` is the address in the node's hello, or '' if none came.
    """
    name = _format_address(address)
    if isinstance(why, AuthenticationError):
        return AuthenticationError(f"{name} and this node do not trust each other: {why}; "
                                   "do both have the same key?")
    if isinstance(why, (ConnectionRefusedError, FileNotFoundError)):
        text = f"no node listens at {name}; is that where it was started?"
        if not _is_loopback(address):
            text += " Other machines reach it only if start_node was told 0.0.0.0:PORT there"
        return NodeUnreachable(text)
    if isinstance(why, socket.gaierror):
        return NodeUnreachable(
            f"the name in {name} cannot be looked up here ({why.strerror}): say the number of "
            "that machine, such as 192.168.1.17; its own start_node says that by advertise=")
    if own_name and own_name != name and isinstance(why, (EOFError, OSError)):
        return NodeUnreachable(
            f"the node at {name} hung up; it calls itself {own_name}. If {name} leads to it "
            f"through NAT or a tunnel, its start_node needs advertise={name!r}")
    text = f"cannot connect to {name}: {str(why) or 'it hung up'}"
    if getattr(why, "errno", None) in NO_WAY_THERE:
        text += _network_hint(address)
    return NodeUnreachable(text)


NO_WAY_THERE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT)


def _network_hint(address: Address | None) -> str:
    """Return a hint for a machine that cannot be reached, or does not answer."""
    if not isinstance(address, tuple) or _is_loopback(address):
        return ""
    return (f"; is that machine on this network, and does its firewall let port {address[1]} "
            "in?")


######## Node: start_node, stop_node, local_node, nodes, connect, disconnect

# Handshakes of strangers at once.  For each further one, an older one is ended.
MAX_STRANGERS = 512
# The bounds of a heartbeat and of a connect_timeout, in seconds; of a max_message, in bytes.
MIN_HEARTBEAT = 0.01
MAX_SECONDS = 1e6
MAX_MAX_MESSAGE = 1 << 32

# Descriptors of this process that the child of a fork closes.
_close_after_fork: "weakref.WeakSet[Any]" = weakref.WeakSet()

# The numbers of this process's connections.
_serials = itertools.count(1)


class Node(AbstractContextManager["Node"]):
    """This process, as others address it.  `start_node` makes the node, or its first use does.

    A `with` block of a node stops the node at its end.  These are the node's threads:

    * the *accept thread*, from `start_node` to `stop_node`, which wakes the thread by dialling;
    * a *reader* for each dial and each stranger, which shakes hands first, and ends with the
      connection or with a handshake that fails;
    * a *timer*, while there are handshakes, which aborts those that outlast `connect_timeout`;
    * a *writer* for each connection, which starts when the connection is established, and
      which senders wake;
    * *requests*, for each connection over which another node asks for something.
    """

    def __init__(self) -> None:
        # The address that other nodes dial.
        self.address: Address | None = None
        self.incarnation = _own_incarnation
        self._listen_address: Address | None = None

        # Whether other machines can reach the listener.
        self._is_exposed = False
        self._is_started = False
        self._stopped = False
        self._accept_thread: threading.Thread | None = None
        self._listener: Listener | None = None

        # Guards the three tables below, and the counts.  Threads without the lock read copies.
        self._lock = _Lock()

        # All connections, from the peer's first MAC, when they get their serials, to their end.
        self._connections: set[_Connection] = set()

        # These two have their oldest members first.
        self._established: list[_Connection] = []
        self._handshakes: list[_Handshake] = []
        self._counts = Counter(
            sent=0, received=0, undelivered=0, refused=0, lost=0, strangers=0)

        self._timer_is_running = False

        # Woken when a connection has been established, or has gone; when a handshake has ended.
        self._connections_changed = _WaitQueue()
        self._handshakes_changed = _WaitQueue()
        self._set_options(None, None, 10.0, 5.0, 1 << 28)

    # Options

    def _set_options(self, authkey: Any, allow: Any, heartbeat: float, connect_timeout: float,
                     max_message: int) -> None:
        self._key = authkey
        self._allow: str | tuple[Any, ...] | None = allow
        self._heartbeat = float(heartbeat)
        self._connect_timeout = float(connect_timeout)
        self._max_message = max_message
        # The loader for plain data, and what it allows.  It is made when it is first needed,
        # because making it imports many modules.
        self._kept_loader: tuple[Any, Callable[[Any], Any]] | None = None

    def _start(self, address: NodeLike | None, authkey: Any, advertise: Any, allow: Any,
               heartbeat: float, connect_timeout: float, max_message: int) -> None:
        """Take the options of `start_node`, and listen; a bad one raises before any change."""
        _check_number("heartbeat= in seconds", heartbeat, MIN_HEARTBEAT, MAX_SECONDS)
        _check_number("connect_timeout= in seconds", connect_timeout,
                      MIN_HEARTBEAT, MAX_SECONDS)
        _check_number("max_message= in bytes", max_message, 1, MAX_MAX_MESSAGE - 1,
                      may_be_fraction=False)
        if authkey is not None:
            # Otherwise a node that does not listen would report a bad key only when dialling.
            authkey = _find_key(authkey, None)
        if allow is not None:
            allow = _check_allow(allow)
        if address is None:
            advertised = _advertised_address(None, advertise)
            self._set_options(authkey, allow, heartbeat, connect_timeout, max_message)
            self.address = advertised
            return
        wanted = _parse_address(address)
        key = _find_key(authkey, wanted)
        listener = _listen(wanted)
        try:
            bound = _parse_address(listener.address)
            advertised = _advertised_address(bound, advertise)
        except BaseException:
            listener.close()
            raise
        _close_after_fork.add(listener)
        self._set_options(key, allow, heartbeat, connect_timeout, max_message)
        self._listen_address = bound
        self._is_exposed = not _is_loopback(bound)
        self.address = advertised
        self._listener = listener
        self._accept_thread = _start_daemon("accept", self._accept_loop, listener)

    def load(self, data: Any) -> Any:
        """Unpickle data that this program gives to `deserialize`.

        The origin of the data is unknown.  If other machines can reach this node, the data is
        treated as theirs.
        """
        return self._loader_for(not self._is_exposed)(data)

    def _loader_for(self, is_local: bool, module: str = __name__) -> Callable[[Any], Any]:
        """Return the function that loads the messages of a node, on this machine or another.

        `module` is the name that this file has on that node.
        """
        allowed = self._allowed_from(is_local)
        if allowed == "anything" or module != __name__:
            return _make_loader(allowed, module)
        kept = self._kept_loader
        if kept is None or kept[0] is not allowed:
            kept = (allowed, _make_loader(allowed))
            self._kept_loader = kept
        return kept[1]

    def _allowed_from(self, is_local: bool) -> "str | tuple[Any, ...]":
        """Return what messages may name that come from this machine, or from another."""
        if self._allow is not None:
            return self._allow
        if is_local:
            return "anything"
        return ()

    def _may_call(self, function: Any, is_local: bool) -> bool:
        """Return whether another node may have this node call `function`, by `spawn`."""
        allowed = self._allowed_from(is_local)
        return allowed == "anything" or function in allowed

    # Counts and names

    def stats(self) -> dict[str, int]:
        """Return counts of messages, exact at any time.  Never blocks.

        `sent` and `received` count messages over connections.  `undelivered` counts messages to
        this node that had no living receiver or could not be read, and `refused` those that
        `allow` kept out.  `lost` counts messages from this node that reached no receiver, as
        this node or another reports.  A message within this process can be `undelivered` and
        `lost`, too.  `strangers` counts handshakes that failed to get in.
        """
        with self._lock:
            counts = self._counts.copy()
            for connection in self._connections:
                counts.update(sent=connection.sent, received=connection.received)
            return dict(counts)

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def __str__(self) -> str:
        return _format_address(self.address)

    def __repr__(self) -> str:
        stopped = ""
        if self._stopped:
            stopped = ", stopped"
        return f"<Node {str(self) or 'that does not listen'}{stopped}>"

    def _has_address(self, address: Address | None) -> bool:
        return address is not None and address in (self.address, self._listen_address)

    def _find(self, incarnation: int | None, id: int | str) -> Thread:
        """Return the receiver of a message from another node; raise NoSuchThread."""
        # Whatever was sent to a stopped node was sent to an earlier run of it.
        if incarnation not in (None, self.incarnation) or self._stopped:
            raise NoSuchThread(f"{id!r:.300} was a thread of an earlier run of this node")
        if isinstance(id, int):
            thread = _registry.by_id.get(id)
        else:
            thread = _registry.by_name.get(id)
        if thread is None:
            raise _no_such_thread(id)
        return thread

    # Connections

    def _post(self, incarnation: int, header: bytes, payload: bytes = b"") -> bool:
        """Send if a connection to that node is there; return False if not.  Never blocks."""
        connection = self._established_with(incarnation, None)
        return connection is not None and connection.post(header, payload)

    def _established_with(self, incarnation: int | None,
                          address: Address | None) -> _Connection | None:
        """Return the oldest connection to the node of that incarnation, or at that address.

        Two nodes that dial each other at once have two connections.  All messages go over the
        older one, and so keep their order.
        """
        established = self._established.copy()
        for connection in established:
            if connection.peer.incarnation == incarnation:
                return connection
        if address is not None:
            for connection in established:
                if address in connection.addresses:
                    return self._established_with(connection.peer.incarnation, None)
        return None

    def _connection_to(self, address: Address | None, incarnation: int | None) -> _Connection:
        """Return the connection to a node; without one, dial, once for all threads that wait.

        Raises NodeUnreachable, NodeDown, AuthenticationError after `connect_timeout` at most.
        """
        connection = self._established_with(incarnation, address)
        if connection is not None and not connection.closing:
            return connection
        deadline = monotonic() + self._connect_timeout
        if _must_not_wait():
            # Such a thread does not wait for a closing connection, nor does it dial below.
            deadline = monotonic()

        def is_settled() -> bool:
            last = self._established_with(incarnation, address)
            return last is None or not last.closing

        # Between these steps a connection may come, or go; then they begin again.
        while True:
            if not self._connections_changed.wait_until(is_settled, deadline):
                raise NodeUnreachable(
                    f"the last connection to {_format_address(address)} does not end")
            key = None
            if self._established_with(incarnation, address) is None:
                # No lock is held, as this may wait for a file.
                key = self._find_key_to_dial(address)
            with self._lock:
                connection = self._established_with(incarnation, address)
                if connection is None and key is not None:
                    dial = self._dial(address, key)
                    break
                if connection is not None and not connection.closing:
                    return connection
        if not dial.wait(deadline):
            raise NodeUnreachable(
                f"{_format_address(address)} did not answer in time{_network_hint(address)}")
        if dial.error is not None:
            raise dial.error
        connection = dial.connection
        assert connection is not None
        # The peer may have dialled this node meanwhile, and that connection may be the older.
        return self._established_with(connection.peer.incarnation, None) or connection

    def _find_key_to_dial(self, address: Address | None) -> bytes:
        """Return the key for that node; raise an error if this thread cannot dial it now."""
        if self._stopped:
            raise NodeDown("this node was stopped; start_node starts it again")
        if address is None:
            raise NodeUnreachable(
                "that node does not listen, so nobody can dial it, and it has no connection "
                "with this node now; start_node() there lets others dial it")
        if _faults.cut_off({address}):
            raise NodeUnreachable(f"faults(drop=1) cuts {_format_address(address)} off")
        if _must_not_wait():
            raise NodeUnreachable(
                "a __del__ that runs in a thread of this module, or within a call of it, "
                f"cannot dial {_format_address(address)}; connect to it first")
        return _find_key(self._key, address)

    def _dial(self, address: Address | None, key: bytes) -> _Handshake:
        """Return the handshake that is under way with that node, or start one."""
        for handshake in self._handshakes:
            if handshake.dialled == address and handshake.error is None:
                return handshake
        handshake = _Handshake(self, address, key)
        self._begin(handshake)
        return handshake

    def _begin(self, handshake: _Handshake) -> None:
        with self._lock:
            if not self._timer_is_running:
                _start_daemon("timer", self._time_handshakes)
                self._timer_is_running = True
            handshake.start()
            self._handshakes.append(handshake)

    def _handshake_ended(self, handshake: _Handshake) -> None:
        with self._lock, suppress(ValueError):
            self._handshakes.remove(handshake)
        self._handshakes_changed.wake_all()

    def _time_handshakes(self) -> None:
        """Be the timer: time out the oldest handshake, until there are none."""
        _local.must_not_wait = True
        while True:
            with self._lock:
                if not self._handshakes:
                    self._timer_is_running = False
                    return
                oldest = self._handshakes[0]
            has_ended = partial(self._has_ended, oldest)
            if not self._handshakes_changed.wait_until(has_ended, oldest.deadline):
                oldest.time_out()
                # Its own thread may need a while to notice, and others are due meanwhile.
                self._handshake_ended(oldest)

    def _has_ended(self, handshake: _Handshake) -> bool:
        return handshake not in self._handshakes

    def _add_connection(self, connection: _Connection) -> int:
        """Number a new connection; return the number of the oldest one to the same node.

        One that is closing does not count: the peer shall wait for its end.
        """
        with self._lock:
            connection.serial = next(_serials)
            self._connections.add(connection)
            same_peer = [other.serial for other in self._connections
                         if other.peer == connection.peer and not other.closing]
            return min(same_peer)

    def _wait_for_older(self, connection: _Connection, oldest: int) -> None:
        """Wait for the end of all connections that the peer has lost, or this node ends.

        A node that dials itself has both ends of that connection, and waits for neither.
        """
        def is_alone() -> bool:
            with self._lock:
                return not any(
                    other.closing or 0 < other.peer_serial < oldest
                    for other in self._connections
                    if other is not connection and other.peer == connection.peer
                    and other.peer.incarnation != self.incarnation)

        deadline = monotonic() + self._connect_timeout
        if not self._connections_changed.wait_until(is_alone, deadline):
            raise NodeUnreachable("the connection before this one does not end")

    def _establish(self, connection: _Connection) -> None:
        """Let senders use the connection."""
        with self._lock:
            if self._stopped:
                raise NodeDown("this node was stopped")
            connection.start()
            self._established.append(connection)
        self._connections_changed.wake_all()

    def _connection_closed(self, connection: _Connection) -> None:
        """Forget a connection that has ended; report that contact with its node is lost.

        When an established connection ends, all others to that node end with it, for contact
        with a node is lost as a whole.  The last of them reports the loss.
        """
        with self._lock:
            if connection.is_over or connection not in self._connections:
                return
            connection.is_over = True
            same_peer = [other for other in self._connections
                         if other.peer == connection.peer and not other.is_over]
            if connection in self._established:
                self._established.remove(connection)
                for other in same_peer:
                    other.abort()
        # With a connection whose peer has not told its serials, there is no contact yet.
        is_last = connection.peer_serial and not any(c.peer_serial for c in same_peer)
        if is_last:
            # The peer's next connection waits until this one is out of the table; until then no
            # new watchers and no new calls can come.
            waiting = _pending.watching(connection.peer)
            _registry.remove_watchers_of(connection.peer)
        with self._lock:
            self._connections.remove(connection)
            self._counts.update(sent=connection.sent, received=connection.received)
        self._connections_changed.wake_all()
        if is_last:
            # A waiter that reacts to this may dial at once.
            self._contact_lost(connection, waiting)

    def _contact_lost(self, connection: _Connection, waiting: list[_Pending]) -> None:
        """Fail all pendings that watched that node."""
        text = f"contact with {connection.name} was lost"
        event = None
        if not self._stopped:
            event = _observer.record(None, "down", why=text)
        for pending in waiting:
            _pending.fail(pending.tag, _Failure(NodeDown(text)), event)
        if connection.broken_by and not waiting and not self._stopped:
            # No thread learns of this loss, and messages may have been lost.
            _log("INFO", "%s: %s; what was sent last may be lost", text, connection.broken_by)

    # Letting others in

    def _accept_loop(self, listener: Listener) -> None:
        """Be the accept thread: for each stranger, start a thread that shakes hands."""
        _local.must_not_wait = True
        while not self._stopped:
            try:
                channel = listener.accept()
                if self._stopped:
                    # This connection is the one by which `stop` wakes this thread.
                    channel.close()
                    break
                self._let_in(channel, listener)
            except (OSError, EOFError, RuntimeError, AuthenticationError) as error:
                # This process has no more descriptors or threads, or the stranger has gone.
                _log("INFO", "nobody can be let in just now: %s", error)
                self._drop_strangers(0)
                sleep(0.05)
        listener.close()

    def _let_in(self, channel: Any, listener: Listener) -> None:
        handshake = _Handshake(self, None, self._key, channel)
        last_accepted = listener.last_accepted
        if isinstance(last_accepted, tuple):
            handshake.host = last_accepted[0]
        self._begin(handshake)
        self._drop_strangers(MAX_STRANGERS)

    def _drop_strangers(self, limit: int) -> None:
        """End one of more than `limit` strangers: the oldest from the busiest host.

        Strangers that have proved the key are spared.
        """
        with self._lock:
            knocking = [h for h in self._handshakes
                        if not h.dialled and h.error is None and not h.has_proved_key]
        if len(knocking) > limit:
            [(busiest, _)] = Counter(h.host for h in knocking).most_common(1)
            oldest = next(h for h in knocking if h.host == busiest)
            oldest.abort(NodeDown("too many knock"))

    # The end

    def stop(self, timeout: float = 5.0) -> None:
        """Stop the node; see `stop_node`."""
        deadline = _bounded_deadline(timeout)
        if self.incarnation != _own_incarnation:
            # This process is the child of a fork, and the node is its parent's.
            return
        with self._lock:
            is_first = not self._stopped
            self._stopped = True
            handshakes = self._handshakes.copy()
        for handshake in handshakes:
            handshake.abort(NodeDown("this node was stopped"))
        if is_first:
            _registry.forget_names()
        self._end_accept_thread(deadline)
        with self._lock:
            connections = self._connections.copy()
        self._end_connections(connections, deadline)
        for log in (_losses, _wrong_keys, _noise):
            log.flush()

    def _end_accept_thread(self, deadline: float) -> None:
        """Wake the accept thread by dialling, which works on every system; join the thread."""
        accept_thread = self._accept_thread
        at = self._listen_address
        if at is None or accept_thread is None or not accept_thread.is_alive():
            return
        if at[0] == "0.0.0.0":
            at = ("127.0.0.1", int(at[1]))
        with suppress(OSError), socket.socket(_address_family(at)) as knock:
            knock.settimeout(max(_remaining(deadline), 0.01))
            knock.connect(at)
        accept_thread.join(_remaining(deadline))

    def _end_connections(self, connections: Iterable[_Connection], deadline: float) -> None:
        """Close connections; abort those that have not ended shortly before the deadline."""
        ending = set(connections)

        def have_ended() -> bool:
            with self._lock:
                return self._connections.isdisjoint(ending)

        for connection in ending:
            connection.close()
        patience = monotonic() + 0.9 * _remaining(deadline)
        if self._connections_changed.wait_until(have_ended, patience):
            return
        for connection in ending:
            connection.abort()
        if not self._connections_changed.wait_until(have_ended, deadline):
            for connection in ending:
                self._connection_closed(connection)

    def __exit__(self, *_: Any) -> None:
        self.stop()


def _check_number(option: str, value: Any, lowest: float, highest: float,
                  may_be_fraction: bool = True) -> None:
    """Raise TypeError or ValueError for an option that is no number from lowest to highest."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole and not may_be_fraction:
        raise TypeError(f"{option} is a whole number, not {value!r:.100}")
    if not is_whole and not isinstance(value, float):
        raise TypeError(f"{option} is a number, not {value!r:.100}")
    # This refuses nan, too.
    if not lowest <= value <= highest:
        raise ValueError(f"{option} is from {lowest} to {highest}, not {value!r:.100}")


def _is_same_host(sock: socket.socket) -> bool:
    """Return whether the other end of a connection is on this machine."""
    if sock.family != socket.AF_INET:
        return True
    here: str = sock.getsockname()[0]
    there: str = sock.getpeername()[0]
    return here == there or there.startswith("127.")


def _listen(address: Address | None) -> Listener:
    """Return a Listener with a backlog for a whole classroom that connects at once."""
    if isinstance(address, str) and not hasattr(socket, "AF_UNIX"):
        raise ValueError(f"cannot listen at {address}: Python has no Unix sockets on this "
                         "system; say 9000, or 'host:9000'")
    try:
        return Listener(address, backlog=128)
    except OSError as error:
        if isinstance(address, str) and _is_abandoned(address):
            os.unlink(address)
            return Listener(address, backlog=128)
        cure = "does a node run there? Choose another address, or 0 for a free port"
        if error.errno == errno.EADDRNOTAVAIL:
            cure = ("this machine does not have that address. Say 0.0.0.0:PORT to listen at "
                    "all that it has; behind NAT, name the outer one by advertise=")
        elif isinstance(error, socket.gaierror):
            cure = "say a number, such as 0.0.0.0:PORT, for all addresses of this machine"
        text = f"cannot listen at {_format_address(address)}: {error.strerror or error}; {cure}"
        raise OSError(error.errno, text) from None


def _is_abandoned(path: str) -> bool:
    """Return whether `path` is a Unix socket that a killed node has left behind.

    Files of other kinds refuse a connection, too, but are not this module's to remove.
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX) as knock:
            knock.settimeout(1.0)
            knock.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


class _Process:
    """The process as a whole, with its node."""

    def __init__(self) -> None:
        # Guards `node`.  Held while a node begins to listen, so that a process has one at most.
        self.lock = _Lock()
        self.node: Node | None = None


_process = _Process()


def start_node(address: NodeLike | None = 0, *, authkey: bytes | str | None = None,
               advertise: NodeLike | None = None, allow: Any = None, heartbeat: float = 10.0,
               connect_timeout: float = 5.0, max_message: int = 1 << 28) -> Node:
    """Listen at `address`; return this process's node.  Blocks until the node listens.

    Port 0 is any free one, and a node with the address None does not listen.  `authkey`: the
    default is the environment's DISTCONC_AUTHKEY, or the cookie file's; processes that
    multiprocessing starts inherit a key that is given.  `advertise`: the address that others
    dial, if not `address`.  `allow`: the classes and functions that messages may name besides
    plain data; "anything"; None, the default: anything from nodes on this machine, plain data
    from others.  `heartbeat`: the seconds within which the loss of a node is noticed; C code
    that holds the interpreter for longer makes others take this node for lost.
    `connect_timeout`: seconds to dial and shake hands.  `max_message`: bytes.

    Raises RuntimeError if started already, ValueError, TypeError, PermissionError for a bad
    argument or key, OSError if the node cannot listen there.  Then nothing has started.
    Factor: start-node.  Erlang: net_kernel:start.
    """
    with _process.lock:
        node = local_node()
        if node._stopped:
            node = Node()
        if node._is_started:
            raise RuntimeError(f"{node!r} runs in this process already; stop_node() first")
        node._start(address, authkey, advertise, allow, heartbeat, connect_timeout, max_message)
        node._is_started = True
        _process.node = node
        _pass_on_key(authkey)
        return node


def stop_node(timeout: float = 5.0) -> None:
    """Send the queued messages, close everything, forget the names, release the address.

    Blocks until that is done, at most `timeout` seconds.  Any thread may call this function, at
    any time, and again; the end of the process calls it, too.  Afterwards a remote `send`
    raises NodeDown, until `start_node`.  Factor: stop-node.
    """
    if _process.node:
        _process.node.stop(timeout)
    else:
        _bounded_deadline(timeout)


def _at_exit() -> None:
    stop_node()
    for thread in threads().values():
        thread._print_unread_failures()


atexit.register(_at_exit)


def local_node() -> Node:
    """Return this process's node.  Never blocks.  Factor: local-node.  Erlang: node().

    Without `start_node` the node does not listen: it can send, and be answered over the
    connections that it opened.
    """
    if _process.node is None:
        with _process.lock:
            node = Node()
            # A `__del__` that has run meanwhile may have needed a node, too.
            _process.node = _process.node or node
    return _process.node


def nodes() -> list[Address]:
    """Return the addresses of all connected nodes that listen.  Never blocks.

    Erlang: nodes(), without the hidden ones.
    """
    addresses = set()
    for connection in local_node()._established.copy():
        if connection.address and not connection.closing:
            addresses.add(connection.address)
    return sorted(addresses, key=_format_address)


def connect(node: NodeLike) -> None:
    """Connect to `node` now, so that errors show here.  Never needed.  Factor: connect.

    Blocks at most `connect_timeout` seconds.  Raises NodeDown (once this node was stopped; else
    NodeUnreachable), AuthenticationError, ValueError, PermissionError.
    """
    if not _is_this_node(node):
        local_node()._connection_to(_parse_address(node), None)


def _is_this_node(node: NodeLike) -> bool:
    """Return whether `node` denotes this process's node, which need not listen."""
    here = local_node()
    return node is here or here._has_address(_parse_address(node))


def disconnect(node: NodeLike) -> None:
    """Send the messages queued for `node` and close the connection, if there is one.

    Blocks until that is done, at most `connect_timeout` seconds.  On both nodes, all calls,
    joins, links and monitors to the other fail with NodeDown.  The next `send` connects anew.
    Factor: disconnect.  Erlang: disconnect_node.
    """
    here = local_node()
    connection = here._established_with(None, _parse_address(node))
    if connection:
        here._end_connections([connection], monotonic() + here._connect_timeout)


######## Remote handles and names: RemoteThread, register_, unregister_, get_remote_thread


class RemoteThread(_Handle):
    """A handle of a thread on some node, by id or registered name.  Factor: remote-thread.

    `.node` is the node's address, `.id` the id or name.  Handles are immutable.  A handle that
    a `Thread` was pickled into equals that thread, on any node; a later run of its node refuses
    the handle.  A handle made by hand equals one made by hand of the same node and id.  A
    handle that comes home stays a RemoteThread, and messages to that handle go straight into
    its thread's mailbox, uncopied.
    """

    __slots__ = ("_node", "_id", "_incarnation", "_send_header", "_connection",
                 "_named_by")

    def __init__(self, node: NodeLike | None, id: int | str,
                 incarnation: int | None = None) -> None:
        _check_id(id)
        self._node: Address | None = None
        if node is not None:
            self._node = _parse_address_cached(node)
        if self._node is None and incarnation is None:
            # The node does not listen, so cannot be dialled, but may be this one.
            incarnation = getattr(node, "incarnation", None)
            if incarnation is None:
                raise ValueError(f"not a node: {node!r}")
        if incarnation is not None:
            _check_incarnation(incarnation)
        # An int or a str of a subclass, such as an Enum, may compare in a way of its own.
        self._id: int | str = int(id) if isinstance(id, int) else str.__str__(id)
        self._incarnation = incarnation
        self._identity = (incarnation or self._node, self._id)
        self._send_header = _encode_header("send", incarnation, self._id)

        # The connection over which a message to this thread was sent last.
        self._connection: _Connection | None = None

        # The connection over which this handle came; None if this process has made the handle.
        self._named_by: _Connection | None = _local.loading_from

    @property
    def node(self) -> Address | None:
        """The address of the thread's node; None if that node does not listen."""
        return self._node

    @property
    def id(self) -> int | str:
        """The thread's id, or its registered name."""
        return self._id

    def is_alive(self) -> bool:
        """Return whether the thread lives.  Blocks for one round trip; raises as `send` does.

        Raises NodeDown if the node cannot be reached, for then the answer is not known.
        """
        if self._is_local():
            with suppress(NoSuchThread):
                return get_remote_thread(self._id).is_alive()
            return False
        return bool(_call_node(self, ("is alive", self._incarnation, self._id)))

    def join(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds for the thread's end; return whether it has ended.

        Raises NodeDown if contact with the thread's node is lost, or cannot be made.
        """
        if self._is_local():
            with suppress(NoSuchThread):
                return get_remote_thread(self._id).join(timeout)
            return True
        deadline = _deadline(timeout)
        end = _Request(current_thread())
        try:
            self._watch(end)
            if not end.wait(deadline):
                return False
            end.result()
        except (ThreadDied, NoSuchThread):
            pass
        finally:
            end.cancel()
        return True

    def send(self, message: Any) -> None:
        """Send `message`, to another node as a copy; see `send`."""
        connection = self._connection
        if connection is None or connection.closing or message.__class__ is Reply:
            self._send(message)
            return
        if _faults.are_active or _observer.is_recording or _local.is_logging:
            self._send(message)
            return
        # The rest is `_send` in its most frequent case, without the steps for other cases: so a
        # flood is half as fast again.
        try:
            payload = pickle.dumps(message, 5)
        except Exception:
            payload = serialize(message)
        if len(payload) > connection.max_outgoing:
            raise _too_large(payload, connection.max_outgoing)
        if not connection.send(self._send_header, payload):
            self._send(message)

    def _send(self, message: Any) -> None:
        cause = None
        if _observer.is_recording:
            cause = _observer.record_send(message, self)
        if message.__class__ is Reply:
            self._reply(message.data, str(message.tag), cause)
        elif self._is_local():
            try:
                thread = get_remote_thread(self._id)
            except NoSuchThread as error:
                _observer.message_lost(self, error, cause)
            else:
                thread._mailbox._put(_Entry(message, cause))
        else:
            header = self._send_header
            if cause is not None:
                header = _encode_header("send", self._incarnation, self._id, cause=cause)
            self._send_copy(header, message, cause)

    def _reply(self, data: Any, tag: str, cause: _Cause) -> None:
        """Answer a call that this thread has made.

        Raises SerializationError, or NodeDown if the caller cannot be reached, for any reason.
        A reply that is too large for the caller's node fails the call.
        """
        if self._is_local():
            _pending.resolve(tag, _Entry(data, cause))
            return
        try:
            payload = serialize(data)
            connection = self._connection_for_reply()
            if len(payload) > connection.max_outgoing:
                _check_own_limit(payload)
            if not _send_over(connection, *connection.encode_reply(tag, payload, cause)):
                raise NodeDown(f"the connection to {connection.name} ended before it took it")
        except Exception as error:
            _record_lost(error, cause)
            raise
        # The call is over, so the caller need not hear of the called thread's end any more: see
        # `_Connection._find_and_watch`.
        _registry.remove_watcher(tag)

    def _connection_for_reply(self) -> _Connection:
        """Return a connection over which a reply comes to this thread.

        If the handle came from another node, its address is not dialled.  The address may be
        made up, and while a server waits for a dial, honest callers would wait for the server.
        The node that passed the request on can pass on the reply: see
        `_Connection._pass_reply_on`.
        """
        if self._connection is None or self._connection.closing:
            self._connection = local_node()._established_with(self._incarnation, self._node)
        connection = self._connection or self._named_by
        if connection is None:
            return self._dial_for_reply()
        if connection.closing:
            raise NodeUnreachable(f"this node is not connected to {connection.name} any more")
        return connection

    def _dial_for_reply(self) -> _Connection:
        try:
            return local_node()._connection_to(self._node, self._incarnation)
        except (ValueError, PermissionError) as error:
            # The caller's address needs another key than this node has.
            raise NodeUnreachable(str(error)) from error

    def _call(self, call: _PendingCall, message: Any, cause: _Cause) -> None:
        if self._is_local():
            get_remote_thread(self._id)._call(call, message, cause)
            return
        header = _encode_header(
            "call", self._incarnation, self._id, call.waiter.id, call.tag, cause)
        self._send_copy(header, message, cause, call)

    def _watch(self, pending: _Pending) -> bool:
        """Have the thread's end reported to `pending`."""
        if self._is_local():
            return get_remote_thread(self._id)._watch(pending)
        header = _encode_header("monitor", self._incarnation, self._id, tag=pending.tag)
        self._transmit(header, b"", pending)
        return True

    def _send_copy(self, header: bytes, message: Any, cause: _Cause,
                   *pendings: _Pending) -> None:
        """Send a copy of `message`; record the message as lost if that fails."""
        try:
            self._transmit(header, serialize(message), *pendings)
        except Exception as error:
            _record_lost(error, cause)
            raise

    def _transmit(self, header: bytes, payload: bytes, *pendings: _Pending) -> None:
        """Send over the last connection, or, if that one closes, over a new one.

        From now on, if contact with the node is lost, the pendings fail.
        """
        for _ in range(2):
            connection = self._connection
            if connection is None or connection.closing:
                _check_own_limit(payload)
                connection = local_node()._connection_to(self._node, self._incarnation)
                self._connection = connection
            for pending in pendings:
                # This precedes the sending, as contact may be lost at once.
                pending.watched = connection.peer
            if len(payload) > connection.max_outgoing:
                raise _too_large(payload, connection.max_outgoing)
            if _local.is_logging:
                _losses.mute(f"{self._id!r} at {connection.name}")
            if _send_over(connection, header, payload):
                return
        raise NodeDown(
            f"two connections to {_format_address(self._node)} ended before they took it")

    def _is_local(self) -> bool:
        """Return whether the thread is on this node."""
        connection = self._connection
        if connection is not None and not connection.closing:
            # In the most frequent case, a connection has led to the thread before.
            return False
        if self._incarnation is not None:
            return self._incarnation == _own_incarnation
        return local_node()._has_address(self._node)

    def __repr__(self) -> str:
        return f"RemoteThread({_format_address(self._node) or None!r}, {self._id!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteThread, (self._node, self._id, self._incarnation)


MAX_ID = (1 << 64) - 1


def _check_incarnation(incarnation: object) -> None:
    """Raise TypeError or ValueError if `incarnation` is not that of a process."""
    if type(incarnation) is not int:
        raise TypeError(f"an incarnation is an int, not {incarnation!r:.100}")
    if not 0 < incarnation <= MAX_ID:
        raise ValueError(f"incarnations are from 1 to {MAX_ID}, not {incarnation!r:.100}")


def _check_id(id: object) -> None:
    """Raise TypeError or ValueError if `id` is neither a thread's id nor a name."""
    if isinstance(id, str):
        _check_name(id)
    elif not isinstance(id, int) or isinstance(id, bool):
        raise TypeError(f"a thread is found by its id or its name, not by {id!r:.100}")
    elif not 0 < id <= MAX_ID:
        raise ValueError(f"the ids of threads are from 1 to {MAX_ID}, not {id!r:.100}")


def _send_over(connection: _Connection, header: bytes, payload: bytes) -> bool:
    """Send over `connection`; return False if it closes without taking the message."""
    if _faults.are_active:
        return _faults.send(connection, header, payload)
    return connection.send(header, payload)


def _record_lost(error: Exception, cause: _Cause) -> None:
    """Record the loss of the message that the calling thread sent as the event `cause`."""
    _observer.record(current_thread(), "lost", cause, why=_last_line(error))


def _check_own_limit(payload: bytes) -> None:
    """Raise SerializationError if no message of this node may be so large."""
    limit = local_node()._max_message
    if len(payload) > limit:
        raise _too_large(payload, limit)


def _too_large(payload: bytes, limit: int) -> SerializationError:
    return SerializationError(f"{len(payload)} bytes are more than max_message, {limit}")


def register_remote_thread(thread: Thread, name: str | None = None) -> None:
    """Let other nodes reach `thread` by `name`, by default its own.  Never blocks.

    Takes the name from any earlier owner; the thread's end frees the name.  A thread may have
    several names.  Raises TypeError unless `thread` is of this node, NoSuchThread if the thread
    has ended.  Factor: register-remote-thread.  Erlang: register.
    """
    if not isinstance(thread, Thread) or thread._remote:
        raise TypeError(f"only a thread of this node can get a name: not {thread!r:.100}")
    if name is None:
        name = thread.name
    _check_name(name)
    # A str of a subclass, such as an Enum, may be hashed in a way of its own.
    _registry.register(str.__str__(name), thread)


def unregister_remote_thread(name: str) -> None:
    """Forget a registered name.  Never blocks.  Raises NoSuchThread.

    Factor: unregister-remote-thread.  Erlang: unregister.
    """
    if not isinstance(name, str):
        raise TypeError(f"a registered name is a text, not {name!r:.100}")
    if not _registry.unregister(name):
        raise _no_such_thread(name)


def get_remote_thread(name_or_id: int | str) -> Thread:
    """Return the thread of this node by its registered name or its id.  Never blocks.

    Raises NoSuchThread.  Factor: get-remote-thread.  Erlang: whereis.
    """
    if isinstance(name_or_id, str):
        thread = _registry.by_name.get(name_or_id)
    elif isinstance(name_or_id, int) and not isinstance(name_or_id, bool):
        thread = _registry.by_id.get(name_or_id)
    else:
        raise TypeError(f"a thread is found by its id or its name, not by {name_or_id!r:.100}")
    if thread is None:
        raise _no_such_thread(name_or_id)
    return thread


class _NearNames:
    """Finds the registered names that are near to a wrong one.

    To compare names takes long, and a peer can ask for many wrong ones.  So after a second's
    work no more is done than a hundredth of the time, and otherwise nothing is found.
    """

    def __init__(self) -> None:
        # Seconds of work beyond a hundredth of the time, and when that was reckoned.  There is
        # no lock, since an error would do no harm.
        self._excess = 0.0
        self._last_time = monotonic()

    def find(self, wanted: str) -> list[str]:
        """Return similar names; without any, a few others."""
        from difflib import get_close_matches

        now = monotonic()
        self._excess = max(self._excess - (now - self._last_time) / 100, 0)
        self._last_time = now
        if self._excess > 1:
            return []
        start = thread_time()
        names = sorted(_registry.by_name.copy())
        near = get_close_matches(wanted, names, cutoff=0.5)
        self._excess += thread_time() - start
        return near or names[:5]


_near_names = _NearNames()


def _no_such_thread(name_or_id: int | str) -> NoSuchThread:
    """Return the error, which suggests registered names: similar ones, or any."""
    if not isinstance(name_or_id, str):
        return NoSuchThread(f"no living thread has the id {name_or_id!r:.{MAX_NAME}}")
    # No registered name is so long, so what is cut off could not have made one match.
    wanted = name_or_id[:MAX_NAME + 1]
    near = _near_names.find(wanted)
    hint = ""
    if near:
        hint = f"; did you mean {' or '.join(map(repr, near))}?"
    return NoSuchThread(f"no thread is registered as {wanted!r}{hint}")


def _spawn_at(node: NodeLike, request: _SpawnRequest, link: _PendingLink | None,
              event: _Cause) -> Handle:
    """Start a thread on `node`, which may be this node."""
    if _is_this_node(node):
        return _spawn_here(request, link, event)
    tag = None
    if link:
        tag = link.tag
    remote_child = _call_node(node, ("spawn", *request, tag), cause=event, link=link)
    if not isinstance(remote_child, RemoteThread):
        raise RemoteError("TypeError", f"{node} answered with no thread")
    return remote_child


def _watch_node(pending: _Pending, node: Any) -> None:
    """Have `pending` fail when contact with `node` is lost; never, if that is this node."""
    if not _is_this_node(node):
        connection = local_node()._connection_to(_parse_address(node), None)
        pending.watched = connection.peer
        if local_node()._established_with(connection.peer.incarnation, None) is None:
            _pending.fail(pending.tag, _Failure(NodeDown("contact was lost at once")))


######## Requests: services of one node to another


class _Request(_PendingCall):
    """A thread's wait for the answer to a request.  Traces do not show these."""

    def _record(self, outcome: Any, cause: _Cause) -> None:
        pass


def _call_node(target: Any, request: tuple[Any, ...], timeout: float | None = None,
               cause: _Cause = None, link: _PendingLink | None = None) -> Any:
    """Have a node, or the node of a thread, do something; return or raise its answer.

    From then on `link` watches the node.
    """
    if not isinstance(target, RemoteThread):
        # The handle holds the address alone, and its id is of no use.
        target = RemoteThread(target, "node")
    call = _Request(current_thread())
    try:
        pendings: list[_Pending] = [call]
        if link is not None:
            pendings.append(link)
        header = _encode_header("request", tag=call.tag, cause=cause)
        target._transmit(header, serialize(request), *pendings)
        if not call.wait(_deadline(timeout)):
            raise TimeoutError(f"the node did not answer within {timeout} seconds")
        answer = call.result()
    finally:
        call.cancel()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve_requests(connection: _Connection, requests: Mailbox) -> None:
    """Be the thread that serves the peer's requests, until the end of the connection."""
    _local.loading_from = connection
    while True:
        request = requests.get()
        if request is None:
            return
        tag, cause, payload = request
        try:
            wanted = _load(connection, payload)
        except (Exception, SystemExit) as error:
            connection._fail_call(tag, error, cause)
            continue
        try:
            answer = serialize(_do_request(connection, wanted, cause))
        except _NotAllowed as error:
            answer = serialize(connection._delivery_error(error))
        except (Exception, SystemExit) as error:
            answer = _pickled_error(error)
        with suppress(NodeDown):
            # A peer that does not read holds up its own requests, and no memory.
            connection.send(*connection.encode_reply(tag, answer, None))


def _pickled_error(error: BaseException) -> bytes:
    """Return `error`, pickled, for the peer to raise; a RemoteError if that fails."""
    try:
        return serialize(error)
    except SerializationError:
        return serialize(RemoteError(type(error).__name__, _last_line(error)))


def _do_request(connection: _Connection, request: Any, cause: _Cause) -> Any:
    """Serve one request of the peer's.  Erlang: net_kernel."""
    match request:
        case ("ps",):
            return [_thread_info(thread) for thread in threads().values()]
        case ("is alive", incarnation, int() | str() as id):
            with suppress(NoSuchThread):
                return connection._node._find(incarnation, id).is_alive()
            return False
        case ("spawn", function, tuple(args), str(name), register, is_server, link):
            if not connection._node._may_call(function, connection.is_local):
                raise _NotAllowed(f"{_function_name(function)} is not among what it allows")
            # These errors show nothing that may stand for much more than it is.
            if not callable(function):
                raise TypeError("only a function can be spawned")
            if not name.isprintable():
                raise ValueError(f"{name!r:.300} has characters that a log cannot show")
            wanted = _request(function, args, name, bool(register))
            watcher = None
            if isinstance(link, str):
                watcher = _RemoteWatcher(link, connection.peer, is_link=True)
            return _spawn_here(wanted._replace(is_server=bool(is_server)), watcher, cause)
    raise ValueError("a node of this version cannot do that")


def _thread_info(thread: Thread) -> tuple[Any, ...]:
    """Return id, name, registered names, unread messages, age and activity, for `ps`."""
    names = " ".join(thread._registered_names)
    unread = len(thread._mailbox._entries)
    age = monotonic() - thread._started_at
    return thread.id, thread.name, names, unread, age, _current_call(thread)


def _current_call(thread: Thread) -> str:
    """Return the public function of this module that a thread is in, and its call's place."""
    call = "running"
    frame = sys._current_frames().get(thread._os_ident or 0)
    while frame and frame.f_code.co_filename == _current_call.__code__.co_filename:
        if frame.f_code.co_name in __all__:
            call = frame.f_code.co_name
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename == threading.__file__:
        return call
    return f"{call} at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


######## Losses: messages that nobody could take, and their reports

# The seconds between two lines about the same target; the most targets remembered at once, and
# the most lines that wait for a handler.
LOG_INTERVAL = 1.0
MAX_LOG_KEYS = 1000
MAX_UNLOGGED = 1000


def _log(level: str, text: str, *about: Any) -> None:
    """Log a line; a handler of the user's may take long, or send.

    A thread for which others wait leaves the line to the log thread.  A handler that forwards
    lines through a node must not cause new lines, so nothing that a handler does is logged.
    """
    if _local.is_logging:
        return
    if _local.must_not_wait:
        _log_thread.add(level, text, *about)
    else:
        _emit(level, text, *about)


def _emit(level: str, text: str, *about: Any) -> None:
    _local.is_logging = True
    try:
        # Even this import fails if the process has no more descriptors.
        import logging

        logging.getLogger("distconc").log(getattr(logging, level), text, *about)
    except OSError:
        pass
    except Exception as error:
        # The failure of a handler must not fail a send.
        _print_failure(error)
    finally:
        _local.is_logging = False


class _LogThread:
    """Logs lines in a thread that runs while there are any.

    A handler may hold up the thread for ever, so the waiting lines are bounded: further lines
    are dropped.
    """

    def __init__(self) -> None:
        # Guards the lines and the flag.
        self._lock = _Lock()
        self._lines: deque[tuple[Any, ...]] = deque()
        self._is_running = False

    def add(self, *line: Any) -> None:
        """Have a line logged.  Never blocks."""
        with self._lock:
            if len(self._lines) < MAX_UNLOGGED:
                self._lines.append(line)
            if self._is_running:
                return
            self._is_running = True
            try:
                _start_daemon("log", self._run)
            except RuntimeError:
                # The process can have no more threads.  The next line tries again.
                self._is_running = False

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._lines:
                    self._is_running = False
                    return
                line = self._lines.popleft()
            _emit(*line)


_log_thread = _LogThread()


class _Line:
    """The events about one key that a _LimitedLog has not logged yet."""

    def __init__(self) -> None:
        self.count = 0
        self.why = ""
        self.last_time = 0.0

    def say(self, key: str) -> tuple[int, str, str, str]:
        """Return the line's fields: the number of events since the last line, key, reason."""
        plural = "s"
        if self.count == 1:
            plural = ""
        count = self.count
        self.count = 0
        self.last_time = monotonic()
        return count, plural, key, self.why


class _LimitedLog:
    """Logs the first of many events about a key at once, later ones at most once a second.

    Each line has the number of events since the last line.
    """

    def __init__(self, text: str, level: str = "WARNING") -> None:
        self._text = text
        self._level = level
        self.forget()

    def forget(self) -> None:
        """Begin anew, as in the child of a fork."""
        # Guards the two tables below.
        self._lock = _Lock()
        self._lines: dict[str, _Line] = {}
        self._muted: set[str] = set()

    def add(self, key: str, why: object, count: int) -> None:
        with self._lock:
            if key in self._muted or _local.is_logging:
                return
            due = []
            if len(self._lines) > MAX_LOG_KEYS:
                due = self._take_unsaid()
                self._lines = {}
            line = self._lines.setdefault(key, _Line())
            line.count += count
            line.why = str(why)
            if not line.last_time or monotonic() >= line.last_time + LOG_INTERVAL:
                due.append(line.say(key))
        self._write(due)

    def _take_unsaid(self) -> list[tuple[int, str, str, str]]:
        return [line.say(key) for key, line in self._lines.items() if line.count]

    def _write(self, due: list[tuple[int, str, str, str]]) -> None:
        """Log lines, without holding the lock, for handlers are the user's code."""
        for fields in due:
            _log(self._level, self._text, *fields)

    def flush(self) -> None:
        """Log all events that have not been logged yet."""
        with self._lock:
            due = self._take_unsaid()
        self._write(due)

    def mute(self, key: str) -> None:
        """Log nothing about `key`, to which a logging handler sends."""
        with self._lock:
            self._muted.add(key)


class _Losses(_LimitedLog):
    """Counts and logs messages from this node that nobody could take."""

    def add(self, key: str, why: object, count: int, cause: _Cause = None) -> None:
        local_node()._count("lost", count)
        _observer.record(None, "lost", cause, why=f"{count} to {key}: {why}")
        super().add(key, why, count)


def _log_stranger(host: str, why: BaseException) -> None:
    """Log that a stranger was not let in.

    All strangers share a line, as there may be as many hosts as attempts.
    """
    where = host or "this machine"
    if isinstance(why, AuthenticationError):
        _wrong_keys.add("did not get in", f"{where}: {_one_line(why)}", 1)
    else:
        reason = f"{type(why).__name__}: {_one_line(why)}"
        _noise.add("did not get in", f"{where}: {reason}", 1)


_losses = _Losses("lost %d message%s to %s: %s")
_wrong_keys = _LimitedLog("%d stranger%s %s; the last came from %s")
_noise = _LimitedLog("%d stranger%s without a key %s; the last came from %s", "INFO")


######## Other processes: ChildNode, spawn_node

PRINTER_TIMEOUT = 1.0  # seconds
CHILD_END_TIMEOUT = 10.0  # seconds
# The most that a pipe holds by default.
PIPE_CAPACITY = 65536  # bytes

# (name in sys.flags) -> (letter on the command line)
INTERPRETER_FLAGS = {
    "isolated": "-I",
    "ignore_environment": "-E",
    "no_user_site": "-s",
    "no_site": "-S",
    "safe_path": "-P",
    "optimize": "-O",
    "dont_write_bytecode": "-B",
    "bytes_warning": "-b",
    "verbose": "-v",
    "debug": "-d",
}

# The directory of this process's start.  For its child, "" in sys.path means this directory.
try:
    _start_directory = os.getcwd()
except OSError:
    # The directory has been deleted.
    _start_directory = ""


class ChildNode(AbstractContextManager["ChildNode"]):
    """A node in a process of its own, made by `spawn_node`, which ends with its parent.

    `.address` is the address of the node, `.pid` the number of its process.  A `with` block of
    a child stops the child at its end.

    Two pipes join the parent and the child.  The control pipe goes both ways:

        parent                              child
        the options of start_node  ------->
                                   <-------  the address, or the error
        "stop"                     ------->
        end of file, when the parent ends -> stops its node and ends
                   <- end of file, when the child ends

    Nothing else is ever written to this pipe, and only these two processes hold its ends: so an
    end of file always means the end of the other process.  The output pipe is the child's
    standard output.  The child's standard input is empty, its standard error the parent's.

    In the parent, a thread for each child, the printer, reads both pipes until the child has
    ended.  In the child, the main thread starts the node, answers, and waits; a thread, the
    watcher, reads the control pipe, and wakes the main thread to end the process.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", control: Connection) -> None:
        # Not known before the child has answered.
        self.address: Address = ""
        self.pid = process.pid
        self._process = process
        self._control = control
        # Held while the control pipe is written to or closed, so that "stop" never goes to
        # another file that has got the pipe's old number.
        self._control_lock = _Lock()
        # The child's answer, then None when the child has ended.
        self._answers = Mailbox()
        # The printer keeps this object: a child whose handle is dropped lives on.
        self._printer = _start_daemon("printer", self._read_pipes)

    def _start_node(self, orders: bytes) -> None:
        """Have the child start its node as ordered; raise the child's error if that fails."""
        self._tell(orders)
        answer = self._answers.get()
        if answer is None:
            self.stop(CHILD_END_TIMEOUT)
            raise RuntimeError(
                f"the child's process ended with status {self._process.returncode} before its "
                "node listened; what it printed to the standard error says why")
        if isinstance(answer, Exception):
            raise answer
        self.address = answer

    def is_alive(self) -> bool:
        """Return whether the process has not ended.  Never blocks."""
        return self._process.poll() is None

    def stop(self, timeout: float = 5.0) -> None:
        """Have the child stop its node and end; after `timeout` seconds, kill it.

        Blocks until the process has ended, and its output has come out; for that, a second at
        most.  Does nothing to a child that has ended.  Erlang: peer:stop.
        """
        deadline = _bounded_deadline(timeout)
        self._tell(b"stop")
        try:
            self._process.wait(_remaining(deadline))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # An output that takes no text may hold up the printer for ever, but not this thread.
        self._printer.join(PRINTER_TIMEOUT)

    def kill(self) -> None:
        """End the process at once, as a crash would; return when it has ended."""
        self._process.kill()
        self.stop()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def __str__(self) -> str:
        return _format_address(self.address)

    def __repr__(self) -> str:
        state = ""
        if not self.is_alive():
            state = ", ended"
        return f"<ChildNode {self}, pid {self.pid}{state}>"

    def _tell(self, message: bytes) -> None:
        with self._control_lock:
            _tell_process(self._control, message)

    def _read_pipes(self) -> None:
        """Be the printer: print the child's output, and pass on its answer, until its end.

        Output that precedes the child's answer, or its end, is printed before that.  Processes
        that the child left behind may print to the same pipe later; the printer does not wait
        for their output.
        """
        lines = _LinePrinter()
        pipes: list[Any] = [self._control]
        output = self._process.stdout
        if output is not None:
            pipes.append(output)
        while True:
            # `wait` looks at the control pipe first.  If an answer is there, all earlier output
            # of the child is in the output pipe already.
            ready: list[Any] = wait(pipes)
            if output is not None and output in ready:
                data = os.read(output.fileno(), PIPE_CAPACITY)
                lines.print(data)
                if not data:
                    pipes.remove(output)
            if self._control in ready:
                try:
                    self._answers.put(self._control.recv())
                except (EOFError, OSError):
                    break
        lines.print_rest()
        if output is not None:
            output.close()
        with self._control_lock:
            self._control.close()
        self._answers.put(None)


class _LinePrinter:
    """Prints a child's output in whole lines, as others print to the same place."""

    def __init__(self) -> None:
        self._unfinished_line = bytearray()

    def print(self, data: bytes) -> None:
        """Print the lines that `data` completes, and keep the rest."""
        self._unfinished_line += data
        if b"\n" in data:
            lines, newline, self._unfinished_line = self._unfinished_line.rpartition(b"\n")
            _print_text(lines + newline)

    def print_rest(self) -> None:
        """Print the last line, which has no end."""
        if self._unfinished_line:
            _print_text(self._unfinished_line)


def _print_text(data: bytearray) -> None:
    """Print to this `sys.stdout`, be it a notebook's or a test's; escape odd letters."""
    stream = sys.stdout
    if stream is None:
        return
    text = data.decode("utf-8", "backslashreplace")
    # A stream of the program's may raise anything.  Still the printer must go on to empty the
    # pipe, or the child would come to stand still.
    with suppress(Exception):
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    with suppress(Exception):
        print(text, end="", file=stream, flush=True)


def spawn_node(address: NodeLike = 0, **options: Any) -> ChildNode:
    """Start a node in a new Python process, with `start_node`'s options; return a ChildNode.

    Blocks until the node listens.  The new process gets this one's key, trace, `sys.path` and
    interpreter flags.  Its standard input is empty, and its output comes out where this process
    prints.  The child ends when this process does, for any reason; then the child's `atexit`
    handlers run, for 10 seconds at most, but its threads are not waited for.

    Raises the errors of `start_node` there; SerializationError if the options cannot be sent to
    the child, or read there; RuntimeError if the process cannot be started, or ends before its
    node listens.  Then no process is left.  Erlang: peer:start.
    """
    orders = _pack_options(address, options)
    control, child_end = _open_control_pipe()
    try:
        with child_end:
            process = _start_interpreter(child_end)
    except BaseException:
        control.close()
        raise
    child = ChildNode(process, control)
    try:
        child._start_node(orders)
    except BaseException:
        child.kill()
        raise
    return child


def _pack_options(address: NodeLike, options: dict[str, Any]) -> bytes:
    """Return the options of `start_node` in the child, pickled, with this node's key."""
    options = options.copy()
    options["address"] = _parse_address(address)
    key = options.get("authkey")
    if key is None:
        key = local_node()._key
    options["authkey"] = _find_key(key, options["address"])
    try:
        return serialize(options)
    except SerializationError as error:
        text = f"the options of spawn_node cannot be sent to the child: {error}"
        raise SerializationError(text) from error


def _open_control_pipe() -> tuple[Connection, Connection]:
    """Return the parent's and the child's end of a new control pipe."""
    control, child_end = Pipe()
    # Where this process has closed its standard streams, new pipes get their numbers.  But in
    # the child these numbers belong to the standard streams again.
    if sys.platform != "win32" and child_end.fileno() <= 2:
        with child_end:
            number = fcntl.fcntl(child_end.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
        child_end = Connection(number)
    _close_after_fork.add(control)
    _close_after_fork.add(child_end)
    return control, child_end


def _start_interpreter(child_end: Connection) -> "subprocess.Popen[bytes]":
    """Start the Python that runs `_child_main`, the only process to inherit `child_end`."""
    number = child_end.fileno()
    arguments = [sys.executable or "", *_interpreter_flags(), "-c", _boot_program(number)]
    settings: dict[str, Any] = {
        "env": {**os.environ, "DISTCONC_TRACE": _tracer.directory},
        "stdin": subprocess.DEVNULL,
        "bufsize": 0,
    }
    if sys.__stderr__ is None:
        # The number of the standard error may be that of a socket by now.
        settings["stderr"] = subprocess.DEVNULL
    # Ctrl-C at the terminal is for the parent, which may catch that and go on.  So the child is
    # in a session, or on Windows in a process group, of its own.
    if sys.platform == "win32":
        # A thread cannot wait for a Connection and a plain pipe at once on Windows.  So the
        # child writes to the parent's own standard output.
        os.set_handle_inheritable(number, True)
        inherited = {"handle_list": [number]}
        settings["startupinfo"] = subprocess.STARTUPINFO(lpAttributeList=inherited)
        settings["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        settings["stdout"] = subprocess.PIPE
        settings["pass_fds"] = [number]
        settings["start_new_session"] = True
    try:
        process = subprocess.Popen(arguments, **settings)
    except OSError as error:
        reason = error.strerror or error
        raise RuntimeError(
            f"cannot start {sys.executable!r} as a child: {reason}; set sys.executable to the "
            "path of a Python that this user may run") from error
    if process.stdout is not None:
        _close_after_fork.add(process.stdout)
    return process


def _interpreter_flags() -> list[str]:
    """Return the command-line flags that this Python was started with."""
    flags = []
    for name, flag in INTERPRETER_FLAGS.items():
        # A flag may be given more than once, as in -OO; -P is unknown to 3.10.
        times = int(getattr(sys.flags, name, 0))
        flags += [flag] * times
    for warning_filter in sys.warnoptions:
        flags += ["-W", warning_filter]
    for name, value in sys._xoptions.items():
        option = name
        if value is not True:
            option = f"{name}={value}"
        flags += ["-X", option]
    return flags


def _boot_program(number: int) -> str:
    """Return the program of the new Python, which sets `sys.path` and imports this module.

    Python puts "", its working directory, before all else in `sys.path`.  So the program
    replaces the path before the first import of a module that is not built in.
    """
    search_path = []
    for entry in sys.path:
        if entry == "":
            entry = _start_directory
        if isinstance(entry, str):
            search_path.append(entry)
    # An import statement does not take every name that a copy of this file may have.
    return (
        f"import sys; sys.path[:] = {ascii(search_path)}; from importlib import import_module; "
        f"import_module({ascii(__name__)})._child_main({number})"
    )


def _tell_process(control: Connection, message: bytes) -> None:
    """Send `message` to the other process, which may have ended.

    The loss of the message is no error, as the end of the control pipe tells enough.
    """
    with suppress(OSError), _without_broken_pipe_signal():
        control.send_bytes(message)


@contextmanager
def _without_broken_pipe_signal() -> Iterator[None]:
    """Let a write to a process or a peer that has gone raise BrokenPipeError, and no more.

    Python ignores SIGPIPE, but a program may have restored the default, by which the signal
    kills this process.  The signal goes to the thread that writes.  So the thread blocks the
    signal while writing, and takes any that has come before the block ends.
    """
    if sys.platform == "win32":
        yield
        return
    broken_pipe = {signal.SIGPIPE}
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, broken_pipe)
    try:
        yield
    finally:
        if signal.SIGPIPE in signal.sigpending():
            signal.sigwait(broken_pipe)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def _child_main(number: int) -> None:
    """Be the process of a `ChildNode`; `number` is that of its end of the control pipe.

    Never returns.  The main thread waits where signal handlers can run.
    """
    control = _inherit_control_pipe(number)
    _print_in_utf8()
    # The handler is registered before those of the program, so called after them, but before
    # those of this module and of multiprocessing.
    atexit.register(_end_child_processes)
    parent_ended = threading.Event()
    try:
        orders = control.recv_bytes()
        _start_daemon("parent watcher", _watch_parent, control, parent_ended)
        _tell_process(control, _start_as_ordered(orders))
        parent_ended.wait()
    except (EOFError, KeyboardInterrupt):
        # The parent has ended already, or a signal interrupts the child.
        pass
    except BaseException as error:
        _print_failure(error)
    finally:
        _end_process()


def _inherit_control_pipe(number: int) -> Connection:
    """Return the child's end of the control pipe, which no further process inherits."""
    if sys.platform == "win32":
        os.set_handle_inheritable(number, False)
        control = PipeConnection(number)
    else:
        os.set_inheritable(number, False)
        control = Connection(number)
    _close_after_fork.add(control)
    return control


def _print_in_utf8() -> None:
    """Have `print` write whole lines in UTF-8, as the parent reads them.

    On Windows the child keeps the encoding of its output, which is the parent's own.
    """
    encoding = None
    if sys.platform != "win32":
        encoding = "utf-8"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            encoding=encoding, errors="backslashreplace", line_buffering=True)


def _start_as_ordered(orders: bytes) -> bytes:
    """Start the node with the pickled options; return the address or the error, pickled."""
    try:
        options = pickle.loads(orders)
    except Exception as error:
        return serialize(SerializationError(
            f"the child cannot read the options of spawn_node: {error}; put what they name "
            "into a file of its own, which both can import"))
    try:
        return serialize(start_node(**options).address)
    except Exception as error:
        return _pickled_error(error)


def _watch_parent(control: Connection, parent_ended: threading.Event) -> None:
    """Be the watcher: wait for the parent's word or end; see that this process ends.

    The main thread ends the process.  If a handler of `atexit`, or a module that is still being
    imported, holds up that thread, the watcher ends the process after CHILD_END_TIMEOUT.
    """
    with suppress(EOFError, OSError):
        control.recv_bytes()
    parent_ended.set()
    sleep(CHILD_END_TIMEOUT)
    os._exit(1)


def _end_child_processes() -> None:
    """End the children of multiprocessing here, which would wait for them, however long."""
    from multiprocessing import active_children

    for process in active_children():
        process.terminate()


def _end_process() -> None:
    """Call the handlers of `atexit`, and end, though other threads, or a pool's, still run.

    An interpreter that returns from its main thread would first wait for those threads, however
    long they run.  Since 3.13 Python's own multiprocessing ends its forks like this, with the
    same function, which is not documented.
    """
    try:
        atexit._run_exitfuncs()
        for stream in sys.stdout, sys.stderr:
            with suppress(Exception):
                stream.flush()
    finally:
        os._exit(0)


######## Forks and multiprocessing: a child is a node of its own


def _after_fork() -> None:
    """Leave the parent its connections, and make all tables anew, in the child of a fork.

    Threads that do not exist in the child may hold the locks of these tables, which are made
    anew, too.  Handles of the parent's threads still denote these, and send to them over a
    connection.
    """
    global _own_incarnation
    parent = _process.node
    parent_incarnation = _own_incarnation
    _leave_descriptors(parent)
    parent_address = None
    if parent is not None:
        parent_address = parent.address
    for thread in _registry.by_id.values():
        thread._remote = RemoteThread(parent_address, thread.id, parent_incarnation)
    _own_incarnation = int.from_bytes(os.urandom(8), "big")
    _local.thread = None
    _local.exit_hook = None
    for table in (_registry, _pending, _process, _faults, _log_thread):
        table.__init__()  # type: ignore[misc]
    for log in (_losses, _wrong_keys, _noise):
        log.forget()
    if parent is not None:
        # The child dials with the parent's key, and allows as much as the parent.
        child = local_node()
        child._set_options(parent._key, parent._allow, parent._heartbeat,
                           parent._connect_timeout, parent._max_message)
        child._is_exposed = parent._is_exposed
    _observer.after_fork()


def _leave_descriptors(parent: Node | None) -> None:
    """Close all descriptors that only the parent uses, and have handles dial anew."""
    for descriptor in _close_after_fork.copy():
        with suppress(OSError):
            descriptor.close()
    if parent is not None:
        for connection in parent._connections.copy():
            connection.closing = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# A child inherits the key as multiprocessing's own `authkey`: in a dictionary of which each new
# process gets a copy, under every start method.  So the workers of a pool, to which handles
# come in messages only, have the key as well.  The dictionary is not documented, nor are the
# finalizers below; both have been there since Python 2.6.
KEY_ENTRY = "distconc authkey"


def _pass_on_key(key: bytes | str | None) -> None:
    """Have the processes that multiprocessing starts from now on inherit the key.

    None takes back the key of an earlier node of this process, but not an inherited key.
    """
    config: dict[str, Any] = current_process()._config  # type: ignore[attr-defined]
    if key is not None:
        config[KEY_ENTRY] = key
    elif parent_process() is None:
        config.pop(KEY_ENTRY, None)


def _inherited_key() -> bytes | str | None:
    """Return the key of the node whose process started this one by multiprocessing, if any."""
    if parent_process() is None:
        return None
    config: dict[str, Any] = current_process()._config  # type: ignore[attr-defined]
    return config.get(KEY_ENTRY)


def _end_with_multiprocessing() -> None:
    """Stop the node at the end of a process that multiprocessing started.

    Such a process calls its finalizers at its end, but no handlers of `atexit`.  The finalizers
    come before the interpreter waits for threads that are no daemons, which may still send; so
    this function waits for them first.
    """
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    _at_exit()
    atexit.unregister(_at_exit)


def _stop_when_process_ends(_: object = None) -> None:
    """Have the node stopped at the end of this process, after all other finalizers."""
    util.Finalize(None, _end_with_multiprocessing, exitpriority=-100)


# A new process forgets all finalizers, and then calls the functions that are registered here.
# A process that imports this file later is past that point, and calls the function itself.
util.register_after_fork(_stop_when_process_ends, _stop_when_process_ends)
if parent_process() is not None:
    _stop_when_process_ends()


################ Part three: seeing and breaking ################
######## Faults: a network that can be broken


class _Faults:
    """The entered faults of this process."""

    def __init__(self) -> None:
        # The tuple is replaced as a whole, so that threads can read it without a lock.
        self._entered: tuple[faults, ...] = ()
        self.are_active = False

    def enter(self, fault: "faults") -> None:
        self._entered += (fault,)
        self.are_active = True

    def leave(self, fault: "faults") -> None:
        entered = list(self._entered)
        # In the child of a fork, the fault is not there.
        if fault in entered:
            entered.remove(fault)
        self._entered = tuple(entered)
        self.are_active = bool(entered)

    def concerning(self, addresses: Iterable[Address | None]) -> "faults | None":
        """Return the last entered fault that concerns the node of these addresses."""
        for fault in reversed(self._entered):
            if fault._to is None or fault._to in addresses:
                return fault
        return None

    def cut_off(self, addresses: Iterable[Address | None]) -> bool:
        """Return whether a fault cuts off the node of these addresses."""
        fault = self.concerning(addresses)
        return fault is not None and fault._drop >= 1

    def send(self, connection: _Connection, header: bytes, payload: bytes) -> bool:
        """Send a message as `_Connection.send` does, but with the faults of its peer."""
        fault = self.concerning(connection.addresses)
        if fault is None:
            return connection.send(header, payload)
        return fault._send(connection, header, payload)


_faults = _Faults()


class faults:
    """Lose, repeat or delay messages of this node to others, during a `with` block.

    Each message is lost with the probability `drop`, sent twice with the probability
    `duplicate`, and held up for up to `delay` seconds, in order: waiting messages go together.
    `seed` has the same messages from one thread suffer the same faults.  `to` is the node that
    suffers them (None: all); of several faults for one node, the last entered counts.  `drop=1`
    cuts the node off, on this side: nothing goes there, heartbeats included, and neither node
    can dial the other; so each takes the other for lost.  Nobody is told of a dropped message.
    Messages that are still held up go out when the fault is left, or when they are too many
    (2,000 for a node).  Entering and leaving never block.  Raises ValueError for a number that
    is no probability.
    """

    def __init__(self, *, to: NodeLike | None = None, drop: float = 0, delay: float = 0,
                 duplicate: float = 0, seed: Any = None) -> None:
        _check_number("drop=, a probability,", drop, 0, 1)
        _check_number("duplicate=, a probability,", duplicate, 0, 1)
        _check_number("delay= in seconds", delay, 0, MAX_SECONDS)
        if seed is not None and not isinstance(seed, (int, float, str, bytes, bytearray)):
            raise TypeError(f"seed= is a number, a text, bytes or None, not {seed!r:.100}")
        self._to: Address | None = None
        if to is not None:
            self._to = _parse_address(to)
            if self._to is None:
                raise ValueError(f"to= is a node that listens, not {to!r:.100}")
        self._drop = drop
        self._delay = delay
        self._duplicate = duplicate
        self._seed = seed
        self._random = random.Random(seed)

    def __enter__(self) -> "faults":
        self._random = random.Random(self._seed)
        _faults.enter(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _faults.leave(self)
        for connection in local_node()._established.copy():
            other = _faults.concerning(connection.addresses)
            if connection.delayed_until and not (other and other._delay):
                connection.delayed_until = 0.0
                connection._work.wake_all()

    def _send(self, connection: _Connection, header: bytes, payload: bytes) -> bool:
        """Send a message once, twice or never; a delayed one waits in the outbox, in order."""
        drop = self._random.random()
        duplicate = self._random.random()
        delay = self._random.random()
        if drop < self._drop:
            cause = _decode_cause(*HEADER.unpack_from(header)[5:8])
            _observer.record(None, "lost", cause, why="dropped by faults")
            return True
        copies = 1
        if duplicate < self._duplicate:
            copies = 2
        queued = len(connection._outbox)
        if not queued:
            connection.delayed_until = monotonic() + delay * self._delay
        send = connection.send
        if self._delay and queued < MAX_QUEUED:
            send = connection.post
        elif self._delay:
            connection.delayed_until = 0.0
        return any([send(header, payload) for _ in range(copies)])


######## Traces: trace

# The most by which the cause of an event may be ahead of all clocks of this process.
MAX_CLOCK_JUMP = 1 << 32


class _Recorder(_Observer):
    """Records events in a file of this process's own, if `trace` was called.

    The clock of a thread counts its events, and jumps ahead of the cause of each.  So every
    effect of an event has a greater clock than the event.  Lamport 1978.
    """

    def __init__(self) -> None:
        # Guards the clocks and the file: an event's clock and its line are one step.
        self._lock = _Lock()

        # The id of the node itself is 0.
        self._clocks: dict[int, int] = {}  # thread's id -> clock
        self._latest_clock = 0

        # Without a trace, the descriptor is -1, and the directory is "".
        self._descriptor = -1
        self.directory = ""
        self.is_recording = False

    def start(self, directory: str) -> None:
        """Record to a file in `directory` from now on; raise OSError, changing nothing."""
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, f"{_own_incarnation:016x}.jsonl")
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with self._lock:
            self.stop()
            self._descriptor = descriptor
            self.directory = directory
            self.is_recording = True

    def stop(self) -> None:
        with self._lock:
            self.is_recording = False
            self.directory = ""
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1

    def after_fork(self) -> None:
        """Record the child's events in a file of its own."""
        directory = self.directory
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self.__init__()  # type: ignore[misc]
        if directory:
            self.start(directory)

    def record(self, thread: Thread | None, event: str, cause: _Cause = None,
               **about: Any) -> _Cause:
        if not self.is_recording:
            return None
        thread_id = 0
        name = "node"
        if thread:
            if thread._ended or thread._remote:
                return None
            thread_id = thread.id
            name = thread.name
        about.update(process=f"{_own_incarnation:016x}", node=str(local_node()),
                     thread=thread_id, name=name, event=event)
        return self._write(thread_id, cause, about)

    def _write(self, thread_id: int, cause: _Cause, about: dict[str, Any]) -> _Cause:
        """Give an event its clock, and append it to the file."""
        import json

        with self._lock:
            if not self.is_recording:
                return None
            earlier = [self._clocks.get(thread_id, 0)]
            if thread_id == 0:
                # An event of the node's comes after all earlier events of its threads.
                earlier.extend(self._clocks.values())
            # No real event is further ahead.  A false clock would push this process's clocks to
            # their end.
            if cause and cause[2] <= self._latest_clock + MAX_CLOCK_JUMP:
                earlier.append(cause[2])
                about["cause"] = cause
            clock = max(earlier) + 1
            self._clocks[thread_id] = clock
            self._latest_clock = max(self._latest_clock, clock)
            about.update(clock=clock, time=time())
            failure = None
            try:
                os.write(self._descriptor, json.dumps(about).encode() + b"\n")
            except OSError as error:
                # A full disk is no reason to stop the program.
                failure = error
                self.stop()
        if failure is not None:
            _log("WARNING", "the trace of this process ends here: %s", failure)
        return about["process"], thread_id, clock

    def record_send(self, message: Any, thread: Handle) -> _Cause:
        receiver = f"{_format_address(thread.node)}/{thread.id}"
        if isinstance(thread, Thread):
            receiver = thread.name
        return self.record(current_thread(), "send", message=_short_repr(message), to=receiver)

    def record_receive(self, message: Any, cause: _Cause) -> None:
        self.record(current_thread(), "receive", cause, message=_short_repr(message))

    def message_lost(self, thread: Handle, why: object, cause: _Cause) -> None:
        local_node()._count("undelivered")
        _losses.add(repr(thread), str(why), 1, cause)


_tracer = _Recorder()
_observer = _tracer


def trace(directory: "str | os.PathLike[str] | None") -> None:
    """Record this process's events in a file of its own in `directory`; None: stop.

    The events are spawns, starts, ends and crashes of threads, sends, receives, time-outs, lost
    messages and lost nodes, each with the thread's Lamport clock.  Nodes made by `spawn_node`
    from now on record theirs, too, and so does every process with DISTCONC_TRACE=directory in
    its environment.  The directory is made if there is none.  Each record is written at once,
    so kill -9 loses none.

    Raises OSError, or ValueError for an empty name, and goes on as before.  If the disk is full
    later, the trace ends, with a warning.  See `chart`.  Erlang: seq_trace.
    """
    if directory is None:
        _tracer.stop()
        return
    if not isinstance(directory, (str, bytes, os.PathLike)):
        raise TypeError(f"trace takes the name of a directory, or None, not {directory!r:.100}")
    name = os.fsdecode(directory)
    if not name or "\0" in name:
        raise ValueError(f"a directory has a name; trace cannot use {name!r:.100}")
    _tracer.start(os.path.abspath(name))


def _short_repr(message: Any) -> str:
    """Return a message as a trace shows it: one short line, even if its __repr__ fails."""
    import reprlib

    shortened = reprlib.Repr()
    shortened.maxstring = 100
    shortened.maxother = 100
    # A request may hold a request, and so on.  Ten levels are enough to show.
    for _ in range(10):
        if not isinstance(message, (Synchronous, Reply)):
            break
        message = message.data
    if isinstance(message, Down):
        return f"Down: {_short_repr(message.target)}, {_short_repr(message.reason)}"
    if type(message) is bytes:
        message = message[:200]
    try:
        return shortened.repr(message)
    except Exception:
        # The message is too large a number, for one, or another thread changes the message.
        return f"<a {type(message).__name__}>"


# As a program, this file imports itself (see the end), and the imported copy starts the trace.
if __name__ != "__main__" and os.environ.get("DISTCONC_TRACE"):
    trace(os.environ["DISTCONC_TRACE"])


################ Part four: pictures and shell ################
######## Charts: chart, its traces, its columns and rows, text, ShiViz's form

_CHART_FORMATS = ("svg", "text", "shiviz")


def chart(directory: "str | os.PathLike[str]", format: str = "svg", *, first: int = 0,
          last: float = float("inf"), threads: str | Iterable[str] = ()) -> str:
    """Return the traces in `directory` as one space-time diagram.

    A column is a thread; time runs down, so no arrow points up.  `format` is "svg" (a picture
    for any browser: click an event, and its past lights up in one colour, its future in
    another, and all concurrent events go pale; as the last value of a notebook's cell the
    picture shows itself), "text" (for a terminal, 80 characters wide for up to 20 threads) or
    "shiviz" (vector clocks, for the tool of that name).  `first` and `last` narrow the diagram
    to these Lamport clocks, `threads` to the threads of that name, such as "logger" or
    "127.0.0.1:9001/MainThread", or of the names in a list.

    Damaged lines of a trace are left out, with a warning in the log.  Raises
    FileNotFoundError if there is no trace; ValueError for another format, and if nothing is
    left to draw.
    """
    if format not in _CHART_FORMATS:
        formats = ", ".join(_CHART_FORMATS)
        raise ValueError(f"{format!r} is no format of a chart; there are {formats}")
    _check_number("first=, a clock,", first, 0, float("inf"))
    _check_number("last=, a clock,", last, 0, float("inf"))
    wanted_names = _check_thread_names(threads)
    all_events = _read_traces(directory)
    columns = _assign_columns(all_events)
    events = []
    for event in all_events:
        column = columns[event.thread]
        is_wanted = not wanted_names or event.has_name_in(wanted_names, column.node)
        if is_wanted and first <= event.clock <= last:
            events.append(event)
    if not events:
        raise ValueError("nothing is left to draw: no event is of such a clock and thread")
    picture = _Picture(events, all_events, columns)
    if format == "svg":
        return _SvgDrawing(picture).render()
    if format == "text":
        return _TextDrawing(picture).render()
    return _format_shiviz(picture)


def _check_thread_names(threads: Any) -> set[str]:
    """Return the names in a chart's `threads`; raise TypeError for anything else."""
    if isinstance(threads, str):
        return {threads}
    if isinstance(threads, Iterable):
        names = list(threads)
        if all(isinstance(name, str) for name in names):
            return set(names)
    raise TypeError(f"threads= is the name of a thread, or several, not {threads!r:.100}")


class _Mark(NamedTuple):
    """How a chart shows one kind of event.

    `text` is the event's character in a drawing as text, and `shape` its outline in one as SVG,
    a path that begins in the middle.  `meaning` is the explanation in the legend, and `words` a
    template for the words beside the event, which the fields of the trace's record fill.
    """

    text: str
    shape: str
    meaning: str
    words: str


_CIRCLE = "m-4 0a4 4 0 1 0 8 0 4 4 0 1 0-8 0z"
_PLUS = "m-5 0h10m-5-5v10"
_TWO_BARS = "m-5-2h10m-10 4h10"
_CROSSED_BOX = "m-6-6h12v12h-12zl12 12m0-12-12 12"
_CROSS = "m-5-5 10 10m0-10-10 10"
_WARNING_SIGN = "m0-7 7 12h-14zm0 4v4m0 2v1"
_HOURGLASS = "m-5-6h10l-10 12h10z"

_MARKS = {
    "start": _Mark("o", _CIRCLE, "start", ""),
    "spawn": _Mark("+", _PLUS, "spawn", "spawns {child}"),
    "send": _Mark("*", _CIRCLE, "message", "{message}"),
    "receive": _Mark("*", _CIRCLE, "message", "{message}"),
    "end": _Mark("=", _TWO_BARS, "end", ""),
    "crash": _Mark("X", _CROSSED_BOX, "crash", "{error}"),
    "lost": _Mark("x", _CROSS, "lost", "lost: {why}"),
    "down": _Mark("!", _WARNING_SIGN, "node lost", "{why}"),
    "timeout": _Mark("?", _HOURGLASS, "time-out", "{what} timed out"),
}

_ThreadKey = tuple[str, int]  # incarnation in hex, thread's id


class _Event(NamedTuple):
    """One line of a trace: something that a thread did, or that happened to its node."""

    process: str
    node: str
    thread_id: int
    thread_name: str
    kind: str
    words: str
    receiver: str
    clock: int
    time: float
    cause: _EventId

    @property
    def id(self) -> _EventId:
        return (self.process, self.thread_id, self.clock)

    @property
    def thread(self) -> _ThreadKey:
        return (self.process, self.thread_id)

    def lamport_order(self) -> tuple[int, float, _EventId]:
        """Return a key to sort by: effects come after their causes."""
        return (self.clock, self.time, self.id)

    def has_name_in(self, names: set[str], node: str) -> bool:
        """Return True if the thread's name is in `names`, alone or with its node's."""
        full_name = f"{node}/{self.thread_name}"
        return self.thread_name in names or full_name in names


def _read_traces(directory: "str | os.PathLike[str]") -> list[_Event]:
    """Return the events of all traces in a directory, ordered by their clocks."""
    from pathlib import Path

    found = Path(directory).glob("*.jsonl")
    paths = sorted(path for path in found if path.is_file())
    if not paths:
        place = os.fspath(directory)
        raise FileNotFoundError(f"there are no traces (*.jsonl) in {place!r}")
    events: dict[_EventId, _Event] = {}
    for path in paths:
        lines = path.read_bytes().splitlines()
        damaged = len(lines)
        for line in lines:
            # There are as many kinds of errors as there are ways to damage a file.
            with suppress(Exception):
                event = _parse_event(line)
                if event.id not in events:
                    events[event.id] = event
                    damaged -= 1
        if damaged:
            text = "%s: %d of its lines are no events, and left out"
            _log("WARNING", text, path, damaged)
    return sorted(events.values(), key=_Event.lamport_order)


def _parse_event(line: bytes) -> _Event:
    """Return the event that a line of a trace records.

    Raises an exception of any kind if the line is damaged.
    """
    import json

    record = json.loads(line)
    texts = {}
    for field, value in record.items():
        if isinstance(value, str):
            texts[field] = _printable(value)
    process, thread_id, clock = record.get("cause", ("", 0, -1))
    event = _Event(
        process=texts["process"],
        node=texts["node"],
        thread_id=int(record["thread"]),
        thread_name=texts["name"],
        kind=texts["event"],
        words=_MARKS[texts["event"]].words.format_map(texts),
        receiver=texts.get("to", ""),
        clock=int(record["clock"]),
        time=float(record["time"]),
        cause=(str(process), int(thread_id), int(clock)),
    )
    # A cause has a lower clock than its effect, so no event can be among its own causes.
    is_later = -1 <= event.cause[2] < event.clock
    is_credible = event.clock < 1 << 64 and event.time >= 0
    if not (is_later and is_credible):
        raise ValueError(f"no event has such clocks or such a time: {record}")
    return event


def _printable(text: str) -> str:
    """Return `text`, or the inside of its repr, if a character of the text cannot be printed.

    Either is one line, and fit for XML.
    """
    if text.isprintable():
        return text
    return repr(text)[1:-1]


class _Column(NamedTuple):
    """Where a chart shows a thread.  Columns are sorted by node, then by the thread's id."""

    node_number: int
    thread_id: int
    label: str
    node: str

    def thread_name(self) -> str:
        """Return the label without the node."""
        return self.label[len(self.node) + 1:]


def _assign_columns(events: list[_Event]) -> dict[_ThreadKey, _Column]:
    """Return the column of each thread; nodes stand in the order of their first events."""
    # A node may get its address late, or get another: users know the node by the last one.
    addresses = {event.process: event.node for event in events if event.node}
    thread_names = {event.thread: event.thread_name for event in events}
    node_numbers: dict[str, int] = {}
    threads_by_label = Counter[str]()
    columns = {}
    for thread, name in thread_names.items():
        process, thread_id = thread
        node = addresses.get(process, f"process {process[:4]}")
        label = f"{node}/{name}".replace(" ", "_")
        # Threads with the same label can be of an earlier and a later run of the node.
        while threads_by_label[label] > 0:
            threads_by_label[label] += 1
            label += f"#{threads_by_label[label]}"
        threads_by_label[label] = 1
        node_number = node_numbers.setdefault(process, len(node_numbers))
        columns[thread] = _Column(node_number, thread_id, label, node)
    return columns


class _Picture:
    """The content of a chart in any format: events, and a column for each of their threads.

    `events` are in the order of their clocks, `columns` from left to right.
    """

    def __init__(self, events: list[_Event], all_events: list[_Event],
                 columns: dict[_ThreadKey, _Column]) -> None:
        self.events = events
        self._all_events = all_events
        self._column_by_thread = columns
        self.columns = sorted({columns[event.thread] for event in events})
        self._column_numbers = {column: number for number, column in enumerate(self.columns)}

    def column(self, event: _Event) -> _Column:
        return self._column_by_thread[event.thread]

    def column_number(self, event: _Event) -> int:
        return self._column_numbers[self.column(event)]

    def rows(self) -> "list[_Row]":
        """Put each event into a row below its thread's earlier events, and not above its cause.

        An event shares the row of its cause if its thread does nothing in between.  So mostly
        a message takes one row.  A row has one arrow, to its last event.
        """
        rows: list[_Row] = []
        shown: dict[_EventId, _Event] = {}
        row_numbers: dict[_EventId, int] = {}
        last_row_numbers: dict[_ThreadKey, int] = {}
        for event in self.events:
            number = row_numbers.get(event.cause, -1)
            last_row_number = last_row_numbers.get(event.thread, -1)
            if number <= last_row_number or not rows[number].has_room():
                number = len(rows)
                rows.append(_Row())
            rows[number].add(event, shown.get(event.cause))
            shown[event.id] = event
            row_numbers[event.id] = number
            last_row_numbers[event.thread] = number
        return rows

    def vector_clocks(self) -> dict[_EventId, dict[str, int]]:
        """Return the past of each event, as the number of events in it for each thread.

        The past of an event is the event itself, the earlier events of its thread, its cause,
        and the pasts of all these.  Events that are not shown count for nothing, but hand on
        the clocks of their causes.  Threads go by their labels.  Fidge 1988, Mattern 1989.
        """
        shown = {event.id for event in self.events}
        clocks: dict[_EventId, dict[str, int]] = {}
        latest_clocks: dict[_ThreadKey, dict[str, int]] = {}
        for event in self._all_events:
            clock = latest_clocks.get(event.thread, {}).copy()
            for label, count in clocks.get(event.cause, {}).items():
                clock[label] = max(count, clock.get(label, 0))
            if event.id in shown:
                label = self.column(event).label
                clock[label] = clock.get(label, 0) + 1
            clocks[event.id] = clock
            latest_clocks[event.thread] = clock
        return clocks


class _Row:
    """A line of a chart: one event, or a cause and its effect, side by side."""

    def __init__(self) -> None:
        self.events: list[_Event] = []

        # The cause of the last event, which may stand in an earlier row, or be shown nowhere.
        self.cause: _Event | None = None

    def add(self, event: _Event, cause: _Event | None) -> None:
        self.events.append(event)
        self.cause = cause

    def has_room(self) -> bool:
        """Return True if an effect of the row's event can stand beside it."""
        return len(self.events) == 1 and self.cause is None

    def arrow_ends(self) -> list[_Event]:
        """Return the cause and the last event; only the event, if no cause is shown."""
        last = self.events[-1]
        if self.cause is None:
            return [last]
        return [self.cause, last]

    def words(self) -> str:
        """Return the words that stand beside the row."""
        # The words of a send and of its receive are the same, and said once.
        words = []
        for event in self.events:
            if event.words and event.words not in words:
                words.append(event.words)
        text = "; ".join(words)
        last = self.events[-1]
        if last.kind == "send":
            text += f" to {last.receiver}"
        return text


def _truncate(text: str, max_length: int) -> str:
    if len(text) <= max_length:
        return text
    return text[:max_length - 2] + ".."


# The widths of two parts of a line, in characters.
_CLOCK_WIDTH = 7
_WORDS_WIDTH = 33


class _TextDrawing:
    """A chart for a terminal, 80 characters wide; wider, with more than 20 columns.

    From left to right, a line has the clock, the lifelines of the threads, and words.
    """

    def __init__(self, picture: _Picture) -> None:
        self._picture = picture

        # A line has 7 characters for the clock, 40 for up to 20 columns, and 33 for words,
        # which makes 80.
        count = len(picture.columns)
        self._column_width = max(2, min(6, 40 // count))
        self._words_position = _CLOCK_WIDTH + self._column_width * count
        self._max_width = max(80, self._words_position + _WORDS_WIDTH)
        self._rows_per_heading = 30 + 2 * count

        # The positions of the lifelines that go on below the row that was drawn last.
        self._lifelines: set[int] = set()

    def render(self) -> str:
        """Return the chart as lines of text.

        The columns are named again and again, because the first names scroll away.
        """
        lines: list[str] = []
        for number, row in enumerate(self._picture.rows()):
            if number % self._rows_per_heading == 0:
                lines.extend(self._draw_headings())
            line = self._draw_row(row) + row.words()
            lines.append(_truncate(line, self._max_width))
        lines.append("")
        lines.append(self._draw_legend())
        return "".join(line.rstrip() + "\n" for line in lines)

    def _position(self, event: _Event) -> int:
        return _CLOCK_WIDTH + self._column_width * self._picture.column_number(event)

    def _draw_legend(self) -> str:
        # One mark stands for sends and receives.
        marks = [mark for kind, mark in _MARKS.items() if kind != "receive"]
        return "  ".join(f"{mark.text} {mark.meaning}" for mark in marks)

    def _draw_headings(self) -> Iterator[str]:
        margin = " " * _CLOCK_WIDTH
        lifeline = "|".ljust(self._column_width)
        for number, column in enumerate(self._picture.columns):
            yield margin + lifeline * number + column.label[-_WORDS_WIDTH:]

    def _draw_row(self, row: _Row) -> str:
        """Return the clock, the lifelines, the arrow and the marks of a row."""
        clock = f"{row.events[0].clock:>5}"
        line = list(clock.ljust(self._words_position))
        self._lifelines.update(map(self._position, row.events))
        for position in self._lifelines:
            line[position] = "|"
        self._draw_arrow(line, row)
        for event in row.events:
            position = self._position(event)
            line[position] = _MARKS[event.kind].text
            if event.kind in ("end", "crash"):
                self._lifelines.remove(position)
        return "".join(line)

    def _draw_arrow(self, line: list[str], row: _Row) -> None:
        """Draw dashes from the cause to the last event of the row, with a tip."""
        ends = row.arrow_ends()
        start = self._position(ends[0])
        stop = self._position(ends[-1])
        if start == stop:
            return
        # The thread of the cause may have ended, and its lifeline with it.
        line[start] = "|"
        length = abs(stop - start) - 1
        if start < stop:
            line[start + 1:stop] = ">".rjust(length, "-")
        else:
            line[stop + 1:start] = "<".ljust(length, "-")


def _format_shiviz(picture: _Picture) -> str:
    """Return each event with its vector clock, in the form that ShiViz reads."""
    import json

    vector_clocks = picture.vector_clocks()
    lines = []
    for event in picture.events:
        vector_clock = json.dumps(vector_clocks[event.id])
        lines.append(f"{picture.column(event).label} {vector_clock}\n")
        lines.append(f"{event.words or event.kind}\n")
    return "".join(lines)


######## Charts for a browser: style, script, drawing, notebooks

_SVG_STYLE = """
svg { color-scheme: light dark; background: Canvas; color: CanvasText; display: block;
      font: 12px ui-monospace, monospace; --past: #0a5cd6; --future: #b34700; --bad: #c3163c }
@media (prefers-color-scheme: dark) {
  svg { --past: #7db9ff; --future: #ffb35c; --bad: #ff7a90 }
}
text { fill: currentColor; white-space: pre }
path { fill: none; stroke: currentColor; stroke-width: 1.5 }

/* The drawing gives each node a hue of its own. */
.node { fill: hsl(var(--hue) 70% 50% / 0.08) }
#head .node { fill: hsl(var(--hue) 70% 50% / 0.2); stroke: hsl(var(--hue) 60% 50%) }
#head .sheet { fill: Canvas }
.lifeline { stroke-opacity: 0.3; stroke-width: 1 }
.clock { text-anchor: end; opacity: 0.6 }

.arrow { stroke: CanvasText; stroke-width: 1.2; opacity: 0.7; marker-end: url(#tip) }
#tip path { fill: context-stroke; stroke: none }
.start .arrow { stroke-dasharray: 3 3 }
.lost .arrow { stroke: var(--bad); marker-end: none }
.row:hover .arrow { stroke-width: 3 }

/* Words amid an arrow interrupt it. */
.middle { text-anchor: middle }
.amid { paint-order: stroke; stroke: Canvas; stroke-width: 12px; stroke-linejoin: round }

/* Messages are discs, and all else is an outline. */
.mark { fill: Canvas }
.send .mark, .receive .mark { fill: currentColor }
.crash, .lost, .down, .timeout { color: var(--bad) }
.event { cursor: pointer }
.event circle { fill: transparent }

/* Past and future differ in shape, too: by a ring, and by a ring of dashes. */
[data-relation=past] { color: var(--past) }
[data-relation=future] { color: var(--future) }
.event[data-relation=past] circle { stroke: currentColor }
.event[data-relation=future] circle { stroke: currentColor; stroke-dasharray: 3 2.65 }
.event[data-relation=chosen] { color: black }
.event[data-relation=chosen] circle { fill: gold; stroke: CanvasText; stroke-width: 2 }
.event[data-relation=concurrent] .mark { opacity: 0.25 }
.arrow[data-relation=past] { stroke: var(--past); stroke-width: 2.5; opacity: 1 }
.arrow[data-relation=future] { stroke: var(--future); stroke-width: 2.5; opacity: 1 }
.arrow[data-relation=concurrent] { opacity: 0.2 }
.row:not(:has(.event:not([data-relation=concurrent]))) .words { fill-opacity: 0.4 }
"""

_SVG_SCRIPT = """
"use strict";

let events = [];
let chosen = null;

// The element of an event names its thread, by the number of the column, and its cause: "3:7"
// is the seventh event in column 3.  Its clock says of how many events of each thread it may
// know, and so is a vector clock.  The element has only the news in it: the counts that the
// event before, in the same thread, did not know.
function readEvents() {
  const latest = {};  // number of a column -> the latest event in that column
  const byName = {};  // "3:7" -> an event
  events = [];
  for (const element of document.querySelectorAll(".event")) {
    const {thread, news, cause} = element.dataset;
    const before = latest[thread];
    const event = {element, thread, before, clock: {...before?.clock}};
    for (const name of news.split(" ")) {
      const [other, count] = name.split(":");
      event.clock[other] = Number(count);
    }
    event.number = event.clock[thread];
    event.cause = byName[cause];
    if (before) {
      before.after = event;
    }
    if (event.cause) {
      event.cause.effect ??= event;
    }
    latest[thread] = event;
    byName[thread + ":" + event.number] = event;
    events.push(event);
  }
}

function isKnownTo(event, other) {
  return other.clock[event.thread] >= event.number;
}

function relationToChosen(event) {
  if (event === chosen) {
    return "chosen";
  }
  if (isKnownTo(event, chosen)) {
    return "past";
  }
  if (isKnownTo(chosen, event)) {
    return "future";
  }
  return "concurrent";
}

// An arrow can be a step towards the chosen event, or a step from there, or neither.
function arrowRelation(event) {
  const cause = relationToChosen(event.cause);
  const effect = relationToChosen(event);
  if (effect === "past" || effect === "chosen") {
    return "past";
  }
  if (cause === "future" || cause === "chosen") {
    return "future";
  }
  return "concurrent";
}

function choose(one) {
  chosen = one;
  const counts = {chosen: 0, past: 0, future: 0, concurrent: 0};
  for (const event of events) {
    const relation = relationToChosen(event);
    const arrow = event.element.querySelector(".arrow");
    event.element.dataset.relation = relation;
    if (arrow) {
      arrow.dataset.relation = arrowRelation(event);
    }
    counts[relation] += 1;
  }
  for (const element of document.querySelectorAll(".count")) {
    const relation = element.dataset.relation;
    element.textContent = `${counts[relation]} ${relation}   `;
  }
}

function chooseNone() {
  chosen = null;
  for (const element of document.querySelectorAll(".event, .arrow")) {
    delete element.dataset.relation;
  }
  for (const element of document.querySelectorAll(".count")) {
    element.textContent = "";
  }
}

// Arrows may cross a mark, which is meant nevertheless.  A click elsewhere in a row, such as on
// its words, is for the first event of that row.
function onClick(click) {
  if (click.target.closest("#head")) {
    return;
  }
  const here = document.elementsFromPoint(click.clientX, click.clientY);
  const circle = here.find(element => element.matches(".event circle"));
  const element = circle?.parentNode ?? click.target.closest(".row")?.querySelector(".event");
  if (element) {
    choose(events.find(event => event.element === element));
  } else {
    chooseNone();
  }
}

function onKey(press) {
  const neighbours = {
    ArrowUp: chosen?.before,
    ArrowDown: chosen?.after,
    Enter: chosen?.effect ?? chosen?.cause,
  };
  if (press.key === "Escape") {
    chooseNone();
  } else if (press.key in neighbours && !press.ctrlKey && !press.metaKey && !press.altKey) {
    press.preventDefault();
    choose(neighbours[press.key] ?? chosen ?? events[0]);
    const circle = chosen.element.querySelector("circle");
    circle.scrollIntoView({block: "center", inline: "nearest"});
  }
}

// The head stays in view, and its words stay at the left.
function moveHead() {
  const head = document.querySelector("#head");
  const legend = document.querySelector("#legend");
  head?.setAttribute("transform", `translate(0 ${scrollY})`);
  legend?.setAttribute("transform", `translate(${scrollX} 0)`);
}

addEventListener("click", onClick);
addEventListener("keydown", onKey);
addEventListener("scroll", moveHead);
readEvents();
moveHead();
"""

_SVG_TIP = """<marker id="tip" viewBox="0 0 10 10" refX="14" refY="5" markerWidth="9"
markerHeight="9" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 1 10 5 0 9z"/>
</marker>"""

_HINT = "Click an event, or walk with the arrow keys and Enter; Escape clears."
# All in pixels, but for the letters of a thread's name in the head, and of a row's words.  The
# first width is that of the style's font; the last is enough for the legend.
_CHARACTER_WIDTH = 7.23
_ROW_HEIGHT = 20
_LEFT = 60
_FRAMES_TOP = 52
_MAX_NAME = 16
_MAX_WORDS = 80
_MIN_WIDTH = 860


class _SvgDrawing:
    """A chart for a browser, where its script answers clicks and keys.

    The clocks are at the left, then the threads in a frame for each node, then words.  The head
    is at the top and stays in view, above the rows.
    """

    def __init__(self, picture: _Picture) -> None:
        self._picture = picture
        self._rows = picture.rows()
        self._clocks = picture.vector_clocks()
        self._last_clocks: dict[_ThreadKey, dict[str, int]] = {}
        self._column_numbers: dict[str, int] = {}
        self._names: list[str] = []
        for number, column in enumerate(picture.columns):
            self._column_numbers[column.label] = number
            self._names.append(_truncate(column.thread_name(), _MAX_NAME))

        # Names that are wider than a column stand upright.  Up to six columns are so wide
        # that none is, and that most words have room amid their arrows.
        count = len(picture.columns)
        self._column_width = max(28, min(166, 720 // count))
        self._names_height = 24
        widest = 16 + max(map(_text_width, self._names))
        self._names_are_upright = widest > self._column_width
        if self._names_are_upright:
            self._names_height = widest

        self._top = _FRAMES_TOP + 24 + self._names_height + 10
        self._bottom = self._top + _ROW_HEIGHT * len(self._rows)
        self._right = _LEFT + self._column_width * count
        self._width = max(self._right, _MIN_WIDTH)
        self._heights: dict[_EventId, int] = {}

    def render(self) -> "_SvgText":
        """Return the chart as the text of an SVG file."""
        # Drawing the rows tells how wide the chart is, and where the lifelines begin and end.
        rows = [self._draw_row(number, row) for number, row in enumerate(self._rows)]
        elements = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self._width}" '
            f'height="{self._bottom + 20}">',
            # Without a title here, browsers look for one through all the rows, at each row.
            f"<title>chart</title><style>{_SVG_STYLE}</style>{_SVG_TIP}",
            *self._draw_frames(0, self._bottom),
            *self._draw_lifelines(),
            *rows,
            '<g id="head">',
            *self._draw_head(),
            f"</g><script><![CDATA[{_SVG_SCRIPT}]]></script></svg>\n",
        ]
        # With all but ASCII escaped, the file can be saved in any encoding.
        text = "\n".join(elements).encode("ascii", "xmlcharrefreplace").decode()
        return _SvgText(text)

    def _x(self, column_number: int) -> int:
        """Return the middle of a column."""
        return _LEFT + self._column_width * column_number + self._column_width // 2

    def _event_x(self, event: _Event) -> int:
        return self._x(self._picture.column_number(event))

    def _draw_row(self, number: int, row: _Row) -> str:
        """Return a row, with a title to point at."""
        y = self._top + _ROW_HEIGHT * number + _ROW_HEIGHT // 2
        events = []
        for event in row.events:
            self._heights[event.id] = y
            events.append(self._draw_event(event, row, y))
        return (f'<g class="row"><title>{self._format_title(row)}</title>'
                f'<text class="clock" x="44" y="{y + 4}">{row.events[0].clock}</text>'
                f'{"".join(events)}{self._draw_words(row, y)}</g>')

    def _format_title(self, row: _Row) -> str:
        """Return the row's words and where both ends of its arrow are."""
        lines = [row.words()]
        for event in row.arrow_ends():
            label = self._picture.column(event).label
            lines.append(f"{event.kind} at {label}, clock {event.clock}")
        return _escape("\n".join(lines).lstrip("\n"))

    def _draw_event(self, event: _Event, row: _Row, y: int) -> str:
        """Return an event's mark, in a circle that can be clicked, with the arrow to it."""
        column_number = self._picture.column_number(event)
        x = self._x(column_number)
        arrow = ""
        cause = ""
        if row.cause is not None and event is row.events[-1]:
            start = f"{self._event_x(row.cause)} {self._heights[row.cause.id]}"
            arrow = f'<path class="arrow" d="M{start}L{x} {y}"/>'
            cause = f' data-cause="{self._format_name(row.cause)}"'
        return (f'<g class="event {event.kind}" data-thread="{column_number}" '
                f'data-news="{self._format_news(event)}"{cause}>{arrow}'
                f'<circle cx="{x}" cy="{y}" r="9"/>'
                f'<path class="mark" d="M{x} {y}{_MARKS[event.kind].shape}"/></g>')

    def _format_name(self, event: _Event) -> str:
        """Return the script's name for an event: its column and its number there."""
        label = self._picture.column(event).label
        number = self._clocks[event.id][label]
        return f"{self._column_numbers[label]}:{number}"

    def _format_news(self, event: _Event) -> str:
        """Return the entries of an event's vector clock that are news to its thread."""
        clock = self._clocks[event.id]
        last_clock = self._last_clocks.get(event.thread, {})
        self._last_clocks[event.thread] = clock
        news = []
        for label, count in clock.items():
            if count != last_clock.get(label, 0):
                news.append(f"{self._column_numbers[label]}:{count}")
        return " ".join(news)

    def _draw_words(self, row: _Row, y: int) -> str:
        """Return the words of a row: amid its arrow, if there is room, or at the right."""
        words = _truncate(row.words(), _MAX_WORDS)
        width = _text_width(words)
        name = "words"
        x = self._right + 12
        if len(row.events) == 2:
            start, stop = map(self._event_x, row.events)
            if abs(stop - start) > width + 36:
                name = "words middle amid"
                x = (start + stop) // 2
        self._width = max(self._width, x + width + 12)
        return f'<text class="{name}" x="{x}" y="{y + 4}">{_escape(words)}</text>'

    def _draw_lifelines(self) -> Iterator[str]:
        """Yield a line for each thread, from its first event to its end or to the bottom."""
        tops: dict[int, int] = {}
        bottoms: dict[int, int] = {}
        for event in self._picture.events:
            x = self._event_x(event)
            y = self._heights[event.id]
            tops.setdefault(x, y)
            bottoms[x] = self._bottom
            if event.kind in ("end", "crash"):
                bottoms[x] = y
        for x, top in tops.items():
            yield f'<path class="lifeline" d="M{x} {top}V{bottoms[x]}"/>'

    def _draw_frames(self, top: int, bottom: int) -> Iterator[str]:
        """Yield a frame around the columns of each node, in the node's own hue."""
        for columns, x, width in self._nodes():
            # This angle keeps the hues of any number of nodes apart.
            hue = (210 + 137 * columns[0].node_number) % 360
            yield (f'<rect class="node" style="--hue: {hue}" x="{x + 2}" y="{top}" '
                   f'width="{width - 4}" height="{bottom - top}" rx="6"/>')

    def _nodes(self) -> Iterator[tuple[list[_Column], int, int]]:
        """Yield the columns of each node, where they begin, and how wide they are together."""
        x = _LEFT
        columns = self._picture.columns
        for _, group in itertools.groupby(columns, lambda column: column.node_number):
            columns_of_node = list(group)
            width = self._column_width * len(columns_of_node)
            yield columns_of_node, x, width
            x += width

    def _draw_head(self) -> Iterator[str]:
        """Yield the legend, the nodes with their addresses, and the names of the threads."""
        yield f'<rect class="sheet" width="100%" height="{self._top - 6}"/>'
        yield from self._draw_legend()
        yield from self._draw_frames(_FRAMES_TOP, self._top - 10)
        for columns, x, width in self._nodes():
            address = columns[0].node
            # The end of an address, with the port, tells nodes apart.
            end = address[-int(width / _CHARACTER_WIDTH):]
            yield (f'<text class="middle" x="{x + width // 2}" y="{_FRAMES_TOP + 16}">'
                   f'<title>{_escape(address)}</title>{_escape(end)}</text>')
        for number, column in enumerate(self._picture.columns):
            yield self._draw_name(number, column)

    def _draw_legend(self) -> Iterator[str]:
        yield '<g id="legend">'
        x = 16
        for kind, mark in _MARKS.items():
            # One mark stands for sends and receives.
            if kind != "receive":
                yield (f'<g class="{kind}"><path class="mark" d="M{x} 14{mark.shape}"/></g>'
                       f'<text x="{x + 12}" y="18">{mark.meaning}</text>')
                x += 36 + _text_width(mark.meaning)
        counts = ""
        for relation in ("past", "future", "concurrent"):
            counts += f'<tspan class="count" data-relation="{relation}"></tspan>'
        yield f'<text x="10" y="40">{counts}<tspan id="hint">{_HINT}</tspan></text></g>'

    def _draw_name(self, number: int, column: _Column) -> str:
        x = self._x(number)
        y = self._top - 18
        place = f'class="thread middle" x="{x}" y="{y}"'
        if self._names_are_upright:
            place = f'class="thread" transform="translate({x + 4} {y}) rotate(-90)"'
        title = _escape(column.label)
        return f"<text {place}><title>{title}</title>{_escape(self._names[number])}</text>"


def _text_width(text: str) -> int:
    """Return how many pixels wide a text is in a drawing as SVG."""
    from unicodedata import east_asian_width

    # Chinese characters, and others, are as wide as two.
    wide = sum(east_asian_width(character) in "WF" for character in text)
    return int(_CHARACTER_WIDTH * (len(text) + wide)) + 1


def _escape(text: str) -> str:
    from html import escape

    return escape(text)


class _SvgText(str):
    """The text of an SVG file, which shows itself as the last value of a notebook's cell."""

    def _repr_html_(self) -> str:
        # In a page of its own, its script runs, and does not meet those of other charts.
        page = _escape(f"<!DOCTYPE html><style>body {{ margin: 0 }}</style>{self}")
        style = "width: 100%; height: 30em; border: 0; resize: vertical"
        return f'<iframe srcdoc="{page}" style="{style}"></iframe>'


######## At the shell: main, and its commands demo, node, send, call, ps, chart, key


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the arguments of the command line name.

    Exits with status 1 and one line on standard error if the command fails, with 2 after a
    wrong use, and with 130 on Ctrl-C.
    """
    import logging

    _make_output_safe()
    logging.basicConfig(format="distconc: %(message)s")
    options = vars(_make_parser().parse_args(arguments))
    run_command = options.pop("run_command")
    try:
        run_command(**options)
    except KeyboardInterrupt:
        sys.exit(130)
    except (DistconcError, AuthenticationError, OSError, ValueError) as error:
        sys.exit(f"distconc: {_printable(str(error))}")


def _make_output_safe() -> None:
    """Let any text be printed, in whatever encoding standard output and errors have."""
    for stream in (sys.stdout, sys.stderr):
        # A closed stream is None, and a program may have put anything in its place.
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _make_parser() -> Any:
    """Return the parser of the command line, an argparse.ArgumentParser."""
    import argparse

    parser = argparse.ArgumentParser(
        "distconc",
        description="Threads that send, on any node.  In the environment: "
                    "DISTCONC_AUTHKEY, the key; DISTCONC_COOKIE, the file that has it "
                    "otherwise; DISTCONC_TRACE, a directory to write traces to.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_node(commands)
    _add_send(commands)
    _add_call(commands)
    _add_ps(commands)
    _add_chart(commands)
    _add_key(commands)
    return parser


def _add_command(commands: Any, name: str, run_command: Callable[..., None],
                 description: str) -> Any:
    """Add a command, which calls `run_command` with its options, and return its parser."""
    parser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run_command=run_command)
    return parser


def _add_demo(commands: Any) -> None:
    _add_command(commands, "demo", _run_demo,
                 "Run the example that started it all, on two nodes.")


def _run_demo() -> None:
    if _tracer.directory:
        _demonstrate()
        return
    with tempfile.TemporaryDirectory() as directory:
        trace(directory)
        try:
            _demonstrate()
        finally:
            # Windows removes no file that is open.
            trace(None)


def _demonstrate() -> None:
    """Have two nodes talk, and print their words, and the chart of their talk."""
    with start_node() as node, spawn_node() as child:
        own_pid = os.getpid()
        print(f"node {node} has pid {own_pid}, its child {child} has pid {child.pid}")
        _talk_to(child)
        # Drawn while both nodes run: the end of one would look like a loss.
        drawing = chart(_tracer.directory, "text")
    print("\nAll of it, time running down:\n\n" + drawing.rstrip())


def _talk_to(child: ChildNode) -> None:
    """Send a message, make a call, and have an answer sent to a handle that travelled."""
    spawn_server(_log_message, node=child, name="logger", register=True)
    logger = RemoteThread(child, "logger")
    send("hello", logger)
    shouter = spawn(handle_synchronous, str.upper, name="shouter", node=child)
    print("a call:", send_synchronous("can you hear me?", shouter), flush=True)
    send(current_thread(), logger)
    thanker = spawn(send, "thank you", current_thread(), name="thanker", node=child)
    print("through a handle that travelled:", receive())
    thanker.join()


def _log_message() -> bool:
    print("logger:", receive(), flush=True)
    return True


def _add_node(commands: Any) -> None:
    parser = _add_command(
        commands, "node", _run_node,
        "Run a node, with a Python prompt, or with SCRIPT, after which it stays up.")
    parser.add_argument("address", nargs="?", default="0",
                        help="9000; 0.0.0.0:9000, for other machines; or a path; without it, "
                             "a free port is taken")
    parser.add_argument("script", nargs="?", default="",
                        help="a Python file, run as the main program of the node")
    parser.add_argument("--advertise", metavar="HOST[:PORT]",
                        help="where other nodes dial it, if that is another address")


def _run_node(address: str, script: str, advertise: str | None) -> None:
    if os.path.isfile(address):
        raise ValueError(f"{address} is a file; say: node ADDRESS {address}")
    # The prompt and the script get a module of their own, with none of this file's names.
    main_module = types.ModuleType("__main__")
    sys.modules["__main__"] = main_module
    with start_node(address, advertise=advertise) as node:
        print(f"node {node}, pid {os.getpid()}", flush=True)
        if script:
            _run_script(script, main_module)
            # Stay up until Ctrl-C.
            _WaitQueue().wait_until(lambda: False, None)
        else:
            _run_prompt(main_module)


def _run_prompt(main_module: types.ModuleType) -> None:
    """Run a Python prompt, where all public names of this file are imported already."""
    import code

    namespace = main_module.__dict__
    for name in __all__:
        namespace[name] = globals()[name]
    end_of_input = "Ctrl-D"
    if sys.platform == "win32":
        end_of_input = "Ctrl-Z and Enter"
    banner = f"All names of distconc are here; {end_of_input} ends the node."
    code.interact(banner, local=namespace, exitmsg="")


def _run_script(path: str, main_module: types.ModuleType) -> None:
    """Run a file as Python would, as the module `__main__`.

    Exits with status 1 if the file raises an exception, after printing that.
    """
    with open(path, "rb") as file:
        source = file.read()
    sys.argv = [path]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    main_module.__file__ = path
    try:
        exec(compile(source, path, "exec"), main_module.__dict__)
    except Exception as error:
        # The outermost frame is that of this function, not of the script.
        if error.__traceback__:
            error.__traceback__ = error.__traceback__.tb_next
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


def _add_send(commands: Any) -> None:
    parser = _add_command(
        commands, "send", _run_send,
        "Send MESSAGE to TARGET, and wait for it to be there; exit with 1 if it was lost.")
    _add_message_arguments(parser)


def _add_message_arguments(parser: Any) -> None:
    parser.add_argument("target", help="a thread, such as 127.0.0.1:9000/logger")
    parser.add_argument("message", help="a Python literal, such as \"('hello', 1)\"")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS",
                        help="fail after so many seconds (10)")


def _run_send(target: str, message: str, timeout: float) -> None:
    thread = _parse_target(target)
    send(_parse_literal(message), thread)
    # A node handles messages in order.  So if our message was lost, the node reports the loss
    # before the answer to this request.
    _call_node(thread.node, ("ps",), timeout=timeout)
    if local_node().stats()["lost"]:
        sys.exit(1)


def _parse_target(text: str) -> RemoteThread:
    node, _, name = text.rpartition("/")
    if not node or not name:
        raise ValueError(f"{text!r} is no target; say 127.0.0.1:9000/logger")
    if name.isdecimal():
        return RemoteThread(node, int(name))
    return RemoteThread(node, name)


def _parse_literal(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        # No shell changes these: double quotes outside, single ones inside.
        examples = "such as 7, \"('hello', 1)\" or \"'hello'\""
        start = _truncate(text, 60)
        raise ValueError(f"{start} is no Python literal, {examples}") from None


def _add_call(commands: Any) -> None:
    parser = _add_command(
        commands, "call", _run_call,
        "Send MESSAGE to TARGET as `send` does, and print the reply.")
    _add_message_arguments(parser)


def _run_call(target: str, message: str, timeout: float) -> None:
    request = _parse_literal(message)
    reply = send_synchronous(request, _parse_target(target), timeout)
    print(repr(reply))


def _add_ps(commands: Any) -> None:
    parser = _add_command(commands, "ps", _run_ps, "List the threads of NODE.")
    parser.add_argument("node", help="such as 9000 or 127.0.0.1:9000")


def _run_ps(node: str) -> None:
    rows = [("id", "name", "registered", "unread", "age", "in")]
    answer = _call_node(_parse_address(node), ("ps",))
    for thread_id, name, registered, unread, age, current_call in answer:
        seconds = f"{age:.0f} s"
        row = (str(thread_id), name, registered, str(unread), seconds, current_call)
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = []
        for cell, width in zip(row, widths):
            cells.append(_printable(cell).ljust(width))
        print("  ".join(cells).rstrip())


def _add_chart(commands: Any) -> None:
    parser = _add_command(
        commands, "chart", _run_chart, "Draw what was traced to DIRECTORY.")
    parser.add_argument("directory", help="where the traces are")
    parser.add_argument("-o", dest="output", default="", metavar="FILE",
                        help="write to this file; without it the picture, SVG for a browser, "
                             "is printed")
    parser.add_argument("--format", default="svg", help="svg (the default), text or shiviz")
    parser.add_argument("--watch", action="store_true",
                        help="serve a page to this machine's browsers, which draws the traces "
                             "again while they grow, until Ctrl-C")
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="CLOCK",
                        help="leave out events of lower Lamport clocks")
    parser.add_argument("--to", dest="last", type=float, default=float("inf"),
                        metavar="CLOCK", help="leave out events of higher Lamport clocks")
    parser.add_argument("--thread", dest="threads", action="append", default=[],
                        metavar="NAME",
                        help="show only the threads of that name, such as logger or "
                             "127.0.0.1:9000/logger; may be repeated")


def _run_chart(directory: str, output: str, format: str, watch: bool, first: int, last: float,
               threads: list[str]) -> None:
    draw = partial(chart, directory, format, first=first, last=last, threads=threads)
    if watch:
        if output or format != "svg":
            raise ValueError("--watch shows a page, so it takes no -o and no other --format")
        _watch(directory, draw)
    elif output:
        with open(output, "w", encoding="utf-8") as file:
            file.write(draw())
    else:
        sys.stdout.write(draw())


_WATCH_SCRIPT = """
let version = "";

// A name that an event keeps while the traces grow.
function nameOf(event) {
  const label = document.querySelectorAll(".thread title")[event.thread].textContent;
  return label + " " + event.number;
}

// Draw the traces again if they have grown.  Whoever sees the end goes on seeing the end.
async function redraw() {
  const answer = await fetch("drawing", {headers: {"If-None-Match": version}});
  if (answer.status === 200) {
    const page = document.documentElement;
    const seesEnd = scrollY + innerHeight > page.scrollHeight - 60;
    const name = chosen ? nameOf(chosen) : "";
    version = answer.headers.get("ETag");
    document.body.innerHTML = await answer.text();
    chosen = null;
    readEvents();
    const again = events.find(event => nameOf(event) === name);
    if (again) {
      choose(again);
    }
    if (seesEnd) {
      scrollTo(scrollX, page.scrollHeight);
    }
    moveHead();
  }
  setTimeout(redraw, 1000);
}

redraw();
"""


def _watch(directory: str, draw: Callable[[], str]) -> None:
    """Serve a page that shows the drawing, anew whenever the traces change.

    Only browsers on this machine reach it, and only those that know its random path.
    """
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    page = _WatchPage(directory, draw)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = page.answer(self.path, self.headers["If-None-Match"])
            self.send_response(answer.status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("ETag", answer.version)
            self.end_headers()
            # The browser may have closed the page meanwhile.
            with suppress(ConnectionError):
                self.wfile.write(answer.text.encode())

        def log_message(self, *_: Any) -> None:
            """Say nothing of each request on standard error."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}{page.path}"
        print(f"{address} shows {page.name}; Ctrl-C ends it", flush=True)
        server.serve_forever()


class _WatchAnswer(NamedTuple):
    """An answer by HTTP; `version` is that of the traces, or "" where there is none."""

    status: int
    text: str
    version: str


class _WatchPage:
    """The page of a drawing, and below its path the drawing itself."""

    def __init__(self, directory: str, draw: Callable[[], str]) -> None:
        self.path = f"/{os.urandom(16).hex()}/"
        self.name = _printable(directory)
        self._directory = directory
        self._draw = draw

    def answer(self, path: str, known_version: str | None) -> _WatchAnswer:
        """Return the answer for a path and a browser that knows the drawing of a version."""
        if path == self.path:
            return _WatchAnswer(200, self._html(), "")
        if path != self.path + "drawing":
            return _WatchAnswer(404, "", "")
        version = _traces_version(self._directory)
        if version == known_version:
            return _WatchAnswer(304, "", version)
        try:
            return _WatchAnswer(200, self._draw(), version)
        except (OSError, ValueError) as error:
            # There may be no traces yet.
            text = _escape(_printable(str(error)))
            return _WatchAnswer(200, f"<p>{text}</p>", version)

    def _html(self) -> str:
        return (f"<!DOCTYPE html><title>{_escape(self.name)}</title>"
                "<style>body { margin: 0 } :root { color-scheme: light dark }</style>"
                f"<body></body><script>{_SVG_SCRIPT}{_WATCH_SCRIPT}</script>")


def _traces_version(directory: str) -> str:
    """Return a text that is another one whenever the traces in a directory have changed."""
    files = []
    # There may be no such directory yet.
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            status = entry.stat()
            files.append((entry.name, status.st_size, status.st_mtime_ns))
    digest = hashlib.sha256(repr(sorted(files)).encode()).hexdigest()
    return f'"{digest}"'


def _add_key(commands: Any) -> None:
    _add_command(
        commands, "key", _run_key,
        "Print a random key, for DISTCONC_AUTHKEY or authkey= on all nodes of a group.")


def _run_key() -> None:
    print(os.urandom(16).hex())


def _own_name() -> str:
    """Return the name by which other programs import this file.

    In a package that is the full name.  Then `sys.path` has the package's directory no more,
    but the one above it, as with `python3 -m`: else a program that runs on this node could
    import this file a second time, by its other name, with threads and mailboxes of its own.
    """
    if __spec__:
        return __spec__.name
    # A file that is run through a symbolic link is imported from its real place.
    path, file_name = os.path.split(os.path.realpath(__file__))
    own_directory = path
    name = os.path.splitext(file_name)[0]
    while os.path.exists(os.path.join(path, "__init__.py")):
        path, package = os.path.split(path)
        name = f"{package}.{name}"
    sys.path[:] = [path if entry == own_directory else entry for entry in sys.path]
    return name


if __name__ == "__main__":
    import importlib

    # Messages name classes by their module, and `__main__` is another module on each node.
    # So this file imports itself by its own name, and that copy runs the command.
    try:
        own_module = importlib.import_module(_own_name())
    except OSError as error:
        sys.exit(f"distconc: DISTCONC_TRACE: {error}")

    own_module.main()
