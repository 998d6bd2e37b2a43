import atexit
import hashlib
import hmac
import itertools
import logging
import os
import pickle
import socket
import stat
import struct
import subprocess
import sys
import threading
import traceback
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener, answer_challenge, deliver_challenge
from time import monotonic
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
""".split()
__version__ = "0.1.0"

Predicate = Union[Callable[[Any], Any], type, tuple[type, ...], types.UnionType]


######## Errors: what a caller may see, each carrying what it is about


class DistconcError(Exception):
    """The base of this module's errors."""


class LinkedError(DistconcError):
    """A thread from `spawn_linked` failed: `.error` is why, `.thread` which.  Factor: linked-error."""

    def __init__(self, error: BaseException, thread: "Handle") -> None:
        super().__init__(error, thread)
        self.error, self.thread = error, thread

    def __str__(self) -> str:
        return f"{self.thread} failed: {type(self.error).__name__}: {self.error}"


class NodeDown(DistconcError, ConnectionError):
    """Contact with a node was lost or could not be made; what was under way may have arrived."""


class NodeUnreachable(NodeDown):
    """The node could not be connected to, so nothing was delivered."""


class NoSuchThread(DistconcError, LookupError):
    """No living thread has that id or name there; nothing was delivered."""


class ThreadDied(DistconcError):
    """The thread ended before it replied, of `.reason` (None: it returned).  Erlang: exit."""

    def __init__(self, text: str, reason: BaseException | None = None) -> None:
        super().__init__(text, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class SynchronousToSelfError(DistconcError):
    """A thread called itself and would wait for ever.  Factor: cannot-send-synchronous-to-self."""

    def __init__(self, message: Any, thread: "Handle") -> None:
        super().__init__(message, thread)
        self.message, self.thread = message, thread

    def __str__(self) -> str:
        return f"{self.thread} cannot wait for its own reply; call the function itself"


class SerializationError(DistconcError, ValueError):
    """The message cannot be copied to another node; it was not sent."""


class RemoteError(DistconcError):
    """Stands in for an error that could not cross: `.type` is its name, the text its traceback."""

    def __init__(self, type: str, text: str) -> None:
        super().__init__(type, text)
        self.type = type

    def __str__(self) -> str:
        return str(self.args[1])


######## Waiting: deadlines and bells


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else monotonic() + timeout


def _left(deadline: float | None) -> float:
    """The seconds until `deadline`, as `Lock.acquire` takes them: -1 means for ever."""
    if deadline is None:
        return -1
    return min(max(deadline - monotonic(), 0.0), threading.TIMEOUT_MAX)


def _bell() -> threading.Lock:
    """A lock that is held until someone rings: waiting for it is to acquire it."""
    bell = threading.Lock()
    bell.acquire()
    return bell


def _ring(bell: threading.Lock) -> None:
    """Wake who waits for `bell`, or spare its next wait.  Never blocks; rung twice is rung once."""
    try:
        if bell.locked():
            bell.release()
    except RuntimeError:
        pass  # another thread rang it between these two lines


######## Mailbox: put, get, get_if, get_all, empty


class Mailbox:
    """A queue of messages, from which the oldest that fits can be taken.  Factor: mailbox.

    Each message lies in a cell of its own, a list of one.  Taking it is `del cell[0]`: only one
    thread succeeds, without a lock, and Ctrl-C cannot strike between that and the `return` after
    it.  The empty cell is swept out by the next who meets it.  Any number of threads may put and
    get; putting is safe in a signal handler.
    """

    __slots__ = ("_cells", "_waiters")

    def __init__(self) -> None:
        self._cells: deque[list[Any]] = deque()  # oldest first, some of them empty
        self._waiters: list[tuple[deque[list[Any]], threading.Lock]] = []  # (news, its bell)

    def put(self, message: Any) -> None:
        """Add `message` as the newest.  Never blocks.  Factor: mailbox-put."""
        cell = [message]
        self._cells.append(cell)
        if self._waiters:
            for news, bell in self._waiters.copy():
                news.append(cell)
                _ring(bell)

    def get(self, timeout: float | None = None) -> Any:
        """Remove and return the oldest message.

        Blocks at most `timeout` seconds (None: for ever; 0: not at all).  Raises TimeoutError,
        leaving the mailbox as it was.  Factor: mailbox-get, mailbox-get-timeout.
        """
        cells = self._cells
        while cells:
            try:
                cell = cells[0]
                if cell:
                    message = cell[0]
                    del cell[0]
                    return message
                cells.remove([])  # sweeps the first empty cell, this one or another
            except (IndexError, ValueError):
                pass  # another thread took or swept it first
        return self.get_if(lambda message: True, timeout)

    def get_if(self, pred: Predicate, timeout: float | None = None) -> Any:
        """Remove and return the oldest message for which `pred` is true; the others stay, in order.

        A class, or a tuple of classes, stands for its `isinstance`.  `pred` runs in this thread
        with no lock held, once for each message (and again only if another thread snatches the
        chosen one).  Blocks at most `timeout` seconds (None: for ever; 0: not at all).  Raises
        TimeoutError or what `pred` raises, leaving the mailbox as it was.

        Factor: mailbox-get?, mailbox-get-timeout?.
        """
        accepts, deadline = _accepts(pred), _deadline(timeout)
        while True:
            cell = self._find(accepts, deadline)
            try:
                message = cell[0]
                del cell[0]
                return message
            except IndexError:
                pass  # another thread took it first

    def _find(self, accepts: Callable[[Any], Any], deadline: float | None) -> list[Any]:
        """Wait for a cell whose message fits; it is not taken yet."""
        waiter = news, bell = deque[list[Any]](), _bell()
        self._waiters.append(waiter)  # before looking, so that nothing slips in between unseen
        try:
            here = list(self._cells)
            for cell in here:
                for message in cell or self._sweep():
                    if accepts(message):
                        return cell
            seen = set(map(id, here))  # a put that was under way can be both here and in the news
            while True:
                while news:
                    cell = news.popleft()
                    for message in () if id(cell) in seen else cell:
                        if accepts(message):
                            return cell
                if not bell.acquire(True, _left(deadline)):
                    raise TimeoutError("no such message came within the time-out")
        finally:
            self._waiters.remove(waiter)

    def _sweep(self) -> tuple[()]:
        try:
            self._cells.remove([])
        except ValueError:
            pass
        return ()

    def get_all(self, timeout: float | None = None) -> list[Any]:
        """Wait for a message, then remove and return all there are, oldest first.

        Blocks and raises as `get` does.  Factor: mailbox-get-all, mailbox-get-all-timeout.
        """
        taken = [self.get(timeout)]
        try:
            for _ in range(len(self._cells)):
                taken.append(self.get(0))
        except TimeoutError:
            pass
        except BaseException:  # Ctrl-C: put back what would be lost
            self._cells.extendleft([message] for message in reversed(taken))
            raise
        return taken

    def empty(self) -> bool:
        """Whether no message is here now.  Never blocks; another thread may change it at once."""
        return not self._unread()

    def _unread(self) -> int:
        return sum(map(len, list(self._cells)))


def _accepts(pred: Predicate) -> Callable[[Any], Any]:
    if isinstance(pred, (type, tuple, types.UnionType)):
        kinds: Any = pred
        return lambda message: isinstance(message, kinds)
    return pred


######## Outcomes: everything that awaits one, and who owes it

_awaited: dict[str, "_Await"] = {}  # by tag, what this process waits for
_debts: dict[str, "tuple[Thread, int, bool]"] = {}  # by tag: who owes it, to which node, linked
_settling = threading.RLock()  # guards: taking from _awaited and telling who waits is one step


class _Await:
    """One thing that awaits an outcome, settled once: by a reply, an end or the loss of a node."""

    peer = 0  # the incarnation of the node whose loss settles it; 0: this node

    def __init__(self) -> None:
        self.tag = os.urandom(8).hex()  # not to be guessed, so that nobody can forge an outcome
        _awaited[self.tag] = self

    def settle(self, outcome: "Reply | DistconcError") -> bool:
        """Take the outcome; runs under `_settling`, so must not block.  True if it was of use."""
        raise NotImplementedError


def _settle(tag: str, outcome: "Reply | DistconcError") -> bool:
    with _settling:
        awaited = _awaited.pop(tag, None)
        return awaited is not None and awaited.settle(outcome)


def _strike(tag: str) -> None:
    """Nobody needs to hear any more of what is owed under `tag`."""
    debt = _debts.pop(tag, None)
    if debt:
        debt[0]._owes.discard(tag)


class _Link(_Await):
    """A parent that wants to hear of its child's failure."""

    child: "Handle | None" = None  # not known yet when the child ends before its start has answered
    failure: BaseException | None = None

    def __init__(self, parent: "Thread") -> None:
        self.parent = parent
        super().__init__()

    def settle(self, outcome: "Reply | DistconcError") -> bool:
        self.failure = outcome.reason if isinstance(outcome, ThreadDied) else outcome  # type: ignore
        self.deliver()
        return self.parent.is_alive()

    def deliver(self) -> None:
        """Send the failure once both it and the child are known; called when either becomes so."""
        with _settling:
            if self.failure and self.child:
                self.parent.send(LinkedError(self.failure, self.child))
                self.failure = None


######## Threads: Thread, current_thread, threads, spawn, spawn_linked, spawn_server

_ids = itertools.count(1)
_threads: dict[int, "Thread"] = {}  # the living, by id
_names: dict[str, "Thread"] = {}  # the registered, by name
_registry = threading.RLock()  # guards: a thread's end and its names change as one step
_incarnation = int.from_bytes(os.urandom(8), "big")


class Thread:
    """A thread with a mailbox, on this node; made by `spawn`.  Factor: thread.  Erlang: pid.

    `.id`, `.name` and `.node` tell which.  Can be put into messages: pickled, it turns into a
    `RemoteThread` that is equal to it; copying gives the thread itself.
    """

    __slots__ = ("id", "name", "_key", "_mailbox", "_owes", "_names", "_ended", "_over")

    def __init__(self, name: str) -> None:
        self.id = next(_ids)
        self.name = name
        self._key = (_incarnation, self.id)
        self._mailbox = Mailbox()
        self._owes: set[str] = set()  # tags of the calls, monitors and links that hear of its end
        self._names: tuple[str, ...] = ()  # registered; guarded by _registry
        self._ended = False  # guarded by _registry
        self._over = _bell()  # rung at the end, and passed on by each who waited for it

    @property
    def node(self) -> "Address | None":
        """The address of this thread's node, None while that does not listen."""
        return local_node().address

    def is_alive(self) -> bool:
        """Whether the thread has not ended.  Never blocks."""
        return not self._ended

    def join(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds for the thread's end; return whether it has ended."""
        if _here.thread is self:
            raise RuntimeError("a thread cannot wait for its own end")
        if self._over.acquire(True, _left(_deadline(timeout))):
            self._over.release()
        return self._ended

    def send(self, message: Any) -> None:
        """Put `message` itself into the thread's mailbox.  Never blocks; see `send`."""
        if message.__class__ is Reply:
            _strike(message.tag)
            _settle(message.tag, message)
        elif self._ended:
            _undelivered(self, f"{self} has ended")
        else:
            self._mailbox.put(message)

    def _request(self, awaited: "_Await", message: Any) -> None:
        if self._owe(awaited.tag):
            self._mailbox.put(Synchronous(message, current_thread(), awaited.tag))

    def _watch(self, awaited: "_Await") -> None:
        self._owe(awaited.tag)

    def _forget(self, awaited: "_Await") -> None:
        _strike(awaited.tag)

    def _owe(self, tag: str, creditor: int = 0, linked: bool = False) -> bool:
        """Have this thread's end told to whoever awaits `tag`; False if it has ended already."""
        _debts[tag] = self, creditor, linked
        self._owes.add(tag)
        if self._ended:  # perhaps just now, before it could see this debt
            self._tell(lambda: NoSuchThread(f"{self} has ended"))
            return False
        return True

    def _tell(self, error: Callable[[], DistconcError]) -> bool:
        """Settle all that this thread owes by its end; True if a link took the failure."""
        heard = False
        for tag in list(self._owes):
            self._owes.discard(tag)
            _, creditor, linked = _debts.pop(tag, (None, 0, False))
            told = _settle(tag, error()) if not creditor else _tell_node(creditor, tag, error())
            heard = heard or (linked and told)
        return heard

    def _start(self, func: Callable[..., Any], *args: Any) -> None:
        try:
            threading.Thread(target=self._run, args=(func, args), name=self.name, daemon=True).start()
        except BaseException as error:
            self._end(error)
            raise

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        _here.thread = self
        try:
            func(*args)
        except SystemExit:
            self._end(None)
        except BaseException as error:
            if not self._end(error):
                raise  # nobody is linked: threading.excepthook prints it
        else:
            self._end(None)

    def _end(self, reason: BaseException | None) -> bool:
        with _registry:
            self._ended = True
            _threads.pop(self.id, None)
            for name in self._names:
                _names.pop(name, None)
        heard = self._tell(partial(_obituary, self, reason))
        self._over.release()
        return heard

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Thread, RemoteThread)) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"<Thread {self.id} {self.name!r}{', ended' if self._ended else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteThread, (self.node, self.id, self._key[0])

    def __copy__(self) -> "Thread":
        return self

    def __deepcopy__(self, memo: Any) -> "Thread":
        return self


def _obituary(thread: Thread, reason: BaseException | None) -> ThreadDied:
    """What the end of `thread` is to those who wait for it."""
    if reason is None:
        return ThreadDied(f"{thread} ended before it replied")
    kind = type(reason).__name__
    died = ThreadDied(f"{thread} died before it replied: {kind}: {reason}", reason)
    died.__cause__ = RemoteError(kind, "".join(traceback.format_exception(reason)))
    return died


class _Here(threading.local):
    """What belongs to the running thread."""

    thread: Thread | None = None
    guest: "_Guest | None" = None


_here = _Here()


class _Guest:
    """Lies in the locals of an adopted thread, so as to be dropped, and tell, when that ends."""

    def __init__(self, thread: Thread) -> None:
        self.thread = thread

    def __del__(self) -> None:
        self.thread._end(None)


def current_thread() -> Thread:
    """Return the handle of the calling thread.  Never blocks.  Factor: self.  Erlang: self().

    A thread that `spawn` did not make (the main thread, a `threading.Thread`) is adopted.
    """
    if _here.thread is None:
        thread = _here.thread = Thread(threading.current_thread().name)
        _threads[thread.id] = thread
        if threading.current_thread() is not threading.main_thread():
            _here.guest = _Guest(thread)
    return _here.thread


def threads() -> dict[int, Thread]:
    """Return the living threads of this node by id, a new dict.  Never blocks.  Factor: threads."""
    return dict(_threads)


def spawn(
    func: Callable[..., Any],
    *args: Any,
    name: str | None = None,
    node: "NodeLike | None" = None,
    register: bool = False,
) -> "Handle":
    """Run `func(*args)` in a new daemon thread and return its handle.  Factor, Erlang: spawn.

    `name` defaults to the function's; with `register` it is registered before the thread runs.
    With `node` the thread runs there: `func` is imported there, and this blocks until it has
    started.  Raises there-raised errors here, NodeDown, SerializationError, AuthenticationError;
    then nothing has started (after NodeDown: perhaps).  For keyword arguments use
    `functools.partial`.
    """
    return _spawn(func, args, name, node, register)


def spawn_linked(
    func: Callable[..., Any],
    *args: Any,
    name: str | None = None,
    node: "NodeLike | None" = None,
    register: bool = False,
) -> "Handle":
    """Like `spawn`; if `func` fails or its node is lost, the calling thread gets a `LinkedError`.

    Exactly one, in its mailbox, raised by the `receive` that takes it.  Returning and SystemExit
    are no failure.  Factor: spawn-linked.
    """
    link = _Link(current_thread())
    try:
        link.child = _spawn(func, args, name, node, register, link)
    except BaseException:
        _awaited.pop(link.tag, None)  # what is raised here is the one error
        raise
    link.deliver()
    return link.child


def spawn_server(
    func: Callable[..., Any],
    *args: Any,
    name: str | None = None,
    node: "NodeLike | None" = None,
    register: bool = False,
) -> "Handle":
    """Like `spawn`, calling `func(*args)` again while it returns something true.  Factor: spawn-server."""
    return _spawn(_serve, (func, *args), name or _name_of(func), node, register)


def _serve(func: Callable[..., Any], *args: Any) -> None:
    while func(*args):
        pass


def _spawn(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    name: str | None,
    node: "NodeLike | None",
    register: bool,
    link: "_Link | None" = None,
) -> "Handle":
    if not callable(func):
        raise TypeError(f"spawn needs a function, then its arguments; {func!r} is none")
    name = name or _name_of(func)
    if node is not None and not local_node()._is_called(_address(node)):
        return _spawn_there(_address(node), func, args, name, register, link)
    return _spawn_here(func, args, name, register, link.tag if link else None)


def _spawn_here(func: Callable[..., Any], args: tuple[Any, ...], name: str, register: bool,
                link: str | None, parent: int = 0) -> Thread:
    thread = Thread(name)
    _threads[thread.id] = thread
    if link:
        thread._owe(link, parent, linked=True)
    if register:
        register_remote_thread(thread)
    thread._start(func, *args)
    return thread


def _name_of(func: Any) -> str:
    while isinstance(func, partial):
        func = func.func
    return str(getattr(func, "__name__", type(func).__name__))


######## Messages: send, receive, receive_if

_RAISE: Any = object()  # the default of `default`: raise TimeoutError


def send(message: Any, thread: "Handle") -> None:
    """Send `message` to `thread`.  Factor: send.  Erlang, Termite: !.

    To a thread of this node: puts the object itself into its mailbox, never blocks, never raises.
    To another node: sends a copy taken now; connects first if need be (at most the node's
    `connect_timeout`) and waits while too much is queued.  Raises SerializationError, NodeDown,
    AuthenticationError, with nothing sent.  Returning means accepted here; only a reply proves
    more.  What arrives for nobody is dropped there and logged here.
    """
    try:
        deliver = thread.send
    except AttributeError:
        raise TypeError(f"send(message, thread): {thread!r} is no thread") from None
    deliver(message)


def receive(timeout: float | None = None, default: Any = _RAISE) -> Any:
    """Remove and return the oldest message of the calling thread's mailbox.

    Blocks at most `timeout` seconds (None: for ever; 0: not at all), then returns `default` or
    raises TimeoutError.  Raises LinkedError if the message is the failure of a linked thread.

    Factor: receive, receive-timeout.
    """
    try:
        message = current_thread()._mailbox.get(timeout)
    except TimeoutError:
        if default is _RAISE:
            raise
        return default
    if message.__class__ is LinkedError:
        raise message
    return message


def receive_if(pred: Predicate, timeout: float | None = None, default: Any = _RAISE) -> Any:
    """Remove and return the oldest message for which `pred` is true; the others stay, in order.

    A class, or a tuple of classes, stands for its `isinstance`.  `pred` runs in this thread with
    no lock held, once for each message.  Blocks at most `timeout` seconds (None: for ever; 0: not
    at all), then returns `default` or raises TimeoutError.  Raises LinkedError if the search
    meets the failure of a linked thread, and what `pred` raises, leaving the mailbox as it was.

    Factor: receive-if, receive-if-timeout.  Erlang: selective receive.
    """
    accepts = _accepts(pred)
    try:
        message = current_thread()._mailbox.get_if(
            lambda message: message.__class__ is LinkedError or accepts(message), timeout
        )
    except TimeoutError:
        if default is _RAISE:
            raise
        return default
    if message.__class__ is LinkedError:
        raise message
    return message


######## Synchronous sends: Synchronous, Reply, send_, reply_, handle_synchronous


@dataclass(frozen=True, slots=True)
class Synchronous:
    """A message whose `sender` waits for a reply.  Factor: synchronous.  Erlang: call."""

    data: Any
    sender: "Handle"
    tag: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the `Synchronous` of the same `tag`.  Factor: reply."""

    data: Any
    tag: str


class _Call(_Await):
    """A caller that waits for its reply."""

    def __init__(self) -> None:
        self._answered = _bell()
        super().__init__()

    def settle(self, outcome: "Reply | DistconcError") -> bool:
        self.outcome = outcome
        self._answered.release()
        return True

    def wait(self, deadline: float | None) -> Any:
        if not self._answered.acquire(True, _left(deadline)):
            raise TimeoutError("no reply came within the time-out; the request may still run")
        if isinstance(self.outcome, Reply):
            return self.outcome.data
        raise self.outcome


def send_synchronous(message: Any, thread: "Handle", timeout: float | None = None) -> Any:
    """Send `message`, wait for its reply and return it.  Factor: send-synchronous.

    Blocks at most `timeout` seconds (None: until there is an outcome).  Looks at no other message:
    what is unread stays so.  Raises SerializationError, NodeUnreachable, NoSuchThread (nothing was
    delivered); RemoteError (the other node could not read it); ThreadDied, NodeDown, TimeoutError
    (the request may have run); SynchronousToSelfError.  A reply that comes later is dropped.
    """
    if thread == current_thread():
        raise SynchronousToSelfError(message, thread)
    deadline, call = _deadline(timeout), _Call()
    try:
        thread._request(call, message)
        return call.wait(deadline)
    finally:
        if _awaited.pop(call.tag, None):  # no outcome: whoever owes it need not keep it in mind
            thread._forget(call)


def reply_synchronous(reply: Any, synchronous: Synchronous) -> None:
    """Answer `synchronous`; any thread that holds it may, on any node.  Factor: reply-synchronous.

    Blocks as `send` does.  A caller that is gone or has given up hears nothing, which is no error.
    Raises SerializationError.
    """
    try:
        synchronous.sender.send(Reply(reply, synchronous.tag))
    except NodeDown as error:
        _undelivered(synchronous.sender, str(error))


def handle_synchronous(func: Callable[[Any], Any], timeout: float | None = None) -> bool:
    """Take the next `Synchronous`, reply with `func` of its data, return True.

    Made for `spawn_server(handle_synchronous, func)`, which serves for ever.  Other messages stay
    in the mailbox.  Blocks at most `timeout` seconds for the request, then raises TimeoutError.
    If `func` raises, so does this: the server fails, and with it the call.

    Factor: handle-synchronous.
    """
    request = receive_if(Synchronous, timeout)
    reply_synchronous(func(request.data), request)
    return True


######## Addresses and keys: what a node is called, and who may come in

Address = Union[tuple[str, int], str]
NodeLike = Union[int, str, tuple[str, int], "os.PathLike[str]", "Node", "ChildNode"]


def _address(node: Any) -> Address | None:
    """One spelling for all that can be said where a node is asked for; None does not listen."""
    given, node = node, getattr(node, "address", node)
    if isinstance(node, int) and not isinstance(node, bool):
        node = ("127.0.0.1", node)
    if isinstance(node, str) and "/" not in node and node.rpartition(":")[2].isdecimal():
        host, _, port = node.rpartition(":")
        node = (host, int(port))
    match node:
        case str() | os.PathLike():
            return os.path.abspath(node)
        case (str(host), int(port)) if 0 <= port < 65536 and ":" not in host:
            return "127.0.0.1" if host in ("", "localhost") else host, port
        case None:
            return None
    raise ValueError(f"not a node: {given!r}; say 9000, 'host:9000', ('host', 9000) or a path")


def _text(address: Address | None) -> str:
    return address if isinstance(address, str) else "%s:%d" % address if address else ""


def _on_loopback(address: Address | None) -> bool:
    return not isinstance(address, tuple) or address[0].startswith("127.")


def _authkey(given: bytes | str | None, address: Address | None) -> bytes:
    """The key: as given, or from the environment, or from the cookie file."""
    key = os.environ.get("DISTCONC_AUTHKEY") if given is None else given
    source = "DISTCONC_AUTHKEY" if given is None else "authkey"
    if key is None:
        source = os.environ.get("DISTCONC_COOKIE") or os.path.expanduser("~/.distconc.cookie")
        key = _cookie(source)
    if isinstance(key, str):
        key = key.encode()
    if not key:
        raise ValueError(f"the key from {source} is empty, which would let everybody in")
    if len(key) < 16 and not _on_loopback(address):
        raise ValueError(f"the key from {source} has {len(key)} bytes; off this machine use 16 or more")
    return key


def _cookie(path: str) -> bytes:
    """Read the cookie file; make it first if there is none."""
    if not os.path.exists(path):
        draft = f"{path}.{os.getpid()}.{threading.get_ident()}"
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(os.urandom(32).hex() + "\n")
        try:
            os.link(draft, path)  # unlike a rename, fails if another process was first
        except FileExistsError:
            pass
        finally:
            os.unlink(draft)
    with open(path, "rb") as file:
        if os.name == "posix" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise PermissionError(f"others can read the key in {path}: chmod 600 {path}")
        return file.read().strip()


######## Remote handles: RemoteThread and the names of threads


class RemoteThread:
    """A handle of a thread on some node, by its id or registered name.  Factor: remote-thread.

    `.node` is the node's address, `.id` the id or name.  Immutable.  One that a `Thread` was
    pickled into is equal to that thread, on any node, and no later run of its node will take it
    for another; one made by hand equals one made by hand of the same node and id.
    """

    __slots__ = ("_node", "_id", "_key", "_target")

    def __init__(self, node: "NodeLike | None", id: "int | str", incarnation: int = 0) -> None:
        self._node = _address(node)
        self._id = id
        self._key = (incarnation or self._node, id)
        self._target = (incarnation, id)

    node = property(lambda self: self._node)
    id = property(lambda self: self._id)

    def send(self, message: Any) -> None:
        """Send a copy of `message` to the thread; see `send`."""
        if self._is_here():
            try:
                get_remote_thread(self._id).send(message)
            except NoSuchThread as error:
                _undelivered(self, str(error))
        elif message.__class__ is Reply:
            payload = serialize(message.data)
            _strike(message.tag)
            local_node()._send(self, (REPLY, message.tag, payload))
        else:
            local_node()._send(self, (SEND, self._target, serialize(message)))

    def _request(self, awaited: _Await, message: Any) -> None:
        if self._is_here():
            return get_remote_thread(self._id)._request(awaited, message)
        caller = current_thread()
        payload = serialize(message)
        local_node()._send(self, (CALL, self._target, caller.id, awaited.tag, payload), awaited)

    def _watch(self, awaited: _Await) -> None:
        if self._is_here():
            return get_remote_thread(self._id)._watch(awaited)
        local_node()._send(self, (WATCH, self._target, awaited.tag, b""), awaited)

    def _forget(self, awaited: _Await) -> None:
        if awaited.peer:
            local_node()._post(awaited.peer, (FORGET, awaited.tag))
        else:
            _strike(awaited.tag)

    def _is_here(self) -> bool:
        incarnation = self._target[0]
        return incarnation == _incarnation or not incarnation and local_node()._is_called(self._node)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Thread, RemoteThread)) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"RemoteThread({_text(self._node) or None!r}, {self._id!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteThread, (self._node, self._id, self._target[0])


Handle = Union[Thread, RemoteThread]


def register_remote_thread(thread: Thread, name: str | None = None) -> None:
    """Let other nodes reach `thread` by `name`, by default its own.  Factor: register-remote-thread.

    Never blocks.  A thread may have many names; a name that was another's is its no more.  Names
    go when the thread ends.  Raises TypeError unless it is a thread of this node, NoSuchThread if
    it has ended.  Erlang: register.
    """
    if not isinstance(thread, Thread):
        raise TypeError(f"only a thread of this node can be registered here, not {thread!r}")
    name = thread.name if name is None else name
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, not {name!r}")
    with _registry:
        if thread._ended:
            raise NoSuchThread(f"{thread} cannot be registered as {name!r}")
        _names[name] = thread
        thread._names = (*thread._names, name)


def unregister_remote_thread(name: str) -> None:
    """Forget a registered name.  Never blocks.  Raises NoSuchThread.  Factor: unregister-remote-thread."""
    with _registry:
        thread = _names.pop(name, None)
        if thread is None:
            raise _no_such_thread(name)
        thread._names = tuple(known for known in thread._names if known != name)


def get_remote_thread(name_or_id: int | str) -> Thread:
    """Return the thread of this node that others reach so.  Never blocks.  Raises NoSuchThread.

    Factor: get-remote-thread.  Erlang: whereis.
    """
    thread = _names.get(name_or_id) or _threads.get(name_or_id)  # type: ignore[arg-type,call-overload]
    if thread is None:
        raise _no_such_thread(name_or_id)
    return thread


def _no_such_thread(name_or_id: int | str) -> NoSuchThread:
    from difflib import get_close_matches

    text = f"no living thread {'has id' if isinstance(name_or_id, int) else 'is registered as'} {name_or_id!r}"
    if isinstance(name_or_id, str):
        near = get_close_matches(name_or_id, list(_names), cutoff=0.5)
        known = near or sorted(_names)[:5]
        text += f"; did you mean {' or '.join(map(repr, near))}?" if near else (
            f"; registered are {', '.join(map(repr, known))}" if known else "; no names are registered")
    return NoSuchThread(text)


######## Serializing: serialize, deserialize, and what `allow` lets in


def serialize(obj: Any) -> bytes:
    """Return `obj` as bytes: the copy that a remote `send` makes.  Factor: object>bytes.

    Handles of threads turn into `RemoteThread`; cycles and shared objects survive.  Raises
    SerializationError, which names the part that cannot be pickled.
    """
    try:
        return pickle.dumps(obj, 5)
    except Exception as error:
        raise SerializationError(_culprit(obj, error)) from error


def deserialize(data: bytes) -> Any:
    """Return the object that `serialize` made `data` of, if this node allows it.  Factor: bytes>object.

    Raises what unpickling may raise, and that is anything: data from strangers can run code.
    """
    return local_node()._load(data)


def _culprit(obj: Any, error: Exception) -> str:
    """Follow what cannot be pickled down to its smallest part, and say where that is."""
    path, seen = "message", {id(obj)}
    for _ in range(20):  # no deeper: each step pickles all siblings
        for where, part in _parts(obj):
            try:
                if id(part) not in seen:
                    pickle.dumps(part, 5)
            except Exception as inner:
                path, obj, error = path + where, part, inner
                seen.add(id(part))
                break
        else:
            break
    return (
        f"{path} is a {type(obj).__name__} and cannot be sent to another node ({error}); "
        "send plain data, something importable, or the handle of a thread that keeps it"
    )


def _parts(obj: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(obj, dict):
        return [(f"[{key!r}]", value) for key, value in obj.items()]
    if isinstance(obj, (list, tuple)):
        return [(f"[{index}]", value) for index, value in enumerate(obj)]
    return [(f".{name}", value) for name, value in getattr(obj, "__dict__", {}).items()]


def _loader(allow: Any) -> Callable[[Any], Any]:
    """Return what unpickles messages: anything, or plain data and what `allow` names."""
    if allow == "anything":
        return pickle.loads
    import builtins, datetime, decimal, fractions, io, uuid

    plain: list[Any] = [complex, range, set, frozenset, bytearray, datetime.date, datetime.time]
    plain += [datetime.datetime, datetime.timedelta, datetime.timezone]
    plain += [decimal.Decimal, fractions.Fraction, uuid.UUID, RemoteThread, Synchronous, Reply]
    plain += [kind for kind in (*vars(builtins).values(), *globals().values())
              if isinstance(kind, type) and issubclass(kind, BaseException)]
    for item in allow or ():
        if not callable(item) or not hasattr(item, "__qualname__"):
            raise TypeError(f"allow= takes classes and functions themselves, not {item!r}")
    known = {(item.__module__, item.__qualname__): item for item in (*plain, *(allow or ()))}

    class Narrow(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            try:
                return known[module, name]
            except KeyError:
                raise _Refused(f"{module}.{name} is not what this node allows") from None

    return lambda data: Narrow(io.BytesIO(data)).load()


class _Refused(pickle.UnpicklingError):
    """A message names something that `allow` does not."""


######## The wire: hello, seal, frames and their messages

VERSION = b"distconc 1"
SEND, CALL, REPLY, WATCH, FORGET, DIED, NOBODY, UNREAD, LOST = range(9)
KERNEL = 0  # the id of the thread that does what one node asks of another
HEAD = struct.Struct(">II16s")  # length of the messages, length of the tail, MAC
LARGE = 2048  # from here on, copying a payload into a batch costs more than a write of its own
FULL = 4000  # messages in an outbox: who sends more, waits for the network
BURST = 50e-6  # seconds: a send so soon after a write is one of many, and left to the writer


class _Hello:
    """What each side says of itself after the stock challenge, and the keys that follow from it."""

    def __init__(self, line: bytes) -> None:
        version, self.role, _, incarnation, heartbeat, limit, address, *self.meant = line.split(b"\0")
        if version != VERSION:
            raise AuthenticationError(f"the other side speaks {version!r}, not {VERSION!r}")
        self.line, self.incarnation = line, int(incarnation, 16)
        self.heartbeat, self.limit = float(heartbeat), int(limit)
        self.address = _address(address.decode() or None)


class _Seal:
    """The MACs of one direction: HMAC-SHA256 over a counter and the frame, cut to 16 bytes."""

    def __init__(self, authkey: bytes, writer: bytes, dialler: _Hello, acceptor: _Hello) -> None:
        hellos = hashlib.sha256(dialler.line).digest() + hashlib.sha256(acceptor.line).digest()
        key = hmac.digest(authkey, writer + hellos, "sha256").ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in key))
        self._count = 0

    def mac(self, *parts: Any) -> bytes:
        """The MAC of the next frame; to hash 2 states of `hmac` afresh each time costs twice."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(self._count.to_bytes(8, "big"))
        self._count += 1
        for part in parts:
            inner.update(part)
        outer.update(inner.digest())
        return outer.digest()[:16]


######## Connection: one sealed connection, its outbox, reader and writer


class _Ended(Exception):
    """The connection ended before it took the message."""


class _Connection:
    """One connection to another node.  Both speak on it; senders write, only the reader reads.

    A sender appends to the outbox, and empties that itself if the last write was a while ago or
    something was read since.  A message that follows a write at once is one of many: it is left
    to the writer thread, which gets to run when the senders pause or the interpreter switches,
    and by then writes hundreds in one frame.  The reader never writes, so that two nodes that
    flood each other go on reading.

    reader: started by `start`; wakes by what arrives, or by `cut`; ends by itself and cleans up.
    writer: started by `start`; wakes by its bell; ends when the connection does, the last outbox
    written.
    """

    def __init__(self, node: "Node", sock: socket.socket, mine: _Hello, peer: _Hello,
                 seals: tuple[_Seal, _Seal]) -> None:
        self.peer, self.address = peer.incarnation, peer.address
        self.limit = min(node._max_message, peer.limit)
        self.stamp = self.peer_stamp = 0  # when each side came to count this connection
        self.ending = False  # once true, takes no more messages
        self.sent = self.received = 0
        self.heartbeat = min(mine.heartbeat, peer.heartbeat)
        self._node, self._sock = node, sock
        self._file = sock.makefile("rb", 1 << 16)
        self._seal, self._check = seals
        self._outbox: deque[tuple[Any, ...]] = deque()  # what waits to be written
        self._writing = threading.Lock()  # guards: emptying the outbox, the seal, _muted and the socket's output
        self._muted = False  # the output was shut: what is in the outbox now stays there
        self._bell = _bell()  # wakes the writer
        self._wrote = 0.0  # when a frame was last written; 0 after each read, when an answer is due
        self._idle = True  # nothing was written since the last beat
        self._silent = -1  # beats since something was read; below zero while the reader is busy
        self.due = float("inf")  # when the next beat is; none before the start
        self._writer = threading.Thread(target=self._write_on, name="distconc writer", daemon=True)
        self._on = {
            SEND: self._on_send, CALL: self._on_call, REPLY: self._on_reply, WATCH: self._on_watch,
            FORGET: self._on_forget, DIED: self._on_died, NOBODY: self._on_nobody,
            UNREAD: self._on_unread, LOST: self._on_lost,
        }

    def start(self) -> None:
        self.due = 0.0
        self._writer.start()
        threading.Thread(target=self._read_on, name="distconc reader", daemon=True).start()

    # Writing

    def send(self, message: tuple[Any, ...]) -> None:
        """Have `message` written, its payload last; waits while too much waits.

        Raises _Ended if the connection ended before taking it, OSError if while writing it.
        """
        if len(message[-1]) > LARGE:
            with self._writing:
                if self.ending:
                    raise _Ended
                self._flush()
                self._write([(*message[:-1], None)], message[-1])
            return
        self._outbox.append(message)
        if len(self._outbox) > FULL:
            self._writing.acquire()
        elif monotonic() - self._wrote < BURST or not self._writing.acquire(False):
            _ring(self._bell)
            if self.ending:
                self._retract(message)
            return
        try:
            self._flush()
        finally:
            self._writing.release()
        if self.ending:
            self._retract(message)

    def _retract(self, message: tuple[Any, ...]) -> None:
        """Take back what came too late for the writer's last round."""
        self._writer.join()
        try:
            self._outbox.remove(message)
        except ValueError:
            return  # it was still written
        raise _Ended

    def post(self, message: tuple[Any, ...]) -> None:
        """Have `message` written soon.  Never blocks: for readers and threads that are ending."""
        self._outbox.append(message)
        _ring(self._bell)

    def _flush(self) -> None:
        """Write the outbox, in frames of many messages; `_writing` is held."""
        outbox = self._outbox
        while outbox and not self._muted:
            self._write([outbox.popleft() for _ in range(min(len(outbox), 1000))], b"")

    def _write(self, messages: list[tuple[Any, ...]], tail: bytes) -> None:
        body = pickle.dumps(messages, 5)
        lengths = HEAD.pack(len(body), len(tail), b"")[:8]
        frame = lengths + self._seal.mac(lengths, body, tail) + body
        try:
            if tail:
                _send_both(self._sock, frame, tail)
            else:
                self._sock.sendall(frame)
        except BaseException:  # Ctrl-C too: half a frame may be out, nothing can follow it
            self.cut()
            raise
        self._wrote = monotonic()
        self._idle = False
        self.sent += sum(message[0] <= REPLY for message in messages)

    def _write_on(self) -> None:
        try:
            while not self.ending:
                self._bell.acquire()
                with self._writing:
                    if self._outbox:
                        self._flush()
                    elif self._idle:
                        self._write([], b"")
            with self._writing:
                self._flush()
                self._muted = True
                self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.cut()
        self._muted = True

    def close(self) -> None:
        """Take no more; have what waits written, then say the end.  Never blocks."""
        self.ending = True
        _ring(self._bell)

    def cut(self) -> None:
        """End the connection now.  Never blocks; the reader notices and cleans up."""
        self.ending = True
        _hang_up(self._sock)
        _ring(self._bell)

    def beat(self) -> None:
        """Five times a heartbeat: show the peer that we live, look whether it does."""
        if self._silent >= 4:
            self.cut()
        elif self._silent >= 0 or self.ending:
            self._silent += 1
        if self._idle:
            _ring(self._bell)
        self._idle = True

    # Reading

    def _read_on(self) -> None:
        try:
            while True:
                messages, tail = self.read_frame()
                self._silent = -1
                self._wrote = 0.0
                lost: Counter[tuple[Any, str]] = Counter()
                for message in messages:
                    payload = tail if message[-1] is None else message[-1]
                    self._on[message[0]](message, payload, lost)
                for (target, why), times in lost.items():
                    self.post((LOST, target, why, times))
        except EOFError:
            self.close()  # the peer has said all; so may we
        except Exception as error:
            _log.info("connection to %s ended: %s", _text(self.address), error)
            self.cut()
        self._silent = 0  # from now on beats count until the writer, too, must be done
        self._writer.join()
        self._node._forget(self)
        self.release()

    def release(self) -> None:
        """Give the descriptors back; nobody uses them any more."""
        with self._writing:
            self._muted = True
            self._file.close()
            self._sock.close()

    def read_frame(self) -> tuple[list[tuple[Any, ...]], Any]:
        """Wait for a frame, check its seal before anything else, return its messages and tail."""
        self._silent = 0
        head = self._file.read(HEAD.size)
        if not head:
            raise EOFError
        body_size, tail_size, mac = HEAD.unpack(head)
        if body_size > 1 << 24 or tail_size > self._node._max_message:
            raise OSError(f"a frame of {body_size} + {tail_size} bytes is too large")
        body, tail = self._read(body_size), self._read(tail_size)
        if not hmac.compare_digest(mac, self._check.mac(head[:8], body, tail)):
            raise OSError("a frame was altered, repeated, lost or out of order")
        return self._node._load(body), tail

    def _read(self, size: int) -> Any:
        if size <= 1 << 16:
            data = self._file.read(size)
            if len(data) < size:
                raise OSError("cut off in the middle of a frame")
            return data
        buffer = memoryview(bytearray(size))  # takes no memory before the bytes come
        at = 0
        while at < size:
            count = self._file.readinto1(buffer[at:])  # type: ignore[attr-defined]
            if not count:
                raise OSError("cut off in the middle of a frame")
            at += count
            self._silent = 0  # a large message on its way is no silence
        return buffer

    def _on_send(self, message: tuple[Any, ...], payload: Any, lost: "Counter[tuple[Any, str]]") -> None:
        self.received += 1
        target = message[1]
        try:
            self._node._find(target).send(self._node._load(payload))
        except NoSuchThread as error:
            lost[target, str(error)] += 1
            self._node._count("undelivered")
        except BaseException as error:  # loading may raise anything, SystemExit too
            lost[target, self._unread(error)] += 1

    def _unread(self, error: BaseException) -> str:
        self._node._count("refused" if isinstance(error, _Refused) else "undelivered")
        return f"the other node could not read it: {type(error).__name__}: {error}"

    def _on_call(self, message: tuple[Any, ...], payload: Any, _: Any) -> None:
        self.received += 1
        _, target, caller, tag, _ = message
        try:
            thread = self._node._find(target)
            data = self._node._load(payload)
        except NoSuchThread as error:
            self._node._count("undelivered")
            return self.post((NOBODY, tag, str(error)))
        except BaseException as error:
            return self.post((UNREAD, tag, type(error).__name__, self._unread(error)))
        if thread._owe(tag, self.peer):
            thread._mailbox.put(Synchronous(data, RemoteThread(self.address, caller, self.peer), tag))
        if target[1] == KERNEL:
            thread._start(_kernel)

    def _on_watch(self, message: tuple[Any, ...], *_: Any) -> None:
        _, target, tag, _ = message
        try:
            self._node._find(target)._owe(tag, self.peer)
        except NoSuchThread as error:
            self.post((NOBODY, tag, str(error)))

    def _on_forget(self, message: tuple[Any, ...], *_: Any) -> None:
        _strike(message[1])

    def _on_reply(self, message: tuple[Any, ...], payload: Any, _: Any) -> None:
        self.received += 1
        tag = message[1]
        awaited = _awaited.get(tag)
        if awaited and awaited.peer != self.peer:  # another than the called answered: release that
            self._node._post(awaited.peer, (FORGET, tag)) if awaited.peer else _strike(tag)
        try:
            _settle(tag, Reply(self._node._load(payload), tag))
        except BaseException as error:
            text = f"the reply could not be read here: {type(error).__name__}: {error}"
            _settle(tag, RemoteError(type(error).__name__, text))

    def _on_died(self, message: tuple[Any, ...], payload: Any, _: Any) -> None:
        _, tag, text, kind, trace, _ = message
        if not kind:
            _settle(tag, ThreadDied(text))
            return
        cause = RemoteError(kind, trace)
        try:
            reason = self._node._load(payload)
        except BaseException:
            reason = cause
        died = ThreadDied(text, reason if isinstance(reason, BaseException) else cause)
        died.__cause__ = cause
        _settle(tag, died)

    def _on_nobody(self, message: tuple[Any, ...], *_: Any) -> None:
        _settle(message[1], NoSuchThread(f"at {_text(self.address)}: {message[2]}"))

    def _on_unread(self, message: tuple[Any, ...], *_: Any) -> None:
        _settle(message[1], RemoteError(*message[2:4]))

    def _on_lost(self, message: tuple[Any, ...], *_: Any) -> None:
        _, (_, name_or_id), why, times = message
        _log_lost((self.address, name_or_id), f"{name_or_id!r} at {_text(self.address)}", why, times)


def _send_both(sock: socket.socket, frame: bytes, tail: Any) -> None:
    """Write a frame and its tail without copying them together."""
    if hasattr(sock, "sendmsg"):
        sent = sock.sendmsg([frame, tail])
        frame, tail = frame[sent:], memoryview(tail)[max(sent - len(frame), 0):]
    sock.sendall(frame)
    sock.sendall(tail)


def _hang_up(sock: socket.socket) -> None:
    """Wake all who read or write `sock` with its end; it is closed by its owner."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # ended already


######## Node: start_node, stop_node, local_node, nodes, connect, disconnect


class Node:
    """This process as others address it; made by `start_node`, or when first needed.

    A context manager: leaving it stops the node.

    accepter: started by `start_node`; wakes by a client; ends when the node stops.
    doorman, one a stranger: started by the accepter; ends by the handshake or its deadline.
    dialler, one a dial: started by the first sender; likewise.
    warden: started with the first connection; wakes for each beat and deadline; ends with the node.
    """

    def __init__(self) -> None:
        self.address: Address | None = None
        self.incarnation = _incarnation
        self._started = self._stopped = False
        self._lock = threading.RLock()  # guards all tables below
        self._changed = threading.Condition(self._lock)  # a connection came or went, or a deadline
        self._speaking: dict[Any, _Connection] = {}  # by incarnation and address: where to send
        self._open: set[_Connection] = set()  # all, half-made and ending ones too
        self._dials: dict[Address, _Dial] = {}
        self._shaking: dict[socket.socket, float] = {}  # handshakes and their deadlines, oldest first
        self._counts: Counter[str] = Counter()
        self._stamps = itertools.count(1)
        self._warden: threading.Thread | None = None
        self._listener: Listener | None = None
        self._bound: Address | None = None
        self._configure()

    def _configure(self, authkey: bytes | str | None = None, advertise: "NodeLike | None" = None,
                   allow: Any = None, heartbeat: float = 10.0, connect_timeout: float = 5.0,
                   max_message: int = 1 << 28) -> None:
        if heartbeat <= 0 or connect_timeout <= 0:
            raise ValueError("heartbeat and connect_timeout are seconds above zero")
        if not 0 < max_message < 1 << 32:
            raise ValueError("max_message is bytes, from 1 to 4 GiB - 1")
        self._given_key, self._advertise = authkey, _address(advertise)
        self._heartbeat, self._connect_timeout = heartbeat, connect_timeout
        self._max_message = max_message
        self._allow = allow
        self._load = _loader("anything" if allow is None else allow)

    def _listen(self, address: Address) -> None:
        """Open the door: bind, choose the advertised address, start the accepter."""
        key = _authkey(self._given_key, address)
        if self._allow is None and not _on_loopback(address):
            self._load = _loader(None)
        family = "AF_UNIX" if isinstance(address, str) else "AF_INET"
        try:
            self._listener = Listener(address, family, backlog=128)
        except OSError as error:
            cure = "does another node run there? choose another address, or 0 for any free port"
            raise OSError(error.errno, f"cannot listen at {_text(address)}: {error.strerror}; {cure}") from None
        self._given_key = key
        self._bound = self.address = _address(self._listener.address)
        if isinstance(self._bound, tuple) and self._bound[0] == "0.0.0.0":
            self.address = (socket.gethostname(), self._bound[1])
        self.address = self._advertise or self.address
        threading.Thread(target=self._accept_on, name="distconc accepter", daemon=True).start()

    def __enter__(self) -> "Node":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def __str__(self) -> str:
        return _text(self.address)

    def __repr__(self) -> str:
        return f"<Node {self or 'that does not listen'}{', stopped' if self._stopped else ''}>"

    def stats(self) -> dict[str, int]:
        """Count what passed since the start: messages `sent` and `received`, those `undelivered`
        here (nobody, or unreadable) and `refused` by `allow`, those `lost` on other nodes, and the
        `strangers` who knocked and did not get in.  Never blocks.
        """
        with self._lock:
            counts = Counter(dict.fromkeys(_COUNTS, 0)) + self._counts
            for connection in self._open:
                counts["sent"] += connection.sent
                counts["received"] += connection.received
            return {name: counts[name] for name in _COUNTS}

    def stop(self, timeout: float = 5.0) -> None:
        """Stop the node; see `stop_node`."""
        deadline = monotonic() + timeout
        with self._changed:
            self._stopped = True
            for sock in self._shaking:
                _hang_up(sock)
            for connection in self._open:
                connection.close()
            self._changed.notify_all()
        with _registry:
            for name in list(_names):
                unregister_remote_thread(name)
        self._close_door(deadline)
        with self._changed:
            if not self._changed.wait_for(lambda: not self._open, max(deadline - monotonic() - 0.2, 0)):
                for connection in self._open:
                    connection.cut()
                self._changed.wait_for(lambda: not self._open, max(deadline - monotonic(), 0))
        _log_rest()

    # Names and counts

    def _is_called(self, address: Address | None) -> bool:
        return address is not None and address in (self.address, self._bound)

    def _count(self, name: str, times: int = 1) -> None:
        with self._lock:
            self._counts[name] += times

    def _find(self, target: tuple[int, int | str]) -> Thread:
        incarnation, name_or_id = target
        if incarnation and incarnation != self.incarnation:
            raise NoSuchThread(f"{name_or_id!r} was a thread of an earlier run of this node")
        return Thread("kernel") if name_or_id == KERNEL else get_remote_thread(name_or_id)

    # Sending

    def _send(self, handle: RemoteThread, message: tuple[Any, ...], awaited: _Await | None = None) -> None:
        """Send over the connection there is, or one made now; once more if it ended untaken."""
        incarnation, node, size = handle._target[0], handle._node, len(message[-1])
        if size > self._max_message:
            raise SerializationError(f"{size} bytes are more than max_message, {self._max_message}")
        for _ in range(2):
            connection = self._speaking.get(incarnation) or self._speaking.get(node)
            if connection is None or connection.ending:
                connection = self._reach(node, incarnation)
            if size > connection.limit:
                raise SerializationError(f"{size} bytes are more than the other node's max_message")
            if awaited:
                awaited.peer = connection.peer
            try:
                return connection.send(message)
            except _Ended:
                continue
            except OSError as error:
                raise NodeDown(f"lost {handle} while sending to it ({error})") from error
        raise NodeDown(f"the connections to {_text(node)} ended before they took the message")

    def _post(self, peer: int, message: tuple[Any, ...]) -> bool:
        """Send if still connected.  Never blocks."""
        connection = self._speaking.get(peer)
        if connection and not connection.ending:
            connection.post(message)
            return True
        return False

    def _depend(self, awaited: _Await, peer: int) -> None:
        """Have the loss of `peer` settle `awaited`."""
        awaited.peer = peer
        if peer not in self._speaking:  # lost before it was said
            _settle(awaited.tag, NodeDown("lost contact with that node at once"))

    def _reach(self, node: Address | None, incarnation: int = 0) -> _Connection:
        """Return the connection to speak on; share the dial with all who wait for it."""
        deadline = monotonic() + self._connect_timeout
        with self._changed:
            while True:
                if self._stopped:
                    raise NodeDown("this node was stopped; start_node starts it again")
                connection = self._speaking.get(incarnation) or self._speaking.get(node)
                if connection and not connection.ending:
                    return connection
                if not connection:
                    break
                if not self._changed.wait(max(deadline - monotonic(), 0)):
                    raise NodeUnreachable(f"the last connection to {_text(node)} has not ended yet")
            if node is None:
                raise NodeUnreachable("that node does not listen, and is not connected any more")
            dial = self._dials.get(node)
            if dial is None:
                dial = self._dials[node] = _Dial(self, node, _authkey(self._given_key, node))
        return dial.wait(deadline)

    # Connecting

    def _accept_on(self) -> None:
        listener = self._listener
        assert listener
        while not self._stopped:
            try:
                stranger = listener.accept()
                threading.Thread(target=self._admit, args=(stranger,), name="distconc doorman",
                                 daemon=True).start()
            except (OSError, RuntimeError) as error:  # out of descriptors or threads: let some go
                _log.info("cannot let anybody in just now: %s", error)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped, 0.05)
        listener.close()

    def _close_door(self, deadline: float) -> None:
        """Wake the accepter, which closes the listener: nothing but a client wakes it."""
        bound, self._bound = self._bound, None
        if bound is None:
            return
        try:
            kind = socket.AF_UNIX if isinstance(bound, str) else socket.AF_INET
            with socket.socket(kind) as client:
                client.settimeout(max(deadline - monotonic(), 0.01))
                client.connect(("127.0.0.1", bound[1]) if bound[0] == "0.0.0.0" else bound)
        except OSError:
            pass  # it woke by somebody else

    def _admit(self, stranger: Any) -> None:
        try:
            if self._stopped:
                stranger.close()
            else:
                self._shake(stranger, self._given_key, None)
        except Exception as error:
            self._count("strangers")
            _log.info("somebody knocked and was not let in: %s: %s", type(error).__name__, error)

    def _shake(self, stranger: Any, key: Any, dialled: Address | None) -> _Connection:
        """Shake hands, both ways and within the time; return the connection, started."""
        path = isinstance(dialled or self._bound, str)
        sock = socket.fromfd(stranger.fileno(), socket.AF_UNIX if path else socket.AF_INET, socket.SOCK_STREAM)
        connection = None
        try:
            with stranger, self._hurry(sock, dialled):
                if not path:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for step in (answer_challenge, deliver_challenge)[:: 1 if dialled else -1]:
                    step(stranger, key)
                mine = self._hello(sock, dialled)
                stranger.send_bytes(mine.line)
                peer = _Hello(stranger.recv_bytes(4096))
                self._check_hello(mine, peer, sock)
                pair = (mine, peer) if dialled else (peer, mine)
                seals = _Seal(key, mine.role, *pair), _Seal(key, peer.role, *pair)
                connection = _Connection(self, sock, mine, peer, seals)
                self._introduce(connection, dialled)
            return connection
        except BaseException:
            with self._changed:
                self._open.discard(connection)  # type: ignore[arg-type]
                self._changed.notify_all()
            if connection:
                connection.release()
            sock.close()
            raise

    def _hello(self, sock: socket.socket, dialled: Address | None) -> _Hello:
        role = b"dialler" if dialled else b"acceptor"
        meant = [_text(dialled), _text(sock.getpeername())] if dialled else []
        fields = [os.urandom(16).hex(), f"{self.incarnation:x}", self._heartbeat, self._max_message]
        line = [VERSION, role, *(str(field).encode() for field in (*fields, _text(self.address), *meant))]
        return _Hello(b"\0".join(line))

    def _check_hello(self, mine: _Hello, peer: _Hello, sock: socket.socket) -> None:
        if {mine.role, peer.role} != {b"dialler", b"acceptor"}:
            raise AuthenticationError("the other side plays our own part: our words came back to us")
        mine_called = {_text(name).encode() for name in (self.address, self._bound, sock.getsockname())}
        if peer.role == b"dialler" and not mine_called & set(peer.meant):
            raise AuthenticationError(
                f"{b' or '.join(peer.meant).decode()} was dialled, which is not what this node is "
                "called; behind NAT or a tunnel say so with advertise="
            )

    def _introduce(self, connection: _Connection, dialled: Address | None) -> None:
        """Exchange the first sealed frames, wait for older connections' ends, go live.

        Each side numbers its connections, and says with the first frame the oldest that it still
        counts among those between the two.  What is older is lost over there, so the other side
        reads it to its end before the new one may speak: no old message comes after a new one.
        """
        for mine in (True, False) if dialled else (False, True):
            with self._changed:
                if mine:
                    connection.stamp = next(self._stamps)
                    self._open.add(connection)
                    floor = min(c.stamp for c in self._open if c.peer == connection.peer)
            if mine:
                connection._write([(connection.stamp, floor)], b"")
            else:
                [(connection.peer_stamp, oldest)], _ = connection.read_frame()
                self._outlive(connection, oldest)
        with self._changed:
            if self._stopped:
                raise NodeDown("this node was stopped")
            for key in (connection.peer, connection.address, dialled):
                if key and (key not in self._speaking or self._speaking[key].ending):
                    self._speaking[key] = connection
            connection.start()
            self._changed.notify_all()

    def _outlive(self, connection: _Connection, oldest: int) -> None:
        """Wait until what the peer no longer counts, and what is ending here, has been read."""
        def old() -> list[_Connection]:
            return [c for c in self._open if c.peer == connection.peer != self.incarnation
                    and c is not connection and (c.ending or 0 < c.peer_stamp < oldest)]
        with self._changed:
            for stale in old():
                stale.cut()
            if not self._changed.wait_for(lambda: not old(), self._connect_timeout):
                raise NodeUnreachable("the connection before this one has not ended yet")

    @contextmanager
    def _hurry(self, sock: socket.socket, dialled: Address | None) -> Iterator[None]:
        """Have the warden end `sock` if the handshake takes too long, or too many knock."""
        with self._changed:
            knocking = [other for other, (_, mine) in self._shaking.items() if not mine]
            for oldest in knocking[: len(knocking) - CROWD + 1] if not dialled else ():
                _hang_up(oldest)
                del self._shaking[oldest]
            self._shaking[sock] = monotonic() + self._connect_timeout, dialled is not None
            if self._warden is None:
                self._warden = threading.Thread(target=self._ward, name="distconc warden", daemon=True)
                self._warden.start()
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._lock:
                self._shaking.pop(sock, None)

    def _ward(self) -> None:
        with self._changed:
            while not self._stopped or self._open:
                now = monotonic()
                for sock, (deadline, _) in list(self._shaking.items()):
                    if deadline <= now:
                        _hang_up(sock)
                        del self._shaking[sock]
                for connection in self._open:
                    if connection.due <= now:
                        connection.beat()
                        connection.due = now + connection.heartbeat / 5
                soon = [at for at, _ in self._shaking.values()] + [c.due for c in self._open]
                self._changed.wait(min(min(soon, default=60.0) - now, 60.0))

    def _forget(self, connection: _Connection) -> None:
        """A connection has been read to its end: contact with that node is lost, all of it."""
        with self._changed:
            self._open.discard(connection)
            rest = [other for other in self._open if other.peer == connection.peer]
            for other in rest:
                other.cut()
            for key in [key for key, value in self._speaking.items() if value is connection]:
                if rest:
                    self._speaking[key] = rest[0]  # who sends waits until that has ended, too
                else:
                    del self._speaking[key]
            self._counts.update(sent=connection.sent, received=connection.received)
            self._changed.notify_all()
        if not rest:
            _contact_lost(connection.peer, connection.address)


class _Dial:
    """One attempt to connect, shared by all who wait for it."""

    def __init__(self, node: Node, address: Address, key: bytes) -> None:
        self._node, self._address, self._key = node, address, key
        self._done = threading.Event()
        self._connection: _Connection | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="distconc dialler", daemon=True).start()

    def _run(self) -> None:
        try:
            if isinstance(self._address, tuple) and not self._address[1]:
                raise OSError("port 0 is nobody's")
            self._connection = self._node._shake(Client(self._address), self._key, self._address)
        except BaseException as error:
            self._error = error
        self._give_up()
        self._done.set()

    def _give_up(self) -> None:
        with self._node._lock:
            if self._node._dials.get(self._address) is self:
                del self._node._dials[self._address]

    def wait(self, deadline: float) -> _Connection:
        name, timeout = _text(self._address), self._node._connect_timeout
        if not self._done.wait(max(deadline - monotonic(), 0)):
            self._give_up()  # the next to come dials anew
            raise NodeUnreachable(f"{name} did not answer within {timeout:g} seconds")
        if self._connection:
            return self._connection
        error = self._error
        if isinstance(error, AuthenticationError):
            raise AuthenticationError(f"{name} has another key than this node ({error})") from error
        if isinstance(error, ConnectionRefusedError) or isinstance(error, FileNotFoundError):
            raise NodeUnreachable(f"no node listens at {name}: is it started, is the address right?") from error
        raise NodeUnreachable(f"cannot connect to {name}: {error or type(error).__name__}") from error


CROWD = 256  # strangers who may knock at once; one more, and the oldest has to go
_COUNTS = ("sent", "received", "undelivered", "refused", "lost", "strangers")
_log = logging.getLogger("distconc")
_node: Node | None = None
_node_lock = threading.RLock()  # guards _node


def start_node(
    address: NodeLike = 0,
    *,
    authkey: bytes | str | None = None,
    advertise: NodeLike | None = None,
    allow: Any = None,
    heartbeat: float = 10.0,
    connect_timeout: float = 5.0,
    max_message: int = 1 << 28,
) -> Node:
    """Listen at `address` and return this process's node.  Factor: start-node.

    Never blocks for long.  Port 0 is any free one; None does not listen.  `authkey`: the key, else
    the environment's DISTCONC_AUTHKEY, else the cookie file.  `advertise`: what others dial, if
    not `address`.  `allow`: the classes and functions that messages may name besides plain data;
    None: anything, but on loopback only; "anything".  `heartbeat`: seconds within which the loss
    of a node is noticed.  `connect_timeout`: seconds for dialling and the handshake.
    `max_message`: bytes.

    Raises RuntimeError if the node is started already, ValueError, TypeError, PermissionError for
    what is wrong with the arguments or key, OSError if it cannot listen; then nothing has started.
    """
    global _node
    with _node_lock:
        node = local_node() if not (_node and _node._stopped) else Node()
        if node._started:
            raise RuntimeError(f"this process is {node!r} already; stop_node first")
        node._configure(authkey, advertise, allow, heartbeat, connect_timeout, max_message)
        if address is not None:
            where = _address(address)
            assert where is not None
            node._listen(where)
        node._started, _node = True, node
    return node


def stop_node(timeout: float = 5.0) -> None:
    """Send what is queued, close everything, forget the names, release the address.

    Blocks until that is done, at most `timeout` seconds.  From any thread, at any time, twice.
    Afterwards a remote `send` raises NodeDown, until `start_node`.  Runs at exit, too.
    Factor: stop-node.
    """
    if _node:
        _node.stop(timeout)


atexit.register(stop_node)


def local_node() -> Node:
    """Return this process's node.  Never blocks.  Factor: local-node.  Erlang: node().

    Without `start_node` it does not listen: it can send to others, and be answered over the
    connections that it opened.
    """
    global _node
    if _node is None:
        with _node_lock:
            _node = _node or Node()
    return _node


def nodes() -> list[Address]:
    """Return the addresses of the nodes now connected that listen.  Never blocks.  Erlang: nodes()."""
    node = local_node()
    with node._lock:
        live = {c.address for c in node._speaking.values() if not c.ending}
    return sorted((address for address in live if address), key=_text)


def connect(node: NodeLike) -> None:
    """Connect to `node` now, so that what is wrong shows here.  Never needed.  Factor: connect.

    Blocks at most `connect_timeout`.  Raises NodeUnreachable, AuthenticationError; ValueError,
    PermissionError for a bad key.
    """
    local_node()._reach(_address(node))


def disconnect(node: NodeLike) -> None:
    """Send what is queued for `node`, then close the connection, if there is one.  Factor: disconnect.

    Blocks until that is done, at most `connect_timeout`.  The next `send` opens a new one.
    Whatever waits for that node gets NodeDown, here and there.  Erlang: disconnect_node.
    """
    here, address = local_node(), _address(node)
    with here._changed:
        connection = here._speaking.get(address)
        if connection:
            connection.close()
            if not here._changed.wait_for(lambda: connection not in here._open, here._connect_timeout):
                connection.cut()


######## Elsewhere: spawning on another node, spawn_node, ChildNode


def _spawn_there(node: Address | None, func: Callable[..., Any], args: tuple[Any, ...], name: str,
                 register: bool, link: _Link | None) -> RemoteThread:
    request = ("spawn", func, args, name, register, link.tag if link else None)
    child = send_synchronous(request, RemoteThread(node, KERNEL))
    if isinstance(child, Exception):
        raise child
    assert isinstance(child, RemoteThread)
    if link:
        local_node()._depend(link, child._target[0])
    return child


def _kernel() -> None:
    """Do one thing that another node asks for.  Erlang: net_kernel."""
    request = receive()
    answer: Any = None
    try:
        match request.data:
            case "spawn", func, args, name, register, link:
                answer = _spawn_here(func, args, name, register, link, request.sender._target[0])
            case ("ping",):
                pass
            case other:
                answer = ValueError(f"{other!r} is nothing that a node does")
    except Exception as error:
        answer = error
    reply_synchronous(answer, request)


class ChildNode:
    """A node in a process of its own, started by `spawn_node`; it ends with its parent.

    A context manager: leaving it stops the child.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", address: Address) -> None:
        self._process = process
        self.address = address
        self.pid = process.pid

    def is_alive(self) -> bool:
        """Whether the process has not ended.  Never blocks."""
        return self._process.poll() is None

    def stop(self, timeout: float = 5.0) -> None:
        """Have the child stop its node and end; kill it if it has not after `timeout` seconds."""
        assert self._process.stdin
        try:
            self._process.stdin.close()  # the child waits for this, or for its parent's end
        except OSError:
            pass
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process at once, as a crash would.  Returns when it has ended."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "ChildNode":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def __str__(self) -> str:
        return _text(self.address)

    def __repr__(self) -> str:
        return f"<ChildNode {self} pid {self.pid}{'' if self.is_alive() else ', ended'}>"


def spawn_node(address: NodeLike = 0, **options: Any) -> ChildNode:
    """Start a node in a new Python process, with `start_node`'s options; return its `ChildNode`.

    Blocks until it listens.  It has this process's key and `sys.path`, not its memory, prints to
    the same output, and ends with this process, however that ends.  Raises what `start_node`
    raises there, and RuntimeError if the process ends before that.  Erlang: peer.
    """
    where = _address(address)
    options.setdefault("authkey", _authkey(local_node()._given_key, where))
    boot = "import sys, pickle; sys.path[:] = pickle.load(sys.stdin.buffer); import distconc; distconc._child()"
    process = subprocess.Popen([sys.executable, "-u", "-c", boot.replace("distconc", __name__)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    try:
        process.stdin.write(pickle.dumps(sys.path) + pickle.dumps((where, options)))
        process.stdin.flush()
        answer = pickle.load(process.stdout)
    except (OSError, EOFError) as error:
        process.kill()
        raise RuntimeError(f"the new process ended with status {process.wait()} before its node ran") from error
    except BaseException:
        process.kill()
        process.wait()
        raise
    if isinstance(answer, BaseException):
        process.wait()
        raise answer
    threading.Thread(target=_copy_output, args=(process.stdout,), daemon=True).start()
    return ChildNode(process, answer)


def _copy_output(source: Any) -> None:
    """Print what a child prints: to `sys.stdout`, wherever that goes (a notebook, a test)."""
    for line in source:
        print(line.decode(errors="replace"), end="", flush=True)


def _child() -> None:
    """Be the process of a `ChildNode`: its standard input tells what to do, and when to end."""
    orders, report = sys.stdin.buffer, sys.stdout.buffer
    address, options = pickle.load(orders)
    try:
        answer: Any = start_node(address, **options).address
    except Exception as error:
        answer = error
    report.write(pickle.dumps(answer))
    report.flush()
    sys.stdin = open(os.devnull)
    try:
        orders.read()
    except KeyboardInterrupt:
        pass  # Ctrl-C goes to the parent, too; what it does about its children is its affair
    stop_node()


######## Monitors and links: Monitor, Down, monitor, demonitor


@dataclass(frozen=True, slots=True)
class Monitor:
    """What `monitor` returned: `target` is watched.  Erlang: the reference of a monitor."""

    target: Any
    tag: str


@dataclass(frozen=True, slots=True)
class Down:
    """The message that `target` has ended, of `reason`: see `monitor`.  Erlang: 'DOWN'."""

    monitor: Monitor
    target: Any
    reason: BaseException | None


class _Watch(_Await):
    """A thread that wants to hear of an end."""

    def __init__(self, target: Any) -> None:
        self.watcher = current_thread()
        super().__init__()
        self.monitor = Monitor(target, self.tag)

    def settle(self, outcome: "Reply | DistconcError") -> bool:
        reason: Any = outcome.reason if isinstance(outcome, ThreadDied) else outcome
        self.watcher.send(Down(self.monitor, self.monitor.target, reason))
        return True


def monitor(thread_or_node: "Handle | NodeLike") -> Monitor:
    """Have one `Down` message sent here when a thread ends or contact with a node is lost.

    Its `reason` is None (the thread returned), the exception that it died of (or a RemoteError),
    NoSuchThread, or NodeDown: contact was lost, though it may live.  It comes after all that the
    thread had sent here.  Blocks as `send` does; raises nothing for what cannot be reached, but
    ValueError for what is neither.  Erlang: monitor, monitor_node.
    """
    if isinstance(thread_or_node, (Thread, RemoteThread)):
        watch = _Watch(thread_or_node)
        begin: Callable[[], None] = partial(thread_or_node._watch, watch)
    else:
        address = _address(thread_or_node)
        watch = _Watch(thread_or_node)
        begin = partial(_watch_node, watch, address)
    try:
        begin()
    except (NodeDown, NoSuchThread) as error:
        _settle(watch.tag, error)
    except AuthenticationError as error:
        _settle(watch.tag, NodeUnreachable(str(error)))
    return watch.monitor


def _watch_node(watch: _Watch, address: Address | None) -> None:
    node = local_node()
    if not node._is_called(address):
        node._depend(watch, node._reach(address).peer)


def demonitor(monitor: Monitor) -> None:
    """End `monitor`: when this returns, no Down of it is in this thread's mailbox, or will come.

    Never blocks; ending it twice does nothing.  Erlang: demonitor with flush.
    """
    with _settling:
        watch = _awaited.pop(monitor.tag, None)
    if watch and isinstance(monitor.target, (Thread, RemoteThread)):
        monitor.target._forget(watch)
    try:
        current_thread()._mailbox.get_if(
            lambda message: isinstance(message, Down) and message.monitor == monitor, 0)
    except TimeoutError:
        pass


######## Loss: of a node, and of messages that nobody could take


def _tell_node(peer: int, tag: str, error: DistconcError) -> bool:
    """Tell another node that what it awaits has ended; False if it is out of contact."""
    if not isinstance(error, ThreadDied):
        return local_node()._post(peer, (NOBODY, tag, str(error)))
    cause, reason = error.__cause__, b""
    if not isinstance(cause, RemoteError):
        return local_node()._post(peer, (DIED, tag, str(error), "", "", b""))
    try:
        reason = serialize(error.reason)
    except SerializationError:
        pass  # its name and traceback will stand in for it
    return local_node()._post(peer, (DIED, tag, str(error), cause.type, str(cause), reason))


def _contact_lost(peer: int, address: Address | None) -> None:
    """Settle all that awaited this node; what is owed to it, nobody awaits any more."""
    for awaited in list(_awaited.values()):
        if awaited.peer == peer:
            _settle(awaited.tag, NodeDown(f"lost contact with {_text(address) or 'a node that did not listen'}"))
    for tag, (_, creditor, _) in list(_debts.items()):
        if creditor == peer:
            _strike(tag)


_losses: dict[Any, list[Any]] = {}  # by target: [its text, why, how many are not logged yet]
_losing = threading.RLock()  # guards _losses


def _undelivered(thread: "Handle", why: str) -> None:
    local_node()._count("undelivered")
    _log_lost(thread, str(thread), why)


def _log_lost(target: Any, text: str, why: str, times: int = 1) -> None:
    """Log lost messages, at most one line a second for a target; none goes uncounted."""
    local_node()._count("lost", times)
    with _losing:
        if target in _losses:
            _losses[target][2] += times
            return
        _losses[target] = [text, why, times]
    _log_window(target)


def _log_window(target: Any) -> None:
    """Log what was lost since the last line; look again in a second, until nothing was."""
    with _losing:
        text, why, times = _losses[target]
        _losses[target][2] = 0
        if not times:
            del _losses[target]
            return
    _log.warning("lost %d message%s to %s: %s", times, "s" * (times > 1), text, why)
    timer = threading.Timer(1.0, _log_window, [target])
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:
        pass  # at exit; stop_node logs the rest


def _log_rest() -> None:
    with _losing:
        rest = [loss.copy() for loss in _losses.values() if loss[2]]
        for loss in _losses.values():
            loss[2] = 0
    for text, why, times in rest:
        _log.warning("lost %d more message%s to %s: %s", times, "s" * (times > 1), text, why)


######## Fork: a child has no node


def _after_fork() -> None:
    """Leave the parent's connections to the parent; this process is another node, not started."""
    global _incarnation, _node, _here, _registry, _settling, _losing, _node_lock
    if _node:
        for connection in _node._open:
            os.close(connection._sock.detach())
    _incarnation, _node = int.from_bytes(os.urandom(8), "big"), None
    _here = _Here()
    for table in (_threads, _names, _awaited, _debts, _losses):
        table.clear()
    _registry, _settling, _losing, _node_lock = (threading.RLock() for _ in range(4))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


######## The shell: demo, node, send, call


def _log_message() -> bool:
    print("logger:", receive(), flush=True)
    return True


def _greeter(name: str) -> None:
    """Answer one call, through whatever handle it came with."""
    request = receive_if(Synchronous)
    print(f"{name}: {request.data!r}, from {request.sender!r}", flush=True)
    reply_synchronous(f"good morning, I am {name}", request)


def _demo(_: Any) -> None:
    with start_node(), spawn_node() as child:
        print(f"this is node {local_node()}, pid {os.getpid()}; its child is node {child}, pid {child.pid}")
        spawn_server(_log_message, node=child, name="logger", register=True)
        logger = RemoteThread(child, "logger")
        send("hello", logger)
        print("a call:", send_synchronous("how are you?", spawn(_greeter, "greeter", node=child)))
        send(("my handle is", current_thread()), logger)
        spawn(_introduce_me, current_thread(), node=child)
        request = receive()
        print(f"called back by {request.sender!r}: {request.data!r}")
        reply_synchronous("pleased to meet you", request)
        print("it says:", receive())


def _introduce_me(parent: Handle) -> None:
    answer = send_synchronous("I am your child", parent)
    send(f"my parent said {answer!r}", parent)


def _console(options: Any) -> None:
    """Run a node until Ctrl-C or the end of the prompt."""
    import code
    import runpy

    main = types.ModuleType("__main__")
    main.__dict__.update({name: globals()[name] for name in __all__})
    with start_node(options.address) as node:
        print(f"node {node} (pid {os.getpid()})", flush=True)
        if options.script:
            runpy.run_path(options.script, run_name="__main__")
            threading.Event().wait()
        sys.modules["__main__"] = main
        code.interact(banner="All of distconc's names are here; Ctrl-D ends the node.", exitmsg="", local=main.__dict__)


def _target(text: str) -> RemoteThread:
    node, slash, name = text.rpartition("/")
    if not (node and slash and name):
        raise ValueError(f"{text!r} is no target; say 127.0.0.1:9000/logger")
    return RemoteThread(int(node) if node.isdecimal() else node, int(name) if name.isdecimal() else name)


def _literal(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ValueError(f"{text} is no Python literal; a string needs quotes of its own: '\"{text}\"'") from None


def _send_command(options: Any) -> None:
    logging.basicConfig(format="%(message)s")
    target = _target(options.target)
    send(_literal(options.message), target)
    send_synchronous(("ping",), RemoteThread(target.node, KERNEL), options.timeout)
    if local_node().stats()["lost"]:
        sys.exit(1)


def _call_command(options: Any) -> None:
    print(repr(send_synchronous(_literal(options.message), _target(options.target), options.timeout)))


def main(arguments: list[str] | None = None) -> None:
    """Run the shell command that `arguments` say."""
    import argparse

    parser = argparse.ArgumentParser(prog="distconc", description="Threads that send to each other, on many nodes.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    command("demo", _demo, "two nodes talk: the example that started it all")
    sub = command("node", _console, "run a node with a Python prompt, or SCRIPT on one")
    sub.add_argument("address", nargs="?", default=0, help="9000, host:9000 or a path; any free port if left out")
    sub.add_argument("script", nargs="?", help="a Python file to run; the node stays up after it")
    for name, run, help in (("send", _send_command, "send MESSAGE to TARGET; status 1 if it was lost"),
                            ("call", _call_command, "send MESSAGE to TARGET and print the reply")):
        sub = command(name, run, help)
        sub.add_argument("target", help="where to, such as 127.0.0.1:9000/logger")
        sub.add_argument("message", help="a Python literal, such as '(\"hello\", 1)'")
        sub.add_argument("--timeout", type=float, default=None, help="seconds to wait for the reply")
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except (DistconcError, AuthenticationError, OSError, ValueError) as error:
        sys.exit(f"distconc: {error}")


if __name__ == "__main__":
    import distconc  # the same file by its name, so that its classes are those that messages name

    distconc.main()
