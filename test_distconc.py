"""The tests of distconc.py, its bench and its soak: `make test`, `make bench`, `make soak`."""

import argparse
import array
import ast
import contextlib
import copy
import copyreg
import ctypes
import datetime
import difflib
import dis
import errno
import enum
import faulthandler
import fractions
import functools
import gc
import hashlib
import hmac
import html
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import keyword
import logging
import math
import multiprocessing
import operator
import os
import pickle
import platform
import py_compile
import queue
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import typing
import unittest
import weakref
import uuid
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing.connection import (
    answer_challenge, Client, Connection, deliver_challenge, Listener)
from multiprocessing.managers import BaseManager
from statistics import median
from time import monotonic, perf_counter, process_time
from unittest import mock
from xml.etree import ElementTree

import distconc
from distconc import *

try:
    import pty
    import tty
except ImportError:
    pty = tty = None  # Windows has no such terminals

try:
    from hypothesis import given, HealthCheck, settings, strategies as st
    from hypothesis.stateful import Bundle, invariant, rule, RuleBasedStateMachine
except ImportError:
    if sys.argv[1:2] != ["check"] and "hypothesis" not in sys.modules:  # the bench forbids it
        raise
    given = settings = st = Bundle = invariant = rule = mock.MagicMock()
    RuleBasedStateMachine = type("RuleBasedStateMachine", (), {"TestCase": mock.MagicMock()})

if not isinstance(settings, mock.MagicMock):
    # That a busy machine makes examples slowly is no fault of a test.
    settings.register_profile("busy", suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")

HERE = os.path.dirname(os.path.abspath(__file__))
WAIT = 20.0  # seconds after which what has to happen has failed to
NOTHING = object()
logging.getLogger("distconc").addHandler(logging.NullHandler())


def check(holds, *about):
    """Like `assert`, under `-O` as well."""
    if not holds:
        raise AssertionError(*about)


# The tests of part one also run on that part alone, cut out of the file: see PartOneAlone.
PART_ONE_ALONE = not hasattr(distconc, "serialize")
whole_file = unittest.skipIf(PART_ONE_ALONE, "it names later parts")


def trip(thing):
    """A copy, as another node would get it; in part one there are none."""
    if PART_ONE_ALONE:
        return thing
    return deserialize(serialize(thing))


def fail(error):
    raise error


def idle():
    receive_if(lambda message: message == "stop")


def end(thread):
    if thread.is_alive():
        send("stop", thread)
    check(thread.join(WAIT))


def joined(func, *args, **options):
    thread = spawn(func, *args, **options)
    check(thread.join(WAIT))
    return thread


def outcome(func, *args):
    """What `func` returns or raises."""
    try:
        return func(*args)
    except Exception as error:
        return error


ON_WINDOWS = os.name == "nt"


def not_on_windows(lacking):
    return unittest.skipIf(ON_WINDOWS, f"Windows has no {lacking}")


@contextlib.contextmanager
def ctrl_c_storm(*functions, every=0.0002):
    """Interrupt the main thread again and again, while it is within one of `functions`.

    A single signal would not do: one that comes just before a wait does not end it.
    """
    codes, struck = {function.__code__ for function in functions}, []

    def strike(signum, frame):
        if frame.f_code is strike.__code__:
            return  # one is enough, or they nest for ever where time is short
        if frame.f_globals["__name__"] == "_weakrefset":
            return  # a callback of the interpreter, which prints and drops what is raised there
        while frame and frame.f_code not in codes:
            frame = frame.f_back
        if frame:
            struck.append(signum)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, every, every)
    try:
        yield struck
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Odd:
    """As awkward as an array: not to be compared, hashed or tested for truth."""

    __hash__ = None
    __eq__ = __ne__ = lambda self, other: fail(AssertionError("nobody may compare messages"))
    __bool__ = __len__ = lambda self: fail(AssertionError("a message is a black box"))


class Shy:
    """What neither can be pickled nor looked at."""

    @property
    def __dict__(self):
        raise RuntimeError("do not look")

    def __reduce__(self):
        raise TypeError("nor pickle")

    @classmethod
    def error(cls):
        """An exception that has one, so that it cannot be pickled, either."""
        return ValueError("why", cls())


class Awkward(Exception):
    """An error that is false (a list of none, say) and cannot be printed."""

    __len__ = lambda self: 0
    __str__ = __repr__ = lambda self: 1 // 0


class Case(unittest.TestCase):
    """Each test must leave an empty mailbox, no thread, no failure that it did not expect."""

    def setUp(self):
        self.me, self.shown = current_thread(), queue.SimpleQueue()
        self.before = set(threading.enumerate())
        faulthandler.dump_traceback_later(5 * WAIT, exit=True)  # a hang is a failure, too
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-5)  # gives races a chance
        patch = mock.patch("threading.excepthook", self.shown.put)
        patch.start()
        self.addCleanup(patch.stop)
        self.addCleanup(self.nothing_is_left)  # the first to be added runs last but one

    def nothing_is_left(self):
        for thread in set(threading.enumerate()) - self.before:
            if thread.ident and not isinstance(thread, threading.Timer):
                thread.join(WAIT)
                self.assertFalse(thread.is_alive(), thread)
        left = list(iter(lambda: outcome(receive, 0, NOTHING), NOTHING))
        while not self.shown.empty():
            left.append(self.shown.get())
        self.assertEqual([], left)

    def failure_shown(self):
        return self.shown.get(timeout=WAIT)

    def raised(self, kind, func, *args):
        with self.assertRaises(kind) as caught:
            func(*args)
        return caught.exception


######## Waiting


class WaitingTests(Case):
    def test_ctrl_c_while_threads_are_woken_leaves_none_asleep(self):
        waiting, is_true, release = distconc._WaitQueue(), [], distconc._release
        threads_ = [spawn(waiting.wait_until, lambda: bool(is_true), None) for _ in range(3)]
        end = monotonic() + WAIT
        while len(waiting._sleepers) < 3 and monotonic() < end:
            receive(0.001, None)
        struck = []

        def strike(lock):
            if not struck:
                struck.append(True)
                raise KeyboardInterrupt
            release(lock)
        is_true.append(True)
        with mock.patch.object(distconc, "_release", strike):
            self.assertRaises(KeyboardInterrupt, waiting.wake_all)
        self.assertTrue(all(thread.join(WAIT) for thread in threads_))

    def test_a_thread_that_is_woken_in_vain_is_woken_again(self):
        waiting, is_true = distconc._WaitQueue(), []
        thread = spawn(waiting.wait_until, lambda: len(is_true) == 1000, None)
        for number in range(1000):
            is_true.append(number)
            waiting.wake_all()
        self.assertTrue(thread.join(WAIT))

    @unittest.skipIf(sys.version_info < (3, 11), "3.10: a second Ctrl-C ends a `with` early")
    @not_on_windows("timer that interrupts")
    def test_ctrl_c_leaves_no_lock_held(self):
        lock = distconc._Lock()

        def work():
            for _ in range(1000):
                with lock, lock:
                    pass

        def is_free():
            got = []
            joined(lambda: got.append(lock.acquire(timeout=1) and (lock.release() or True)))
            return got[0]

        for _ in range(200):
            with suppress(KeyboardInterrupt), ctrl_c_storm(work):
                while True:
                    work()
            self.assertTrue(is_free())

    def test_ctrl_c_ends_every_wait_within_a_fifth_of_a_second(self):
        thread = spawn(idle)
        self.addCleanup(end, thread)
        for name, *wait in (("receive", receive), ("receive for long", receive, WAIT),
                            ("receive_if", receive_if, int), ("join", thread.join),
                            ("call", send_synchronous, 1, thread)):
            with self.subTest(name):
                self.assertLess(self.seconds_to_interrupt(*wait), 0.2)

    def seconds_to_interrupt(self, wait, *args):
        struck, begun = [], threading.Event()

        def on_signal(signum, frame):
            if not struck:  # a later one comes too late
                struck.append(monotonic())
                raise KeyboardInterrupt

        def strike():
            begun.wait()
            start.append(monotonic())
            while not struck:  # one that comes just before the wait does not end it
                if ON_WINDOWS:
                    signal.raise_signal(signal.SIGINT)
                else:
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                threading.Event().wait(0.02)

        start, striker = [], threading.Thread(target=strike)
        striker.start()
        before = signal.signal(signal.SIGINT, on_signal)
        try:
            begun.set()
            wait(*args)
            self.fail("it was not interrupted")
        except KeyboardInterrupt:
            return struck[0] - start[0]
        finally:
            striker.join(WAIT)
            signal.signal(signal.SIGINT, before)


######## Mailbox

MESSAGES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=2),
                     st.lists(st.integers(), max_size=2), st.builds(Odd))
PREDICATES = [int, str, (int, str), (), object, Odd, (list, type(None)), lambda message: 0,
              lambda message: isinstance(message, int) and message > 0, lambda message: [0]]


class MailboxMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.box, self.model = Mailbox(), []

    def takes_the_first_that(self, fits, call, *args):
        at = next((at for at, message in enumerate(self.model) if fits(message)), None)
        try:
            check(call(*args) is self.model.pop(at))
        except TimeoutError:
            check(at is None)

    @rule(message=MESSAGES)
    def put(self, message):
        self.box.put(message)
        self.model.append(message)

    @rule()
    def get(self):
        self.takes_the_first_that(lambda message: True, self.box.get, 0)

    @rule(pred=st.sampled_from(PREDICATES))
    def get_if(self, pred):
        fits = pred if not isinstance(pred, (type, tuple)) else (lambda m: isinstance(m, pred))
        self.takes_the_first_that(fits, self.box.get_if, pred, 0)

    @rule(at=st.integers(0, 4))
    def a_predicate_that_raises_changes_nothing(self, at):
        asked = []
        error = outcome(self.box.get_if, lambda message: asked.append(message) or (
            len(asked) > at and fail(ZeroDivisionError())), 0)
        check(type(error) is (ZeroDivisionError if at < len(self.model) else TimeoutError))
        check(list(map(id, asked)) == list(map(id, self.model[:at + 1])))

    @rule()
    def get_all(self):
        got = outcome(self.box.get_all, 0)
        check(list(map(id, got)) == list(map(id, self.model)) != [] if isinstance(
            got, list) else isinstance(got, TimeoutError) and not self.model)
        self.model = []

    @invariant()
    def empty(self):
        check(self.box.empty() == (not self.model))

    def teardown(self):
        while self.model:
            self.get()
        self.empty()


MailboxAsAListTest = MailboxMachine.TestCase
MailboxAsAListTest.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


def relay_to(box):
    while (message := receive()) != "stop":
        box.put(message)


class Weak:
    """Can be referred to weakly."""


class Struck(deque):
    """A deque at whose third `popleft` Ctrl-C strikes."""

    strikes = 3

    def popleft(self):
        self.strikes -= 1
        if self.strikes == 0:
            raise KeyboardInterrupt
        return super().popleft()


class MailboxTests(Case):
    def test_what_ctrl_c_struck_in_get_all_is_all_there_in_order(self):
        class StruckOnce(distconc._Entry):
            needs_loading = True

            def load(self):
                if self.message == "struck":
                    self.message = "not struck"
                    raise KeyboardInterrupt
                return True

        box = Mailbox()
        for number in range(30):
            box.put(number)
        box._put(StruckOnce("struck"))
        self.assertRaises(KeyboardInterrupt, box.get_all, 0)
        box.put("newer")
        self.assertEqual(25, box.get_if(lambda message: message == 25, 0))
        self.assertEqual("newer", box.get_if(lambda message: message == "newer", 0))
        self.assertEqual([*range(25), *range(26, 30), "not struck"], box.get_all(0))

    def test_getters_share_what_fits_them(self):  # Factor's own
        mixed = [1, "junk", [456], 3, "junk2"]
        for messages, preds in (([1, 2, 3], [object] * 3), ([1, 2, 3], [int] * 3),
                                (mixed, [int, int, str, str, list])):
            box = Mailbox()
            for pred in preds:
                get = box.get if pred is object else partial(box.get_if, pred)
                spawn(lambda get: send(get(), self.me), get)
            for message in messages:
                box.put(message)
            self.assertCountEqual(messages, [receive(WAIT) for _ in preds])
            self.assertTrue(box.empty())

    @whole_file
    def test_a_stress_of_putters_takers_watchers_and_senders_loses_and_doubles_nothing(self):
        # Without the interpreter's lock, all this happens at the same time.
        seed = int(os.environ.get("DISTCONC_SEED", "0")) or random.randrange(1 << 32)
        draw, count = random.Random(seed), 1000
        box, stop, taken, looks = Mailbox(), object(), [[] for _ in range(6)], []
        relay = spawn(relay_to, box, name="relay", register=True)

        def put(putter, choices):
            to = RemoteThread(local_node(), relay.id, local_node().incarnation)
            for number, choice in enumerate(choices):
                message = putter, number
                if choice == "put":
                    box.put(message)
                else:
                    (relay if choice == "send" else to).send(message)

        def take(got, choices):
            for choice in itertools.cycle(choices):
                if choice == "get_all":
                    got += box.get_all()
                else:
                    got.append(box.get() if choice == "get" else box.get_if(object))
                if stop in got:
                    for _ in range(got.count(stop) - 1):  # get_all has taken another's
                        got.remove(stop)
                        box.put(stop)
                    return

        def watch():
            while relay.is_alive():
                looks.append(box._copy() and box.empty())
                watched = spawn(int)
                demonitor(monitor(watched))
                receive(0, None)
                check(watched.join(WAIT) and threads() is not None)

        putters = [spawn(put, at, draw.choices(("put", "send", "by handle"), k=count))
                   for at in range(4)]
        takers = [spawn(take, got, draw.choices(("get", "get_if", "get_all"), (4, 4, 1), k=99))
                  for got in taken]
        watchers = [spawn(watch) for _ in range(2)]
        with self.subTest(seed=seed):
            self.assertTrue(all(thread.join(WAIT) for thread in putters))
            end(relay)
            for _ in takers:
                box.put(stop)
            self.assertTrue(all(thread.join(WAIT) for thread in takers + watchers))
            self.assertTrue(looks)
            messages = [message for message in sum(taken, []) if message is not stop]
            wanted = [(putter, number) for putter in range(4) for number in range(count)]
            self.assertEqual(wanted, sorted(messages))

    def test_a_message_that_another_getter_looks_at_is_not_overlooked(self):
        for get in Mailbox.get, Mailbox.get_all, lambda box: box.get_if(int):
            box = Mailbox()

            def refuse(message):
                other = spawn(lambda: send(get(box), self_))
                self.assertTrue(other.join(WAIT))
                return False
            self_ = self.me
            box.put(7)
            self.assertRaises(TimeoutError, box.get_if, refuse, 0)
            self.assertIn(receive(WAIT), (7, [7]))

    def meanwhile(self, box, step, act):
        """Have another thread act in a step of the mailbox's deque, the first time."""
        acted = []

        class Interrupted(deque):
            def interrupt(self, name, *args):
                if name == step and not acted:
                    acted.append(name)
                    other = threading.Thread(target=act)
                    other.start()
                    other.join(WAIT)
                return getattr(super(), name)(*args)

            def remove(self, entry):
                self.interrupt("remove", entry)

            def popleft(self):
                return self.interrupt("popleft")

            def __iter__(self):
                iterator = super().__iter__()
                self.interrupt("__len__")
                return iterator
        box._entries = Interrupted(box._entries)
        return acted

    def test_who_looks_at_a_mailbox_while_another_takes_changes_no_order(self):
        box = Mailbox()
        box.put("first"), box.put("second")
        acted = self.meanwhile(box, "remove", lambda: (box._copy(), box.put("third")))
        self.assertEqual([box.get_if(str), box.get(0), box.get(0)], ["first", "second", "third"])
        self.assertTrue(acted)

    def test_a_message_that_another_takes_first_is_taken_once(self):
        for step, take in ("remove", lambda box: box.get_if(str)), ("popleft", Mailbox.get):
            box, other = Mailbox(), []
            box.put("first"), box.put("second")
            self.meanwhile(box, step, lambda: other.append(box._entries.pop()))
            self.assertEqual(take(box), "first")
            self.assertEqual([entry.message for entry in other], ["second"])
            self.assertRaises(TimeoutError, box.get, 0)
        box.put("first"), box.put("second")
        self.meanwhile(box, "remove", lambda: other.append(box.get()))
        self.assertEqual([box.get_if(str), other[-1]], ["second", "first"])
        self.assertTrue(box.empty())

    def test_a_message_that_comes_while_the_others_are_looked_through_is_found(self):
        box = Mailbox()
        box.put("first")
        acted = self.meanwhile(box, "__len__", lambda: box.put("late"))
        self.assertEqual(box.get_if("late".__eq__, 0), "late")
        self.assertTrue(acted)

    def test_a_getter_that_waits_keeps_no_messages_that_others_took(self):
        box, stop, looked = Mailbox(), [], threading.Semaphore(0)

        def is_stop(message):
            looked.release()
            return message is stop
        waiter, alive = spawn(box.get_if, is_stop), weakref.WeakSet()
        for _ in range(500):
            message = Weak()
            alive.add(message)
            box.put(message)
            self.assertTrue(looked.acquire(timeout=WAIT))
            box.get(0)
            del message
        self.assertLess(len(alive), 200)
        box.put(stop)
        self.assertTrue(waiter.join(WAIT))

    def test_what_is_put_back_is_found_by_a_getter_that_waits(self):
        box, refused = Mailbox(), threading.Event()

        def wanted(message):
            refused.set()
            return message == "wanted"
        box.put("wanted")
        entry = box._entries.popleft()
        box.put("other")
        waiter = spawn(box.get_if, wanted, WAIT)
        self.assertTrue(refused.wait(WAIT))
        box._put_back([entry])  # as Ctrl-C in another thread does
        self.assertTrue(waiter.join(WAIT))
        self.assertEqual([entry.message for entry in box._entries], ["other"])

    def test_a_deque_that_changes_all_the_time_is_looked_through_to_its_end(self):
        class Restless(deque):
            """As a deque is to one thread while another puts, without the interpreter's lock."""

            def __iter__(self):
                raise RuntimeError("deque mutated during iteration")
            __reversed__ = __iter__
        box = Mailbox()
        box._entries = Restless()
        for number in range(100):
            box.put(number)
        self.assertEqual(box.get_if((77).__eq__, 0), 77)
        self.assertRaises(TimeoutError, box.get_if, str, 0)
        self.assertEqual(len(box._copy()), 99)
        self.assertEqual(box.get_all(), [*range(77), *range(78, 100)])

    def test_ctrl_c_in_get_all_costs_no_message(self):
        box = Mailbox()
        box._entries = Struck()
        for number in range(5):
            box.put(number)
        self.assertRaises(KeyboardInterrupt, box.get_all)
        self.assertEqual(box.get_all(), [0, 1, 2, 3, 4])

    def test_get_all_waits_for_the_first_and_takes_all(self):  # Factor's own
        box = Mailbox()
        putter = spawn(lambda: (receive(WAIT), box.put("foo")))
        self.assertRaises(TimeoutError, box.get_all, 0)
        send("go", putter)
        self.assertEqual(["foo"], box.get_all(WAIT))
        box.put("foo"), box.put("bar")
        self.assertEqual(["foo", "bar"], box.get_all())

    def test_an_empty_mailbox_times_out(self):  # Factor's own
        box = Mailbox()
        for call in (box.get, functools.partial(box.get_if, int), box.get_all):
            self.assertRaises(TimeoutError, call, 0)
            self.assertRaises(TimeoutError, call, timeout=0.01)
        self.assertTrue(box.empty())
        box.put("foo")
        self.assertFalse(box.empty())

    def test_many_putters_and_getters_lose_double_and_reorder_nothing(self):
        box, count, stop = Mailbox(), 300, ()

        def take(call, got):
            while stop not in got:
                taken = call()
                got.extend(taken if isinstance(taken, list) else [taken])
            while got[-2:] == [stop, stop]:  # get_all has taken the stop of another
                box.put(got.pop())

        calls = [box.get, box.get_all, lambda: box.get_if(tuple), lambda: box.get_if(object)]
        gots = [[] for _ in calls]
        getters = list(map(functools.partial(spawn, take), calls, gots))
        flood = [spawn(lambda who: [box.put((who, at)) for at in range(count)], who)
                 for who in range(4)]
        self.assertTrue(all(thread.join(WAIT) for thread in flood))
        for _ in getters:
            box.put(stop)
        self.assertTrue(all(thread.join(WAIT) for thread in getters))
        self.assertEqual([stop] * 4 + [(who, at) for who in range(4) for at in range(count)],
                         sorted(sum(gots, [])))
        for got in gots:
            for who in range(4):
                own = [message for message in got if message[:1] == (who,)]
                self.assertEqual(sorted(own), own)

    def test_a_refused_message_is_not_asked_again_while_others_flood(self):
        def flood():
            for at in range(200, last + 1):
                box.put(at)
                if at >= 300:  # from here on one by one, each after the last was refused
                    receive_if(lambda refused: refused == at, WAIT)

        for _ in range(10):
            box, asked, last = Mailbox(), [], 399
            for at in range(200):
                box.put(at)
            thread = spawn(flood)
            self.assertEqual(last, box.get_if(
                lambda at: asked.append(at) or send(at, thread) or at == last, WAIT))
            self.assertTrue(thread.join(WAIT))
            self.assertEqual(list(range(last + 1)), asked)
            self.assertEqual(list(range(last)), box.get_all(0))

    def test_a_search_ends_in_its_time_though_more_messages_come_than_it_can_look_at(self):
        box = Mailbox()
        box.put("another")
        for timeout in 0, 0.05:
            self.assertRaises(TimeoutError, box.get_if, box.put, timeout)  # looks, adds one

    def test_what_is_neither_predicate_nor_class_is_a_type_error(self):
        self.assertRaises(TypeError, Mailbox().get_if, "text", 0)

    def test_a_predicate_runs_in_the_receiving_thread_with_no_lock_held(self):
        box, inside = Mailbox(), []
        box.put(1), box.put(2)

        def pred(message):
            joined(box.put, "meanwhile")
            joined(lambda: inside.append(box.get_if(str, 0)))
            inside.append(current_thread())
            return message == 2

        self.assertEqual(2, box.get_if(pred, WAIT))
        self.assertEqual(["meanwhile", self.me] * 2, inside)
        self.assertEqual([1], box.get_all(0))

    @not_on_windows("timer that interrupts")
    def test_many_ctrl_c_while_a_thread_waits_lose_nothing(self):
        takes = [receive, lambda: receive(WAIT), lambda: receive_if(int, WAIT)]
        for take in takes:
            for at in range(20):
                with ctrl_c_storm(distconc._WaitQueue.wait_until):
                    self.assertRaises(KeyboardInterrupt, take)
                    self.assertRaises(KeyboardInterrupt, take)
                send(at, self.me)
                self.assertEqual(at, take())

    @unittest.skipIf(sys.version_info < (3, 11), "3.10 may strike between any two instructions")
    @not_on_windows("timer that interrupts")
    def test_a_storm_of_ctrl_c_costs_at_most_the_message_that_is_taken_and_all_goes_on(self):
        takes = [receive, lambda: receive(WAIT), lambda: receive_if(int, WAIT)]
        with ctrl_c_storm(receive, receive_if) as struck:
            while len(struck) < 300:
                sent = [*range(500), -1]
                flood, got = spawn(lambda: [send(at, self.me) for at in sent]), []
                while not got or got[-1] != -1:
                    with contextlib.suppress(KeyboardInterrupt):
                        got.append(takes[len(got) % 3]())
                    if not flood.is_alive() and self.me._mailbox.empty():
                        break
                self.assertEqual(got, [message for message in sent if message in got])
                self.assertLessEqual(len(sent) - len(got), len(struck))
                self.assertTrue(flood.join(WAIT))
        send("all goes on", self.me)
        self.assertEqual("all goes on", receive(WAIT))


######## Threads


class ThreadTests(Case):
    def test_who_sees_a_failure_finds_that_thread_ended_even_if_to_show_it_fails(self):
        seen = []

        def hook(about):
            seen.append((thread.is_alive(), thread.id in threads()))
            raise ValueError("a bad hook")
        with mock.patch.object(threading, "excepthook", hook), \
                contextlib.redirect_stderr(io.StringIO()):
            thread = spawn(lambda: receive() / 0, name="bad")
            thread.send(1)
            self.assertTrue(thread.join(WAIT))
        self.assertEqual(seen[0], (False, False))

    def test_a_failure_that_nobody_is_linked_to_is_shown_with_the_threads_name(self):
        for options in ({"name": "error test"}, {}):
            error = ValueError("Errors, errors")
            monitor(spawn(fail, error, **options))  # to be told is not to be linked
            shown = self.failure_shown()
            self.assertEqual(options.get("name", "fail"), shown.thread.name)
            self.assertIs(error, shown.exc_value)
            self.assertIsNotNone(shown.exc_traceback)
            self.assertIsInstance(receive(WAIT), Down)

    @whole_file
    def test_what_cannot_start_is_an_error_here_and_leaves_nothing_behind(self):
        before = threads()
        for start in (spawn, spawn_linked, spawn_server):
            for wrong in ("a", 3, None):
                self.assertRaises(TypeError, start, wrong, lambda: 1 + 1)
            with mock.patch("threading.Thread.start", side_effect=RuntimeError("no more")):
                self.assertRaises(RuntimeError, start, idle, name="unborn", register=True)
            self.assertRaises(TypeError, start, idle, name=5, register=True)
        self.assertRaises(NoSuchThread, get_remote_thread, "unborn")
        self.assertEqual(before, threads())

    def test_a_thread_is_named_after_its_function(self):
        twice = functools.partial(functools.partial(idle))
        for start in (spawn, spawn_linked, spawn_server):
            for func, options in ((idle, {}), (twice, {}), (lambda: idle(), {"name": "idle"})):
                thread = start(func, **options)
                self.addCleanup(end, thread)
                self.assertEqual("idle", thread.name)

    def test_a_thread_is_listed_while_it_lives_and_joined_when_it_ends(self):
        thread = spawn(lambda: (receive(), send([
            current_thread(), threads()[current_thread().id], threading.current_thread().daemon,
            self.me in threads().values()], self.me)))
        self.assertIs(thread, threads()[thread.id])
        self.assertEqual([True, False, False],
                         [thread.is_alive(), thread.join(0), thread.join(timeout=0.01)])
        waiters = [spawn(lambda: send(thread.join(), self.me)) for _ in range(3)]
        send("go", thread)
        self.assertEqual([thread, thread, True, True], receive(WAIT))
        self.assertEqual([True] * 3, [receive(WAIT) for _ in waiters])
        self.assertEqual([True, 1, False], [thread.join(), thread.join(0), thread.is_alive()])
        self.assertNotIn(thread.id, threads())

    def test_other_threads_are_adopted_and_forgotten_when_they_end(self):
        for at in range(20):
            other = threading.Thread(name=f"adopted {at}", target=lambda: (
                send(current_thread(), self.me), receive()))
            other.start()
            thread = receive(WAIT)
            self.assertEqual((Thread, other.name), (type(thread), thread.name))
            self.assertIs(thread, threads()[thread.id])
            watch = monitor(thread)
            send("go", thread)
            other.join(WAIT)
            self.assertTrue(thread.join(WAIT))
            self.assertNotIn(thread, threads().values())
            self.assertRaises(NoSuchThread, send_synchronous, "?", thread, WAIT)
            self.assertEqual(Down(watch, thread, None), receive(WAIT))

    def test_a_server_repeats_while_its_function_returns_something_true(self):
        returns = [0, "x", [0], 1]
        self.assertTrue(spawn_server(lambda: returns.pop()).join(WAIT))
        self.assertEqual([], returns)

    def test_system_exit_counts_as_returning(self):
        for start in (spawn, spawn_linked, spawn_server):
            thread = start(lambda: (receive(), sys.exit("not an error")))
            watch = monitor(thread)
            send("go", thread)
            self.assertEqual(Down(watch, thread, None), receive(WAIT))

    def test_copying_a_thread_gives_the_thread_itself(self):
        self.assertIs(self.me, copy.copy(self.me))
        self.assertIs(self.me, copy.deepcopy([self.me, {1: self.me}])[1][1])


class LinkTests(Case):
    error = LinkedError(KeyError("lost"), None)

    def test_a_crash_is_raised_in_the_thread_that_linked(self):  # Factor's own
        for why in (ValueError("crash"), Awkward()):
            child = spawn_linked(fail, why, name="Linked test")
            linked = self.raised(LinkedError, receive, WAIT)
            self.assertIs(why, linked.error)
            self.assertIs(child, linked.thread)
            self.assertTrue(child.join(WAIT))

    def test_an_unread_linked_error_of_anything_at_all_lets_the_thread_end(self):
        go_on = threading.Event()
        thread = spawn(go_on.wait, WAIT)
        send(LinkedError("no exception", None), thread)
        go_on.set()
        self.assertTrue(thread.join(WAIT))
        self.assertTrue(thread._end_was_told)
        self.assertIs(LinkedError, self.failure_shown().exc_type)

    def test_each_crash_is_delivered_once_after_what_the_child_sent(self):
        children = {spawn_linked(lambda at: (send(at, self.me), fail(ValueError())), at): at
                    for at in range(50)}
        seen = []
        for _ in range(2 * len(children)):
            seen.append(outcome(receive, WAIT))
            if isinstance(seen[-1], LinkedError):
                self.assertIn(children.pop(seen[-1].thread), seen)
        self.assertEqual({}, children)

    def test_a_linked_error_waits_for_its_turn(self):
        for message in (0, 1, self.error, 2):
            send(message, self.me)
        self.assertEqual(1, receive_if(lambda message: message == 1))
        self.assertEqual(0, receive())
        self.assertIs(self.error, self.raised(LinkedError, receive, 0, "default"))
        self.assertEqual(2, receive())

    def test_receive_if_raises_the_linked_error_that_its_scan_meets(self):
        for message in (0, self.error, 2, 3):
            send(message, self.me)
        two = (lambda message: message == 2)
        self.assertIs(self.error, self.raised(LinkedError, receive_if, two, WAIT, "default"))
        self.assertEqual([2, 0, 3], [receive_if(two), receive(), receive()])

    def test_a_waiting_call_is_not_disturbed_by_a_linked_error(self):
        server = spawn(lambda: (send(self.error, (request := receive()).sender),
                                reply_synchronous("reply", request)))
        send(self.error, self.me)
        self.assertEqual("reply", send_synchronous("?", server))
        self.assertRaises(LinkedError, receive, 0)
        self.assertRaises(LinkedError, receive, 0)

    def test_a_linked_error_fails_the_thread_it_is_sent_to_and_who_is_linked_to_that(self):
        child = spawn_linked(receive)
        send(self.error, child)
        linked = self.raised(LinkedError, receive, WAIT)
        self.assertIs(self.error, linked.error)
        self.assertIs(child, linked.thread)

    def test_a_failure_whose_linked_parent_is_gone_is_shown(self):
        def orphan():
            receive()
            raise ValueError("nobody hears me")

        joined(lambda: send(spawn_linked(orphan), self.me))
        send("go", receive(WAIT))
        self.assertEqual("orphan", self.failure_shown().thread.name)

    def test_a_failure_that_its_linked_parent_did_not_receive_is_shown_at_its_end(self):
        def parent():
            spawn_linked(fail, ValueError("unread"), name="child").join(WAIT)

        self.assertTrue(spawn(parent, name="parent").join(WAIT))
        shown = self.failure_shown()
        self.assertEqual(("parent", LinkedError), (shown.thread.name, shown.exc_type))
        self.assertEqual("fail", traceback.extract_tb(shown.exc_traceback)[-1].name)

    def test_returning_is_no_failure(self):
        self.assertTrue(spawn_linked(len, "abc").join(WAIT))


######## Messages


class MessageTests(Case):
    def test_a_failure_of_a_kind_of_its_own_is_raised_as_any_linked_error(self):
        class Own(LinkedError):
            pass
        failure = Own(KeyError(1), current_thread())
        for take in receive, partial(receive_if, int):
            send(failure, current_thread())
            with self.assertRaises(Own) as raised:
                take(0)
            self.assertIs(raised.exception, failure)

    def test_receive_if_leaves_the_others_in_order(self):  # Factor's own
        for message in (1, 2, 3):
            send(message, self.me)
        self.assertEqual([1, 3, 2], [receive(), receive_if(lambda n: n % 2 != 0), receive()])

    def test_a_counter_keeps_its_state_in_a_loop(self):  # Factor's own
        def counter(value):
            while True:
                match receive():
                    case ["increment", by]:
                        value += by
                    case ["decrement", by]:
                        value -= by
                    case ["value", sender]:
                        send(value, sender)
                    case "exit":
                        return

        thread = spawn(counter, 0, name="Counter")
        for message in (["increment", 10], ["decrement", 15], ["value", self.me], "exit"):
            send(message, thread)
        self.assertEqual(-5, receive(WAIT))

    def test_a_local_message_is_the_object_itself(self):
        for message in (None, [], Odd(), threading.Lock(), Synchronous(1, self.me, "2")):
            send(message, self.me)
            self.me.send(message)
            self.assertIs(message, receive(0))
            self.assertIs(message, receive_if(object, 0))

    def test_a_time_out_returns_the_default_only_if_one_is_given(self):
        send("other", self.me)
        for call in (functools.partial(receive_if, int), receive):
            self.assertRaises(TimeoutError, call, 0)
            self.assertRaises(TimeoutError, call, timeout=0.01)
            for default in (None, 0, NOTHING):
                self.assertIs(default, call(0, default))
                self.assertIs(default, call(timeout=0.01, default=default))
            receive(0, None)

    def test_what_a_predicate_raises_is_no_time_out(self):
        send(1, self.me)
        self.addCleanup(receive, 0)
        for error in (KeyError("mine"), TimeoutError("mine")):
            with self.subTest(error):
                self.assertIs(error, outcome(receive_if, lambda m: fail(error), 0, "default"))

    def test_each_senders_order_is_kept(self):
        for who in range(4):
            spawn(lambda who: [send((who, at), self.me) for at in range(200)], who)
        got = [receive(WAIT) for _ in range(800)]
        self.assertEqual(sorted(got), sorted(got, key=lambda message: message[0]))  # stable

    def test_swapped_arguments_of_send_are_a_type_error_that_says_so(self):
        for wrong in ("hello", 1, None, [2]):
            self.assertRaisesRegex(TypeError, r"send\(message, thread\)", send, self.me, wrong)

    @whole_file
    def test_a_message_to_an_ended_thread_is_dropped_counted_and_logged(self):
        for way in (lambda thread: thread, trip):
            target, before = way(joined(int)), local_node().stats()["undelivered"]
            with Records() as records:
                self.assertEqual([None] * 10, [send("lost", target) for _ in range(10)])
                distconc._losses.flush()
                counts = [records.lost(repr(target)) for _ in range(2)]
            self.assertEqual([1, 9], counts)
            self.assertEqual(before + 10, local_node().stats()["undelivered"])


######## Synchronous sends


class Reduced:
    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def go(request):
    receive_if(lambda message: message == "go", WAIT)


def answer(reply):
    return lambda request: reply_synchronous(reply, request)


class SynchronousTests(Case):
    def server(self, *deeds):
        """A thread that takes one request, does the deeds with it, and tells its sender so."""
        def serve():
            request = receive(WAIT)
            for deed in deeds:
                deed(request)
            send("done", request.sender)

        return spawn(serve)

    def nothing_else_comes(self, *threads):
        for thread in threads:
            send("go", thread)
        self.assertEqual("done", receive(WAIT))  # nothing before it and, at the end, after it

    def echo(self):
        server = spawn_server(lambda: (request := receive()) != "stop" and (
            reply_synchronous(request.data, request) or True))
        self.addCleanup(end, server)
        return server

    def test_received(self):  # Factor's own
        self.assertEqual("received", send_synchronous("sent", self.server(answer("received"))))
        self.nothing_else_comes()

    def test_add1_gives_six(self):  # Factor's own
        self.assertEqual(6, send_synchronous(5, spawn(handle_synchronous, lambda n: n + 1)))

    @whole_file
    def test_nobody_can_call_himself_by_any_handle(self):  # Factor's own, and more
        with start_node() as node:
            register_remote_thread(self.me, "myself")
            for target in (self.me, trip(self.me), RemoteThread(node, self.me.id),
                           RemoteThread(str(node), "myself")):
                with self.subTest(target=target):
                    self.assertRaises(SynchronousToSelfError, send_synchronous, 1, target, 0.1)
                receive_if(Synchronous, 0, None)

    def test_the_server_sees_data_sender_and_a_tag_that_is_no_counter(self):
        tags = []
        for at in range(20):
            thread = self.server(lambda request: tags.append(request.tag) or reply_synchronous(
                (request.data, request.sender), request))
            self.assertEqual((at, self.me), send_synchronous(at, thread, WAIT))
            self.nothing_else_comes()
        self.assertEqual(20, len(set(tags)))
        self.assertNotIn(tags, (sorted(tags), sorted(tags, reverse=True)))

    def test_a_late_reply_never_reaches_the_mailbox(self):
        for timeout in (0, 0.01):
            thread = self.server(go, answer("late"))
            self.assertRaises(TimeoutError, send_synchronous, "?", thread, timeout)
            self.nothing_else_comes(thread)

    def test_a_second_reply_never_reaches_the_mailbox(self):
        by_hand = lambda request: send(Reply("third", request.tag), request.sender)
        thread = self.server(answer("first"), answer("second"), by_hand, by_hand)
        self.assertEqual("first", send_synchronous("?", thread))
        self.nothing_else_comes()

    def test_a_forged_reply_neither_answers_nor_reaches_the_mailbox(self):
        def forge(request):
            for tag in ("", "0" * 16, 1, None, b"x", []):
                forged = Reply("forged", "t")
                vars(forged).update(tag=tag)
                send(forged, request.sender)
                send(forged, trip(request.sender))

        thread = self.server(forge, answer("true"), forge)
        self.assertEqual("true", send_synchronous("?", thread))
        self.nothing_else_comes()

    def test_any_thread_that_holds_the_request_may_answer(self):
        for way in (lambda request: request, trip):
            helper = spawn(lambda: reply_synchronous("helped", receive(WAIT)))
            server = self.server(lambda request: send(way(request), helper), go)
            self.assertEqual("helped", send_synchronous("?", server))
            self.nothing_else_comes(server)

    def test_the_thread_that_was_called_owes_the_answer_even_if_it_passed_the_call_on(self):
        helper = self.server(go, answer("late"))
        server = spawn(lambda: send(receive(), helper))
        self.assertIsNone(self.raised(ThreadDied, send_synchronous, "?", server).reason)
        self.nothing_else_comes(helper)

    @not_on_windows("timer that interrupts")
    def test_an_interrupted_caller_gets_no_late_reply(self):
        interrupt = lambda request: signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        thread = self.server(interrupt, go, answer("late"))
        with ctrl_c_storm(send_synchronous, every=0):
            self.assertRaises(KeyboardInterrupt, send_synchronous, "?", thread)
        self.nothing_else_comes(thread)

    @not_on_windows("timer that interrupts")
    def test_a_storm_of_ctrl_c_in_calls_mixes_up_no_replies(self):
        server, at = self.echo(), 0
        with ctrl_c_storm(send_synchronous) as struck:
            while len(struck) < 300:
                at += 1
                with contextlib.suppress(KeyboardInterrupt):
                    self.assertEqual(at, send_synchronous(at, server, WAIT))
        self.assertEqual("still there", send_synchronous("still there", server, WAIT))

    def test_many_callers_of_one_server_get_their_own_replies(self):
        server = self.echo()
        for who in range(4):
            spawn(lambda who: send([send_synchronous((who, at), server) == (who, at)
                                    for at in range(100)], self.me), who)
        self.assertEqual([[True] * 100] * 4, [receive(WAIT) for _ in range(4)])

    def test_a_server_that_dies_tells_its_caller_why(self):
        for error, text in ((KeyError("why"), "KeyError: 'why'"), (Awkward(), "Awkward")):
            thread = self.server(lambda request: fail(error))
            died = self.raised(ThreadDied, send_synchronous, "?", thread, WAIT)
            self.assertIs(error, died.reason)
            self.assertEqual((RemoteError, type(error).__name__),
                             (type(died.__cause__), died.__cause__.type))
            self.assertRegex(str(died.__cause__), rf"(?s)^Traceback.* in fail\n.*{text}")
            self.assertIs(error, self.failure_shown().exc_value)

    def test_a_failing_function_of_handle_synchronous_fails_server_and_call(self):
        server = spawn_server(handle_synchronous, lambda n: 1 // n)
        self.assertEqual(1, send_synchronous(1, server))
        died = self.raised(ThreadDied, send_synchronous, 0, server)
        self.assertIs(died.reason, self.failure_shown().exc_value)
        self.assertIsInstance(died.reason, ZeroDivisionError)
        self.assertTrue(server.join(WAIT))

    def test_handle_synchronous_leaves_other_messages_and_times_out(self):
        send("other", self.me)
        self.assertRaises(TimeoutError, handle_synchronous, len, 0)
        self.assertRaises(TimeoutError, handle_synchronous, len, timeout=0.01)
        caller = spawn(lambda: send(send_synchronous("abc", self.me), self.me))
        self.assertIs(True, handle_synchronous(len, WAIT))
        self.assertTrue(caller.join(WAIT))
        self.assertEqual(["other", 3], [receive(0), receive(0)])

    def test_a_call_of_a_thread_that_has_ended_or_is_ending_never_hangs(self):
        for thread in (ended := joined(int), trip(ended)):
            self.assertRaises(NoSuchThread, send_synchronous, "?", thread, WAIT)
        for func in [int, receive, int] * 100:
            died = outcome(send_synchronous, "?", spawn(func), WAIT)
            self.assertIsInstance(died, (ThreadDied, NoSuchThread))

    def test_a_call_with_bad_arguments_says_so_and_leaves_nothing_behind(self):
        server = spawn(receive)
        for thread, timeout in (server, "soon"), (None, None), ("server", 1):
            self.assertRaises(TypeError, send_synchronous, 1, thread, timeout)
        self.assertEqual({}, distconc._pending._by_tag)
        send("end", server)
        self.assertTrue(server.join(WAIT))

    def test_unread_messages_cost_a_call_nothing(self):
        server = self.echo()

        def cost():  # how many functions are called by a call
            made = []
            sys.setprofile(lambda frame, event, arg: made.append(event))
            send_synchronous("?", server, WAIT)
            sys.setprofile(None)
            return len(made)

        def caller():
            costs = [cost(), cost()]
            for at in range(100_000):
                send(at, current_thread())
            send([*costs, cost()], self.me)

        spawn(caller)
        _, before, after = receive(WAIT)
        self.assertLess(after, before + 50)

    def test_a_reply_to_a_caller_that_is_gone_is_dropped(self):
        joined(outcome, send_synchronous, "?", self.me, 0)
        request = receive(WAIT)
        for gone in (request, trip(request)):
            self.assertIsNone(reply_synchronous("late", gone))

    def test_messages_match_by_position_and_by_name(self):
        watch = monitor(ended := joined(int))
        match [Synchronous(1, self.me, "t"), Reply(2, "t"), receive(WAIT), watch]:
            case [Synchronous(1, a, "t"), Reply(2, "t"), Down(b, c, NoSuchThread()), Monitor()]:
                self.assertEqual((self.me, watch, ended), (a, b, c))
            case wrong:
                self.fail(wrong)
        match [Synchronous(1, self.me, "t"), Reply(2, "t"), Down(watch, ended, None)]:
            case [Synchronous(tag="t", sender=a, data=1), Reply(tag="t", data=2),
                  Down(reason=None, target=c, monitor=b)]:
                self.assertEqual((self.me, watch, ended), (a, b, c))
            case wrong:
                self.fail(wrong)

    def test_a_request_equals_every_other_of_its_tag_whatever_its_data(self):
        one = Synchronous([1], self.me, "tag")
        other = Synchronous(array.array("i", [2]), self.me, "tag")
        self.assertEqual(one, other)
        self.assertEqual(1, len({one, other}))
        self.assertNotEqual(one, Synchronous([1], self.me, "another"))
        self.assertNotEqual(one, Reply([1], "tag"))

    @whole_file
    def test_messages_are_immutable_and_no_tuples(self):
        watch = monitor(joined(int))
        for message in (Synchronous(1, self.me, "t"), Reply(2, "t"), receive(WAIT), watch):
            self.assertNotIsInstance(message, tuple)
            self.assertTrue(message.__match_args__)
            for name in message.__match_args__:
                before = getattr(message, name)
                self.assertRaises(AttributeError, setattr, message, name, 3)
                self.assertRaises(AttributeError, delattr, message, name)
                forged = Reduced(*message.__reduce__(), {name: 3})
                self.assertRaises(TypeError, pickle.loads, pickle.dumps(forged))
                self.assertIs(before, getattr(message, name))


######## Monitors


class MonitorTests(Case):
    def test_a_monitor_that_comes_while_others_are_told_hears_that_there_is_no_such_thread(self):
        thread, describe = spawn(receive), distconc._describe_end
        late = []

        def monitor_late(*about):
            if not late:
                late.append(monitor(thread))
            return describe(*about)

        early = [monitor(thread) for _ in range(3)]
        with mock.patch.object(distconc, "_describe_end", monitor_late):
            send("end", thread)
            self.assertTrue(thread.join(WAIT))
        downs = {down.monitor: down.reason for down in
                 [receive_if(Down, WAIT) for _ in range(3)]}
        self.assertEqual([None] * 3, [downs[one] for one in early])

    def watched(self, func, *args):
        """The reason of the one Down of a thread that runs `func`."""
        thread = spawn(lambda: (receive(), func(*args)))
        watch = monitor(thread)
        send("go", thread)
        down = receive(WAIT)
        self.assertEqual((watch, thread), (down.monitor, down.target))
        return down.reason

    def test_the_reason_is_none_if_it_returned_and_else_the_exception(self):
        self.assertIsNone(self.watched(int))
        for error in (ValueError("why"), Awkward()):
            self.assertIs(error, self.watched(fail, error))
            self.failure_shown()

    def test_the_reason_is_no_such_thread_if_it_had_ended(self):
        for target in (ended := joined(int), trip(ended)):
            watch, down = monitor(target), receive(WAIT)
            self.assertEqual((watch, target), (down.monitor, down.target))
            self.assertIsInstance(down.reason, NoSuchThread)

    def test_down_comes_after_all_that_the_thread_had_sent(self):
        for _ in range(10):
            thread = spawn(lambda: (receive(), [send(at, self.me) for at in range(100)]))
            watches = [monitor(thread), monitor(trip(thread)), monitor(thread)]
            send("go", thread)
            self.assertEqual(list(range(100)), [receive(WAIT) for _ in range(100)])
            downs = [receive(WAIT) for _ in watches]
            self.assertCountEqual(watches, [down.monitor for down in downs])
            self.assertEqual([None] * 3, [down.reason for down in downs])

    def test_a_monitor_that_races_with_the_end_gets_exactly_one_down(self):
        for _ in range(200):
            watch = monitor(thread := spawn(int))
            down = receive(WAIT)
            self.assertEqual((watch, thread), (down.monitor, down.target))
            self.assertIsInstance(down.reason, (type(None), NoSuchThread))

    def test_after_demonitor_no_down_is_or_comes(self):
        first, second = spawn(idle), spawn(idle)
        kept, early, late = monitor(first), monitor(second), monitor(second)
        end(first)
        demonitor(early)
        end(second)
        joined(send, "other", self.me)
        demonitor(late)
        demonitor(late)
        self.assertEqual("other", receive_if(str, WAIT))
        self.assertEqual(Down(kept, first, None), receive(WAIT))
        self.assertRaises(TimeoutError, receive, 0)

    def test_after_a_demonitor_that_races_with_the_end_no_down_is_or_comes(self):
        for at in range(300):
            thread = spawn([int, receive][at % 2])
            watch = monitor(thread)
            send("go", thread)
            demonitor(watch)
            self.assertIsNone(receive(0, None))
            self.assertTrue(thread.join(WAIT))
            self.assertIsNone(receive(0, None))

    @whole_file
    def test_what_is_neither_thread_nor_node_cannot_be_watched(self):
        for wrong in (3.5, object(), None, True):
            with self.subTest(wrong):
                self.addCleanup(receive, 0, None)
                self.assertRaises(ValueError, monitor, wrong)


######## Remote handles and the registry

PORTS = st.integers(1, 65535)
IDS = st.one_of(st.integers(1, 1 << 62), st.text(min_size=1, max_size=20))  # repr and all
MADE_BY_HAND = st.builds(RemoteThread, PORTS, IDS)


class HandleTests(Case):
    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.sampled_from([None, 2, 3, 4, 5]), min_size=1))
    def test_a_handle_equals_its_thread_after_any_number_of_trips(self, protocols):
        handle, other = current_thread(), joined(int)
        for protocol in protocols:
            handle = pickle.loads(pickle.dumps(handle, protocol)) if protocol else trip(handle)
            self.assertIs(RemoteThread, type(handle))
            self.assertTrue(handle == self.me == handle)
            self.assertFalse(handle != self.me or self.me != handle)
            self.assertEqual((hash(self.me), self.me.id), (hash(handle), handle.id))
            self.assertNotIn(handle, [other, trip(other), self.me.id, None])

    def test_a_handle_stays_equal_when_its_node_starts_and_stops(self):
        early = trip(self.me)
        with start_node() as node:
            late = trip(self.me)
            self.assertEqual([node.address] * 2, [self.me.node, late.node])
            self.assertEqual({self.me}, {early, late, self.me})
        self.assertEqual({self.me}, {early, late, self.me})

    @not_on_windows("Unix sockets")
    @settings(deadline=None, max_examples=40)
    @given(PORTS, IDS)
    def test_handles_made_by_hand_are_equal_however_the_node_is_written(self, port, id):
        handles = [RemoteThread(node, id) for node in (
            port, f"127.0.0.1:{port}", ("127.0.0.1", port), f"localhost:{port}")]
        for handle in handles + list(map(trip, handles)):
            self.assertEqual({handles[0]}, {handles[0], handle})
            self.assertEqual((("127.0.0.1", port), id), (handle.node, handle.id))
            for node, other in ((port % 65535 + 1, id), (f"127.0.0.2:{port}", id),
                                ("/tmp/x", id), (port, id * 2), (port, repr(id))):
                self.assertNotEqual(handle, RemoteThread(node, other))

    def test_a_node_its_address_and_its_text_are_one_node(self):
        with start_node() as node:
            self.assertEqual(1, len({RemoteThread(spelling, "x") for spelling in (
                node, str(node), node.address, node.address[1])}))

    def test_handles_can_be_referred_to_weakly(self):
        handles = self.me, RemoteThread(9000, "x")
        kept = weakref.WeakKeyDictionary((handle, handle.id) for handle in handles)
        self.assertEqual([self.me.id, "x"], [kept[handle] for handle in handles])

    def test_a_handle_that_came_home_joins_as_its_thread_does(self):
        thread = joined(int)
        self.assertTrue(trip(thread).join(0))
        with self.assertRaises(RuntimeError):
            trip(self.me).join(0.1)

    def test_a_remote_thread_is_immutable(self):
        handle = RemoteThread(9000, "logger")
        for name in ("node", "id", "other"):
            self.assertRaises(AttributeError, setattr, handle, name, 1)
        self.assertRaises(AttributeError, delattr, handle, "id")
        self.assertEqual((("127.0.0.1", 9000), "logger"), (handle.node, handle.id))

    def test_sent_home_it_delivers_without_the_network(self):
        early, dialled = trip(self.me), AssertionError("dialled")
        patch = mock.patch("socket.socket.connect", side_effect=dialled)
        with start_node() as node, patch as connect:
            register_remote_thread(self.me, "home")
            for handle in (early, trip(self.me), RemoteThread(node, self.me.id),
                           RemoteThread(node.address, "home")):
                send([1], handle)
                handle.send([2])
                self.assertEqual([[1], [2]], [receive(0), receive(0)])
                caller = spawn(lambda: send(send_synchronous("abc", handle), self.me))
                self.assertTrue(handle_synchronous(len, WAIT) and caller.join(WAIT))
                self.assertEqual(3, receive(0))
            self.assertEqual(([], 0), (nodes(), connect.call_count))
        send("stopped", early)
        self.assertEqual("stopped", receive(0))


class RegistryMachine(RuleBasedStateMachine):
    threads = Bundle("threads")
    names = st.sampled_from(["a", "logger"])

    def __init__(self):
        super().__init__()
        self.model, self.alive, self.ended = {}, [], []

    @rule(target=threads, name=names, register=st.booleans())
    def spawn(self, name, register):
        thread = spawn(idle, name=name, register=register)
        self.alive.append(thread)
        self.model.update({name: thread} if register else {})
        return thread

    @rule(thread=threads, name=st.none() | names)
    def register(self, thread, name):
        error = outcome(register_remote_thread, thread, *[name] * (name is not None))
        check(type(error) is (type(None) if thread in self.alive else NoSuchThread))
        self.model.update({} if error else {name or thread.name: thread})
        for wrong in (trip(thread), thread.id, None):
            check(isinstance(outcome(register_remote_thread, wrong, "a"), TypeError))

    @rule(name=names)
    def unregister(self, name):
        error = outcome(unregister_remote_thread, name)
        check(type(error) is (type(None) if self.model.pop(name, None) else NoSuchThread))

    @rule(thread=threads)
    def end(self, thread):
        end(thread)
        if thread in self.alive:
            self.alive.remove(thread)
            self.ended.append(thread)
        self.model = {name: owner for name, owner in self.model.items() if owner != thread}

    @invariant()
    def lookup(self):
        known = {**self.model, **{thread.id: thread for thread in self.alive}}
        for wanted in ("a", "logger", *(thread.id for thread in self.alive + self.ended)):
            found = outcome(get_remote_thread, wanted)
            check(found is known[wanted] if wanted in known else type(found) is NoSuchThread)

    def teardown(self):
        for thread in self.alive:
            end(thread)


RegistryAsADictTest = RegistryMachine.TestCase
RegistryAsADictTest.settings = settings(deadline=None, max_examples=80, stateful_step_count=20)


class RegistryTests(Case):
    def test_the_text_of_no_such_thread_lists_near_names(self):
        thread = spawn(idle, name="logger", register=True)
        self.addCleanup(end, thread)
        for at in range(10):
            register_remote_thread(thread, f"an{at}")
        with start_node() as node:
            for call in (get_remote_thread, unregister_remote_thread,
                         lambda name: send_synchronous("?", RemoteThread(node, name), WAIT)):
                self.assertRaisesRegex(NoSuchThread, r"\blogger\b", call, "loger")

    def test_a_thread_has_its_registered_name_before_it_runs(self):
        for at in range(20):
            thread = spawn(lambda: send(outcome(get_remote_thread, "early"), self.me),
                           name="early", register=True)
            self.assertIs(thread, receive(WAIT))
            self.assertTrue(thread.join(WAIT))
            self.assertRaises(NoSuchThread, get_remote_thread, "early")

    def test_a_name_given_while_the_thread_ends_does_not_stay(self):
        for _ in range(200):
            thread = spawn(int)
            self.assertIsInstance(outcome(register_remote_thread, thread, "brief"),
                                  (type(None), NoSuchThread))
            self.assertTrue(thread.join(WAIT))
            self.assertRaises(NoSuchThread, get_remote_thread, "brief")


######## Serializing


@dataclass
class Pair:
    a: object
    b: object


OBJECTS = [  # Factor's own
    False, True, 0, -50, 20, 5.25, -5.25, 1 + 2j, fractions.Fraction(1, 2), "test",
    (1, 2, "three"), [1, 2, "three"], bytearray(b"hello world"), "hello \U00012345 unicode",
    len, [len, "dup"], Pair("a", 2), b"\x32\x0d\x37\x40\x01", [True, False, True],
    array.array("d", [1.0, 3.0, 4.0, 1.0, 2.35, 0.33]), (("a", "bc"), ("de", "fg")),
    {"a": "bc", "de": "fg"}, math.pi, 2 ** 1008, 2 ** 1024 - 1]
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False),
                   st.text(), st.binary(), st.fractions(), st.datetimes(), st.uuids(),
                   MADE_BY_HAND, st.builds(current_thread))
DATA = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(LEAVES, inner),
    st.frozensets(LEAVES), st.builds(Synchronous, inner, MADE_BY_HAND, st.text())))


class SerializeTests(Case):
    def test_objects_come_back_equal_and_what_is_shared_stays_shared(self):  # Factor's own
        for thing in OBJECTS:
            first, second = trip([thing, thing])
            self.assertEqual((thing, type(thing)), (first, type(first)))
            self.assertTrue(first is second or isinstance(thing, (int, float, complex)))
        curry = trip(functools.partial(operator.add, 1))
        self.assertEqual(3, curry(2))

    def test_a_list_and_a_dict_that_contain_themselves_come_back_so(self):  # Factor's own
        for ring, key in (([None], 0), ({}, "self")):
            ring[key] = ring
            back = trip(ring)
            self.assertIs(back, back[key])

    @settings(deadline=None, max_examples=60)
    @given(DATA)
    def test_nested_data_with_handles_inside_comes_back_equal(self, data):
        self.assertEqual(data, trip(data))

    def test_errors_come_back_with_what_they_carry(self):
        thread = spawn(lambda: receive() and fail(KeyError("why")))
        died = outcome(send_synchronous, "?", thread)
        self.failure_shown()
        back = trip([died, died.__cause__, LinkedError(ValueError("x"), self.me)])
        self.assertEqual([ThreadDied, RemoteError, LinkedError], list(map(type, back)))
        self.assertEqual("KeyError('why')", repr(back[0].reason))
        self.assertEqual(("KeyError", str(died.__cause__)), (back[1].type, str(back[1])))
        self.assertEqual(("ValueError('x')", self.me), (repr(back[2].error), back[2].thread))
        for error in (died, outcome(send_synchronous, 1, self.me), NoSuchThread("no"),
                      NodeDown("no"), NodeUnreachable("no"), outcome(serialize, len.__call__)):
            self.assertIs(type(error), type(trip(error)))

    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.text(max_size=3) | st.integers(0, 3), max_size=8), st.booleans())
    def test_what_cannot_be_pickled_is_named_with_its_path(self, path, as_tuple):
        message = threading.Lock()
        for step in reversed(path):
            if isinstance(step, str):
                message = {"fine": 1, step: message}
            else:
                message = [*["fine", 2.5, {}][:step], message, "fine"]
                message = tuple(message) if as_tuple else message
        where = "message" + "".join(f"[{step!r}]" for step in path)
        self.assertRaisesRegex(SerializationError, re.escape(where) + r"(?![\[.\w])",
                               serialize, message)

    def test_what_cannot_be_looked_at_is_refused_as_what_cannot_be_sent(self):
        lost = weakref.proxy(Odd())
        for thing in lost, [lost], Shy(), Shy.error():
            self.assertRaises(SerializationError, serialize, thing)

    def test_the_path_leads_through_attributes_cycles_and_many_levels(self):
        ring, deep = [Pair("fine", [threading.Lock()])], threading.Lock()
        ring.insert(0, ring)
        for _ in range(30):
            deep = [deep]
        for message, where in ((ring, "message[1].b[0]"), (deep, "message" + "[0]" * 30)):
            with self.subTest(where):
                self.assertRaisesRegex(SerializationError, re.escape(where) + r"(?!\[)",
                                       serialize, message)

    def test_whatever_cannot_be_serialized_raises_the_same_kind_of_error(self):
        class Hopeless:
            def __init__(self, error):
                self.error = error

            def __reduce__(self):
                raise self.error

            __repr__ = __reduce__

        deep = []
        for _ in range(100_000):
            deep = [deep]
        for at, wrong in enumerate((
                lambda: 0, deep, Hopeless(MemoryError()), [Hopeless(ZeroDivisionError())],
                {Hopeless(ZeroDivisionError()): 1}, {1, lambda: 0}, (at for at in ()), sys,
                Pair(threading.Lock(), 1))):
            with self.subTest(at):
                error = self.raised(SerializationError, serialize, wrong)
                self.assertIn("message", str(error))


######## What allow lets in


class Strict(Exception):
    code = None

    def __init__(self, one, two):
        super().__init__(one, two)


def short_text(word):
    return b"\x8c" + bytes([len(word)]) + word.encode()


def named(thing):
    return short_text(thing.__module__) + short_text(thing.__qualname__) + b"\x93"


def built(start, state, end=b""):
    """Return the pickle that says BUILD, with `state`, of what `start` leaves on the stack."""
    body = pickle.dumps(state, 2)[2:-1]
    return b"\x80\x04" + start + body + b"b" + end + b"."


class AllowCase(Case):
    def load(self, data, *allow):
        return distconc._make_loader(allow)(data)

    def trip(self, thing, *allow):
        return self.load(pickle.dumps(thing, 5), *allow)

    def assert_refused(self, data, *allow):
        self.assertRaises(distconc._NotAllowed, self.load, data, *allow)


class ExceptionsThatComeInTests(AllowCase):
    def test_a_unicode_error_whose_offsets_are_outside_of_its_object_is_refused(self):
        for args in ((("u", b"x", -(1 << 40), 1, "r"), ("u", b"x", 0, 1 << 40, "r"),
                      ("u", b"x", 1, 0, "r"), ("u", "x", 0, 1, "r"), ("u", b"x", 0, 1, 7))):
            with self.subTest(args):
                self.assert_refused(pickle.dumps(Reduced(UnicodeDecodeError, args)))
        self.assert_refused(pickle.dumps(Reduced(UnicodeEncodeError, ("u", "x", -9, 1, "r"))))
        error = Reduced(UnicodeTranslateError, ("x", 0, 1 << 40, "r"))
        self.assert_refused(pickle.dumps(error))

    def test_a_state_cannot_move_the_offsets_of_a_unicode_error(self):
        data = pickle.dumps(Reduced(UnicodeDecodeError, ("u", b"x", 0, 1, "r"),
                                    {"start": -(1 << 40)}))
        self.assert_refused(data)
        self.assert_refused(data, echo)

    def test_a_true_unicode_error_gets_in(self):
        for wrong in (lambda: b"\xff".decode(), lambda: "\xff".encode("ascii")):
            with self.assertRaises(UnicodeError) as caught:
                wrong()
            back = self.trip(caught.exception)
            self.assertEqual(str(back), str(caught.exception))
        error = UnicodeTranslateError("abc", 1, 2, "why")
        self.assertEqual(self.trip(error).args, error.args)

    def test_name_from_of_an_import_error_does_not_get_in(self):
        state = {"name_from": "x", "name": "antigravity"}
        data = pickle.dumps(Reduced(ImportError, ("no",), state))
        self.assertIsNone(getattr(self.load(data), "name_from", None))
        self.assertEqual(self.load(data).name, "antigravity")

    def test_the_name_of_an_import_error_is_a_text(self):
        self.assert_refused(pickle.dumps(Reduced(ImportError, ("no",), {"name": [1]})))

    def test_a_true_import_error_keeps_its_name(self):
        try:
            import no_such_module_at_all  # noqa: F401
        except ImportError as error:
            back = self.trip(error)
        self.assertEqual(type(back), ModuleNotFoundError)
        self.assertEqual(back.name, "no_such_module_at_all")
        try:
            [].nothing
        except AttributeError as error:
            self.assertEqual(self.trip(error).args, error.args)

    def test_no_state_sets_what_python_itself_reads_of_an_exception(self):
        for name, value in (("__cause__", ValueError()), ("__context__", ValueError()),
                            ("__traceback__", None), ("__notes__", [1]), ("__notes__", "x"),
                            ("filename", 7), ("__class__", 1), (7, 7)):
            with self.subTest(name):
                self.assert_refused(pickle.dumps(Reduced(OSError, (2, "no"), {name: value})))
        self.assert_refused(pickle.dumps(Reduced(ValueError, (), (None, {"x": 1}))))

    def test_notes_are_texts_even_if_the_pickle_adds_to_them_later(self):
        notes = ["one"]
        error = Reduced(ValueError, ("v",), {"__notes__": notes})
        back = self.load(pickle.dumps([error, notes]))
        self.assertEqual(back[0].__notes__, ["one"])
        self.assertIsNot(back[0].__notes__, back[1])

    def test_attributes_that_mean_nothing_to_python_get_in(self):
        error = ValueError("v")
        error.code = [5]
        self.assertEqual(self.trip(error).code, [5])

    def test_a_syntax_error_that_names_a_place_is_refused(self):
        place = ("file", 1, 1, "text", 1, 1 << 40)
        self.assert_refused(pickle.dumps(SyntaxError("no", place)))
        self.assertEqual(self.trip(SyntaxError("no")).args, ("no",))

    def test_no_exception_is_made_without_its_constructor(self):
        body = b"\x80\x04" + named(UnicodeDecodeError) + b")\x81."  # NEWOBJ
        with self.assertRaises(Exception):
            self.load(body)

    def test_our_own_errors_and_the_built_in_ones_get_in(self):
        for error in (ValueError("v"), OSError(2, "no"), KeyError(1), StopIteration(1),
                      NodeDown("d"), ThreadDied(None, None, "t"), RemoteError("a", "b"),
                      AuthenticationError("a"), SystemExit(3)):
            back = self.trip(error)
            self.assertEqual((type(back), back.args), (type(error), error.args))
        back = self.trip(LinkedError(ValueError("x"), RemoteThread(9000, "y")))
        self.assertEqual(repr(back.error), "ValueError('x')")
        self.assertEqual(back.thread, RemoteThread(9000, "y"))

    def test_a_listed_exception_keeps_its_attributes_and_no_cause_is_forged(self):
        error = Strict(1, 2)
        error.code = 5
        self.assertEqual(self.trip(error, Strict).code, 5)
        self.assert_refused(pickle.dumps(Reduced(Strict, (1, 2), {"__cause__": 1})), Strict)


class AllowTests(AllowCase):
    def setUp(self):
        self.defaults = echo.__defaults__

    def test_no_message_changes_a_listed_function(self):
        for state in (None, {"__defaults__": (1,)}), {"note": 1}:
            with self.subTest(state):
                self.assert_refused(built(named(echo), state), echo)
        self.assertEqual((echo.__defaults__, vars(echo)), (self.defaults, {}))

    def test_no_message_changes_a_listed_class(self):
        for state in (None, {"forged": 1}), {"forged": 1}:
            self.assert_refused(built(named(Point), state), Point)
        self.assertFalse(hasattr(Point, "forged"))

    def test_no_message_changes_what_a_listed_function_gives_back(self):
        call = named(echo) + named(Point) + b"\x85R"  # echo(Point)
        self.assert_refused(built(call, (None, {"forged": 1})), Point, echo)
        self.assertFalse(hasattr(Point, "forged"))

    def test_no_message_changes_a_class_of_plain_data(self):
        for kind in RemoteThread, Reply, uuid.UUID, datetime.date, NodeDown:
            for state in (None, {"forged": 1}), {"forged": 1}:
                with self.subTest(kind), self.assertRaises(Exception):
                    self.load(built(named(kind), state))
            self.assertFalse(hasattr(kind, "forged"))

    def test_stand_ins_cannot_be_chained(self):
        link = named(complex) + b"(" + named(range) + b")}Ntb"  # as partial takes it
        self.assert_refused(b"\x80\x04" + link + b"K\x03\x85R.")  # and calls it with 3
        self.assertEqual(self.trip(1j), 1j)

    def test_a_class_itself_is_refused_wherever_it_hides(self):
        down = Down(Monitor(1, "t"), ValueError, None)
        for value in (ValueError, [complex], {"k": (NodeDown,)}, Reply(RemoteThread, "t"), down,
                      ValueError(complex), [RemoteThread(9000, 1), RemoteThread],
                      [uuid.uuid4(), RemoteThread], [RemoteThread] * 3):
            with self.subTest(value):
                self.assert_refused(pickle.dumps(value, 5))
        self.assert_refused(pickle.dumps([Point(ValueError)], 5), Point)
        for value in {complex}, {complex: 1}, {(complex,): 1}:
            with self.subTest(value):
                self.assert_refused(pickle.dumps(value, 5))

    def test_extension_codes_are_refused_though_they_were_seen_before(self):
        copyreg.add_extension("os", "getpid", 0xF0)
        try:
            data = b"\x80\x02\x82\xf0)R."
            self.assertEqual(pickle.loads(data), os.getpid())  # which caches it
            self.assert_refused(data)
            self.assert_refused(data, echo)
            self.assertEqual(self.trip([1, RemoteThread(9000, 1)]), [1, RemoteThread(9000, 1)])
        finally:
            copyreg.remove_extension("os", "getpid", 0xF0)

    def test_a_registered_code_is_refused_by_a_loader_older_than_it(self):
        load = distconc._make_loader([])
        copyreg.add_extension("os", "getpid", 0xF0)
        try:
            pickle.loads(b"\x80\x02\x82\xf0.")
            self.assertRaises(distconc._NotAllowed, load, b"\x80\x02\x82\xf0)R.")
        finally:
            copyreg.remove_extension("os", "getpid", 0xF0)

    def test_plain_data_and_what_is_listed_comes_back_equal(self):
        zone = datetime.timezone(datetime.timedelta(hours=1), "x")
        plain = [None, True, 1 << 70, 1j, range(5), bytearray(b"x"), {1}, frozenset("a"),
                 uuid.uuid4(),
                 datetime.datetime(2020, 1, 1, fold=1, tzinfo=zone), datetime.time(1, fold=1),
                 datetime.date(2020, 2, 29), RemoteThread(9000, 1), Reply(1, "t")]
        self.assertEqual(self.trip(plain), plain)
        mixed = [*plain, Point(7), echo, Point]
        self.assertEqual(self.trip(mixed, Point, echo), mixed)
        self.assertEqual(self.trip(mixed, Point, echo)[9].fold, 1)

    def test_a_ring_gets_in_and_a_date_that_is_none_does_not(self):
        ring = [RemoteThread(9000, 1)]
        ring.append(ring)
        back = self.trip(ring)
        self.assertIs(back[1], back)
        for kind, fields in ((datetime.date, b"\x07\xe4\x01\xff"),
                             (datetime.time, b"\x17\xff\xff\0\0\0")):
            with self.subTest(kind), self.assertRaises(ValueError):
                self.load(pickle.dumps(Reduced(kind, (fields,))))

    def test_what_is_not_named_is_never_imported(self):
        sys.modules.pop("antigravity", None)
        name = short_text("antigravity") + short_text("fly") + b"\x93"
        self.assert_refused(b"\x80\x04" + name + b".")
        self.assertNotIn("antigravity", sys.modules)

    def test_allow_takes_classes_and_functions_themselves(self):
        def local():
            pass
        for item in (Point().__eq__, Point.__eq__, list[int], Point(), "os.system", None, os,
                     [].append, str.join, local, functools.lru_cache(echo),
                     types.SimpleNamespace(__qualname__="x", __module__="y")):
            with self.subTest(item), self.assertRaises(TypeError):
                distconc._check_allow([item])
        for allow in "os.system", 7, None, Point, "":
            with self.subTest(allow), self.assertRaises(TypeError):
                distconc._check_allow(allow)
        self.assertEqual(distconc._check_allow([Point, echo, len]), (Point, echo, len))
        self.assertIs(distconc._make_loader("anything"), pickle.loads)


######## Addresses and keys


class AddressTests(Case):
    def test_what_is_no_address_is_an_error_at_once(self):
        for node in ("", "h", "h:", ":", "h:x", "h:90O0", "a\0b:1", "a\nb:1", "/a\0b", "/a\nb",
                     "/a\x1bb", "/a\x9bb", ("h", True), ("h", -1), ("h", 65536), ("h", 1.0),
                     ("", 1), True, -1, 70000, ("h",), ("h", 1, 2), 1.5, b"h:1", b"127.0.0.1:1",
                     None, object(), "h h:1", ("a:b", 1), ":9", "h:" + "0" * 100 + "1",
                     "h:" + "9" * 5000, "h" * 300 + ":1", ("h\udc80", 1), "/" + "x" * 5000):
            with self.subTest(repr(node)[:50]), self.assertRaises((ValueError, TypeError)):
                distconc._parse_address(node)

    def test_every_spelling_comes_to_one(self):
        for node in (9000, "9000", "127.0.0.1:9000", ("127.0.0.1", 9000), "localhost:9000",
                     ["localhost", 9000]):
            self.assertEqual(distconc._parse_address(node), ("127.0.0.1", 9000))

    @not_on_windows("paths of any bytes")
    def test_a_path_of_any_bytes_has_a_text_that_means_it(self):
        path = os.fsdecode(b"/tmp/\xff\xfe:9000")
        for node in path, b"/tmp/\xff\xfe:9000":
            address = distconc._parse_address(node)
            self.assertEqual(os.fsencode(address), b"/tmp/\xff\xfe:9000")
            text = distconc._format_address(address)
            self.assertEqual(distconc._parse_address(text), address)
        self.assertEqual(distconc._format_address(None), "")

    def test_paths_that_are_too_long_are_errors_and_not_kept(self):
        distconc._parse_and_keep.cache_clear()
        for number in range(50):
            path = f"/{number}" + "x" * 5000
            self.assertRaises(ValueError, distconc._parse_address_cached, path)
        self.assertEqual(distconc._parse_and_keep.cache_info().currsize, 0)

    def test_only_digits_that_begin_with_127_are_loopback(self):
        for host, expected in (("127.0.0.1", True), ("127.9.9.9", True), ("127.1", True),
                               ("127.evil.org", False), ("127.0.0.1.evil.org", False),
                               ("127.", False), ("10.0.0.1", False), ("h", False)):
            with self.subTest(host):
                self.assertIs(distconc._is_loopback((host, 1)), expected)
        self.assertTrue(distconc._is_loopback("/run/x"))
        self.assertTrue(distconc._is_loopback(None))

    def test_what_is_advertised_can_be_dialled(self):
        advertised, everywhere = distconc._advertised_address, ("0.0.0.0", 9000)
        host, port = advertised(everywhere, None)
        self.assertNotEqual(distconc._numeric_host(host), b"")
        self.assertNotEqual(host, "0.0.0.0")
        self.assertEqual(port, 9000)
        self.assertEqual(advertised(everywhere, "public.example"), ("public.example", 9000))
        self.assertEqual(advertised(everywhere, "public.example:7"), ("public.example", 7))
        self.assertEqual(advertised(("10.0.0.9", 5), None), ("10.0.0.9", 5))
        self.assertIsNone(advertised(None, None))
        for wrong in 0, "h:0", ("0.0.0.0", 9), "0.0.0.0", "", "a b", True, 1.5:
            with self.subTest(wrong), self.assertRaises(ValueError):
                advertised(everywhere, wrong)
        with self.assertRaises(ValueError):
            advertised("/run/x", "h")

    def test_without_a_network_the_loopback_address_is_advertised(self):
        with mock.patch("socket.socket.connect", side_effect=OSError("no network")):
            self.assertEqual(distconc._network_host(), "127.0.0.1")


class KeyTests(Case):
    LOCAL = ("127.0.0.1", 1)

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        self.path = os.path.join(directory.name, "cookie")

    def environment(self, **changes):
        changed = {name: value for name, value in os.environ.items()
                   if not name.startswith("DISTCONC_")}
        changed.update(changes)
        patch = mock.patch.dict(os.environ, changed, clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    def test_only_bytes_and_text_are_keys(self):
        for key in (bytearray(b"k" * 20), [1] * 20, (1,) * 20, range(20), 20,
                    memoryview(b"k" * 20), True):
            with self.subTest(key), self.assertRaises(TypeError):
                distconc._find_key(key, self.LOCAL)
        self.assertEqual(distconc._find_key("k\xe9", self.LOCAL), "k\xe9".encode())
        for key in b"", "":
            self.assertRaises(ValueError, distconc._find_key, key, self.LOCAL)

    @not_on_windows("variables of any bytes")
    def test_the_environment_may_have_a_key_of_any_bytes(self):
        self.environment()
        os.environb[b"DISTCONC_AUTHKEY"] = b"\xff\xfe\x80key"
        self.assertEqual(distconc._find_key(None, self.LOCAL), b"\xff\xfe\x80key")
        same = os.environ["DISTCONC_AUTHKEY"]
        self.assertEqual(distconc._find_key(same, self.LOCAL), b"\xff\xfe\x80key")

    def test_a_short_key_is_refused_off_loopback_and_the_text_makes_a_good_one(self):
        for host in "10.0.0.1", "127.evil.org", "0.0.0.0":
            with self.assertRaisesRegex(ValueError, "random.*python3 distconc.py key"):
                distconc._find_key("short", (host, 1))
        self.assertEqual(distconc._find_key("é" * 8, ("10.0.0.1", 1)), "é".encode() * 8)
        command = distconc.MAKE_KEY.replace("python3", sys.executable, 1)
        made = subprocess.run(command, shell=True, capture_output=True, check=True,
                              cwd=os.path.dirname(MODULE)).stdout
        self.assertEqual(len(made.strip()), 32)

    def test_the_argument_comes_before_the_environment_before_the_cookie(self):
        self.environment(DISTCONC_COOKIE=self.path)
        cookie = distconc._find_key(None, self.LOCAL)
        self.assertEqual(distconc._read_cookie(self.path), cookie)
        os.environ["DISTCONC_AUTHKEY"] = "environment"
        self.assertEqual(distconc._find_key(None, self.LOCAL), b"environment")
        self.assertEqual(distconc._find_key("argument", self.LOCAL), b"argument")

    @not_on_windows("modes of files")
    def test_a_cookie_is_made_for_its_user_alone_and_nothing_else_is_left(self):
        key = distconc._read_cookie(self.path)
        self.assertGreaterEqual(len(key), 32)
        self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o600)
        self.assertEqual(os.listdir(self.directory), ["cookie"])
        self.assertEqual(distconc._read_cookie(self.path), key)

    def test_who_finds_that_another_was_first_takes_its_key(self):
        key = distconc._read_cookie(self.path)
        with mock.patch("os.path.lexists", return_value=False):
            self.assertEqual(distconc._read_cookie(self.path), key)

    def test_a_cookie_is_made_where_there_are_no_hard_links(self):
        with mock.patch("os.link", side_effect=OSError("no hard links")):
            self.assertGreaterEqual(len(distconc._read_cookie(self.path)), 32)
        self.assertEqual(os.listdir(self.directory), ["cookie"])

    def test_where_no_cookie_can_be_made_the_error_says_three_ways(self):
        no_home = os.path.join(self.directory, "nowhere", "cookie")
        paths = [no_home, self.directory]
        if not ON_WINDOWS:  # where not everybody may make links
            os.symlink("nothing", os.path.join(self.directory, "dangling"))
            paths += os.path.join(self.directory, "dangling"), "/proc/cookie"
        for path in paths:
            with self.subTest(path), self.assertRaises(OSError) as caught:
                distconc._read_cookie(path)
            for way in path, "authkey=", "DISTCONC_AUTHKEY", "DISTCONC_COOKIE":
                self.assertIn(way, str(caught.exception))
        self.assertLessEqual({*os.listdir(self.directory)}, {"dangling"})

    @not_on_windows("way to remove a file that is open")
    def test_a_full_disk_leaves_nothing_behind(self):
        with mock.patch("os.urandom", return_value=mock.Mock(hex=lambda: "key")):
            full = OSError(28, "No space left on device")
            with mock.patch("builtins.open", side_effect=full):
                self.assertRaises(OSError, distconc._read_cookie, self.path)
        self.assertEqual(os.listdir(self.directory), [])

    @not_on_windows("modes of files")
    def test_a_cookie_that_others_can_read_or_that_is_anothers_is_refused(self):
        distconc._read_cookie(self.path)
        for mode in 0o640, 0o604, 0o602:
            os.chmod(self.path, mode)
            with self.assertRaisesRegex(PermissionError, "cookie; chmod 600"):
                distconc._read_cookie(self.path)
        os.chmod(self.path, 0o600)
        with mock.patch("os.getuid", return_value=os.getuid() + 1):
            with self.assertRaisesRegex(PermissionError, "cookie belongs to another user"):
                distconc._read_cookie(self.path)

    def test_an_empty_cookie_is_an_error_and_one_that_is_being_written_is_waited_for(self):
        with open(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            self.assertRaises(ValueError, distconc._read_cookie, self.path)
            def write_it(_):
                print("later", file=file, flush=True)
            with mock.patch.object(distconc, "sleep", write_it):
                self.assertEqual(distconc._read_cookie(self.path), b"later")


######## The module as a whole

CONTRACT = """
    Mailbox Thread RemoteThread spawn spawn_linked spawn_server current_thread threads
    send receive receive_if
    Synchronous Reply send_synchronous reply_synchronous handle_synchronous
    Node start_node stop_node local_node nodes connect disconnect ChildNode spawn_node
    register_remote_thread unregister_remote_thread get_remote_thread serialize deserialize
    Monitor Down monitor demonitor
    DistconcError LinkedError NodeDown NodeUnreachable NoSuchThread ThreadDied
    SynchronousToSelfError SerializationError RemoteError AuthenticationError
    trace chart faults""".split()
SCRIPT = """
from distconc import *
with start_node() as node:
    server = spawn_server(handle_synchronous, lambda n: n + 1, name="add1", register=True)
    demonitor(monitor(server))
    print(send_synchronous(5, server), send_synchronous(6, RemoteThread(node, "add1")))
    send(deserialize(serialize([current_thread()])), current_thread())
    print(receive() == [current_thread()])
spawn_linked(lambda: 1 / 0)
try:
    receive()
except LinkedError as error:
    print(error.error)
"""


class ModuleTests(Case):
    def test_all_names_are_exported_in_the_contracts_order(self):
        later = {"trace", "chart", "faults"} - set(distconc.__all__)
        self.assertEqual([name for name in CONTRACT if name not in later], distconc.__all__)
        for name in distconc.__all__:
            self.assertTrue(getattr(distconc, name))

    def test_errors_derive_from_what_the_contract_says(self):
        for name in CONTRACT[CONTRACT.index("LinkedError"):CONTRACT.index("RemoteError") + 1]:
            self.assertTrue(issubclass(getattr(distconc, name), DistconcError), name)
        for error, base in ((NoSuchThread, LookupError), (SerializationError, ValueError),
                            (NodeDown, ConnectionError), (NodeUnreachable, NodeDown)):
            self.assertTrue(issubclass(error, base))

    def test_it_runs_without_asserts_and_without_warnings(self):
        for options in (["-W", "error", "-X", "dev"], ["-O", "-W", "error"]):
            done = subprocess.run(
                [sys.executable, *options, "-c", SCRIPT], text=True, capture_output=True,
                timeout=60, cwd=os.path.dirname(os.path.abspath(distconc.__file__)))
            self.assertEqual(("6 7\nTrue\ndivision by zero\n", "", 0),
                             (done.stdout, done.stderr, done.returncode))


class PartOneAlone(unittest.TestCase):
    """Part one, cut out into a file of its own, teaches all of Erlang's ideas and runs."""

    def cut(self, path, before, after=""):
        """Write the beginning of a file, to the banner `before`, into one of the same name."""
        with open(path, encoding="utf-8") as file:
            text, found, _ = file.read().partition(before)
        self.assertTrue(found, before)
        name = os.path.join(self.dir, os.path.basename(path))
        with open(name, "w", encoding="utf-8") as file:
            file.write(text + after)

    def test_its_tests_pass_on_it(self):
        self.dir = tempfile.mkdtemp(prefix="dc")
        self.addCleanup(shutil.rmtree, self.dir)
        self.cut(MODULE, "################ Part two",
                 "__all__ = [name for name in __all__ if name in globals()]\n")
        self.cut(__file__, "######## Remote handles and the registry")
        done = subprocess.run(
            [sys.executable, "-m", "unittest", "test_distconc"], cwd=self.dir, text=True,
            env=environment(PYTHONPATH=None), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=10 * WAIT)
        self.assertEqual(0, done.returncode, done.stdout)
        ran, skipped = re.search(r"Ran (\d+) tests.*skipped=(\d+)", done.stdout, re.S).groups()
        self.assertGreater(int(ran) - int(skipped), 50, done.stdout)


USERS_PROGRAM = """
from collections.abc import Callable
from distconc import *

def log_message() -> bool:
    print(receive())
    return True

def double(number: int) -> int:
    return 2 * number

def outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except (NodeDown, NodeUnreachable, NoSuchThread, SerializationError) as error:
        return str(error)
    except ThreadDied as error:
        return error.reason
    except RemoteError as error:
        return error.type
    except LinkedError as error:
        return error.error, error.thread
    except (SynchronousToSelfError, AuthenticationError, DistconcError):
        return None

with start_node(9000, authkey="sixteen letters!", allow=[double], heartbeat=5) as node:
    address: tuple[str, int] | str | None = node.address
    counts: dict[str, int] = node.stats()
    server: Thread = spawn_server(handle_synchronous, double, name="double", register=True)
    logger = spawn_server(log_message, name="logger")
    linked: Thread = spawn_linked(double, 1)
    remote = spawn(double, 1, node=node)
    register_remote_thread(logger)
    send("hello", RemoteThread(9000, "logger"))
    logger.send(("a", 1))
    handles: list[Thread | RemoteThread] = [server, remote, current_thread()]
    handles.append(get_remote_thread("double"))
    print(send_synchronous(3, server, timeout=5) + 1, threads()[server.id].name)
    watch: Monitor = monitor(server)
    demonitor(watch)
    monitor("127.0.0.1:9001")
    match receive(1.0, None):
        case Down(of, target, reason):
            print(of == watch, target, reason)
        case Synchronous(data, sender, tag) as request:
            reply_synchronous((data, sender, tag), request)
        case Reply(data, tag):
            print(data, tag)
    receive_if(int, 0, default=None)
    receive_if((int, str), 0, default=None)
    receive_if(lambda message: message == 1, timeout=0, default=None)
    box = Mailbox()
    box.put(1)
    print(box.get(), box.get_all(0), box.empty(), box.get_if(str, 0.1))
    with spawn_node(allow="anything") as child:
        there = spawn(double, 4, node=child)
        print(there.join(5), there.is_alive(), there.node, there.id, child.pid, child.address)
        connect(child)
        disconnect(child)
        child.kill()
    other: ChildNode = spawn_node()
    other.stop()
    here: Node = local_node()
    print(here.incarnation, nodes(), deserialize(serialize(handles)))
    with faults(to=other, drop=0.5, delay=1, seed=1):
        outcome(lambda: send_synchronous(1, RemoteThread(other, "x")))
    trace("traces")
    picture: str = chart("traces", format="text")
    trace(None)
    unregister_remote_thread("logger")
stop_node()
"""


class Types(unittest.TestCase):
    """A user's program, which uses every public name, is clean for the type checkers."""

    def checked(self, *command):
        if shutil.which(command[0]) is None:
            self.skipTest(f"{command[0]} is not installed")
        dir = tempfile.mkdtemp(prefix="dc")
        self.addCleanup(shutil.rmtree, dir)
        with open(os.path.join(dir, "program.py"), "w", encoding="utf-8") as file:
            file.write(USERS_PROGRAM)
        shutil.copy(MODULE, dir)
        done = subprocess.run(
            [*command, "program.py"], cwd=dir, env=environment(PYTHONPATH=None), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(0, done.returncode, done.stdout)

    def test_the_program_uses_every_public_name(self):
        words = set(re.findall(r"\w+", USERS_PROGRAM))
        self.assertEqual(set(), set(CONTRACT) - words)

    def test_mypy_is_content(self):
        self.checked("mypy", "--strict")

    def test_pyright_is_content(self):
        self.checked("pyright")


def setUpModule():
    """Compile what children import, once.

    Where no bytecode is kept (PYTHONDONTWRITEBYTECODE), each child would do that, and hold its
    interpreter meanwhile for longer than some heartbeats here.
    """
    for path in MODULE, os.path.abspath(__file__):
        py_compile.compile(path)


def tearDownModule():
    stop_node()


KEY = os.environ.setdefault("DISTCONC_AUTHKEY", os.urandom(32).hex())
T = 30.0  # seconds: what takes longer hangs
LOOPS = 30  # how often what may race is tried
MODULE = os.path.join(os.path.dirname(os.path.abspath(distconc.__file__)), "distconc.py")

######## What runs on other nodes


def echo(data):
    return data


def once(func):
    """Answer one call, with what `func` makes of its data: a value or an error."""
    def answer(args):
        try:
            return True, func(*args)
        except Exception as error:
            return False, error
    handle_synchronous(answer, T)


def ask(node, func, *args):
    """Return what `func(*args)` is on another node, or raise what it raises."""
    well, answer = send_synchronous(args, spawn(once, func, node=node), T)
    if well:
        return answer
    raise answer


def collect():
    """Keep messages; a call for n of them is answered with all as soon as there are n."""
    kept, waiting = [], []
    while (message := receive()) != "stop":
        (waiting if isinstance(message, Synchronous) else kept).append(message)
        for request in [w for w in waiting if w.data <= len(kept)]:
            waiting.remove(request)
            reply_synchronous(kept, request)


def add_three():
    number, back = receive(T)
    send(3 + number, back)


def triple():
    request = receive(T)
    reply_synchronous(request.data * 3, request)


def log_one():
    print("logger:", receive(), flush=True)
    return True


def fail_so(*args):
    raise ValueError("deliberate", *args)


def fail_quietly(*args):
    threading.excepthook = lambda *_: None
    fail_so(*args)


def fail_when_called(error):
    threading.excepthook = lambda *_: None
    receive_if(Synchronous, T)
    raise error if isinstance(error, BaseException) else error()


def pass_on(to):
    send(receive_if(Synchronous, T), to)
    receive(T)


def answer_passed(suffix):
    request = receive_if(Synchronous, T)
    reply_synchronous(request.data + suffix, request)


def answer_at_length(size):
    reply_synchronous(b"x" * size, receive_if(Synchronous, T))


def tell_outcome(server, whom):
    """Call, and tell `whom` the reply, or the error."""
    try:
        outcome_here = send_synchronous("hi", server, T)
    except DistconcError as error:
        outcome_here = error
    send(outcome_here, whom)


def try_send(message, thread):
    try:
        send(message, thread)
        return "sent"
    except Exception as error:
        return type(error).__name__


def send_all(numbers, thread):
    for number in numbers:
        send(number, thread)


def send_then_end(numbers, thread, error=None):
    receive(T)
    send_all(numbers, thread)
    if error:
        threading.excepthook = lambda *_: None
        raise error


def send_over_cuts(numbers, thread, cuts):
    """Send with `cuts` disconnects from another thread in between; return what was sent."""
    done, sent = threading.Event(), []

    def cut():
        for _ in range(cuts):
            disconnect(thread.node)
        done.set()
    cutter = threading.Thread(target=cut)
    cutter.start()
    for number in numbers:
        try:
            send((number), thread)
            sent.append(number)
        except NodeDown:
            pass
    cutter.join()
    return sent


def hold():
    receive_if(str)


def fail_with_all():
    raise ValueError("x" * receive().data)


def stats_here():
    return local_node().stats()


def owed_by(id):
    return len(get_remote_thread(id)._watchers)


def make_room_for_strangers(number):
    distconc.MAX_STRANGERS = number


def census():
    """Count the threads of this process, and its descriptors (which Windows does not list)."""
    if ON_WINDOWS:
        return threading.active_count(), 0
    return threading.active_count(), len(os.listdir("/dev/fd"))


def memory():
    if not os.path.exists("/proc/self/status") or ON_WINDOWS:
        return 0  # nobody says it there
    with open("/proc/self/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) << 10


def stranger_from(module):
    """Return an instance of a class that only this process can import."""
    sys.modules[module] = types.ModuleType(module)
    made = type("Made", (), {"__module__": module})
    sys.modules[module].Made = made
    return made()


def register_here(name):
    register_remote_thread(current_thread(), name)
    unregister_remote_thread(name)


def append_and_count(path, number):
    """Note in a file, which outlives kill -9, that a request ran."""
    with open(path, "a") as file:
        file.write(f"{number}\n")
    return number


def leave_descriptors(number):
    """Have no more than so many descriptors left; note what goes to stderr from now on."""
    import resource

    sys.stderr = io.StringIO()
    resource.setrlimit(resource.RLIMIT_NOFILE, (census()[1] - 1 + number,  # but for its own
                                                resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def noted_on_stderr():
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1024), hard))
    return sys.stderr.getvalue()


def keep_sizes():
    """Keep the number and size of each message; a call is answered with all of them."""
    kept = []
    while True:
        message = receive()
        if isinstance(message, Synchronous):
            reply_synchronous(kept, message)
        else:
            kept.append((message[0], len(message[1])))


def murmur(target):
    """Send a little now and then, for as long as there is contact."""
    with contextlib.suppress(NodeDown):
        while True:
            send("still here", target)
            receive(0.01, None)


class TwoArguments(Exception):
    def __init__(self, one, two):
        super().__init__(one)


class Mute(Exception):
    """An error that cannot even be printed."""

    def __str__(self):
        raise RuntimeError("no words")


class Does:
    """What is pickled into a call of `func`."""

    def __init__(self, func, *args):
        self.call = func, args

    def __reduce__(self):
        return self.call


def interrupting_error():
    """An exception whose pickling raises what is no Exception."""
    return ValueError("why", Interrupts())


class Interrupts:
    def __reduce__(self):
        raise KeyboardInterrupt


def raise_no_such_thread(text):
    raise NoSuchThread(text if isinstance(text, str) else text())


class Point:
    def __init__(self, x=0):
        self.x = x

    def __eq__(self, other):
        return isinstance(other, Point) and self.x == other.x


def exit_now():
    raise SystemExit("at loading")


def load_late():
    """Tell the test that loading has begun; return when that lets it."""
    LOADING.put("begun")
    GO_ON.get(timeout=T)
    return "late"


def raise_mute():
    raise Mute


def send_late(target):
    receive()
    send(Does(load_late), target)


LOADING, GO_ON = queue.SimpleQueue(), queue.SimpleQueue()


######## What the tests share


class Net(unittest.TestCase):
    """A node here for each test; afterwards its threads and descriptors are back."""

    options = {}

    def setUp(self):
        self.drain()
        self.dir = tempfile.mkdtemp(prefix="dc")
        self.addCleanup(shutil.rmtree, self.dir)
        gc.collect()
        self.before = set(threading.enumerate()), census()[1]
        self.addCleanup(self.check_rest)
        self.addCleanup(stop_node)
        self.node = start_node(**self.options)

    def check_rest(self):
        stop_node()
        rest, end = [None], monotonic() + T
        while rest and monotonic() < end:  # a thread that reports losses may start another
            here = {thread.name for thread in threads().values()}
            rest = [thread for thread in set(threading.enumerate()) - self.before[0]
                    if thread.name not in here]
            for thread in rest:
                with contextlib.suppress(RuntimeError):  # it is just being started
                    thread.join(1)
        self.assertFalse([t for t in rest if t.is_alive()], "threads are left")
        gc.collect()
        self.assertLessEqual(census()[1], self.before[1], "descriptors leak")
        self.drain()

    def drain(self):
        with contextlib.suppress(LinkedError):
            while receive(0, NOTHING) is not NOTHING:
                pass

    def child(self, address=0, **options):
        child = spawn_node(address, **options)
        self.addCleanup(child.stop)
        return child

    def here(self, func, *args, name=None):
        """Spawn a thread on this node that "stop" ends."""
        thread = spawn(func, *args, name=name, register=bool(name))
        self.addCleanup(lambda: (thread.is_alive() and thread.send("stop"), thread.join(T)))
        return thread

    def collector(self, node, name="collector"):
        spawn(collect, name=name, node=node, register=True)
        return RemoteThread(node, name)

    def got(self, collector, number=0):
        return send_synchronous(number, collector, T)

    def mark(self):
        return tempfile.mktemp(dir=self.dir)

    def assert_raises_soon(self, error, func, *args, seconds=2.0):
        start = monotonic()
        with self.assertRaises(error) as caught:
            func(*args)
        self.assertLess(monotonic() - start, seconds)
        return caught.exception


class OneChild(Net):
    """As Net, and a node in a process of its own for the whole class."""

    child_options = {}

    @classmethod
    def setUpClass(cls):
        cls.other = spawn_node(**cls.child_options)
        cls.addClassCleanup(cls.other.stop)


def at_once(*calls):
    """Make the calls, (func, *args) each, at the same time; return when all are done."""
    callers = [threading.Thread(target=func, args=args) for func, *args in calls]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(T)


def freeze(child):
    """Stop a process; it has stopped when this returns."""
    if ON_WINDOWS:
        tell_windows_process("NtSuspendProcess", child.pid)
        return
    os.kill(child.pid, signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)


def thaw(pid):
    if ON_WINDOWS:
        tell_windows_process("NtResumeProcess", pid)
    else:
        os.kill(pid, signal.SIGCONT)


def tell_windows_process(function, pid):
    kernel = ctypes.WinDLL("kernel32")
    kernel.OpenProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.OpenProcess(0x1FFFFF, False, pid))
    getattr(ctypes.WinDLL("ntdll"), function)(process)
    kernel.CloseHandle(process)


def windows_process_ends(pid, seconds):
    """Wait for the end of any process; return whether it came."""
    kernel = ctypes.WinDLL("kernel32")
    kernel.OpenProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.OpenProcess(0x100000, False, pid))  # to wait only
    if not process:
        return True
    ended = kernel.WaitForSingleObject(process, int(1000 * seconds)) == 0
    kernel.CloseHandle(process)
    return ended


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(**changes):
    path = os.pathsep.join([HERE])
    # A `make` that runs the tests would have another one tell of itself.
    inherited = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    env = {**inherited, "PYTHONPATH": path, **changes}
    return {name: value for name, value in env.items() if value is not None}


def script(text, *args, python=sys.executable, **env):
    """Run a script that knows distconc; return what it printed."""
    done = subprocess.run([python, "-c", "from distconc import *\nimport sys, os\n" + text,
                           *map(str, args)], env=environment(**env), text=True, timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return types.SimpleNamespace(out=done.stdout, err=done.stderr, status=done.returncode)


def shell(*args, **env):
    done = subprocess.run([sys.executable, MODULE, *map(str, args)], env=environment(**env),
                          text=True, timeout=60, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return types.SimpleNamespace(out=done.stdout, err=done.stderr, status=done.returncode)


######## The raw peer: the wire from its description alone



class Cut(Exception):
    """The node ended the connection."""


HEADER = ">BQQQ16sQQQH"  # kind, incarnation, id, caller, tag, cause, length of the name

# The kinds, in their order on the wire.  In the tests a header is a tuple: its kind, and then
# these.  Those in brackets are not in the header, but in the payload.
KINDS = {
    "send": ["incarnation", "id", "cause"],
    "call": ["incarnation", "id", "caller", "tag", "cause"],
    "reply": ["tag", "cause"],
    "failed": ["tag", "cause"],  # as it is read: tag, [kind], cause
    "monitor": ["incarnation", "id", "tag", "cause"],
    "unwatch": ["tag"],
    "request": ["tag", "cause"],
    "undelivered": ["id", "[why]", "[count]", "cause"],
    "serials": ["[serial]", "[oldest]"],
    "end": [],
}


def header_of(kind, incarnation=None, id=0, caller=0, tag="", cause=None):
    """A header as bytes; `kind` is its name or number, and a name may be any bytes."""
    name = b""
    if not isinstance(id, int):
        name = id if isinstance(id, bytes) else id.encode("utf-8", "surrogatepass")
        id = 0
    number = list(KINDS).index(kind) if isinstance(kind, str) else kind
    origin, *event = cause or ("0", 0, 0)
    return struct.pack(HEADER, number, incarnation or 0, id, caller, tag.encode(),
                       int(origin, 16), *event, len(name)) + name


def group_of(header, *payloads):
    """A group as bytes: the sizes, the header, and the payloads."""
    kind, *items = header
    fields = dict(zip(KINDS[kind], items, strict=True))
    if kind == "serials":
        payloads = [struct.pack(">QQ", fields.pop("[serial]"), fields.pop("[oldest]"))]
    elif kind == "undelivered":
        why = fields.pop("[why]").encode("utf-8", "surrogatepass")
        payloads = [struct.pack(">I", fields.pop("[count]")) + why]
    data = b"".join(payloads)
    if len(payloads) != 1:
        data = struct.pack(f">{len(payloads)}I", *map(len, payloads)) + data
    return struct.pack(">II", len(payloads), len(data)) + header_of(kind, **fields) + data


FAILURES = ["no thread", "returned", "died", "unreadable"]


def cut(data, sizes):
    """Cut data into pieces of these sizes; nothing may be left."""
    ends = list(itertools.accumulate(sizes, initial=0))
    if ends[-1] != len(data):
        raise AssertionError(f"{sizes} do not make {len(data)}")
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def body_of(*groups):
    """The body of a frame; each group is a tuple of a header and its payloads."""
    return b"".join(group_of(*group) for group in groups)


def two_in(data):
    """The body of a frame with two messages, whose sizes and payloads are in `data`."""
    return struct.pack(">II", 2, len(data)) + header_of("send", id="kept") + data


def take_group(body, large=b""):
    """Return the first messages in a body, as headers with their payloads, and the rest."""
    count, size, number, incarnation, id, caller, tag, origin, thread, clock, name_size = (
        struct.unpack_from(">II" + HEADER[1:], body))
    start = struct.calcsize(">II" + HEADER[1:])
    name, start = body[start:start + name_size].decode("utf-8", "surrogatepass"), start + name_size
    data, rest = body[start:start + size] + large, body[start + size:]
    if large and (size or rest or count != 1):
        raise AssertionError("a large payload is not alone")
    fields = {"incarnation": incarnation or None, "id": id or name, "caller": caller,
              "tag": tag.rstrip(b"\0").decode(),
              "cause": (f"{origin:016x}", thread, clock) if clock else None}
    payloads = [data]
    if count != 1:
        payloads = cut(data[4 * count:], struct.unpack_from(f">{count}I", data))
    kind = list(KINDS)[number]
    if kind not in ("serials", "undelivered", "failed"):
        return [((kind, *(fields[name] for name in KINDS[kind])), payloads)], rest
    groups = []
    for payload in payloads:
        if kind == "serials":
            header = kind, *struct.unpack(">QQ", payload)
        elif kind == "undelivered":
            [number], why = struct.unpack_from(">I", payload), payload[4:].decode()
            header = kind, fields["id"], why, number, fields["cause"]
        else:
            how, *sizes = struct.unpack_from(">BIIII", payload)
            text, name, lines, reason = cut(payload[17:], sizes)
            told = text.decode(), (name.decode(), lines.decode()) if name else None, reason
            header = kind, fields["tag"], FAILURES[how], fields["cause"]
            payload = pickle.dumps(told)
        groups.append((header, [payload]))
    return groups, rest


def failed(tag, kind, text="text", traceback=None, reason=b""):
    """The header and the payload that tell of a failure."""
    parts = [each.encode("utf-8", "surrogatepass") for each in (text, *(traceback or ("", "")))]
    parts.append(reason)
    payload = struct.pack(">BIIII", FAILURES.index(kind), *map(len, parts)) + b"".join(parts)
    return ("failed", tag, None), payload


class RawPeer:
    """One end of a connection, of nothing but the standard library; each step can go wrong.

    `self.fields` is our hello, to be changed before `greet`.
    """

    serials = itertools.count(1)

    def __init__(self, conn, role, address="", meant=(), key=KEY, heartbeat=10.0):
        self.conn, self.role, self.key = conn, role, key.encode()
        self.incarnation = int.from_bytes(os.urandom(8), "big")
        self.fields = ["distconc 7", role, os.urandom(16).hex(), f"{self.incarnation:x}",
                       str(heartbeat), str(1 << 28), address, *meant, "distconc"]
        self.inbox, self.has_read_end, self.is_altered = [], False, False

    @classmethod
    def dial(cls, node, **options):
        """Connect and shake hands."""
        return cls.knock(node, **options).challenge().greet().introduce()

    @classmethod
    def knock(cls, node, **options):
        name = str(node)
        address = name if "/" in name else (name.split(":")[0], int(name.split(":")[1]))
        return cls(Client(address), "dialler", meant=(name, name), **options)

    @classmethod
    def accept(cls, listener, address, **options):
        peer = cls(listener.accept(), "acceptor", address, **options)
        return peer.challenge().greet().introduce()

    def challenge(self):
        steps = [answer_challenge, deliver_challenge]
        for step in steps if self.role == "dialler" else steps[::-1]:
            if step is answer_challenge and not self.conn.poll(T):
                raise TimeoutError("no challenge came")
            step(self.conn, self.key)
        return self

    def greet(self, alter=None):
        """Exchange hellos; `alter` is what somebody on the way makes of ours."""
        mine = "\0".join(self.fields).encode("utf-8", "surrogateescape")
        self.is_altered = alter is not None
        try:
            self.conn.send_bytes(alter(mine) if alter else mine)
            if not self.conn.poll(T):
                raise TimeoutError("no hello came")
            theirs = self.conn.recv_bytes(4096)
        except (EOFError, ConnectionError) as error:
            raise Cut from error
        self.peer = theirs.decode().split("\0")
        self.peer_incarnation = int(self.peer[3], 16)
        hellos = [mine, theirs] if self.role == "dialler" else [theirs, mine]
        transcript = b"".join(hashlib.sha256(hello).digest() for hello in hellos)
        role = "".join(self.fields[1:2])  # which may be a lie, or left out
        self.out, self.into = (  # the MACs of each direction so far
            hashlib.blake2b(digest_size=16, key=hmac.digest(
                self.key, each.encode("utf-8", "surrogateescape") + transcript, "sha256"))
            for each in (role, self.peer[1]))
        self.sock = socket.fromfd(self.conn.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        self.sock.settimeout(T)
        return self

    def introduce(self, oldest=None):
        """Exchange serials; `oldest` is that of our connections, if it is another than this."""
        if self.role == "dialler":
            self.read_tick()
        else:
            self.tick()
        for mine in (True, False) if self.role == "dialler" else (False, True):
            if mine:
                serial = next(self.serials)
                self.write((("serials", serial, oldest or serial), b""))
            else:
                [(header, payloads)] = self.read_groups()
                kind, serial, old = header
                if kind != "serials" or not 0 < old <= serial:
                    raise AssertionError(f"no introduction: {header}")
        return self

    def frame(self, *groups):
        """A frame of a header and its payloads, or several; a large payload follows it."""
        for header, *payloads in groups:
            if len(payloads) == len(groups) == 1 and len(payloads[0]) > 2048:
                return (self.seal(body_of((header, b"")), len(payloads[0])) + payloads[0]
                        + self.mac(payloads[0]))
        return self.seal(body_of(*groups))

    def seal(self, body, large=0):
        start = struct.pack(">II", len(body), large) + body
        return start + self.mac(start)

    def mac(self, piece):
        self.out.update(piece if len(piece) <= 2048 else hashlib.sha256(piece).digest())
        return self.out.digest()

    def write(self, *groups):
        """Write a frame of a header and its payloads, or of several such tuples."""
        self.pour(self.frame(*groups))

    def tick(self):
        self.write()

    def read_tick(self):
        if self.read_groups():
            raise AssertionError("no tick")

    def end(self):
        """Say that nothing follows, and show it."""
        self.write((("end",), b""))
        with suppress(OSError):  # it may be over already
            self.sock.shutdown(socket.SHUT_WR)

    def pour(self, data):
        try:
            self.sock.sendall(data)
        except ConnectionError as error:
            raise Cut from error

    def take(self, size):
        data = b""
        while len(data) < size:
            try:
                more = self.sock.recv(size - len(data))
            except ConnectionError as error:
                raise Cut from error
            if not more:
                raise Cut
            data += more
        return data

    def read_groups(self):
        """Return the headers in the next frame, each with its payloads."""
        start = self.take(8)
        size, large = struct.unpack(">II", start)
        body = self.take(size)
        self.check(start + body)
        payload = self.take(large)
        if large:
            self.check(payload)
        groups = []
        while body:
            taken, body = take_group(body, payload)
            groups += taken
        return groups

    def check(self, piece):
        self.into.update(piece if len(piece) <= 2048 else hashlib.sha256(piece).digest())
        # The node has sealed for the hello that it has read.
        if self.take(16) != self.into.digest() and not self.is_altered:
            raise AssertionError("the node's MAC is wrong")

    def read_frame(self):
        """Return the messages in the next frame, as tuples: the header's items, the payload."""
        messages = []
        for header, payloads in self.read_groups():
            if self.has_read_end:
                raise AssertionError("something follows the end")
            if header == ("end",):
                self.has_read_end = True
            else:
                messages += [(*header, payload) for payload in payloads]
        return messages

    def read(self):
        """Return the next message; ticks are none."""
        while not self.inbox:
            self.inbox += self.read_frame()
        return self.inbox.pop(0)

    def send(self, message, to, incarnation=None, cause=None):
        self.write((("send", incarnation, to, cause), pickle.dumps(message)))

    def ask(self, message, to, tag="tag", caller=1, incarnation=None, cause=None):
        self.write((("call", incarnation, to, caller, tag, cause), pickle.dumps(message)))

    def monitor(self, thread, tag, incarnation=None):
        self.write((("monitor", incarnation, thread, tag, None), b""))

    def reply(self, tag):
        """Return the reply that comes next."""
        kind, *rest = self.read()
        if (kind, *rest[:-1]) != ("reply", tag, None):
            raise AssertionError(f"no reply: {(kind, *rest)}")
        return pickle.loads(rest[-1])

    def failure(self):
        """Return the failure that comes next: its tag, kind, text, traceback and reason."""
        kind, tag, how, cause, payload = self.read()
        if (kind, cause) != ("failed", None):
            raise AssertionError(f"no failure: {kind}, {cause}")
        return tag, how, *pickle.loads(payload)

    def call(self, message, to):
        tag = os.urandom(8).hex()
        self.ask(message, to, tag)
        return self.reply(tag)

    def request(self, *request):
        tag = os.urandom(8).hex()
        self.write((("request", tag, None), pickle.dumps(request)))
        return self.reply(tag)

    def is_cut(self, seconds=T):
        """Read to the end; False if there is none in time."""
        end = monotonic() + seconds
        try:
            while monotonic() < end:
                self.read_frame()  # which is a tick if there is nothing else
        except Cut:
            return True
        except TimeoutError:
            pass
        return False

    def close(self):
        self.conn.close()
        if hasattr(self, "sock"):
            self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def nested(depth):
    """A pickle of a tuple in a tuple in a tuple, and so on."""
    return b"\x80\x04)" + b"\x85" * depth + b"."


def limit_memory(more):
    """Let this process take `more` bytes at most beyond its own; Linux alone has such limits.

    Without its lock the interpreter reserves a gigabyte for itself.
    """
    with suppress(ImportError, OSError):
        import resource

        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def laughing(levels):
    """A tuple of ten times the same tuple of ten times the same, and so on: 10**levels items."""
    laugh = "ha"
    for _ in range(levels):
        laugh = (laugh,) * 10
    return laugh


class TheWire(Net):
    """What the module's head says of the wire is true, and enough to speak it."""

    def setUp(self):
        super().setUp()
        self.kept = self.here(collect, name="kept")
        self.here(self.serve_echo, name="echo")

    def serve_echo(self):
        while isinstance(request := receive(), Synchronous):
            reply_synchronous(request.data, request)

    def dial(self, **options):
        peer = RawPeer.dial(self.node, **options)
        self.addCleanup(peer.close)
        return peer

    def knock(self, **options):
        peer = RawPeer.knock(self.node, **options)
        self.addCleanup(peer.close)
        return peer

    def test_a_raw_peer_sends_by_name_and_by_id(self):
        peer = self.dial()
        peer.send({"a": [1]}, "kept")
        peer.send("by id", self.kept.id)
        peer.send("by whole handle", self.kept.id, peer.peer_incarnation)
        self.assertEqual(self.got(self.kept, 3), [{"a": [1]}, "by id", "by whole handle"])
        self.assertEqual(peer.peer[1], "acceptor")
        self.assertEqual(peer.peer_incarnation, self.node.incarnation)
        self.assertEqual(peer.peer[6], str(self.node))

    def test_a_raw_peer_calls(self):
        peer = self.dial()
        for number in range(LOOPS):
            self.assertEqual(peer.call(number, "echo"), number)

    def test_a_raw_peer_asks_the_node_itself(self):
        peer = self.dial()
        names = [info[1] for info in peer.request("ps")]
        self.assertIn("kept", names)
        incarnation = peer.peer_incarnation
        for whose, id, lives in ((incarnation, self.kept.id, True), (None, "kept", True),
                                 (incarnation ^ 1, self.kept.id, False), (None, "x", False)):
            self.assertIs(peer.request("is alive", whose, id), lives)
        child = peer.request("spawn", collect, (), "spawned", True, False, None)
        self.assertEqual(child.id, get_remote_thread("spawned").id)
        send("stop", get_remote_thread("spawned"))

    def test_a_linked_thread_that_a_raw_peer_spawns_tells_of_its_failure(self):
        hook, threading.excepthook = threading.excepthook, lambda *_: None
        self.addCleanup(setattr, threading, "excepthook", hook)
        peer = self.dial()
        peer.write((("request", "r", None),
                    pickle.dumps(("spawn", fail_so, ("why",), "doomed", False, False, "link"))))
        told = {message[:2]: message for message in (peer.read(), peer.read())}
        self.assertEqual(set(told), {("reply", "r"), ("failed", "link")})
        self.assertEqual(told["failed", "link"][2], "died")
        _, _, reason = pickle.loads(told["failed", "link"][-1])  # text, traceback, reason
        self.assertEqual(pickle.loads(reason).args, ("deliberate", "why"))

    def test_many_messages_in_one_frame_keep_their_order(self):
        peer = self.dial()
        peer.write(*((("send", None, "kept", None), pickle.dumps(n)) for n in range(1000)))
        peer.write((("send", None, "kept", None), *map(pickle.dumps, range(1000, 2000))))
        self.assertEqual(self.got(self.kept, 2000), list(range(2000)))

    def test_large_payloads_go_both_ways_alone_and_among_small_ones(self):
        peer, data = self.dial(), os.urandom(1 << 20)
        send_kept = "send", None, "kept", None
        peer.send(data, "kept")
        peer.write((send_kept, pickle.dumps(1), pickle.dumps(data)), (send_kept, pickle.dumps(2)))
        self.assertEqual(self.got(self.kept, 4), [data, 1, data, 2])
        self.assertEqual(peer.call(data, "echo"), data)

    def test_a_monitor_hears_the_end(self):
        peer = self.dial()
        thread = self.here(hold, name="held")
        peer.monitor("held", "m1")
        self.assertEqual(peer.call(1, "echo"), 1)  # so the monitor stands
        thread.send("end")
        tag, how, text, traceback_, reason = peer.failure()
        self.assertEqual((tag, how, traceback_, reason), ("m1", "returned", None, b""))
        self.assertIsInstance(text, str)

    def test_a_thread_that_dies_says_why(self):
        hook, threading.excepthook = threading.excepthook, lambda *_: None
        self.addCleanup(setattr, threading, "excepthook", hook)
        peer = self.dial()
        self.here(fail_when_called, KeyError("k"), name="doomed")
        peer.ask("die", "doomed", "t")
        tag, how, text, (name, lines), reason = peer.failure()
        self.assertEqual((tag, how), ("t", "died"))
        self.assertEqual(pickle.loads(reason).args, ("k",))
        self.assertEqual(name, "KeyError")
        self.assertIn("Traceback", lines)
        self.assertIn("fail_when_called", lines)

    def test_an_error_whose_class_has_a_huge_name_is_told_as_any_other(self):
        hook, threading.excepthook = threading.excepthook, lambda *_: None
        self.addCleanup(setattr, threading, "excepthook", hook)
        peer = self.dial()
        self.here(fail_when_called, type("X" * 2_000_000, (Exception,), {})("boom"), name="doomed")
        peer.ask("die", "doomed", "t")
        tag, how, text, (name, lines), reason = peer.failure()
        self.assertEqual((tag, how, name, reason), ("t", "died", "X" * 255, b""))
        self.assertLess(len(text) + len(lines), 50_000)

    def test_a_sender_that_waits_for_room_does_not_wait_for_a_write(self):
        peer = self.dial()
        self.assertEqual(peer.call(1, "echo"), 1)
        [connection] = self.node._established
        handle = connection._caller(1)
        with mock.patch.object(distconc, "MAX_QUEUED", 5):
            with connection._write_lock:  # as the writer does while the network takes its time
                for _ in range(5):
                    connection.post(handle._send_header, pickle.dumps("queued"))
                sender = spawn(send, "waits", handle)
                end = monotonic() + T
                while not connection._room._sleepers and monotonic() < end:
                    receive(0.01, None)
                self.assertTrue(connection._room._sleepers)
            self.assertTrue(sender.join(T))
        self.assertEqual([pickle.loads(peer.read()[-1]) for _ in range(6)],
                         ["queued"] * 5 + ["waits"])

    def test_nobody_hears_of_what_is_not_watched_any_more(self):
        peer, thread = self.dial(), self.here(hold, name="held")
        peer.monitor("held", "m1")
        peer.write((("unwatch", "m1"), b""))
        self.assertEqual(peer.call(1, "echo"), 1)
        thread.send("end")
        self.assertTrue(thread.join(T))
        peer.write((("unwatch", "m1"), b""), (("unwatch", "never was"), b""))  # late; of nothing
        self.assertEqual(peer.call(2, "echo"), 2)  # and not a "failed" before it

    def test_what_cannot_be_read_or_is_a_reply_does_not_hold_up_those_around_it(self):
        peer = self.dial()
        unreadable = pickle.dumps(Point()).replace(b"Point", b"Pxint")
        reply = pickle.dumps(Reply("forged", "0" * 16))
        payloads = [pickle.dumps(1), unreadable, pickle.dumps(2), reply, pickle.dumps(3)]
        peer.write((("send", None, "kept", None), *payloads))
        self.assertEqual(peer.read()[:2], ("undelivered", "kept"))
        self.assertEqual(peer.call(1, "echo"), 1)
        self.assertEqual(self.got(self.kept), [1, 2, 3])

    def test_what_nobody_takes_is_not_read_and_told_once_somebody_does(self):
        mark, peer = self.mark(), self.dial()
        peer.send(Does(os.mkdir, mark), current_thread().id)
        payload = pickle.dumps(Point()).replace(b"Point", b"Pxint")
        peer.write((("send", None, current_thread().id, ("ab" * 8, 7, 41)), payload))
        self.assertEqual(peer.call(1, "echo"), 1)  # and no "undelivered" before it
        self.assertFalse(os.path.exists(mark))
        self.assertIs(receive(0), None)
        self.assertTrue(os.path.exists(mark))
        self.assertIs(receive(0, NOTHING), NOTHING)
        kind, id, why, count, cause, _ = peer.read()
        self.assertEqual((kind, id, count, cause),
                         ("undelivered", current_thread().id, 1, ("ab" * 8, 7, 41)))
        self.assertIn("Pxint", why)

    def test_frames_of_many_targets_keep_the_order_for_each(self):
        peer, other = self.dial(), self.here(collect, name="other")
        targets = ["kept", "other", self.kept.id, other.id]
        peer.write(*((("send", None, targets[n % 4], None), pickle.dumps(n))
                     for n in range(400)))
        for first, target in enumerate([self.kept, other]):
            self.assertEqual(self.got(target, 200), list(range(first, 400, 2)))

    def trace(self):
        traces = os.path.join(self.dir, "traces")
        trace(traces)
        self.addCleanup(trace, None)
        return traces

    def test_a_cause_says_in_which_event_a_message_was_sent(self):
        traces, cause = self.trace(), ("ab" * 8, 7, 41)
        peer = self.dial()
        peer.send("caused", "kept", cause=cause)
        self.assertEqual(self.got(self.kept, 1), ["caused"])
        [taken] = [r for r in records(traces) if r.get("message") == "'caused'"]
        self.assertEqual((taken["event"], tuple(taken["cause"])), ("receive", cause))
        self.assertEqual(taken["thread"], self.kept.id)
        self.assertGreater(taken["clock"], 41)
        peer.send(1, "nobody", cause=cause)
        kind, id, why, count, told_cause, _ = peer.read()
        self.assertEqual((kind, id, count, told_cause), ("undelivered", "nobody", 1, cause))

    def test_a_cause_beyond_the_limits_or_that_is_none_is_that_of_an_unknown_event(self):
        traces, peer = self.trace(), self.dial()
        odd = [("ab" * 8, *event) for event in [
            (7, 1 << 63), (7, (1 << 64) - 1), (7, 1 << 60), (7, (1 << 52) - 1), (7, 0),
            (1 << 63, 1)]]
        peer.write(*((("send", None, "kept", cause), pickle.dumps("odd")) for cause in odd))
        self.assertEqual(self.got(self.kept, len(odd)), ["odd"] * len(odd))
        send("own", self.kept)
        self.got(self.kept, len(odd) + 1)
        found = records(traces)
        self.assertLess(max(record["clock"] for record in found), 1000)
        causes = [r.get("cause") for r in found if r.get("message") == "'odd'"]
        self.assertEqual(causes, [None] * len(odd))

    def test_unknown_names_and_stale_incarnations_are_told(self):
        peer = self.dial()
        peer.write((("send", None, "kepd", None), *[pickle.dumps(1)] * 3))
        kind, name, why, times, cause, _ = peer.read()
        self.assertEqual((kind, name, times, cause), ("undelivered", "kepd", 3, None))
        self.assertIn("'kept'", why)
        for target in (None, "kepd"), (None, 1 << 40), (12345, self.kept.id), (12345, "kept"):
            peer.ask(1, target[1], "t", incarnation=target[0])
            peer.monitor(target[1], "m", target[0])
            for expected in "t", "m":
                tag, how, text, traceback_, reason = peer.failure()
                self.assertEqual((tag, how, traceback_, reason),
                                 (expected, "no thread", None, b""), target)
        self.assertEqual(self.got(self.kept), [])

    def test_what_cannot_be_read_is_told(self):
        peer = self.dial()
        payload = pickle.dumps(Point()).replace(b"Point", b"Pxint")
        peer.write((("send", None, "kept", None), payload))
        kind, name, why, times, cause, _ = peer.read()
        self.assertEqual((kind, name, times, cause), ("undelivered", "kept", 1, None))
        peer.write((("call", None, "echo", 1, "t", None), payload))
        tag, how, text, (name, _), reason = peer.failure()
        self.assertEqual((tag, how, reason), ("t", "unreadable", b""))
        self.assertEqual(name, "AttributeError")

    def test_what_is_no_failure_ends_the_connection_and_reaches_no_caller(self):
        good = failed("t", "died", "text", ("E", "lines"), b"reason")[1]
        payloads = [b"", b"junk", good[:-1], good + b"x", b"\x04" + good[1:], bytes(16),
                    good[:1] + b"\xff" * 16 + good[17:],
                    failed("t", "died", reason=bytes((1 << 16) + 1))[1]]
        for payload in payloads:
            with self.subTest(payload=payload[:80]):
                peer = self.dial()
                peer.write((("failed", "t", None), payload))
                self.assertTrue(peer.is_cut())

    def test_an_idle_node_ticks_within_the_heartbeat(self):
        peer = self.dial(heartbeat=1.0)
        peer.sock.settimeout(1.5)
        self.assertEqual(peer.read_frame(), [])
        peer.tick()
        self.assertEqual(peer.read_frame(), [])

    def test_a_silent_peer_is_cut_and_one_that_ticks_is_not(self):
        silent, ticking = self.dial(heartbeat=1.0), self.dial(heartbeat=1.0)
        start = monotonic()
        with self.assertRaises(Cut):
            while True:
                ticking.tick()
                ticking.read_frame()
                if select.select([silent.sock], [], [], 0)[0]:
                    silent.read_frame()
        self.assertLess(monotonic() - start, 2.0)
        self.assertEqual(ticking.call(1, "echo"), 1)

    def listen(self):
        listener = Listener(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        return listener, f"127.0.0.1:{listener.address[1]}"

    def accept(self, **options):
        """Have the node dial a raw peer."""
        listener, address = self.listen()
        dialler = spawn(connect, address)
        peer = RawPeer.accept(listener, address, **options)
        self.addCleanup(peer.close)
        self.assertTrue(dialler.join(T))
        self.assertEqual(peer.peer[1], "dialler")
        self.assertEqual(peer.peer[7:], [address, address, "distconc"])
        return peer, address

    def test_the_node_dials_a_raw_peer_and_speaks_to_it(self):
        peer, address = self.accept()
        self.assertIn(address, [f"{host}:{port}" for host, port in nodes()])
        send("hello", RemoteThread(address, "there"))
        *header, payload = peer.read()
        self.assertEqual((header, pickle.loads(payload)),
                         (["send", None, "there", None], "hello"))
        peer.send("hello back", current_thread().id)
        self.assertEqual(receive(T), "hello back")

    def ask_raw(self, peer, address, answer):
        """Return how the node takes the answer to a call: a function of its tag."""
        results = queue.Queue()
        spawn(lambda: results.put(
            outcome(send_synchronous, "q", RemoteThread(address, "there"), T)))
        kind, incarnation, id, caller, tag, cause, payload = peer.read()
        self.assertEqual((kind, incarnation, id, cause, pickle.loads(payload)),
                         ("call", None, "there", None, "q"))
        self.assertIs(type(caller), int)
        peer.write(*answer(tag))
        return results.get(timeout=T)

    def fail_raw(self, peer, address, kind, text, why, payload=b""):
        return self.ask_raw(peer, address, lambda tag: [failed(tag, kind, text, why, payload)])

    def test_a_raw_peer_answers_calls_in_each_way(self):
        peer, address = self.accept()

        def reply(tag, data):
            return ("reply", tag, None), pickle.dumps(data)
        self.assertEqual(self.ask_raw(peer, address, lambda tag: [reply(tag, "a")]), "a")
        self.assertEqual("true", self.ask_raw(peer, address, lambda tag: [
            reply("0" * 16, "forged"), reply(tag, "true"), reply(tag, "second"),
            failed(tag, "no thread")]))
        error = self.fail_raw(peer, address, "no thread", "no such", None)
        self.assertIsInstance(error, NoSuchThread)
        self.assertIn("no such", str(error))
        error = self.fail_raw(peer, address, "died", "died", ("KeyError", "the trace"),
                              payload=pickle.dumps(KeyError(1)))
        self.assertIsInstance(error, ThreadDied)
        self.assertIsInstance(error.reason, KeyError)
        self.assertIsInstance(error.__cause__, RemoteError)
        self.assertIn("the trace", str(error.__cause__))
        for unreadable in b"", b"junk", pickle.dumps(3), pickle.dumps(SystemExit):
            error = self.fail_raw(peer, address, "died", "died", ("E", "trace"),
                                  payload=unreadable)
            self.assertEqual((type(error.reason), error.reason.type), (RemoteError, "E"))
        error = self.fail_raw(peer, address, "returned", "returned", None)
        self.assertEqual((type(error), error.reason), (ThreadDied, None))
        error = self.fail_raw(peer, address, "unreadable", "unreadable", ("ImportError", "why"))
        self.assertIsInstance(error, RemoteError)
        self.assertEqual(error.type, "ImportError")
        unreadable = pickle.dumps(Point()).replace(b"Point", b"Pxint")
        error = self.ask_raw(peer, address, lambda tag: [(("reply", tag, None), unreadable)])
        self.assertEqual((type(error), error.type), (RemoteError, "AttributeError"))
        self.assertIs(receive(0, NOTHING), NOTHING)

    def test_what_a_peer_says_of_a_failure_has_no_escape_codes(self):
        peer, address = self.accept()
        ugly = "line\nor\r\x1b[31m\x07\u2028"
        for kind, traceback_ in (("no thread", None), ("unreadable", (ugly, ugly)),
                                 ("died", (ugly, ugly)), ("returned", None)):
            with self.subTest(kind):
                error = self.fail_raw(peer, address, kind, ugly * 10_000, traceback_)
                shown = [str(error)]
                if kind == "died":
                    shown += [str(error.reason), error.reason.type]
                for text in shown:
                    self.assertTrue(text.replace("\n", "").isprintable(), text[:200])
                    self.assertLess(len(text), 100_000)

    def test_a_node_monitors_and_unwatches_over_the_wire(self):
        peer, address = self.accept()
        target = RemoteThread(address, "there")
        watch = monitor(target)
        kind, incarnation, id, tag, cause, payload = peer.read()
        self.assertEqual((kind, incarnation, id, cause, payload),
                         ("monitor", None, "there", None, b""))
        peer.write(failed(tag, "returned"))
        self.assertEqual(receive(T), Down(watch, target, None))
        watch = monitor(target)
        tag = peer.read()[3]
        demonitor(watch)
        self.assertEqual(peer.read(), ("unwatch", tag, b""))
        peer.write(failed(tag, "returned"))
        peer.send("after", current_thread().id)
        self.assertEqual(receive(T), "after")

    def test_an_end_is_answered_with_all_that_waits_and_an_end(self):
        peer = self.dial()
        peer.ask("last words", "echo", "t")
        with Records() as log:
            self.assertEqual(peer.reply("t"), "last words")
            peer.end()
            self.assertTrue(peer.is_cut())
            self.assertTrue(peer.has_read_end)
            self.wait_until_alone()
            self.assertTrue(log.queue.empty())

    def wait_until_alone(self):
        """Wait until the node has cleaned up all connections."""
        end = monotonic() + T
        while self.node._connections and monotonic() < end:
            time.sleep(0.01)
        self.assertFalse(self.node._connections)

    def test_a_connection_that_is_over_without_an_end_is_a_loss_and_logged(self):
        def stop_writing(peer):
            peer.sock.shutdown(socket.SHUT_WR)

        def within_a_frame(peer):
            peer.pour(peer.frame((("end",), b""))[:-1])
            stop_writing(peer)

        def reset(peer):
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
        for stop in stop_writing, within_a_frame, reset:
            with self.subTest(stop.__name__), Records() as log:
                log.informed()
                peer = self.dial(address="127.0.0.1:9")
                peer.send("before", "kept")
                stop(peer)
                record = log.get()
                self.assertIn("127.0.0.1:9", record.getMessage())
                self.assertIn("may be lost", record.getMessage())
        self.assertEqual(self.got(self.kept), ["before"] * 3)

    def test_what_follows_an_end_is_not_read(self):
        peer = self.dial()
        frames = peer.frame((("end",), b"")) + peer.frame((("send", None, "kept", None),
                                                           pickle.dumps("late")))
        with suppress(Cut):
            peer.pour(frames)
        self.assertTrue(peer.is_cut())
        self.assertEqual(self.got(self.kept), [])

    def test_a_lost_connection_that_is_not_forgotten_yet_is_not_called_the_oldest(self):
        # The peer may still be reading from it, and must read to its end first.
        go_on, cleaning = threading.Event(), threading.Event()
        watching = distconc._pending.watching

        def slowly(watched):
            if watched == lost.peer:
                cleaning.set()
                go_on.wait(T)
            return watching(watched)
        first, address = self.accept()
        lost, = self.node._established
        with mock.patch.object(distconc._pending, "watching", slowly):
            first.sock.shutdown(socket.SHUT_RDWR)
            self.assertTrue(cleaning.wait(T))
            listener, address = self.listen()
            dialler = spawn(lambda: outcome(connect, address))
            with RawPeer(listener.accept(), "acceptor", address) as again:
                again.fields[3] = first.fields[3]
                again.challenge().greet().tick()
                [(kind, serial, oldest)] = [header for header, _ in again.read_groups()]
                self.assertEqual((kind, oldest), ("serials", serial))
                self.assertGreater(serial, lost.serial)
                go_on.set()
        self.assertTrue(dialler.join(T))

    def test_an_older_connection_is_waited_for_and_never_cut_on_a_newcomers_word(self):
        stop_node()
        self.node = start_node(connect_timeout=0.5)
        for name in "kept", "echo":
            register_remote_thread(self.kept if name == "kept" else self.here(self.serve_echo),
                                   name)
        old, newcomer = self.dial(), self.knock()
        newcomer.fields[3] = old.fields[3]
        newcomer.challenge().greet()
        start = monotonic()
        with self.assertRaises(Cut):
            newcomer.introduce()
        self.assertGreater(monotonic() - start, 0.3)
        self.assertEqual(old.call(1, "echo"), 1)
        late = self.knock()
        late.fields[3] = old.fields[3]
        late.challenge().greet()
        ender = threading.Timer(0.2, old.end)
        ender.start()
        late.introduce()
        ender.join()
        self.assertTrue(old.is_cut() and old.has_read_end)
        self.assertEqual(late.call(2, "echo"), 2)

    def test_a_call_that_is_queued_while_its_connection_is_forgotten_hears_of_the_loss(self):
        paused, computed, appended = (threading.Event() for _ in range(3))
        watching, results = distconc._pending.watching, queue.Queue()

        class Slow(deque):
            def append(self, message):
                super().append(message)
                appended.set()
                while connection._socket.fileno() != -1:  # until the reader has done
                    receive(0.01, None)

        def pause(call, watched):
            if watched is not None:
                paused.set()
                computed.wait(T)
            vars(call)["_watched"] = watched

        def watching_and_then(watched):
            found = watching(watched)
            computed.set()
            appended.wait(T)
            return found
        peer = self.dial()
        self.assertEqual(peer.call(1, "echo"), 1)
        [connection] = self.node._established
        handle = connection._caller(1)
        handle._connection = connection
        connection._outbox, connection._last_write = Slow(), math.inf  # so it is one of many
        watched = property(lambda call: vars(call).get("_watched"), pause)
        with mock.patch.object(distconc._PendingCall, "watched", watched, create=True), \
                mock.patch.object(distconc._pending, "watching", watching_and_then):
            spawn(lambda: results.put(outcome(send_synchronous, 1, handle)))
            self.assertTrue(paused.wait(T))
            peer.sock.shutdown(socket.SHUT_RDWR)
            self.assertIsInstance(results.get(timeout=T), NodeDown)

    def test_a_message_that_comes_too_late_takes_none_that_is_equal_with_it(self):
        self.assertEqual(self.dial().call(1, "echo"), 1)
        [connection] = self.node._established
        header, equal, other = distconc._encode_header("send", id="kept"), b"equal", b"other"
        with connection._write_lock:
            self.assertTrue(connection.post(header, equal))
            self.assertTrue(connection.post(header, other))
            connection.close()
            self.assertFalse(connection.post(header, equal))
            self.assertEqual([message[1] for message in connection._outbox], [equal, other])

    def test_ctrl_c_while_messages_are_taken_to_be_written_costs_none_of_other_threads(self):
        peer = self.dial()
        self.assertEqual(peer.call(1, "echo"), 1)
        [connection] = self.node._established
        with connection._write_lock:
            connection._outbox = Struck()
            headers = [distconc._encode_header("unwatch", tag=str(n)) for n in range(5)]
            for header in headers:
                self.assertTrue(spawn(connection.post, header).join(T))
            queued = [("unwatch", str(n)) for n in range(5)]
            self.assertRaises(KeyboardInterrupt, connection._write_waiting)
        self.assertEqual([peer.read()[:2] for _ in range(5)], queued)
        self.assertEqual(peer.call(2, "echo"), 2)

    def lose_and_remake(self, peer):
        """End a connection, and make another one to the same node."""
        peer.end()
        self.assertTrue(peer.is_cut())
        self.wait_until_alone()
        again = self.knock()
        again.fields[3] = peer.fields[3]
        return again.challenge().greet().introduce()

    def test_a_link_fails_if_contact_is_lost_and_remade_before_the_spawn_has_returned(self):
        peer, address = self.accept()
        results, is_remade, set_child = queue.Queue(), threading.Event(), \
            distconc._PendingLink.set_child

        def set_late(link, child):
            check(is_remade.wait(T))
            set_child(link, child)
        with mock.patch.object(distconc._PendingLink, "set_child", set_late):
            parent = spawn(lambda: (spawn_linked(echo, 1, node=address),
                                    results.put(outcome(receive, T))))
            kind, tag, cause, _ = peer.read()
            self.assertEqual(kind, "request")
            child = RemoteThread(address, 5, peer.incarnation)
            peer.write((("reply", tag, None), pickle.dumps(child)))
            again = self.lose_and_remake(peer)
            is_remade.set()
            error = results.get(timeout=T)
        self.assertIsInstance(error, LinkedError)
        self.assertIsInstance(error.error, NodeDown)
        self.assertEqual(error.thread, child)
        self.assertTrue(parent.join(T))
        self.assertEqual(again.call(1, "echo"), 1)

    def test_a_monitor_or_a_call_that_is_lost_as_soon_as_it_went_out_is_told(self):
        connection_send = distconc._Connection.send
        for kind, act in (("monitor", monitor), ("call", partial(send_synchronous, 1))):
            with self.subTest(kind):
                peer, address = self.accept()

                def send_and_lose(connection, header, payload):
                    was_taken = connection_send(connection, header, payload)
                    if header[0] == kind:
                        self.lose_and_remake(peer)
                    return was_taken
                with mock.patch.object(distconc._Connection, "send", send_and_lose):
                    result = outcome(act, RemoteThread(address, "there"))
                if kind == "monitor":
                    result = receive(T).reason
                self.assertIsInstance(result, NodeDown)

    def test_who_watches_over_a_new_connection_is_not_forgotten_with_the_old_one(self):
        doomed = spawn(receive)
        contact_lost, may_go_on, has_told = Node._contact_lost, *map(
            threading.Semaphore, (0, 0))

        def wait_and_lose(*args):
            may_go_on.acquire(timeout=T)
            contact_lost(*args)
            has_told.release()
        with mock.patch.object(Node, "_contact_lost", wait_and_lose):
            old = self.dial()
            old.end()
            again = self.knock()
            again.fields[3] = old.fields[3]
            again.challenge().greet().introduce()
            again.write((("monitor", None, doomed.id, "tag", None), b""))
            self.assertEqual(again.call(1, "echo"), 1)
            may_go_on.release()
            self.assertTrue(has_told.acquire(timeout=T))
        send("end", doomed)
        self.assertEqual(again.read()[:3], ("failed", "tag", "returned"))

    def test_a_connection_that_lives_is_not_replaced_on_a_claim(self):
        true = self.dial(address="127.0.0.1:7")
        self.assertEqual(true.call(1, "echo"), 1)
        claims_address = self.dial(address="127.0.0.1:7")
        claims_both = self.knock(address="127.0.0.1:7")
        claims_both.fields[3] = true.fields[3]
        claims_both.challenge().greet().introduce(oldest=1)
        while len(self.node._established) < 3:
            receive(0.01, None)
        for handle in (RemoteThread(("127.0.0.1", 7), "there"),
                       RemoteThread(("127.0.0.1", 7), 5, true.incarnation)):
            send("for the true one", handle)
            self.assertEqual(pickle.loads(true.read()[-1]), "for the true one")
        for peer in claims_address, claims_both:
            peer.end()
            self.assertTrue(peer.is_cut())

    def test_a_caller_who_takes_only_small_replies_harms_no_server(self):
        server = get_remote_thread("echo")
        with RawPeer.knock(self.node) as peer:
            peer.fields[5] = "1"
            peer.challenge().greet().introduce()
            peer.ask("x" * 1000, "echo")
            tag, how, text, *_ = peer.failure()
            self.assertEqual((tag, how), ("tag", "unreadable"))
            self.assertIn("max_message", text)
        self.assertTrue(server.is_alive())
        self.assertEqual(self.dial().call(2, "echo"), 2)

    def test_a_node_whose_own_messages_must_be_small_goes_on_serving_requests(self):
        stop_node()
        self.node = start_node(max_message=10)
        peer = self.dial()
        for tag in "first", "second":
            peer.write((("request", tag, None), pickle.dumps(("ps",))))
            self.assertEqual(peer.failure()[:2], (tag, "unreadable"))

    def test_a_reply_too_large_for_the_node_that_passes_it_on_fails_the_call(self):
        stop_node()
        self.node = start_node(max_message=10)
        asker, answerer = self.dial(), self.dial()
        thread = self.here(receive_if, str, name="between")
        asker.ask("q", "between", "t")
        asker.monitor("nobody", "m")
        self.assertEqual(asker.failure()[:2], ("m", "no thread"))  # so the call is here, too
        answerer.write((("reply", "t", None), pickle.dumps("x" * 5000)))
        self.assertEqual(asker.failure()[:2], ("t", "unreadable"))
        self.assertEqual(len(self.node._established), 2)
        thread.send("end")

    def test_a_name_that_is_too_long_ends_the_connection_and_the_longest_is_told_at_once(self):
        for number in range(100, 400):
            self.here(collect, name=f"{number}" * 50)
        peer, start = self.dial(), monotonic()
        peer.send(1, "\U0001f600" * 255)
        self.assertEqual(peer.read()[:2], ("undelivered", "\U0001f600" * 255))
        self.assertLess(monotonic() - start, 10)  # to compare longer names takes longer
        peer.send(1, "1" * 1021)
        self.assertTrue(peer.is_cut())

    def test_messages_of_each_kind_with_equal_headers_all_arrive(self):
        lost = self.node.stats()["lost"]
        with self.dial() as peer:
            self.assertEqual(peer.call(1, "echo"), 1)
            [connection] = self.node._established
            connection.sent += 7
            losses = struct.pack(">IIII", 4, 5, 3, 4) + b"y"
            peer.pour(peer.seal(struct.pack(">II", 2, len(losses))
                                + header_of("undelivered", id="x") + losses))
            payloads = [pickle.dumps(number) for number in range(2)]
            peer.write((("call", None, "echo", 1, "tag", None), *payloads))
            self.assertEqual([peer.reply("tag"), peer.reply("tag")], [0, 1])
            self.assertEqual(self.node.stats()["lost"], lost + 7)
            with connection._write_lock:  # so that all wait together
                for number in range(2):
                    connection._post_undelivered("y", number + 1, "why", None)
            told = [peer.read() for _ in range(2)]
            self.assertEqual([(kind, id, count) for kind, id, _, count, *_ in told],
                             [("undelivered", "y", 1), ("undelivered", "y", 2)])

    def test_a_request_in_a_request_a_thousand_times_is_traced_and_received(self):
        traces, peer, received = self.trace(), self.dial(), queue.Queue()
        self.here(lambda: [received.put(receive(T)) for _ in range(2)], name="reads")
        handle = pickle.dumps(RemoteThread(9000, 1), 2)[2:-1]
        nested_requests = (b"\x80\x04" + named(Synchronous) * 1000 + short_text("innermost")
                           + (handle + short_text("t") + b"\x87R") * 1000 + b".")
        peer.write((("send", None, "reads", None), nested_requests))
        peer.send("after it", "reads")
        self.assertIsInstance(received.get(timeout=T), Synchronous)
        self.assertEqual(received.get(timeout=T), "after it")
        shown = [r["message"] for r in records(traces) if r["event"] == "receive"]
        self.assertEqual(shown[1], "'after it'")
        self.assertLess(len(shown[0]), 300)

    def test_a_message_to_an_id_that_no_thread_has_is_counted_and_told(self):
        peer = self.dial()
        before = self.node.stats()["undelivered"]
        peer.send("to nobody", 1 << 63)
        self.assertEqual(peer.read()[:2], ("undelivered", 1 << 63))
        with Records() as log:
            nobody = distconc.MAX_ID
            send("to nobody", RemoteThread(self.node, nobody))
            self.assertEqual(log.lost(f", {nobody})"), 1)
        self.assertEqual(self.node.stats()["undelivered"], before + 2)

    def test_what_broke_a_connection_is_one_clean_line_of_the_log(self):
        name = b"\x8c\x0aos\x1b[31m\nxy"[:12] + b"\x8c\x03a\nb"
        for data in b"\x80\x04" + name + b"\x93.", b"\x80\x04\x1b", b"\x1b[31m\n":
            with self.subTest(data), Records() as log:
                log.informed()
                peer = self.dial()
                with suppress(Cut):
                    peer.pour(peer.seal(two_in(data)))
                text = log.get().getMessage()
                self.assertIn("lost", text)
                self.assertTrue(text.isprintable(), text)

    # One bit wrong

    def assert_shut(self, peer, mark, *steps):
        """The steps end in a cut at once, and `mark` was never made."""
        start = monotonic()
        with contextlib.suppress(Cut):
            for step in steps:
                step()
            self.assertTrue(peer.is_cut())
        self.assertLess(monotonic() - start, 4)  # a heartbeat's silence takes longer
        self.assertFalse(os.path.exists(mark))

    def bomb(self, mark):
        return ("send", None, "kept", None), pickle.dumps(Does(os.mkdir, mark))

    def test_the_mark_is_made_when_all_is_right(self):
        mark = self.mark()
        self.dial().write(self.bomb(mark))
        self.assertEqual(self.got(self.kept, 1), [None])
        self.assertTrue(os.path.exists(mark))

    def tamper_hello(self, alter, fields=None):
        mark, peer = self.mark(), self.knock()
        with contextlib.suppress(Cut):
            peer.challenge()
            peer.fields = fields or peer.fields
            peer.greet(alter)
            peer.write((("serials", 1, 1), b""))
            peer.write(self.bomb(mark))
            self.assertTrue(peer.is_cut())
        self.assertFalse(os.path.exists(mark))
        self.assertEqual(self.got(self.kept), [])

    def test_a_hello_with_one_field_altered_on_its_way_is_not_let_in(self):
        good = RawPeer.knock(self.node)
        self.addCleanup(good.close)
        for field in range(len(good.fields)):
            def alter(line, field=field):
                fields = line.split(b"\0")
                fields[field] = fields[field][:-1] + bytes([(fields[field] or b"0")[-1] ^ 1])
                return b"\0".join(fields)
            with self.subTest(field=field):
                self.tamper_hello(alter)

    def test_a_sealed_lie_about_role_or_address_is_not_let_in(self):
        good = RawPeer.knock(self.node)
        self.addCleanup(good.close)
        name = good.fields[8]
        for change in ({1: "acceptor"}, {1: ""}, {0: "distconc 3"}, {0: "distconc 1"}, {0: ""},
                       {7: "127.0.0.1:1", 8: "127.0.0.1:1"}, {7: "", 8: ""},
                       {7: name + "0", 8: name[:-1]}, {3: "xyz"}, {4: "soon"}, {5: ""}):
            with self.subTest(change):
                fields = [change.get(at, field) for at, field in enumerate(good.fields)]
                self.tamper_hello(None, fields)
        for fields in ([], good.fields[:3], good.fields[:7], ["\xff" * 4000]):
            with self.subTest(fields=fields):
                self.tamper_hello(lambda line: "\0".join(fields).encode("latin-1"))

    def test_a_hello_beyond_all_bounds_is_refused_and_disturbs_nobody(self):
        def answer_when_told():
            request = receive_if(Synchronous)
            receive_if(str)
            reply_synchronous("late", request)
        results, server = queue.Queue(), self.here(answer_when_told)
        caller = spawn(lambda: results.put(outcome(send_synchronous, 1, server, T)))
        watched = self.here(hold)
        watch, linked = monitor(watched), spawn_linked(hold)
        changes = [{3: text} for text in ("0", "-1", "0x0", "", f"{1 << 64:x}", "f" * 3000)]
        changes += [{4: text} for text in ("nan", "inf", "-inf", "0", "-1", "1e-9", "1e300", "")]
        changes += [{5: text} for text in ("0", "-1", str(1 << 32), "9" * 3000, "1e3", "nan")]
        changes += [{6: text} for text in ("nowhere", "127.0.0.1:99999", "127.0.0.1:-1")]
        before = self.node.stats()["strangers"]
        for change in changes:
            with self.subTest(change):
                fields = [change.get(at, field) for at, field in enumerate(self.knock().fields)]
                self.tamper_hello(None, fields)
        self.assertIs(receive(0.1, NOTHING), NOTHING)  # no Down, no LinkedError
        self.assertTrue(results.empty() and caller.is_alive() and linked.is_alive())
        server.send("now")
        self.assertEqual(results.get(timeout=T), "late")
        watched.send("end")
        self.assertEqual(receive(T), Down(watch, watched, None))
        linked.send("end")
        self.assertTrue(linked.join(T))
        self.assertGreaterEqual(self.node.stats()["strangers"] - before, len(changes))

    def test_whom_we_dial_and_who_has_no_key_disturbs_nobody_by_a_hello(self):
        """Such a one has the challenges answered by somebody else, but can make no MAC."""
        honest, results = self.dial(), queue.Queue()
        self.assertEqual(honest.call(1, "echo"), 1)
        watch = monitor(RemoteThread(("127.0.0.1", 7), 5, honest.incarnation))
        tag = honest.read()[3]

        def answer_when_told():
            receive_if(str, T)
            reply_synchronous("late", receive_if(Synchronous, T))
        asked = self.here(answer_when_told)
        spawn(lambda: results.put(outcome(send_synchronous, 1, asked, T)))
        for incarnation in 0, 1 << 64, self.node.incarnation, honest.incarnation:
            with self.subTest(incarnation), Listener(("127.0.0.1", 0)) as listener:
                name = "%s:%d" % listener.address
                dialler = spawn(lambda: results.put(outcome(connect, listener.address)))
                with RawPeer(listener.accept(), "acceptor", name) as peer:
                    peer.fields[3] = f"{incarnation:x}"
                    with suppress(Cut):
                        peer.challenge().greet().pour(bytes(40))
                        self.assertTrue(peer.is_cut())
                self.assertIsInstance(results.get(timeout=T), NodeUnreachable)
                self.assertTrue(dialler.join(T))
        self.assertIs(receive(0, NOTHING), NOTHING)
        honest.write(failed(tag, "returned"))
        self.assertEqual(receive(T), Down(watch, watch.target, None))
        asked.send("now")
        self.assertEqual(results.get(timeout=T), "late")

    def test_whom_we_dial_and_who_has_no_key_is_not_counted_as_the_node_it_claims_to_be(self):
        with Listener(("127.0.0.1", 0)) as false, Listener(("127.0.0.1", 0)) as true:
            diallers = [spawn(swallow, connect, false.address)]
            stranger = RawPeer(false.accept(), "acceptor", "%s:%d" % false.address)
            with stranger:
                stranger.challenge().greet()
                self.assertFalse(stranger.conn.poll(0.5), "it tells its serials")
                self.assertEqual(self.node._connections, set())
                diallers.append(spawn(connect, true.address))
                with RawPeer(true.accept(), "acceptor", "%s:%d" % true.address) as honest:
                    honest.fields[3] = stranger.fields[3]
                    honest.challenge().greet().tick()
                    [[(_, serial, oldest), _]] = honest.read_groups()
                    self.assertEqual(oldest, serial)
                    honest.write((("serials", 1, 1), b""))
                    self.assertTrue(diallers[1].join(T))
            self.assertTrue(diallers[0].join(T))

    def test_who_begins_with_anything_but_a_tick_is_not_connected(self):
        listener, address = self.listen()
        self.node._connect_timeout = 2 * T  # it is not that which ends it
        results = queue.Queue()
        spawn(lambda: results.put(outcome(connect, address)))
        with RawPeer(listener.accept(), "acceptor", address) as peer:
            peer.challenge().greet().write((("serials", 1, 1), b""))
            self.assertTrue(peer.is_cut())
        self.assertIsInstance(results.get(timeout=T), NodeUnreachable)

    def test_our_own_hello_sent_back_is_not_let_in(self):
        peer = self.knock().challenge()
        self.assertTrue(peer.conn.poll(T))
        peer.conn.send_bytes(peer.conn.recv_bytes())
        with self.assertRaises((EOFError, ConnectionError)):
            peer.conn.recv_bytes()

    @unittest.skipUnless(importlib.util.find_spec("hypothesis"), "needs hypothesis")
    def test_a_frame_with_any_one_bit_wrong_ends_the_connection_unread(self):
        from hypothesis import given, settings, strategies as st

        @settings(max_examples=80, deadline=None, derandomize=True)
        @given(st.floats(0, 1, exclude_max=True), st.booleans(), st.booleans())
        def check(where, first, large):
            mark = self.mark()
            peer = RawPeer.knock(self.node, heartbeat=1.0).challenge().greet()
            with peer:
                if not first:
                    peer.introduce()
                header, payload = self.bomb(mark)
                if large:
                    payload += bytes(3000)  # after the pickle's end, so of no meaning
                bomb = header, payload
                frame = bytearray(peer.frame((("serials", 1, 1), b"") if first else bomb))
                bit = int(where * len(frame) * 8)
                frame[bit // 8] ^= 1 << bit % 8
                self.assert_shut(peer, mark, lambda: peer.pour(frame),
                                 lambda: first and peer.write(bomb))
        check()
        self.assertEqual(self.got(self.kept), [])

    def test_an_altered_length_ends_the_connection_within_a_heartbeat(self):
        for bit in range(8 * 8):
            with self.subTest(bit=bit):
                mark, peer = self.mark(), self.dial(heartbeat=1.0)
                frame = bytearray(peer.frame(self.bomb(mark)))
                frame[bit // 8] ^= 1 << bit % 8
                start = monotonic()
                with suppress(Cut):
                    peer.pour(frame)
                    while not peer.is_cut(0.2):
                        peer.tick()  # which is not taken for the rest of the frame for long
                self.assertLess(monotonic() - start, 2)
                self.assertFalse(os.path.exists(mark))

    def test_a_repeated_skipped_swapped_or_reflected_frame_ends_the_connection(self):
        mark = self.mark()
        for name in "repeat", "skip", "swap", "reflect", "other connection":
            with self.subTest(name):
                peer = self.dial()
                out, into = peer.out.copy(), peer.into
                one, two = (peer.frame(self.bomb(mark)) for _ in range(2))
                if name == "repeat":
                    peer.out = out
                    tick = peer.frame()
                    steps = [tick, tick]
                elif name == "reflect":
                    peer.out, peer.into = into.copy(), out
                    steps = [peer.frame(self.bomb(mark))]
                    peer.into = into
                elif name == "other connection":
                    steps = [self.dial().frame(self.bomb(mark))]
                else:
                    steps = [two] if name == "skip" else [two, one]
                self.assert_shut(peer, mark, *(lambda s=s: peer.pour(s) for s in steps))

    def test_a_stranger_to_the_key_sees_nothing_loaded(self):
        mark, peer = self.mark(), self.knock()
        self.assertTrue(peer.conn.poll(T))
        peer.conn.recv_bytes()
        peer.conn.send(Does(os.mkdir, mark))
        with self.assertRaises((EOFError, ConnectionError)):
            while True:
                peer.conn.recv_bytes()
        self.assertFalse(os.path.exists(mark))

    def test_lengths_that_nobody_has_sealed_take_no_memory_and_end_the_connection(self):
        before = memory()
        for length in 0xffffffff, 1 << 31, (1 << 22) + 1, 1 << 22, 1 << 20:
            with self.subTest(length):
                peer, start = self.dial(heartbeat=1.0), monotonic()
                with suppress(Cut):
                    peer.pour(struct.pack(">II", length, 0) + bytes(1 << 16))
                self.assertTrue(peer.is_cut())
                self.assertLess(monotonic() - start, 2)
        self.assertLess(memory() - before, 20 << 20)

    # With the key, but mad

    def test_payloads_beyond_all_bounds_end_the_connection_and_take_no_memory(self):
        before = memory()
        for length in (1 << 28) + 1, 0xffffffff:
            with self.subTest(length):
                peer = self.dial()
                peer.pour(peer.seal(body_of((("send", None, "kept", None), b"")), length))
                self.assertTrue(peer.is_cut())
        self.assertLess(memory() - before, 50 << 20)

    def test_half_a_frame_and_an_unsealed_one_end_the_connection(self):
        for data in b"\0\0\0\4\0\0", b"\0\0\0\4" + bytes(26), bytes(28):
            with self.subTest(data):
                peer = self.dial()
                peer.pour(data)
                peer.sock.shutdown(socket.SHUT_WR)
                self.assertTrue(peer.is_cut())

    def test_a_large_payload_that_is_altered_or_cut_off_is_not_loaded(self):
        for alter in "first byte", "last byte", "mac", "short":
            with self.subTest(alter):
                mark, peer = self.mark(), self.dial()
                header, payload = self.bomb(mark)
                frame = bytearray(peer.frame((header, payload + bytes(100_000))))
                start = len(frame) - 100_000 - len(payload) - 16
                if alter == "short":
                    del frame[-1:]
                else:
                    frame[{"first byte": start, "last byte": -17, "mac": -1}[alter]] ^= 1
                with suppress(Cut):
                    peer.pour(frame)
                    peer.sock.shutdown(socket.SHUT_WR)
                self.assertTrue(peer.is_cut())
                self.assertFalse(os.path.exists(mark))

    def assert_only_it_suffers(self, cases):
        """`cases`: bodies of frames, that end that connection at most."""
        honest = self.dial()
        for number, body in enumerate(cases):
            with self.subTest(number=number, body=body[:300]):
                peer = self.dial()
                with suppress(Cut):
                    peer.pour(peer.seal(body))
                self.assertTrue(peer.is_cut(3), "it was taken")
                self.assertEqual(honest.call(1, "echo"), 1)
                peer.close()
        start = monotonic()
        honest.close()
        stop_node()
        self.assertLess(monotonic() - start, 4, "a connection is left that nobody cleans up")

    def test_a_sealed_frame_of_nonsense_ends_that_connection_only(self):
        good = group_of(("send", None, "kept", None), b"")
        sizes = [(0, 1), (1, 0), (2, 2), (1 << 31, 1 << 31), ((1 << 32) - 1, 4)]
        header = header_of("send", id="kept")
        self.assert_only_it_suffers([
            b"\0", b"junk", good[:-1], good + b"\0", good[:20], good * 2 + good[:-1],
            struct.pack(">II", 1, 1) + header, struct.pack(">II", 1, 0xffffffff) + header,
            struct.pack(">II", 0, 1) + header + b"x", struct.pack(">II", 2, 0) + header,
            struct.pack(">II", 0xffffffff, 0) + header, two_in(b"junk"),
            *(two_in(struct.pack(">II", *two) + b"xyz") for two in sizes)])

    def test_a_large_payload_that_is_not_alone_in_its_frame_ends_that_connection_only(self):
        one = ("send", None, "kept", None), b""
        self.dial().close()
        for body in (body_of(one, one), body_of((one[0], b"x")), body_of((one[0], b"", b"")),
                     body_of((one[0],)), two_in(bytes(8)) + body_of(one)):
            with self.subTest(body=body), self.dial() as peer:
                large = pickle.dumps(bytes(3000))
                with suppress(Cut):
                    peer.pour(peer.seal(body, len(large)) + large + peer.mac(large))
                self.assertTrue(peer.is_cut())
        self.assertEqual(self.got(self.kept), [])

    HEADERS = [("serials", 1, 1), ("send", None, "kept", None),
               ("call", None, "echo", 1, "t", None), ("monitor", None, "kept", "t", None),
               ("request", "t", None), ("reply", "t", None), ("failed", "t", None),
               ("unwatch", "t"), ("undelivered", "kept", "why", 1, None), ("end",)]

    def test_headers_of_unknown_kinds_or_at_the_wrong_time_end_that_connection_only(self):
        cases = [struct.pack(">II", 1, 0) + header_of(kind) for kind in (10, 11, 99, 255)]
        cases += [body_of((("serials", 1, 1),)), struct.pack(">II", 1, 0) + header_of("serials")]
        self.assert_only_it_suffers(cases)

    def test_fields_of_any_value_harm_nobody_but_their_connection(self):
        numbers = [0, 1, 1 << 31, 1 << 63, (1 << 64) - 1]
        values = {"incarnation": numbers, "caller": numbers, "tag": ["", "\n\x1b[31m", "t" * 16],
                  "id": [*numbers, "", "x" * 65_000, "\n\x1b[31m\udc80", b"\xff", b"\xed\xa0"],
                  "cause": [(f"{n:x}", m, m) for n in numbers for m in numbers]}
        cases = [struct.pack(">II", 1, len(data)) + header_of(kind, **{field: value}) + data
                 for kind in range(10) for field in values for value in values[field]
                 for data in (b"", bytes(16))]
        honest, peer = self.dial(), None
        for number, body in enumerate(cases):
            with self.subTest(number=number, body=body[:300]):
                peer = peer or self.dial()
                try:
                    peer.pour(peer.seal(body))
                    peer.call(1, "echo")
                except (Cut, AssertionError):
                    peer.close()
                    peer = None
                self.assertEqual(honest.call(1, "echo"), 1)

    def bodies_with(self, data):
        """Bodies with these bytes wherever the node itself reads a payload."""
        yield "send", 0, two_in(data)
        yield "failed", 0, body_of((("failed", "t", None), data))
        yield "request", 0, body_of((("request", "t", None), data))

    def assert_harmless(self, field):
        """The victim is a process of its own, which may crash, or freeze."""
        victim = None
        for kind, at, body in self.bodies_with(field):
            with self.subTest(kind, field=at):
                if victim is None:
                    victim = self.child()
                    ask(victim, limit_memory, 1 << 30)
                with RawPeer.dial(victim) as peer:
                    with suppress(Cut):
                        peer.pour(peer.seal(body))
                        peer.end()
                    try:
                        self.assertTrue(peer.is_cut(T), "it takes too long")
                        self.assertEqual(ask(victim, echo, 1), 1)
                    except BaseException:
                        victim.kill()
                        victim = None
                        raise

    def test_a_field_of_a_million_levels_crashes_no_node(self):
        self.assert_harmless(nested(1_000_000))

    def test_a_field_that_stands_for_a_thousand_million_items_freezes_no_node(self):
        for laugh in (laughing(9), ("is alive", None, laughing(9)), ("is alive", laughing(9), 1),
                      ("spawn", collect, (), laughing(9), False, False, None),
                      ("spawn", laughing(9), (), "n", False, False, None)):
            self.assert_harmless(pickle.dumps(laugh))

    def test_a_body_that_stands_for_much_more_than_it_is_takes_no_memory(self):
        header = "send", None, "kept", None
        body = body_of(*[(header, *[b""] * 30_000)] * 20)
        victim = self.child()
        spawn(hold, node=victim, name="kept", register=True)
        self.assertLess(len(body), 3_000_000)
        before = ask(victim, memory)
        with RawPeer.dial(victim) as peer, suppress(Cut):
            peer.pour(peer.seal(body))
            peer.end()
            peer.is_cut()
        self.assertLess(ask(victim, memory) - before, 50 << 20)

    def test_payloads_that_load_badly_are_contained_and_told(self):
        for func in exit_now, raise_mute, fail_so:
            with self.subTest(func.__name__):
                peer = self.dial()
                payload = pickle.dumps(Does(func))
                peer.write((("send", None, "kept", None), payload),
                           (("call", None, "echo", 1, "t", None), payload))
                told = sorted(peer.read()[:2] for _ in range(2))
                self.assertEqual(told, [("failed", "t"), ("undelivered", "kept")])
                self.assertEqual(peer.call(1, "echo"), 1)

    def test_a_flood_of_requests_that_reads_no_answer_has_one_thread_and_is_cut(self):
        def servers():
            return [t for t in threading.enumerate() if t.name == "distconc requests"]
        peer, honest, most = self.dial(), self.dial(), 0
        frame = ("request", "t", None), *[pickle.dumps(("ps",))] * 100
        # Both have their threads already: the flood may be cut before a new one is seen.
        self.assertTrue(peer.request("ps"))
        self.assertTrue(honest.request("ps"))
        with self.assertRaises(Cut):
            for _ in range(20_000):
                peer.write(frame)
                # On a slow machine the honest peer's silence would end its connection.
                honest.tick()
                most = max(most, len(servers()))
        self.assertEqual(most, 2)  # one for each
        self.assertTrue(honest.request("ps"))
        peer.close()
        honest.end()
        honest.is_cut()
        self.wait_until_alone()
        for server in servers():
            server.join(T)
        self.assertEqual(servers(), [])

    def test_the_answers_to_requests_that_nobody_reads_take_little_memory(self):
        for number in range(50):
            self.here(hold, name=f"{number:03}" + "\U0001f600" * 250)
        with self.dial() as peer:
            asked = ("request", "t", None), pickle.dumps(("ps",))
            peer.write(asked)
            self.assertGreater(len(peer.read()[-1]), 50_000)
            [connection] = self.node._established
            before, waiting = memory(), connection._requests._entries
            peer.write(*[asked] * 900)
            number = -1
            while number != len(waiting):  # until all are answered, or the network is full
                number = len(waiting)
                receive(1, None)
            self.assertLess(memory() - before, 25 << 20)

    def test_a_request_of_unknown_or_huge_kind_is_answered_with_an_error(self):
        peer = self.dial()
        for request in [(), ("bogus",), ("x" * (1 << 20),), (None,), (b"ps",), ("ps", 1),
                        ("is alive",), ("is alive", None, []), ("spawn", collect), (10**5000,),
                        ("spawn", None, (), "n", False, False, None),
                        ("spawn", collect, [], "n", False, False, None),
                        ("spawn", collect, (), 7, True, False, None),
                        ("spawn", collect, (), "no\nname", False, False, None),
                        ("spawn", collect, (), "\x1b[31m", False, False, None),
                        (nested(1000),)]:
            with self.subTest(repr(request)[:80] if request != (10**5000,) else "10**5000"):
                self.assertIsInstance(peer.request(*request), Exception)
        for args in [], None, 5, "x", {1}:
            with self.subTest(args=args):
                before = threads()
                refused = peer.request("spawn", collect, args, "taken", True, False, None)
                self.assertIsInstance(refused, Exception)
                self.assertEqual(threads(), before)
                self.assertRaises(NoSuchThread, get_remote_thread, "taken")
        for payload in pickle.dumps(None), pickle.dumps(laughing(9)), nested(20_000):
            with self.subTest(payload[:80]):
                peer.write((("request", "t", None), payload))
                self.assertIsInstance(peer.reply("t"), Exception)
        for payload in b"", b"junk", bytes(1 << 20), pickle.dumps(Does(exit_now)), \
                pickle.dumps(Does(raise_mute)), pickle.dumps(Point()).replace(b"Poi", b"Pxi"):
            with self.subTest(payload[:80]):
                peer.write((("request", "t", None), payload))
                self.assertEqual(peer.read()[:3], ("failed", "t", "unreadable"))
        self.assertTrue(peer.request("ps"))

    def test_a_loss_that_a_peer_tells_of_is_one_clean_line_or_ends_the_connection(self):
        ugly = "line\nor\r\x1b[31m\x07\x00\u2028\udc80"
        with Records() as log:
            for number, (id, why) in enumerate(((ugly, ugly), (ugly * 1000, ugly * 1000),
                                                (7, ""))):
                peer = self.dial()
                peer.write((("undelivered", id, why, number + 1, None), b""))
                with suppress(Cut):
                    self.assertEqual(peer.call(1, "echo"), 1)
                    text = log.get().getMessage()
                    self.assertTrue(text.isprintable(), text)
                    self.assertLess(len(text), 10_000)
                    self.assertIn(f"lost {number + 1} message", text)
        lost = self.node.stats()["lost"]
        for count in 0, 1000, (1 << 32) - 1:
            with self.subTest(count):
                peer = self.dial()
                peer.write((("undelivered", "x", "why", count, None), b""))
                self.assertTrue(peer.is_cut())
        self.assertEqual(self.node.stats()["lost"], lost)

    def test_no_more_can_be_lost_than_was_sent(self):
        peer, lost = self.dial(), self.node.stats()["lost"]
        for number in range(3):
            self.assertEqual(peer.call(number, "echo"), number)
        peer.write((("undelivered", "x", "why", 3, None),))
        self.assertEqual(peer.call(1, "echo"), 1)
        self.assertEqual(self.node.stats()["lost"], lost + 3)
        with suppress(Cut):
            peer.write((("undelivered", "x", "why", 2, None),))
        self.assertTrue(peer.is_cut())
        self.assertEqual(self.node.stats()["lost"], lost + 3)

    def test_many_wrong_names_hold_up_no_reader(self):
        for number in range(50):
            self.here(hold, name=f"worker {number:03}" * 20)
        peer, start = self.dial(), monotonic()
        peer.write((("monitor", None, "worker xyz" * 20, "t", None), *[b""] * 3000))
        for _ in range(3000):
            peer.read()
        self.assertLess(monotonic() - start, T)  # to compare all names takes twice as long
        self.assertEqual(peer.call(1, "echo"), 1)

    def test_a_payload_that_is_announced_and_does_not_come_takes_no_memory(self):
        before = memory()
        one = body_of((("send", None, "kept", None), b""))
        peers = [self.dial() for _ in range(3)]
        for peer in peers:
            peer.pour(peer.seal(one, (1 << 28) - 16))
        early = self.knock().challenge().greet()
        early.pour(early.seal(one, (1 << 28) - 16))
        for peer in peers:
            peer.pour(bytes(100_000))
        self.assertEqual(self.dial().call(1, "echo"), 1)
        self.assertLess(memory() - before, 20 << 20)
        for peer in (*peers, early):
            peer.close()

    def test_a_frame_that_trickles_in_ends_the_connection_soon(self):
        peer = self.dial(heartbeat=1.0)
        frame = peer.frame((("send", None, "kept", None), pickle.dumps("slow" * 100)))
        start = monotonic()
        with suppress(Cut):
            peer.pour(frame[:7])
            for byte in frame[7:]:  # never is there silence for long
                if select.select([peer.sock], [], [], 0.7)[0]:
                    peer.read_frame()
                else:
                    peer.pour(bytes([byte]))
        self.assertTrue(peer.is_cut())
        self.assertLess(monotonic() - start, 2.3)
        self.assertEqual(self.got(self.kept), [])

    def test_all_losses_of_a_flood_are_counted(self):
        child = self.child()
        connect(child)
        lost = self.node.stats()["lost"]
        for number in range(5000):
            send(number, RemoteThread(child, f"nobody {number % 7}"))
        self.assertEqual(ask(child, echo, 1), 1)
        end = monotonic() + T
        while self.node.stats()["lost"] < lost + 5000 and monotonic() < end:
            receive(0.01, None)
        self.assertEqual(self.node.stats()["lost"], lost + 5000)

    def test_a_tag_that_a_peer_uses_twice_leaves_nothing_behind(self):
        one, two = self.here(hold), self.here(hold)
        with self.dial() as peer:
            for thread in one, two:
                for number in range(10):
                    peer.monitor(thread.id, f"tag {number}")
            self.assertEqual(peer.call(1, "echo"), 1)
            self.assertEqual((len(one._watchers), len(two._watchers)), (0, 10))
            peer.end()
            self.assertTrue(peer.is_cut())
        self.wait_until_alone()
        self.assertEqual((one._watchers, two._watchers), ({}, {}))

    @not_on_windows("Unix sockets")
    def test_a_peers_address_is_no_second_line_of_the_log(self):
        for address in "a\nb:9", "\x1b[31m:9", "/tmp/a\nb", "/\x1b[31m":
            with self.subTest(address), Records() as log:
                log.informed()
                with suppress(Cut):
                    peer = self.dial(address=address)
                    peer.write((("undelivered", "x", "why", 1, None), b""))
                    self.assertTrue(log.get().getMessage().isprintable())
                    peer.sock.shutdown(socket.SHUT_WR)
                    self.assertTrue(log.get().getMessage().isprintable())

    def test_a_forged_sender_is_not_dialled_and_keeps_nobody_waiting(self):
        with socket.create_server(("127.0.0.1", 0)) as trap, self.dial() as peer:
            trap.settimeout(0)
            forged = Synchronous("to whom?", RemoteThread(trap.getsockname(), 5, 77), "tag")
            peer.send(forged, "echo")
            # The same server answers later: so it has not waited for that address.
            start = monotonic()
            self.assertEqual(send_synchronous("honest", RemoteThread(self.node, "echo"), T),
                             "honest")
            self.assertLess(monotonic() - start, 2)
            self.assertEqual(peer.reply("tag"), "to whom?")
            self.assertRaises(BlockingIOError, trap.accept)

    def test_the_address_in_a_hello_is_not_dialled_for_a_reply(self):
        requests = queue.Queue()
        self.here(lambda: requests.put(receive_if(Synchronous, T)), name="asked")
        with socket.create_server(("127.0.0.1", 0)) as trap:
            trap.settimeout(0)
            name = "%s:%d" % trap.getsockname()
            with self.dial(address=name) as peer:
                peer.ask("to whom?", "asked")
                request = requests.get(timeout=T)
                peer.end()
                self.assertTrue(peer.is_cut())
            self.wait_until_alone()
            lost = self.node.stats()["lost"]
            self.assertEqual(request.sender.node, trap.getsockname())
            reply_synchronous("too late", request)
            self.assertEqual(self.node.stats()["lost"], lost + 1)
            self.assertRaises(BlockingIOError, trap.accept)

    def test_whatever_comes_the_node_works_on(self):
        seed = int(os.environ.get("DISTCONC_SEED", 4))
        choose, end, counts = random.Random(seed), monotonic() + 5, Counter()
        shown, hook = [], threading.excepthook
        self.addCleanup(setattr, threading, "excepthook", hook)
        threading.excepthook = shown.append
        self.here(self.serve_echo, name="beside it all")
        honest = self.dial()
        numbers = [0, 1, 7, 1 << 63, (1 << 64) - 1, self.kept.id, self.node.incarnation]
        names = ["", "kept", "echo", "no\nne", "x" * 3000, b"\xff"]
        items = [None, -1, 1 << 80, 0.5, True, "died", (1, 2), *numbers, *names]
        payloads = [b"", b"junk", pickle.dumps(1), pickle.dumps(("ps",)), bytes(3000),
                    pickle.dumps(Does(fail_so)), pickle.dumps(Reply(1, "t")),
                    pickle.dumps(("is alive", None, "kept"))]

        def noise(most):
            return choose.randbytes(choose.randrange(most))

        def altered(data):
            data = bytearray(data or b"?")
            for _ in range(choose.randint(1, 3)):
                data[choose.randrange(len(data))] = choose.randrange(256)
            # Of a pickle, this would be a bomb: LONG_BINPUT, which can ask for gigabytes.
            return bytes(data).replace(b"r", b"q")

        def meet():
            """Knock at the node, or have it dial."""
            if choose.random() < 0.7:
                return RawPeer.knock(self.node)
            with Listener(("127.0.0.1", 0)) as listener:
                spawn(swallow, connect, listener.address)
                return RawPeer(listener.accept(), "acceptor", "%s:%d" % listener.address)

        def odd_group():
            payload = choose.choice(payloads)
            count, size = 1, len(payload)
            if choose.random() < 0.2:
                several = choose.choices(payloads, k=choose.choice([0, 2, 5]))
                payload = struct.pack(f">{len(several)}I", *map(len, several)) + b"".join(several)
                count, size = choose.choice([len(several), len(several), 0, 2]), len(payload)
            if choose.random() < 0.1:
                count, size = choose.choice([0, 1, 9, 1 << 31]), choose.choice([0, 1, 1 << 31])
            header = header_of(
                choose.choice([*KINDS, 10, 255]), choose.choice([0, 0, *numbers]),
                choose.choice([*numbers, *names, "kept", "echo"]), choose.choice(numbers),
                choose.choice(["", "t", "\n" * 16]),
                choose.choice([None, None, ("7", choose.choice(numbers), choose.choice(numbers))]))
            return struct.pack(">II", count, size) + header + payload

        def odd_hello(peer):
            fields = peer.challenge().fields
            at = choose.randrange(len(fields))
            fields[at] = choose.choice([*map(str, items), altered(fields[at].encode()).
                                        decode("utf-8", "surrogateescape")])
            if choose.random() < 0.2:
                del fields[choose.randrange(len(fields)):]
            peer.greet(choose.choice([None, altered, lambda line: noise(5000)])).introduce()

        def odd_challenge(peer):
            peer.conn.send_bytes(noise(300))
            peer.challenge()

        def odd_serials(peer):
            peer.challenge().greet()
            peer.write((("serials", choose.choice(numbers), choose.choice(numbers)), b""))

        def odd_frame(peer):
            peer.challenge().greet().introduce()
            for _ in range(3):
                groups = [odd_group() for _ in range(choose.randint(1, 4))]
                peer.pour(peer.seal(b"".join(groups), choose.choice([0, 0, 0, 3000])))

        def odd_body(peer):
            peer.challenge().greet().introduce()
            peer.pour(peer.seal(altered(odd_group())))

        def odd_bytes(peer):
            peer.challenge().greet().introduce()
            frame = peer.seal(odd_group())
            peer.pour(choose.choice([altered, lambda data: data[:choose.randrange(len(data))],
                                     lambda data: noise(200)])(frame))
        while monotonic() < end or len(counts) < 6:
            act = choose.choice([odd_hello, odd_challenge, odd_serials, odd_frame, odd_frame,
                                 odd_body, odd_bytes])
            with meet() as peer:
                with suppress(Cut, OSError, EOFError, AuthenticationError):
                    act(peer)
                    peer.end()
                    self.assertTrue(peer.is_cut(), f"seed {seed}, {counts}, {act.__name__}")
            counts[act.__name__] += 1
            if counts.total() % 20 == 0:
                self.assertEqual(honest.call(1, "beside it all"), 1, f"seed {seed}, {counts}")
        self.assertEqual(honest.call(2, "beside it all"), 2)
        self.assertEqual(self.dial().call(3, "beside it all"), 3)
        self.assertEqual(len(counts), 6, counts)
        # The threads of this test, to which odd messages come, may fail; no others.
        failed = {args.thread.name for args in shown if args.exc_type is not SystemExit}
        self.assertLessEqual(failed, {"kept", "echo"})


######## Two nodes


class Lines:
    """Stands in for sys.stdout; its lines can be waited for."""

    def __init__(self):
        self.lines, self.rest = queue.Queue(), ""

    def write(self, text):
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.lines.put(line)

    def flush(self):
        pass

    def next(self):
        return self.lines.get(timeout=T)


class TwoNodes(OneChild):
    """Names, handles, spawning and calls between two processes."""

    def test_a_handle_joins_and_asks_whether_a_thread_elsewhere_lives(self):
        thread = spawn(receive, node=self.other)
        self.assertEqual((True, False), (thread.is_alive(), thread.join(0.01)))
        waiting = spawn(lambda me: send(thread.join(T), me), current_thread())
        send("end", thread)
        self.assertEqual((True, True, False), (receive(T), thread.join(T), thread.is_alive()))
        self.assertTrue(waiting.join(T))
        nobody = RemoteThread(self.other, "nobody at all")
        self.assertEqual((False, True), (nobody.is_alive(), nobody.join(T)))

    def test_a_default_time_out_of_the_programs_makes_no_difference(self):
        done = script("""if True:
            import socket
            socket.setdefaulttimeout(0.2)
            with start_node(), spawn_node() as child:
                thread = spawn(handle_synchronous, str.upper, node=child)
                receive(0.5, None)
                print(send_synchronous("hello", thread, 20))""")
        self.assertEqual((done.out, done.err), ("HELLO\n", ""))

    def test_what_a_message_runs_while_it_is_loaded_may_send_and_not_call(self):
        me = current_thread()
        server = spawn_server(handle_synchronous, echo, node=self.other)
        for func, *args in (send, "sent", me), (send_synchronous, 1, server):
            send(Does(func, *args), spawn_server(receive, 0.5, None, node=self.other))
        self.assertEqual(receive(T), "sent")
        with self.assertRaises(RemoteError) as caught:
            send_synchronous(Does(send_synchronous, 1, server), server, T)
        self.assertIn("being loaded cannot call", str(caught.exception))
        self.assertEqual(send_synchronous(2, server, T), 2)

    def test_a_message_that_takes_long_to_load_holds_up_no_other(self):
        slow = spawn(receive, node=self.other)
        start = monotonic()
        send(Does(time.sleep, 2), slow)
        self.assertEqual(ask(self.other, echo, "quick"), "quick")
        self.assertLess(monotonic() - start, 1.5)
        self.assertTrue(slow.join(T))

    def test_factors_first_test_gives_8(self):
        for node in self.node, self.other:
            spawn(add_three, name="thread-a", node=node, register=True)
            send([5, current_thread()], RemoteThread(node, "thread-a"))
            self.assertEqual(receive(100), 8)

    def test_factors_second_test_gives_15(self):
        for node in self.node, self.other:
            spawn(triple, name="thread-s", node=node, register=True)
            self.assertEqual(send_synchronous(5, RemoteThread(node, "thread-s"), T), 15)

    @not_on_windows("pipe of a child's output that can be waited for with another")
    def test_the_logger_on_another_node_prints_what_is_sent_to_its_name(self):
        with contextlib.redirect_stdout(Lines()) as printed:
            logger = spawn_server(log_one, node=self.other, name="logger", register=True)
            send("hello", RemoteThread(self.other, "logger"))
            self.assertEqual(printed.next(), "logger: hello")
            send(("handle", current_thread()), logger)
            self.assertIn("RemoteThread", printed.next())

    def test_a_node_is_known_by_every_spelling_of_its_address(self):
        target = self.collector(self.other, "spelt")
        host, port = self.other.address
        spellings = [port, f"{host}:{port}", (host, port), self.other, str(self.other),
                     f"localhost:{port}", ("localhost", port)]
        for node in spellings:
            handle = RemoteThread(node, "spelt")
            self.assertEqual((handle, hash(handle)), (target, hash(target)), node)
            send("x", handle)
        self.assertEqual(self.got(target), ["x"] * len(spellings))
        self.assertEqual(nodes(), [self.other.address])
        for node in -1, 70000, ("h",), 1.5, True, ("h", "x"), b"127.0.0.1:1", "h", "h:90O0":
            with self.subTest(node), self.assertRaises((ValueError, TypeError)):
                connect(node)

    def test_unknown_names_raise_and_name_what_is_near(self):
        self.collector(self.other, "kitchen")
        for func in (lambda t: send_synchronous(1, t, T), ):
            with self.assertRaisesRegex(NoSuchThread, "kitchen"):
                func(RemoteThread(self.other, "kitchn"))
        with self.assertRaises(NoSuchThread):
            send_synchronous(1, RemoteThread(self.other, 1 << 40), T)
        with self.assertRaises(NoSuchThread):
            ask(self.other, get_remote_thread, "kitchn")
        self.assertEqual(ask(self.other, get_remote_thread, "kitchen"),
                         ask(self.other, get_remote_thread, "kitchen"))

    def test_a_name_goes_with_its_thread_and_to_who_comes_later(self):
        first = spawn(collect, name="seat", node=self.other, register=True)
        second = spawn(collect, name="seat", node=self.other, register=True)
        send("for the second", RemoteThread(self.other, "seat"))
        self.assertEqual(self.got(second, 1), ["for the second"])
        watch = monitor(second)
        send("stop", second)
        self.assertEqual(receive(T), Down(watch, second, None))
        with self.assertRaises(NoSuchThread):
            send_synchronous(0, RemoteThread(self.other, "seat"), T)
        self.assertEqual(self.got(first), [])
        ask(self.other, register_here, "brief")
        with self.assertRaises(TypeError):
            register_remote_thread(first, "not of this node")

    def test_handles_travel_and_stay_equal_and_are_answered_through(self):
        me = current_thread()
        home = ask(self.other, echo, {"deep": [me]})["deep"][0]
        self.assertEqual((home, hash(home)), (me, hash(me)))
        self.assertIn(home, {me})
        self.assertIsInstance(home, RemoteThread)
        self.assertEqual(home, deserialize(serialize(home)))
        with self.child() as third:
            far = ask(third, echo, ask(self.other, echo, me))
            self.assertEqual(far, me)
            self.assertEqual(ask(self.other, try_send, "from afar", far), "sent")
        self.assertEqual(receive(T), "from afar")
        message = ["the object itself"]
        send(message, home)
        self.assertIs(receive(T), message)
        with self.assertRaises(SynchronousToSelfError):
            send_synchronous(1, home, T)

    def test_a_message_is_a_copy_taken_before_send_returns(self):
        target, message = self.collector(self.other, "copies"), [0]
        for message[0] in range(1000):
            send(message, target)
        self.assertEqual(self.got(target), [[n] for n in range(1000)])

    def test_a_process_without_start_node_sends_and_is_answered_but_not_dialled(self):
        self.here(collect, name="door")
        done = queue.Queue()
        spawn(lambda: done.put(script('''
            |me = current_thread()
            |door = RemoteThread(sys.argv[1], "door")
            |send(me, door)
            |print(receive(20))
            |send_synchronous(2, door, 20)
            |print(local_node().address, nodes())
            |'''.replace("            |", ""), self.node)))
        [guest] = self.got(RemoteThread(self.node, "door"), 1)
        self.assertEqual(ask(self.other, try_send, "from a third", guest), "NodeUnreachable")
        send("from the one it called", guest)
        send("go", RemoteThread(self.node, "door"))
        result = done.get(timeout=T)
        self.assertEqual(result.out, f"from the one it called\nNone [{self.node.address!r}]\n",
                         result.err)

    @not_on_windows("/proc")
    def test_nothing_listens_before_start_node(self):
        result = script("import distconc; print(local_node().address)\n"
                        "send_synchronous(0, RemoteThread(sys.argv[1], 'kept'), 20)\n"
                        "print(open('/proc/net/tcp').read().count('%x' % os.getpid()) * 0)\n"
                        "socks = [os.readlink('/proc/self/fd/' + f) for f in os.listdir("
                        "'/proc/self/fd') if os.path.exists('/proc/self/fd/' + f)]\n"
                        "print(sum('socket' in s for s in socks))\n",
                        self.node, **({} if self.here(collect, name="kept") else {}))
        self.assertEqual(result.out, "None\n0\n1\n", result.err)

    # Spawning there

    def test_what_is_spawned_there_runs_there(self):
        self.assertEqual(ask(self.other, os.getpid), self.other.pid)
        handle = spawn(hold, node=self.other, name="held", register=True)
        self.assertEqual(handle.node, self.other.address)
        self.assertEqual(ask(self.other, get_remote_thread, "held"), handle)
        send("end", handle)

    def test_errors_in_getting_it_started_there_are_raised_here(self):
        alien = stranger_from("only_here").__class__
        self.addCleanup(sys.modules.pop, "only_here")
        with self.assertRaises(RemoteError) as caught:
            spawn(alien, node=self.other)
        self.assertEqual(caught.exception.type, "ModuleNotFoundError")
        with self.assertRaises(SerializationError):
            spawn(lambda: None, node=self.other)
        with self.assertRaises(SerializationError):
            spawn(echo, threading.Lock(), node=self.other)
        with self.assertRaises(TypeError):
            spawn("echo", node=self.other)
        with self.assertRaises(NodeUnreachable):
            spawn(echo, 1, node=free_port())
        with self.assertRaises(NodeUnreachable):
            spawn_linked(echo, 1, node=free_port())
        self.assertIs(receive(0.1, NOTHING), NOTHING)
        with self.assertRaises(TypeError):
            spawn(echo, 1, node=self.other, name=7, register=True)

    def test_a_function_of_main_cannot_be_spawned_elsewhere(self):
        result = script("def f(): pass\ntry: spawn(f, node=sys.argv[1])\n"
                        "except RemoteError as error: print(error.type, 'f' in str(error))\n",
                        self.other)
        self.assertEqual(result.out, "AttributeError True\n", result.err)

    def test_spawn_server_serves_there_for_ever(self):
        server = spawn_server(handle_synchronous, echo, node=self.other)
        self.assertEqual([send_synchronous(n, server, T) for n in range(100)], list(range(100)))

    # Calls

    def test_a_call_passed_on_to_a_third_node_is_answered_from_there(self):
        with self.child() as third:
            last = spawn(answer_passed, "!", node=third)
            middle = spawn(pass_on, last, node=self.other)
            self.assertEqual(send_synchronous("hi", middle, T), "hi!")
            send("end", middle)
            local = self.here(pass_on, spawn(answer_passed, "?", node=third))
            self.assertEqual(send_synchronous("hi", local, T), "hi?")

    def test_a_call_passed_on_to_where_its_caller_is_unknown_is_answered_all_the_same(self):
        for size, expected in (10, b"x" * 10), (20_000, RemoteError):
            with self.subTest(size), self.child() as third, self.child(max_message=9000) as first:
                last = spawn(answer_at_length, size, node=third)
                middle = self.here(pass_on, last)
                caller = spawn(tell_outcome, middle, current_thread(), node=first)
                outcome_there = receive(T)
                if expected is RemoteError:
                    self.assertIsInstance(outcome_there, RemoteError)
                else:
                    self.assertEqual(outcome_there, expected)
                self.assertEqual(ask(third, nodes), [self.node.address])
                self.assertTrue(middle.is_alive())
                self.assertEqual(owed_by(middle.id), 0)
                self.assertTrue(caller.join(T))

    def test_the_thread_that_was_called_owes_the_answer_even_if_it_passed_it_on(self):
        held = spawn(hold, node=self.other)
        middle = spawn(pass_on, held, node=self.other)
        send("end at once", middle)  # taken after the call
        with self.assertRaises(ThreadDied):
            send_synchronous("hi", middle, T)
        send("end", held)

    def test_a_call_passed_on_and_answered_at_home_leaves_no_debt_behind(self):
        middle = spawn(pass_on, spawn(answer_passed, "!"), node=self.other)
        self.assertEqual(send_synchronous("hi", middle, T), "hi!")
        self.assertEqual(ask(self.other, owed_by, middle.id), 0)
        send("end", middle)

    def test_what_is_awaited_anew_survives_the_news_of_an_earlier_loss(self):
        server = spawn(receive, node=self.other)
        watch = monitor(server)
        lose, slow = distconc.Node._contact_lost, threading.Event()
        self.addCleanup(slow.set)

        def lose_slowly(*about):
            slow.wait(T)
            lose(*about)
            send("lost", me)

        me = current_thread()
        with mock.patch.object(distconc.Node, "_contact_lost", lose_slowly):
            disconnect(self.other)
            connect(self.other)
            slow.set()
            receive_if(lambda message: message == "lost", T)
        again = monitor(server)
        down = receive(T)
        self.assertEqual((down.monitor, type(down.reason)), (watch, NodeDown))
        send("end", server)
        self.assertEqual(receive(T), Down(again, server, None))

    def test_a_failure_too_large_for_the_caller_is_told_without_its_reason(self):
        stop_node()
        start_node(max_message=10_000)
        server = spawn(fail_with_all, node=self.other)
        watch = monitor(self.other)
        with self.assertRaises(ThreadDied) as caught:
            send_synchronous(100_000, server, T)
        self.assertIsInstance(caught.exception.reason, RemoteError)
        self.assertEqual(caught.exception.reason.type, "ValueError")
        demonitor(watch)
        self.assertIsNone(receive(0, None))

    def test_a_server_that_dies_fails_the_call_with_its_traceback(self):
        server = spawn(fail_when_called, KeyError("why"), node=self.other)
        with self.assertRaises(ThreadDied) as caught:
            send_synchronous(1, server, T)
        self.assertIsInstance(caught.exception.reason, KeyError)
        cause = caught.exception.__cause__
        self.assertIsInstance(cause, RemoteError)
        self.assertEqual(cause.type, "KeyError")
        for words in "Traceback", "fail_when_called", "why":
            self.assertIn(words, str(cause))
        with self.assertRaises(NoSuchThread):
            send_synchronous(1, server, T)

    def test_all_who_wait_hear_of_an_end_whose_reason_cannot_be_looked_at(self):
        for error in Shy.error, interrupting_error:
            server = spawn(fail_when_called, error, node=self.other)
            watches = [monitor(server) for _ in range(3)]
            died = outcome(send_synchronous, 1, server, T)
            self.assertEqual((type(died), type(died.reason)), (ThreadDied, RemoteError))
            self.assertEqual([receive(T).monitor for _ in watches], watches)

    def test_an_error_of_a_message_that_is_one_of_ours_is_told_as_ours(self):
        server = spawn_server(handle_synchronous, echo, node=self.other)
        for text in "no", "no" * 1_000_000, threading.Lock:
            raiser = Does(raise_no_such_thread, text)
            error = outcome(send_synchronous, raiser, server, T)
            self.assertIsInstance(error, NoSuchThread)
            self.assertLess(len(str(error)), 20_000)
        self.assertEqual(send_synchronous(1, server, T), 1)
        self.assertEqual(len(self.node._connections), 1)

    def test_an_error_that_cannot_be_printed_ends_its_thread_as_any_other(self):
        with mock.patch("threading.excepthook", lambda info: None):
            watched = monitor(target := spawn(fail_on_request_with_bad_lines))
            send("now", target)
            self.assertEqual(receive(T).monitor, watched)
            self.assertTrue(target.join(T))

    def test_stats_count_messages_and_nothing_else(self):
        target = self.collector(self.child())  # one call, which starts it
        for number in range(10):
            send(number, target)
        self.assertEqual(self.got(target, 10), list(range(10)))  # another
        stats = self.node.stats()
        self.assertEqual((stats["sent"], stats["received"]), (12, 2))
        self.assertEqual(sum(stats.values()), 14)

    def test_a_failure_is_printed_before_its_caller_can_end_the_process(self):
        done = script("""
server = spawn_server(handle_synchronous, int)
try:
    send_synchronous("no number", server)
except ThreadDied:
    os._exit(3)""")
        self.assertEqual(done.status, 3)
        self.assertIn("Exception in thread handle_synchronous", done.err)
        self.assertIn("ValueError: invalid literal", done.err)

    def test_a_server_that_returns_fails_the_call_without_reason(self):
        server = spawn(fail_when_called, SystemExit(), node=self.other)
        with self.assertRaises(ThreadDied) as caught:
            send_synchronous(1, server, T)
        self.assertIsNone(caught.exception.reason)

    def test_a_reply_that_cannot_be_pickled_fails_the_server_and_the_call(self):
        server = spawn(handle_quietly, threading.Lock, node=self.other)
        with self.assertRaises(ThreadDied) as caught:
            send_synchronous((), server, T)
        self.assertIsInstance(caught.exception.reason, SerializationError)

    def test_an_error_that_does_not_unpickle_becomes_a_remote_error(self):
        server = spawn(handle_quietly, raise_two, node=self.other)
        with self.assertRaises(ThreadDied) as caught:
            send_synchronous((), server, T)
        self.assertIsInstance(caught.exception.reason, RemoteError)
        self.assertEqual(caught.exception.reason.type, "TwoArguments")

    def test_an_error_without_words_fails_the_call_as_any_other(self):
        for node in None, self.other:
            with self.subTest(node):
                hook, threading.excepthook = threading.excepthook, lambda *_: None
                self.addCleanup(setattr, threading, "excepthook", hook)
                server = spawn(fail_when_called, Mute, node=node)
                with self.assertRaises(ThreadDied):
                    send_synchronous(1, server, 5)

    def test_an_error_of_20_megabytes_fails_the_call_as_any_other(self):
        error = Does(ValueError, Does(bytes, 20 << 20))
        server = spawn(fail_when_called, error, node=self.other)
        held = spawn(hold, node=self.other)
        watch = monitor(held)
        with self.assertRaises(ThreadDied):
            send_synchronous(1, server, T)
        self.assertIs(receive(0, NOTHING), NOTHING)
        demonitor(watch)
        send("end", held)

    def test_a_reply_that_cannot_be_read_is_a_remote_error(self):
        server = spawn(once, stranger_from, node=self.other)
        with self.assertRaises(RemoteError) as caught:
            send_synchronous(("only_there",), server, T)
        self.assertEqual(caught.exception.type, "ModuleNotFoundError")

    def test_a_call_that_cannot_be_read_there_is_a_remote_error(self):
        message = stranger_from("only_here")
        self.addCleanup(sys.modules.pop, "only_here")
        server = self.collector(self.other, "reader")
        with self.assertRaises(RemoteError) as caught:
            send_synchronous(message, server, T)
        self.assertEqual(caught.exception.type, "ModuleNotFoundError")
        with Records() as records:
            send(message, server)
            self.assertEqual(self.got(server), [])
            self.assertEqual(1, records.lost("only_here"))

    def test_a_call_that_times_out_leaves_no_late_reply(self):
        server = spawn(answer_later, node=self.other)
        with self.assertRaises(TimeoutError):
            send_synchronous("q", server, 0.05)
        send("now", server)
        self.assertEqual(ask(self.other, echo, 1), 1)
        self.assertIs(receive(0.1, NOTHING), NOTHING)

    def test_what_cannot_be_pickled_is_named_with_its_path(self):
        with self.assertRaisesRegex(SerializationError, r"message\[1\]\['lock'\]"):
            send((1, {"lock": threading.Lock()}), RemoteThread(free_port(), "nobody"))
        with self.assertRaises(SerializationError):
            send_synchronous((1, {"lock": threading.Lock()}), RemoteThread(self.other, "n"), T)

    def test_a_deep_list_is_refused_here_or_arrives(self):
        deep = []
        for _ in range(100_000):
            deep = [deep]
        with self.assertRaises(SerializationError):
            send(deep, RemoteThread(self.other, "nobody"))
        while deep:  # not all levels at once
            deep = deep.pop()
        self.assertEqual(ask(self.other, echo, 1), 1)

    # Large, many, in order

    def test_64_mib_arrive_there_and_back(self):
        data = os.urandom(1 << 26)
        self.assertTrue(ask(self.other, echo, data) == data)

    def test_sends_as_the_last_line_of_a_script_all_arrive(self):
        self.here(collect, name="kept")
        result = script("for n in range(20_000): send(n, RemoteThread(sys.argv[1], 'kept'))\n",
                        self.node)
        self.assertEqual((result.status, result.err), (0, ""))
        self.assertEqual(self.got(get_remote_thread("kept")), list(range(20_000)))

    def test_each_senders_order_is_kept_with_many_senders_both_ways(self):
        there, here = self.collector(self.other, "all there"), self.here(collect)
        senders = [threading.Thread(target=send_all, args=([(s, n) for n in range(500)], there))
                   for s in range(8)]
        for s in range(8):
            spawn(send_all, [(s, n) for n in range(500)], here, node=self.other)
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        for got in self.got(there, 4000), self.got(here, 4000):
            for s in range(8):
                self.assertEqual([n for t, n in got if t == s], list(range(500)))

    def test_small_and_large_messages_of_one_sender_keep_their_order(self):
        there = self.collector(self.other, "mixed")
        sizes = [(n * 7919) % 5000 if n % 50 else 300_000 for n in range(1000)]
        for number, size in enumerate(sizes):
            send((number, bytes(size)), there)
        got = self.got(there)
        self.assertEqual([(n, len(data)) for n, data in got], list(enumerate(sizes)))

    def test_order_and_at_most_once_with_disconnects_in_between(self):
        there = self.collector(self.other, "cut here")
        sent = send_over_cuts(range(20_000), there, 50)
        got = self.got(there)
        self.assertEqual(got, sorted(set(got)), "an old message after a new one")
        self.assertEqual(set(sent) - set(got), set(), "disconnect sends what is queued")

    def test_order_and_at_most_once_where_the_receiver_disconnects(self):
        here = self.here(collect)
        results = spawn(once, send_over_cuts, node=self.other)
        cutter = spawn(lambda: [disconnect(self.other) for _ in range(50)])
        with contextlib.suppress(NodeDown):
            send_synchronous((range(20_000), here, 0), results, T)
        self.assertTrue(cutter.join(T))
        self.assertEqual(ask(self.other, echo, 1), 1)
        got = self.got(here)
        self.assertEqual(got, sorted(set(got)), "an old message after a new one")

    def test_two_nodes_dialling_each_other_at_once_lose_and_double_nothing(self):
        with self.child() as third:
            a, b = (self.collector(node, "met") for node in (self.other, third))
            for turn in range(LOOPS):
                numbers, upto = range(turn * 20, turn * 20 + 20), turn * 20 + 20
                starters = [spawn(once, send_all, node=node) for node in (self.other, third)]
                at_once(*((send_synchronous, (numbers, to), starter, T)
                          for to, starter in zip((b, a), starters)))
                for met in a, b:
                    self.assertEqual(self.got(met, upto), list(range(upto)))
                at_once((ask, self.other, disconnect, third.address),
                        (ask, third, disconnect, self.other.address))

    # Undelivered

    def test_lost_sends_are_logged_at_most_once_a_second_with_counts_that_add_up(self):
        records, before = Records(), ask(self.other, stats_here)["undelivered"]
        with records:
            for _ in range(2000):
                send("x", RemoteThread(self.other, "nobody here"))
            total = records.lost("nobody here")
            while ask(self.other, stats_here)["undelivered"] - before < 2000:
                self.assertIs(receive(0.01, NOTHING), NOTHING)
            ask(self.other, echo, "after them")
            distconc._losses.flush()
            while total < 2000:
                total += records.lost("nobody here")
            self.assertEqual(total, 2000)
            lines = [record for record in records.seen if "nobody here" in record.getMessage()]
            self.assertEqual({("WARNING", "distconc")},
                             {(record.levelname, record.name) for record in lines})
            times = [record.created for record in lines]
            self.assertLess(len(lines), 3 + times[-1] - times[0])
        self.assertEqual(ask(self.other, stats_here)["undelivered"] - before, 2000)

    def test_sends_to_a_dead_thread_here_or_there_are_logged_and_never_raise(self):
        for node in None, self.other:
            dead = spawn(hold, node=node)
            watch = monitor(dead)
            send("end", dead)
            self.assertEqual(receive(T).monitor, watch)
            with Records() as records:
                send("x", dead)
                self.assertEqual(1, records.lost("it has ended" if node is None else "no living"))

    # Monitors and links

    def test_down_comes_after_all_that_the_thread_had_sent(self):
        for error in [None, KeyError("x")] * LOOPS:
            thread = spawn(send_then_end, range(200), current_thread(), error, node=self.other)
            watch = monitor(thread)
            send("go", thread)
            self.assertEqual([receive(T) for _ in range(200)], list(range(200)))
            down = receive(T)
            self.assertEqual((down.monitor, down.target), (watch, thread))
            self.assertEqual(repr(down.reason), repr(error))

    @not_on_windows("Unix sockets")
    def test_a_monitor_of_nobody_says_so_and_never_raises(self):
        for target, kind in ((RemoteThread(self.other, "nobody"), NoSuchThread),
                             (RemoteThread(free_port(), "x"), NodeUnreachable),
                             (free_port(), NodeUnreachable),
                             (os.path.join(self.dir, "no"), NodeUnreachable)):
            watch = monitor(target)
            down = receive(T)
            self.assertEqual((down.monitor, down.target), (watch, target))
            self.assertIsInstance(down.reason, kind)

    def test_after_demonitor_no_down_comes_or_is_there(self):
        for _ in range(LOOPS):
            thread = spawn(hold, node=self.other)
            watches = [monitor(thread) for _ in range(3)]
            send("end", thread)
            demonitor(watches[0])
            demonitor(watches[0])
            downs = {receive(T).monitor for _ in range(2)}
            self.assertEqual(downs, set(watches[1:]))
        self.assertEqual(ask(self.other, echo, 1), 1)
        self.assertIs(receive(0.1, NOTHING), NOTHING)

    def test_a_monitored_node_is_down_when_contact_ends_and_can_be_monitored_again(self):
        for _ in range(3):
            watch, silent = monitor(self.other), monitor(str(self.other))
            demonitor(silent)
            disconnect(self.other)
            down = receive(T)
            self.assertEqual((down.monitor, down.target), (watch, self.other))
            self.assertIsInstance(down.reason, NodeDown)
            self.assertIs(receive(0.05, NOTHING), NOTHING)
            self.assertEqual(ask(self.other, echo, 1), 1)

    def test_a_link_over_nodes_gives_exactly_one_error(self):
        for _ in range(LOOPS):  # also where the child ends before its start has answered
            child = spawn_linked(fail_quietly, node=self.other)
            with self.assertRaises(LinkedError) as caught:
                receive(T)
            self.assertIsInstance(caught.exception.error, ValueError)
            self.assertEqual(caught.exception.thread, child)
        spawn_linked(echo, 1, node=self.other)  # to return is no failure
        self.assertEqual(ask(self.other, echo, 1), 1)
        self.assertIs(receive(0.1, NOTHING), NOTHING)

    def test_a_linked_error_does_not_disturb_a_call(self):
        spawn_linked(fail_quietly, node=self.other)
        self.assertEqual(ask(self.other, echo, 1), 1)
        with self.assertRaises(LinkedError):
            receive(T)

    # Stopping

    def test_a_remote_send_after_stop_node_raises_until_start_node(self):
        target = self.collector(self.other, "stopped")
        send("before", target)
        stop_node()
        stop_node()
        for act in (send, send_synchronous):
            with self.assertRaises(NodeDown):
                act("after", target)
        with self.assertRaises(NodeDown):
            spawn(echo, 1, node=self.other)
        with self.assertRaises(RuntimeError), start_node():
            start_node()
        start_node()
        send("again", target)
        self.assertEqual(self.got(target), ["before", "again"])

    def test_stop_node_ends_while_threads_receive_call_and_send(self):
        held = spawn(hold, node=self.other)
        target, results = self.collector(self.other, "flooded"), queue.Queue()

        def note(func, *args):
            try:
                while True:
                    func(*args)
            except Exception as error:
                results.put(error)
        self.here(hold)
        spawn(note, send_synchronous, "q", held)
        spawn(note, send, bytes(1000), target)
        spawn(note, send, bytes(100_000), target)
        self.assertEqual(ask(self.other, echo, 1), 1)
        stoppers = [threading.Thread(target=stop_node) for _ in range(3)]
        start = monotonic()
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join(T)
        self.assertLess(monotonic() - start, 5.5)
        for _ in range(3):
            self.assertIsInstance(results.get(timeout=T), NodeDown)
        start_node()
        send("end", held)


def raise_two():
    raise TwoArguments(1, 2)


def handle_quietly(func):
    threading.excepthook = lambda *_: None
    handle_synchronous(lambda args: func(*args), T)


def answer_later():
    request = receive_if(Synchronous, T)
    receive_if(str, T)
    reply_synchronous("late", request)


class Records(logging.Handler):
    """What is logged, to be waited for."""

    def __init__(self):
        super().__init__()
        self.queue, self.seen = queue.Queue(), []

    def emit(self, record):
        self.queue.put(record)

    def get(self):
        self.seen.append(self.queue.get(timeout=T))
        return self.seen[-1]

    def lost(self, about):
        """How many messages are lost, as the next line says that has these words."""
        while about not in (text := self.get().getMessage()):
            pass
        return int(re.search(r"lost (\d+) message", text)[1])

    def __enter__(self):
        logger = logging.getLogger("distconc")
        self.old, logger.propagate = logger.propagate, False
        self.level = logger.level
        logger.addHandler(self)
        return self

    def informed(self):
        """Hear of what is INFO, too."""
        logging.getLogger("distconc").setLevel(logging.INFO)
        return self

    def __exit__(self, *_):
        logger = logging.getLogger("distconc")
        logger.propagate = self.old
        logger.setLevel(self.level)
        logger.removeHandler(self)


class Plain(Net):
    """`allow` and `max_message`, as this node's and as a child's options."""

    def narrow(self):
        return self.child(allow=[Point, once, collect, echo, stats_here, census])

    def bomb_module(self):
        """A module on the child's path that leaves a mark when it is imported."""
        mark, name = self.mark(), "bomb_" + os.urandom(4).hex()
        with open(os.path.join(self.dir, name + ".py"), "w") as file:
            file.write(f"open({mark!r}, 'w')\ndef Made(*_): pass\n")
        sys.path.append(self.dir)
        self.addCleanup(sys.path.remove, self.dir)
        self.addCleanup(sys.modules.pop, name, None)
        message = stranger_from(name)
        return message, mark

    def test_what_allow_does_not_name_is_never_imported_and_counted_and_told(self):
        message, mark = self.bomb_module()
        child = self.narrow()
        target, ran = self.collector(child), self.mark()
        bad = [message, Does(os.system, f"touch {ran}"), Does(eval, f"open({ran!r}, 'w')"),
               Does(os.mkdir, ran), Does(getattr, "", "join"), [Does(open, ran, "w")]]
        with Records() as records:
            for item in bad:
                with self.assertRaises(RemoteError):
                    send_synchronous(item, target, T)
                send(item, target)
            self.assertEqual(self.got(target), [])
            self.assertIn("collector", records.get().getMessage())
        with self.assertRaises(RemoteError):
            spawn(os.mkdir, ran, node=child)
        with self.assertRaises(RemoteError):
            spawn_server(print, node=child)
        self.assertEqual(ask(child, stats_here)["refused"], 2 * len(bad) + 2)
        self.assertFalse(os.path.exists(ran) or os.path.exists(mark))
        unguarded = self.child()  # the same does leave its mark where all is allowed
        send(Does(os.mkdir, ran), self.collector(unguarded))
        send(message, RemoteThread(unguarded, "collector"))
        self.got(RemoteThread(unguarded, "collector"))
        self.assertTrue(os.path.exists(ran) and os.path.exists(mark))

    def plain(self):
        import datetime as dt, decimal, fractions  # noqa: E401
        return [None, True, 1, -1 << 70, 1.5, "s", b"b", bytearray(b"c"), [1], (2,), {"k": {3}},
                frozenset([4]), 1j, range(5), dt.date(2020, 1, 1),
                dt.time(1, 2, tzinfo=dt.timezone.utc),
                dt.datetime(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1), "x")),
                dt.timedelta(1), decimal.Decimal("1.5"), fractions.Fraction(1, 3), uuid.uuid4(),
                uuid.uuid1(), current_thread(), RemoteThread(self.node, "n"), Point(7),
                Reply(1, "t"), Synchronous(1, current_thread(), "t"), Monitor(1, "t"),
                Down(Monitor(1, "t"), 1, None)]

    def test_plain_data_and_what_is_named_gets_in(self):
        child = self.narrow()
        for item in self.plain():
            with self.subTest(item):
                back = ask(child, echo, [item])[0]
                self.assertEqual((type(back), back), (type(item), item) if not
                                 isinstance(item, Thread) else (RemoteThread, item))
        for error in (ValueError("v"), OSError(2, "no"), StopIteration(1),
                      UnicodeDecodeError("u", b"x", 0, 1, "r"), NoSuchThread("n"),
                      NodeDown("d"), ThreadDied(None, None, "t"),
                      RemoteError("a", "b"), SerializationError("s"), AuthenticationError("a"),
                      NodeUnreachable("u"), SynchronousToSelfError("s")):
            with self.subTest(error):
                back = ask(child, echo, [error])[0]
                self.assertEqual((type(back), back.args), (type(error), error.args))

    def test_cycles_and_sharing_get_in(self):
        shared, child = [1], self.narrow()
        cycle = {"a": shared, "b": shared}
        cycle["self"] = cycle
        back = ask(child, echo, cycle)
        self.assertIs(back["a"], back["b"])
        self.assertIs(back["self"], back)

    def test_a_message_cannot_change_a_class_of_the_node(self):
        child = self.narrow()
        with RawPeer.dial(child) as peer:
            for kind in RemoteThread, Synchronous, Reply:
                peer.write((("send", None, "collector", None), patch(kind, "__repr__")))
                with contextlib.suppress(TimeoutError):
                    peer.sock.settimeout(0.3)
                    peer.read()
        self.assertEqual(ask(child, echo, "alive"), "alive")
        text = ask(child, echo, [current_thread()])
        self.assertEqual(text, [current_thread()])
        self.assertEqual(ask(self.child(allow=[repr_of, once]), repr_of, 1), "1")

    def hostile_pickles(self, module):
        """Pickles that read memory, import, change what is there or end the process."""
        offsets = "u", b"x", -(1 << 40), 1, "r"
        yield pickle.dumps(Does(UnicodeDecodeError, *offsets))
        yield pickle.dumps(Reduced(UnicodeDecodeError, ("u", b"x", 0, 1, "r"),
                                   {"start": -(1 << 40)}))
        yield pickle.dumps(Reduced(ValueError, (), {"__cause__": 1}))
        yield pickle.dumps(SyntaxError("no", ("/etc/passwd", 1, 1, "text", 1, 1 << 40)))
        yield built(named(echo), (None, {"__defaults__": (1,)}))
        yield built(named(Point), (None, {"forged": 1}))
        yield built(named(partial), (None, {"forged": 1}))
        link = named(complex) + b"(" + named(range) + b")}Ntb"
        yield b"\x80\x04" + link * 3 + b"."
        yield GETPID_BY_EXTENSION
        yield b"\x80\x04" + short_text(module) + short_text("Made") + b"\x93)R."
        yield pickle.dumps([ValueError])

    def test_no_pickle_reads_memory_imports_or_changes_what_is_there(self):
        message, mark = self.bomb_module()
        module = type(message).__module__
        child = self.child(allow=[Point, once, collect, echo, stats_here, see_extension])
        self.collector(child)
        self.assertIs(type(ask(child, see_extension)), int)
        with RawPeer.dial(child) as peer:
            for number, payload in enumerate(self.hostile_pickles(module)):
                with self.subTest(payload[:60]):
                    peer.write((("call", None, "collector", 1, "tag", None), payload))
                    tag, how, text, (name, _), _ = peer.failure()
                    self.assertEqual((how, name), ("unreadable", "Refused"))
                    self.assertEqual(ask(child, stats_here)["refused"], number + 1)
        self.assertEqual(ask(child, echo, "alive"), "alive")
        self.assertFalse(os.path.exists(mark))

    def test_a_message_cannot_change_a_class_here(self):
        stop_node()
        start_node(allow=[Point])
        for kind in RemoteThread, Synchronous, NodeDown, uuid.UUID:
            with contextlib.suppress(Exception):
                deserialize(patch(kind, "forged"))
            with self.subTest(kind):
                self.assertFalse(hasattr(kind, "forged"))
            if hasattr(kind, "forged"):
                del kind.forged

    def test_an_import_error_that_is_shown_here_imports_nothing(self):
        message, mark = self.bomb_module()
        module = type(message).__module__
        sys.modules.pop(module)
        error = Reduced(ImportError, ("no",), {"name": module, "name_from": "Made"})
        stop_node()
        start_node(allow=[Point])
        self.here(collect, name="kept")
        with RawPeer.dial(local_node()) as peer:
            peer.write((("send", None, "kept", None), pickle.dumps(error)))
            [loaded] = self.got(get_remote_thread("kept"), 1)
        self.assertIn("ImportError: no", "".join(traceback.format_exception(loaded)))
        self.assertFalse(os.path.exists(mark))

    def test_a_class_sent_as_a_value_is_refused_unless_it_is_listed(self):
        stop_node()
        start_node(allow=[Point])
        for value in [ValueError], {"kind": RemoteThread}, (NodeDown, 1):
            with self.subTest(value), self.assertRaises(pickle.UnpicklingError):
                deserialize(serialize(value))
        error = deserialize(serialize([ValueError("v"), {1j: Point}]))
        self.assertEqual((type(error[0]), error[1]), (ValueError, {1j: Point}))

    def test_who_asks_on_and_never_reads_is_cut_before_the_answers_fill_memory(self):
        header = "call", None, "nobody", 1, "t" * 16, None
        with RawPeer.dial(self.node) as peer, self.assertRaises(Cut):
            for _ in range(20_000):
                peer.write((header, *[pickle.dumps(1)] * 1000))

    def test_no_pickle_changes_a_handle(self):
        load = distconc._make_loader(())
        made = RemoteThread(9000, "x")
        plain = pickle.dumps(made, 4)
        for name in b"_connection", b"_identity", b"_id":
            patched = plain[:-1] + b"N}\x8c" + bytes([len(name)]) + name + b"K\x01s\x86b."
            with self.assertRaises(TypeError):
                load(patched)
        self.assertEqual(load(plain), made)

    def test_allow_takes_classes_and_functions_only(self):
        stop_node()
        for item in "os.system", 7, Point(), None, os:
            with self.subTest(item), self.assertRaises(TypeError):
                start_node(allow=[item])
        for allow in "os.system", 7, "all":
            with self.subTest(allow), self.assertRaises(TypeError):
                start_node(allow=allow)
        start_node(allow=[])

    def test_what_is_only_data_cannot_be_spawned(self):
        child = self.child(allow=[echo])
        for func, args in (uuid.UUID, ("0" * 32,)), (complex, (1,)), (print, ("x",)):
            with self.subTest(func), self.assertRaises(RemoteError) as caught:
                spawn(func, *args, node=child, name="taken", register=True)
            self.assertEqual(caught.exception.type, "Refused")
        spawn(echo, 1, node=child)
        self.assertRaises(NoSuchThread, send_synchronous, 1, RemoteThread(child, "taken"), T)

    def test_a_server_of_a_listed_function_can_be_spawned(self):
        child = self.child(allow=[serve_doubles])
        server = spawn_server(serve_doubles, node=child)
        self.assertEqual([send_synchronous(n, server, T) for n in (1, 2)], [2, 4])
        with self.assertRaises(RemoteError):
            spawn_server(serve_doubles, ValueError, node=child)

    def test_a_client_that_listens_nowhere_takes_plain_data_only_from_elsewhere(self):
        child = self.child()
        bomber = spawn_server(send_bomb, node=child)
        for is_same_host in False, True:
            stop_node()
            start_node(None)
            mark = self.mark()
            with mock.patch("distconc._is_same_host", return_value=is_same_host):
                result = outcome(send_synchronous, mark, bomber, T)
            with self.subTest(is_same_host):
                self.assertEqual(os.path.exists(mark), is_same_host)
                self.assertEqual(isinstance(result, RemoteError), not is_same_host)

    @not_on_windows("fork")
    def test_a_forks_child_lets_in_no_more_than_its_parent(self):
        for options in 'allow=[]', '("0.0.0.0", 0), authkey="x" * 16':
            with self.subTest(options):
                mark = self.mark()
                done = script(f"""
class Bomb:
    def __reduce__(self):
        return os.mkdir, ({mark!r},)

start_node({options})
if os.fork() == 0:
    try:
        deserialize(serialize(Bomb()))
    except Exception as error:
        print(type(error).__name__, flush=True)
    os._exit(0)
os.wait()""")
                self.assertEqual(done.out, "_NotAllowed\n", done.err)
                self.assertFalse(os.path.exists(mark))

    @not_on_windows("fork")
    def test_a_forks_child_takes_no_more_from_a_connection_than_its_parent(self):
        bomber = spawn_server(send_bomb, node=self.child(), name="bomber", register=True)
        for options, inside in ("", True), ("allow=[]", False):
            with self.subTest(options):
                mark = self.mark()
                done = script(f"""
start_node({options})
if os.fork() == 0:
    try:
        send_synchronous({mark!r}, RemoteThread(sys.argv[1], "bomber"), 20)
        print("loaded", flush=True)
    except RemoteError as error:
        print(error.type, flush=True)
    os._exit(0)
os.wait()""", distconc._format_address(bomber.node))
                self.assertEqual(done.out, "loaded\n" if inside else "_NotAllowed\n", done.err)
                self.assertEqual(os.path.exists(mark), inside)

    def test_dates_that_are_none_and_data_of_many_levels_end_no_node(self):
        """As a key of a dict, data of so many levels may; the README says so."""
        child = self.child(allow=[receive, echo, once])
        taker = spawn_server(receive, node=child, name="taker", register=True)
        before = ask(child, echo, 1)
        day = datetime.datetime(2020, 1, 1)
        zone = datetime.timezone(datetime.timedelta(hours=1))
        with RawPeer.dial(child) as peer:
            for kind, *arguments in (
                    (datetime.date, b"\x07\xe4\x00\x01"), (datetime.date, b"\x00\x00\x01\x01"),
                    (datetime.date, b"\xff\xff\xff\xff"), (datetime.date, b"\x07\xe4\x02\x1e"),
                    (datetime.time, b"\x18\0\0\0\0\0"), (datetime.time, b"\0\0\0\xff\xff\xff"),
                    (datetime.datetime, b"\x07\xe4\x0d\x01" + bytes(6)),
                    (datetime.datetime, b"\x07\xe4\x01\x01\x18" + bytes(5)),
                    (datetime.datetime, b"\xff" * 10, zone), (datetime.timedelta, 1 << 40),
                    (datetime.timezone, datetime.timedelta(days=2)), (datetime.timezone, day)):
                with self.subTest(kind, arguments=arguments):
                    bad = pickle.dumps([Reduced(kind, tuple(arguments))])
                    peer.write((("call", None, "taker", 1, "tag", None), bad))
                    kind, tag, how, *_ = peer.read()
                    self.assertEqual((kind, tag, how), ("failed", "tag", "unreadable"))
            for depth in 1000, 100_000:
                for deep in nested(depth), b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b".":
                    with self.subTest(depth, deep=deep[:4]):
                        peer.write((("send", None, "taker", None), deep))
                        self.assertEqual(ask(child, echo, before), before)
        self.assertTrue(taker.is_alive())

    def test_a_forged_sender_harms_no_server_whose_key_is_too_short_to_dial_it(self):
        stop_node()
        with start_node(authkey="short") as node:
            server = spawn_server(handle_synchronous, echo, name="echo", register=True)
            with RawPeer.dial(node, key="short") as peer:
                forged = Synchronous(1, RemoteThread(("192.0.2.1", 9), 5, 77), "tag")
                peer.send(forged, "echo")
                self.assertEqual(peer.reply("tag"), 1)
                self.assertEqual(peer.call(2, "echo"), 2)
            self.assertEqual(send_synchronous(3, server, T), 3)

    def test_handles_with_long_paths_that_a_peer_sends_are_not_kept(self):
        stop_node()
        with start_node() as node, RawPeer.dial(node) as peer:
            self.here(collect, name="kept")
            before = distconc._parse_and_keep.cache_info().currsize
            for number in range(200):
                handle = RemoteThread("/x", 1)
                object.__setattr__(handle, "_node", f"/{number}" + "x" * 100_000)
                peer.send(handle, "kept")
            peer.send("last", "kept")
            self.assertEqual(self.got(get_remote_thread("kept"), 1), ["last"])
            self.assertLess(distconc._parse_and_keep.cache_info().currsize, before + 10)

    def test_a_forged_sender_harms_no_server(self):
        child = self.child(allow=[handle_synchronous, echo])
        server = spawn(handle_synchronous, echo, node=child, name="echo", register=True)
        for sender in 5, RemoteThread(9, 5, 77):
            forged = Synchronous(1, current_thread(), "t")
            object.__setattr__(forged, "sender", sender)
            object.__setattr__(sender, "_node", []) if sender != 5 else None
            send(forged, server)
        self.assertEqual(send_synchronous("hello", server, T), "hello")

    def test_off_loopback_only_plain_data_gets_in_by_default(self):
        stop_node()
        mark = self.mark()
        for address, options, inside in ((("0.0.0.0", 0), {}, False), (0, {}, True),
                                         (("0.0.0.0", 0), {"allow": "anything"}, True),
                                         (None, {}, True)):
            with self.subTest(address, **options), start_node(address, **options):
                with contextlib.suppress(Exception):
                    deserialize(serialize(Does(os.mkdir, mark)))
                self.assertEqual(os.path.exists(mark), inside)
                inside and os.rmdir(mark)
                self.assertEqual(deserialize(serialize([1])), [1])

    def test_what_cannot_be_listened_at_or_advertised_says_its_cure(self):
        stop_node()
        key = "sixteen or more!"
        for address, advertise, error, cure in (
                ("192.0.2.77:0", None, OSError, "does not have that address.*0.0.0.0"),
                ("[::1]:9000", None, ValueError, "IPv6.*IPv4"),
                (("fe80::1", 9000), None, ValueError, "IPv6.*IPv4"),
                (0, "127.0.0.1:0", ValueError, "port 0; leave the port out"),
                (0, "0.0.0.0:9000", ValueError, "address on the network")):
            with self.subTest(address, advertise=advertise):
                with self.assertRaisesRegex(error, cure):
                    start_node(address, advertise=advertise, authkey=key)
        no_name = socket.gaierror(-3, "Temporary failure in name resolution")
        with mock.patch.object(distconc, "Listener", side_effect=no_name):
            with self.assertRaisesRegex(OSError, "say a number"):
                start_node("teacher-laptop:9000", authkey=key)
        with start_node(0, advertise="127.0.0.1") as node:
            self.assertEqual(node.address, ("127.0.0.1", node._listen_address[1]))

    def test_what_cannot_be_dialled_says_its_cure(self):
        for error, cure in (
                (socket.gaierror(-3, "Temporary failure in name resolution"),
                 "cannot be looked up.*the number.*advertise="),
                (OSError(errno.EHOSTUNREACH, "No route to host"), "its firewall let port 9000"),
                (OSError(errno.ETIMEDOUT, "timed out"), "its firewall let port 9000"),
                (ConnectionRefusedError(), "told 0.0.0.0:PORT there")):
            with mock.patch.object(distconc, "Client", side_effect=error):
                with self.assertRaisesRegex(NodeUnreachable, cure):
                    connect("teacher-laptop:9000")
        hung = threading.Event()
        self.addCleanup(hung.set)
        with mock.patch.object(distconc, "Client", side_effect=lambda *_: hung.wait(T) and fail(
                OSError())), mock.patch.object(self.node, "_connect_timeout", 0.1):
            with self.assertRaisesRegex(NodeUnreachable, "in time|within.*its firewall"):
                connect("192.0.2.1:9000")
            hung.set()

    def test_behind_a_door_the_one_who_dials_reads_that_advertise_is_needed(self):
        inside = self.child()
        with Proxy(inside.address, lambda inward, count, frame: [frame]) as door:
            name = "%s:%d" % door.address
            with self.assertRaisesRegex(NodeUnreachable, f"needs advertise='{name}'"):
                connect(door.address)

    def test_a_wildcard_bind_is_reached_by_every_name_and_advertises_none_of_zeros(self):
        child = self.child(("0.0.0.0", 0), allow="anything", advertise=None)
        self.assertNotEqual(child.address[0], "0.0.0.0")
        for host in "127.0.0.1", "127.0.0.2":
            target = RemoteThread((host, child.address[1]), "collector")
            if host == "127.0.0.1":
                spawn(collect, name="collector", node=target.node, register=True)
            send(host, target)
            self.assertEqual(self.got(target)[-1], host)

    def test_a_message_above_max_message_is_refused_at_the_sender_before_connecting(self):
        child = self.child(max_message=10_000)
        target = self.collector(child)
        for act in send, send_synchronous:
            disconnect(child)  # so that it meets the first message of a connection, too
            for _ in range(2):
                with self.assertRaises(SerializationError):
                    act(bytes(20_000), target)
        send(bytes(9_000), target)
        self.assertEqual(self.got(target), [bytes(9_000)])
        stop_node()
        start_node(max_message=1000)
        with self.assertRaises(SerializationError):
            send(bytes(2000), RemoteThread(free_port(), "nobody"))
        with self.assertRaises(NodeUnreachable):
            send(bytes(900), RemoteThread(free_port(), "nobody"))

    def test_a_node_that_does_not_listen_may_stand_for_itself(self):
        stop_node()
        node = start_node(None)
        connect(node)
        demonitor(monitor(node))
        self.assertTrue(spawn(send, "hello", current_thread(), node=node).join(T))
        self.assertEqual(receive(0), "hello")
        self.assertIs(receive(0, NOTHING), NOTHING)

    def test_stopping_an_old_node_again_leaves_the_new_one_alone(self):
        with self.node:
            stop_node()
            new = start_node()
            register_remote_thread(current_thread(), "mine")
        self.assertIs(get_remote_thread("mine"), current_thread())
        connect(self.child())
        self.assertIs(local_node(), new)

    def test_stop_node_ends_in_time_though_a_fault_holds_messages_up(self):
        child = self.child()
        target = self.collector(child)
        connect(child)
        freeze(child)
        self.addCleanup(thaw, child.pid)
        with distconc.faults(delay=0.1):
            for _ in range(30):
                send(bytes(1_000_000), target)
            start = monotonic()
            stop_node(1)
            self.assertLess(monotonic() - start, 2)
            thaw(child.pid)

    def test_a_start_that_fails_changes_nothing(self):
        child = self.child()
        spawn_server(handle_synchronous, echo, node=child, name="echo", register=True)
        done = script("""if True:
            for bad in dict(max_message=100), dict(authkey="another key, not ours"), {
                    "allow": [1]}, dict(heartbeat=0, connect_timeout=1e-6):
                try:
                    start_node(sys.argv[1], **bad)
                except (OSError, TypeError, ValueError):
                    send_synchronous(("size", bytes(1000)), RemoteThread(sys.argv[2], "echo"))
            print("well")
            """, self.node, child)
        self.assertEqual(done.out, "well\n", done.err)

    def test_a_handle_that_was_used_follows_its_name_to_this_node_and_away_again(self):
        port = free_port()
        handle = RemoteThread(port, "collector")
        for _ in range(2):
            with spawn_node(port) as child:
                self.collector(child)
                send("there", handle)
                self.assertEqual(self.got(handle), ["there"])
            stop_node()
            start_node(port)
            self.here(collect, name="collector")
            message = ["here", threading.Lock()]  # which could not be sent away
            send(message, handle)
            self.assertIs(self.got(get_remote_thread("collector"))[0], message)
            stop_node()
            start_node()

    def test_a_reply_above_max_message_fails_the_call(self):
        child = self.child(max_message=10_000)
        with self.assertRaises(ThreadDied) as caught:
            send_synchronous((20_000,), spawn(handle_quietly, bytes, node=child), T)
        self.assertIsInstance(caught.exception.reason, SerializationError)


def patch(kind, name):
    """Return the pickle that pushes a class, then (None, {name: 1}), then says BUILD."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode()
                     for word in (kind.__module__, kind.__qualname__))
    return (b"\x80\x04" + words + b"\x93N}\x8c" + bytes([len(name)]) + name.encode()
            + b"K\x01s\x86b.")


def repr_of(item):
    return repr(item)


GETPID_BY_EXTENSION = b"\x80\x02\x82\xf0)R."


def see_extension():
    """Register a code with copyreg and load a pickle that has it, which caches it."""
    copyreg.add_extension("os", "getpid", 0xF0)
    return pickle.loads(GETPID_BY_EXTENSION)


def serve_doubles():
    return handle_synchronous(lambda number: 2 * number)


def send_bomb():
    """Answer with what makes a directory when it is loaded."""
    return handle_synchronous(lambda path: Does(os.mkdir, path))


def read_a_line():
    """What `input` returns, or the name of its error."""
    try:
        return input()
    except EOFError as error:
        return type(error).__name__


def run_cat():
    return subprocess.run(["cat"], timeout=T, stdout=subprocess.PIPE).stdout


def leave_a_process():
    """Start a process that keeps this one's output; return its number."""
    return subprocess.Popen(["sleep", "60"]).pid


def shout():
    """Print a line with odd letters, one that is no text, and one without an end."""
    print("\xe9 \u20ac")
    os.write(1, b"\xff\n")
    sys.stdout.write("rest")


BUSY = threading.Event()  # nobody sets it


def be_busy(kind):
    """Start a thread for whose end an interpreter would wait; return this process's pid."""
    if kind == "pool":
        running = queue.SimpleQueue()
        ThreadPoolExecutor().submit(lambda: (running.put(None), BUSY.wait()))
        running.get()
    elif kind == "thread":
        threading.Thread(target=BUSY.wait, daemon=False).start()
    return os.getpid()


PROCESSES = []


def start_processes():
    """Start a pool of processes that idles, and a process that is busy; return their pids."""
    pool = ProcessPoolExecutor(2)
    list(pool.map(abs, [1, 2]))
    PROCESSES.append(pool)
    process = multiprocessing.get_context("fork").Process(target=BUSY.wait)
    process.start()
    return [each.pid for each in multiprocessing.active_children()]


def at_exit(func, *args):
    import atexit

    atexit.register(func, *args)


def write_and_print(path):
    with open(path, "a") as file:
        file.write("handler\n")
    sys.stdout.write("printed by a handler")


def hang_at_exit():
    """Have this process hang when it ends, but for a moment."""
    at_exit(BUSY.wait)
    distconc.CHILD_END_TIMEOUT = 0.2
    return os.getpid()


class Children(Net):
    """What is promised of child nodes, in everybody's program."""

    HEAD = f"import sys; sys.path.insert(0, {HERE!r})\nfrom distconc import *\nimport os\n"

    def run_script(self, text, *flags, head=HEAD, shell="", cwd=None, **env):
        """Run a script in a process of its own; `shell` redirects its streams."""
        command = [sys.executable, *flags, "-c", head + textwrap.dedent(text)]
        if shell:
            command = ["sh", "-c", 'exec "$@" ' + shell, "sh", *command]
        env = {**os.environ, "PYTHONUNBUFFERED": "", **env}
        return subprocess.run(command, cwd=cwd, env=env, text=True, timeout=2 * T,
                              capture_output=True)

    def assert_prints(self, expected, text, *flags, **options):
        done = self.run_script(text, *flags, **options)
        self.assertEqual((done.stdout, done.returncode), (expected, 0), done.stderr)
        return done

    def assert_ends(self, pid):
        """Wait for the end of a process, though it is no child of this one."""
        if ON_WINDOWS:
            self.assertTrue(windows_process_ends(pid, T))
            return
        with suppress(ProcessLookupError):
            if hasattr(os, "pidfd_open"):
                process = os.pidfd_open(pid)
                self.addCleanup(os.close, process)
                self.assertTrue(select.select([process], [], [], T)[0])
                return
            end = monotonic() + T
            while monotonic() < end:  # macOS has nothing that could be waited for
                os.kill(pid, 0)
                receive(0.05, None)
            self.fail(f"process {pid} does not end")

    def write(self, name, text):
        path = os.path.join(self.dir, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(textwrap.dedent(text))
        return path

    # Input and output

    def test_the_standard_input_of_a_child_is_empty(self):
        child = self.child()
        self.assertEqual(ask(child, read_a_line), "EOFError")
        if not ON_WINDOWS:  # which has no `cat`
            self.assertEqual(ask(child, run_cat), b"")

    def test_what_a_sitecustomize_prints_makes_no_difference(self):
        self.write("sitecustomize.py", "print('custom')")
        done = self.run_script("with spawn_node(): print('well')", PYTHONPATH=self.dir)
        self.assertEqual(done.stdout.split(), ["custom", "custom", "well"], done.stderr)

    def test_every_line_comes_out_whatever_the_encoding_of_the_parent(self):
        for encoding, out in ("ascii", b"\\xe9 \\u20ac\n\\xff\nrest"), (
                "utf-8", "\xe9 \u20ac\n\\xff\nrest".encode()), (
                "latin-1", b"\xe9 \\u20ac\n\\xff\nrest"):
            with self.subTest(encoding):
                done = subprocess.run(
                    [sys.executable, "-c", self.HEAD + "import test_distconc as tests\n"
                     "with spawn_node() as child: tests.ask(child, tests.shout)"],
                    env={**os.environ, "PYTHONIOENCODING": encoding}, timeout=2 * T,
                    capture_output=True)
                self.assertEqual(done.stdout.replace(b"\r\n", b"\n"), out, done.stderr)

    def test_a_child_that_prints_much_before_it_reads_much_starts(self):
        self.write("sitecustomize.py", """
            import os
            if "NOISE" in os.environ:
                print("\\n".join(["x" * 79] * 10_000))
            """)
        done = self.run_script("""
            os.environ["NOISE"] = "yes"
            with spawn_node(allow=[int] * 1_000_000): pass
            """, PYTHONPATH=self.dir)
        self.assertEqual(done.stdout, ("x" * 79 + "\n") * 10_000, done.stderr)

    @not_on_windows("program `sleep`")
    def test_stop_does_not_wait_for_a_process_that_keeps_the_output(self):
        child = self.child()
        left = ask(child, leave_a_process)
        self.addCleanup(os.kill, left, signal.SIGKILL)
        start = monotonic()
        child.stop()
        self.assertLess(monotonic() - start, 3)
        self.assertFalse(child._printer.is_alive())

    @not_on_windows("shell that closes them")
    def test_closed_standard_streams_make_no_difference(self):
        for closed in "<&- >&- 2>&-", "2>&-", ">&-", "<&- >&-":
            with self.subTest(closed):
                mark = self.mark()
                self.run_script(f"""
                    import test_distconc as tests
                    with spawn_node() as child, open({mark!r}, "w") as file:
                        of_child = tests.ask(child, os.fstat, 2)
                        file.write(str(os.path.samestat(of_child, os.stat(os.devnull))))
                    """, shell=closed)
                with open(mark) as file:
                    self.assertEqual(file.read(), str("2>&-" in closed))

    def test_nothing_of_a_child_is_left_open(self):
        done = self.assert_prints("0\n", """
            before = len(os.listdir("/proc/self/fd"))
            with spawn_node() as child: pass
            print(len(os.listdir("/proc/self/fd")) - before)
            """, "-W", "error")
        self.assertEqual(done.stderr, "")

    # How it starts

    def test_a_child_has_the_flags_of_its_parent(self):
        self.write("flags.py", """
            import os, sys
            def seen():
                return sys.flags, sys.warnoptions, sys._xoptions, sys.path
            def tell(request):
                return repr(seen())
            """)
        rows = [("-I",), ("-O",), ("-OO", "-B"), ("-W", "error"), ("-X", "dev"), ("-s", "-E")]
        if sys.version_info >= (3, 11):
            rows.append(("-P",))
        for flags in rows:
            with self.subTest(flags):
                self.assert_prints("True\n", f"""
                    sys.path.insert(0, {self.dir!r})
                    import flags
                    with spawn_node() as child:
                        server = spawn(handle_synchronous, flags.tell, node=child)
                        print(send_synchronous(0, server, 20) == repr(flags.seen()).replace(
                            "''", repr(os.getcwd())))
                    """, *flags)

    def test_a_child_imports_nothing_that_its_parent_would_not(self):
        for name in "pickle", "socket", "distconc", "sys":
            self.write(name + ".py", "import os; os.write(2, b'the wrong one'); os._exit(3)")
        for flags in ("-I",), ("-P",), ():
            if flags == ("-P",) and sys.version_info < (3, 11):
                continue
            with self.subTest(flags):
                head = self.HEAD
                if not flags:
                    head = "import sys; sys.path.remove('')\n" + head
                done = self.assert_prints("well\n", "with spawn_node(): print('well')", *flags,
                                          head=head, cwd=self.dir)
                self.assertNotIn("wrong", done.stderr)

    def test_a_child_starts_after_the_working_directory_was_changed(self):
        shutil.copy(MODULE, self.dir)
        program = "from distconc import *\nimport os\nos.chdir('/')\n" \
                  "with spawn_node() as child: print('well')\n\n"
        in_prompt = {"args": [sys.executable, "-q", "-i"], "input": program}
        for run in {"args": [sys.executable, "-c", program]}, in_prompt:
            with self.subTest(run["args"][1]):
                done = subprocess.run(**run, cwd=self.dir, timeout=2 * T, text=True,
                                      env=environment(PYTHONPATH=None), capture_output=True)
                self.assertEqual(done.stdout, "well\n", done.stderr)

    def test_the_module_may_live_in_a_package_under_another_name(self):
        os.makedirs(os.path.join(self.dir, "mypkg", "vendored"))
        shutil.copy(MODULE, os.path.join(self.dir, "mypkg", "vendored", "messages.py"))
        self.assert_prints("mypkg.vendored.messages\n", """
            from mypkg.vendored.messages import *
            with spawn_node() as child: print(type(child).__module__)
            """, head="", cwd=self.dir)

    @not_on_windows("variables of any bytes")
    def test_any_bytes_serve_as_a_key(self):
        key = bytes(range(1, 256))
        with mock.patch.dict(os.environ, DISTCONC_AUTHKEY=os.fsdecode(key)):
            stop_node()
            node = start_node()
            self.assertEqual(ask(self.child(), echo, 1), 1)
            self.assert_prints("in\n", f"connect({str(node)!r}); print('in')")
        stop_node()
        start_node(node.address, authkey=key)
        connect(self.child(authkey=key))

    @not_on_windows("Unix sockets")
    def test_any_bytes_serve_in_the_path_of_a_socket(self):
        directory = os.fsencode(self.dir) + b"/\xff\xfe \xe9"
        os.mkdir(directory)
        for path in directory + b"/a", os.fsdecode(directory) + "/b":
            child = self.child(path)
            handle = spawn(hold, node=child, name="held", register=True)
            self.assertEqual(os.fsencode(child.address), os.fsencode(path))
            for each in handle, RemoteThread(path, "held"), RemoteThread(str(child), "held"):
                self.assertTrue(each.is_alive())
            self.assertEqual(ask(child, echo, handle), handle)
            stop_node()
            with start_node(os.fsencode(path) + b"2") as here:
                self.assertEqual(ask(child, nodes), [here.address])
            start_node()

    # What can go wrong at the start

    def test_options_that_the_child_cannot_read_are_an_error_with_the_cure(self):
        done = self.run_script("""
            class Mine: pass
            for wrong in Mine, lambda: 0:
                try:
                    spawn_node(allow=[wrong])
                except SerializationError as error:
                    print(error)
            """)
        unreadable, unsendable = done.stdout.splitlines()
        self.assertIn("put what they name into a file of its own", unreadable)
        self.assertIn("cannot be sent to the child", unsendable)

    def test_an_interpreter_that_cannot_be_started_is_an_error_with_the_cure(self):
        before = census()
        for wrong in "/no/python", self.dir, "", None:
            with self.subTest(wrong), mock.patch("sys.executable", wrong):
                self.assertRaisesRegex(RuntimeError, "set sys.executable", spawn_node)
        gc.collect()
        self.assertEqual(census(), before)

    @not_on_windows("programs `false` and `true`")
    def test_a_child_that_ends_before_its_node_listens_is_an_error(self):
        for name, status in ("false", 1), ("true", 0):
            with self.subTest(name), mock.patch("sys.executable", shutil.which(name)):
                text = f"status {status} before its node listened; .* the standard error"
                self.assertRaisesRegex(RuntimeError, text, spawn_node)

    def test_an_error_that_cannot_be_pickled_is_told_all_the_same(self):
        self.write("sitecustomize.py", """
            import os
            def listen(*args, why=lambda: 0): raise ValueError(why)
            if os.environ.get("BREAK"):
                import socket
                socket.socket.listen = listen
            """)
        done = self.run_script("""
            os.environ["BREAK"] = "1"
            try:
                spawn_node()
            except RemoteError as error:
                print(error.type)
            """, PYTHONPATH=self.dir)
        self.assertEqual(done.stdout, "ValueError\n", done.stderr)

    # Signals

    @not_on_windows("SIGPIPE")
    def test_a_default_sigpipe_does_not_kill_the_parent_of_a_child_that_has_gone(self):
        self.assert_prints("RuntimeError\nstopped\n", """
            import signal, shutil
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            python, sys.executable = sys.executable, shutil.which("false")
            try:
                spawn_node(allow=[int] * 100_000)
            except RuntimeError as error:
                print(type(error).__name__)
            sys.executable = python
            child = spawn_node()
            os.kill(child.pid, 9)
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            child.stop()
            print("stopped")
            """)

    @not_on_windows("SIGCHLD")
    def test_an_ignored_sigchld_makes_no_difference(self):
        self.assert_prints("True False False\n", """
            import signal
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            one, other = spawn_node(), spawn_node()
            before = one.is_alive()
            one.stop()
            other.kill()
            print(before, one.is_alive(), other.is_alive())
            """)

    # How it ends

    def test_a_child_ends_with_its_parent_whatever_its_threads_do(self):
        for end in "os.kill(os.getpid(), 9)", "pass":
            for kind in "thread", "pool":
                with self.subTest(end, kind=kind):
                    done = self.run_script(f"""
                        import test_distconc as tests
                        child = spawn_node()
                        print(tests.ask(child, tests.be_busy, {kind!r}), flush=True)
                        {end}
                        """)
                    self.assert_ends(int(done.stdout))

    def test_a_child_that_is_stopped_ends_at_once_whatever_its_threads_do(self):
        for kind in "thread", "pool":
            child = self.child()
            ask(child, be_busy, kind)
            start = monotonic()
            child.stop()
            self.assertLess(monotonic() - start, 3)
            self.assertEqual(child._process.returncode, 0)

    def test_what_multiprocessing_started_in_a_child_ends_with_it(self):
        child = self.child()
        pids = ask(child, start_processes)
        self.assertGreaterEqual(len(pids), 2)
        start = monotonic()
        child.stop()
        self.assertLess(monotonic() - start, 3)
        self.assertEqual(child._process.returncode, 0)
        for pid in pids:
            self.assert_ends(pid)

    def test_the_handlers_of_atexit_run_in_a_child_that_ends(self):
        for kind, end in (("idle", "child.stop()"), ("pool", "child.stop()"),
                          ("thread", "pass"), ("pool", "os.kill(os.getpid(), 9)")):
            with self.subTest(kind, end=end):
                mark = self.mark()
                done = self.run_script(f"""
                    import test_distconc as tests
                    child = spawn_node()
                    tests.ask(child, tests.at_exit, tests.write_and_print, {mark!r})
                    print(tests.ask(child, tests.be_busy, {kind!r}), flush=True)
                    {end}
                    """)
                pid, *printed = done.stdout.splitlines()
                self.assert_ends(int(pid))
                with open(mark) as file:
                    self.assertEqual(file.read(), "handler\n")
                if end == "child.stop()":
                    self.assertEqual(printed, ["printed by a handler"])

    def test_a_handler_of_atexit_may_still_send(self):
        child = self.child()
        ask(child, at_exit, send, "the last", current_thread())
        child.stop()
        self.assertEqual(receive(T), "the last")

    def test_a_handler_of_atexit_that_hangs_holds_up_the_end_for_a_while_only(self):
        child = self.child()
        ask(child, hang_at_exit)
        child.stop(0.5)
        self.assertFalse(child.is_alive())
        done = self.run_script("""
            import test_distconc as tests
            child = spawn_node()
            print(tests.ask(child, tests.hang_at_exit), flush=True)
            os.kill(os.getpid(), 9)
            """)
        self.assert_ends(int(done.stdout))

    def test_a_wrong_timeout_stops_no_child(self):
        child = self.child()
        for timeout, error in (("soon", TypeError), (None, TypeError), (True, TypeError),
                               (math.nan, ValueError), (math.inf, ValueError)):
            with self.subTest(timeout):
                self.assertRaises(error, child.stop, timeout)
        self.assertEqual(ask(child, echo, 1), 1)


class Processes(Net):
    """Children, signals, forks, keys, ports and paths."""

    def test_a_child_node_says_what_it_is_and_ends_when_stopped_or_killed(self):
        with spawn_node() as child:
            self.assertTrue(child.is_alive())
            self.assertEqual(ask(child, os.getpid), child.pid)
            self.assertEqual(str(child), "127.0.0.1:%d" % child.address[1])
            self.assertNotEqual(child.pid, os.getpid())
        self.assertFalse(child.is_alive())
        child = spawn_node()
        child.kill()
        self.assertFalse(child.is_alive())
        child.stop()

    @not_on_windows("program `false`")
    def test_spawn_node_raises_what_start_node_raises_there(self):
        with self.assertRaises(OSError):
            spawn_node(self.node)
        with self.assertRaises(ValueError):
            spawn_node(heartbeat=-1)
        with self.assertRaises(ValueError):
            spawn_node(authkey=b"")
        with mock.patch("sys.executable", shutil.which("false")):
            self.assertRaisesRegex(RuntimeError, "status 1", spawn_node)

    @not_on_windows("sessions")
    def test_ctrl_c_that_the_parent_survives_ends_no_child(self):
        done = script("""
import signal
if __name__ == "__main__":
    os.setsid()
    child = spawn_node()
    there = spawn(receive, node=child)
    watch = monitor(there)
    try:
        os.killpg(0, signal.SIGINT)
        receive(20)
    except KeyboardInterrupt:
        print("Ctrl-C")
    send("go on", there)
    print(receive(20).reason, child.is_alive())
    child.stop()""")
        self.assertEqual((done.out, done.err), ("Ctrl-C\nNone True\n", ""))

    def test_what_only_a_script_has_cannot_be_spawned_elsewhere_and_the_error_says_why(self):
        done = script("""
def double(number):
    return number * 2

with spawn_node() as child:
    try:
        spawn(double, 1, node=child)
    except RemoteError as error:
        print(error)""")
        self.assertIn("put that into a file of its own", done.out)

    @not_on_windows("pidfd")
    def test_a_child_ends_with_its_parent_even_if_that_is_killed(self):
        parent = subprocess.Popen(
            [sys.executable, "-c", "from distconc import *\nchild = spawn_node()\n"
             "print(child.pid, child, flush=True)\nreceive()"], env=environment(),
            stdout=subprocess.PIPE, text=True)
        with parent:
            pid, address = parent.stdout.readline().split()
            watch = monitor(address)
            parent.kill()
        self.assertEqual(receive(T).monitor, watch)
        gone = os.pidfd_open(int(pid)) if os.path.exists(f"/proc/{pid}") else None
        if gone is not None:
            self.assertTrue(select.select([gone], [], [], T)[0])
            os.close(gone)

    @not_on_windows("atomic appending to a file, which this needs")
    def test_killing_a_node_ends_each_call_and_monitor_and_link_once(self):
        for _ in range(20):
            log = self.mark()
            child = spawn_node()
            held = spawn_linked(hold, node=child)
            watches = [monitor(held), monitor(child)]
            ended, replied = queue.Queue(), []
            count = itertools.count()

            def call(child=child, log=log, ended=ended, replied=replied, count=count):
                try:
                    server = spawn_server(handle_synchronous, AppendTo(log), node=child)
                    while True:
                        number = next(count)
                        if send_synchronous(number, server, T) != number:
                            raise AssertionError("somebody else's reply")
                        replied.append(number)
                except Exception as error:
                    ended.put(error)
            callers = [self.here(call) for _ in range(100)]
            while len(replied) < 200:
                self.assertIs(receive_if(int, 0.01, NOTHING), NOTHING)
            child.kill()
            start = monotonic()
            for caller in callers:
                self.assertTrue(caller.join(T))
            downs, links = {}, 0
            for _ in range(3):
                try:
                    down = receive(T)
                    downs[down.monitor] = down.reason
                except LinkedError as error:
                    self.assertIsInstance(error.error, NodeDown)
                    links += 1
            self.assertLess(monotonic() - start, 2)
            self.assertEqual((set(downs), links), (set(watches), 1))
            for error in [*downs.values(), *(ended.get(timeout=T) for _ in callers)]:
                self.assertIsInstance(error, NodeDown)
            self.assertIs(receive(0.05, NOTHING), NOTHING)
            with open(log) as file:
                ran = [int(line) for line in file]
            self.assertEqual(len(ran), len(set(ran)), "a call ran twice")
            self.assertEqual(set(replied) - set(ran), set())
            child.stop()

    def test_a_frozen_node_is_down_within_its_heartbeat_and_nothing_comes_twice(self):
        child = self.child(heartbeat=1)
        target, held = self.collector(child), spawn_linked(hold, node=child)
        send_all(range(100), target)
        self.assertEqual(self.got(target), list(range(100)))
        watch = monitor(child)
        freeze(child)
        try:
            start = monotonic()
            sent = list(range(100, 200))
            send_all(sent, target)
            with self.assertRaises(NodeDown):
                send_synchronous(0, target, T)
            downs = []
            for _ in range(2):
                with contextlib.suppress(LinkedError):
                    downs.append(receive(T))
            self.assertLess(monotonic() - start, 2)
            self.assertEqual([down.monitor for down in downs], [watch])
        finally:
            thaw(child.pid)
        send_all(range(200, 300), target)
        got = self.got(target)
        self.assertEqual(got, sorted(set(got)))
        self.assertEqual(got[-100:], list(range(200, 300)))
        self.assertIs(receive(0.05, NOTHING), NOTHING)
        send("end", held)

    def test_a_short_freeze_loses_nothing(self):
        child = self.child(heartbeat=5)
        target, watch = self.collector(child), monitor(child)
        for turn in range(5):
            freeze(child)
            send_all(range(turn * 100, turn * 100 + 100), target)
            self.assertIs(receive(0.1, NOTHING), NOTHING)
            thaw(child.pid)
        self.assertEqual(self.got(target), list(range(500)))
        demonitor(watch)

    def test_an_idle_connection_between_different_heartbeats_stays(self):
        child = self.child(heartbeat=1.5)
        watch = monitor(child)
        self.assertEqual(ask(child, echo, 1), 1)
        self.assertIs(receive(3.0, NOTHING), NOTHING)
        demonitor(watch)

    def test_a_frozen_node_delays_no_traffic_to_another(self):
        stop_node()
        start_node(heartbeat=4 * WAIT)  # for so long would a caller wait for the frozen node
        frozen, good = self.child(heartbeat=4 * WAIT), self.child()
        target = self.collector(frozen)
        self.got(target)
        freeze(frozen)
        try:
            flooders = [self.here(flood, target) for _ in range(4)]
            for _ in range(100):
                start = monotonic()
                self.assertEqual(ask(good, echo, 1), 1)
                self.assertLess(monotonic() - start, WAIT)
            self.assertLess(memory(), 1 << 30)
        finally:
            frozen.kill()
        for flooder in flooders:
            self.assertTrue(flooder.join(T), "a sender hangs")

    @not_on_windows("fork")
    def test_a_fork_leaves_the_child_with_no_node_and_the_parent_unharmed(self):
        result = script("""
import distconc, pickle, select, signal
spot = start_node()
child = spawn_node()
send_synchronous(0, RemoteThread(sys.argv[1], "kept"), 20)
handle, incarnation, me = RemoteThread(sys.argv[1], "kept"), spot.incarnation, current_thread()
register_remote_thread(me, "main")
server = spawn_server(handle_synchronous, str)
read, write = os.pipe()
hold_read, hold_write = os.pipe()
pid = os.fork()
if not pid:
    signal.alarm(60)
    os.close(hold_write)
    try:
        assert local_node().address is None, local_node()
        assert local_node().incarnation != incarnation
        assert nodes() == [], nodes()
        assert current_thread() != me
        assert me.node == server.node == spot.address
        assert me.is_alive() and server.is_alive() and not server.join(0.01)
        assert send_synchronous(0, server, 5) == "0"
        assert pickle.loads(pickle.dumps(server)) == server
        try: get_remote_thread("main")
        except NoSuchThread: pass
        else: assert False, "the name came along"
        send("from the fork", handle)
        send_synchronous(0, handle, 20)
        with start_node(): pass
        text = b"well"
    except BaseException as error:
        text = repr(error).encode()
    os.write(write, text)
    os.read(hold_read, 1)
    os._exit(0)
os.close(hold_read)
print(os.read(read, 1000).decode())
send("from the parent", handle)
print(send_synchronous(2, handle, 20))
address, start = spot.address, distconc.monotonic()
child.stop()
print("child stopped in time:", distconc.monotonic() - start < 4)
stop_node()
try:
    start_node(address)
    print("restarted")
except OSError as error:
    print(error)
os.close(hold_write)
os.waitpid(pid, 0)
""", self.here(collect, name="kept").send("x") or self.node, PYTHONWARNINGS="ignore")
        self.assertEqual(result.out.splitlines(), [
            "well", "['x', 'from the fork', 'from the parent']", "child stopped in time: True",
            "restarted"], result.err)

    @not_on_windows("fork")
    def test_a_child_ends_with_its_parent_though_that_has_forked(self):
        start = monotonic()
        result = script("""if True:
            import signal
            child = spawn_node()
            if os.fork() == 0:
                os.close(1), os.close(2)
                signal.alarm(30)
                signal.pause()
            print(child.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """, PYTHONWARNINGS="ignore")
        self.assertTrue(result.out.strip().isdecimal(), result.err)
        self.assertLess(monotonic() - start, 20)  # when the child, too, had let go of stderr

    def test_a_child_may_print_while_it_starts(self):
        with open(os.path.join(self.dir, "noisy.py"), "w") as file:
            file.write("print('noise')\ndef work(): pass\n")
        done = script("""if True:
            sys.path.insert(0, sys.argv[1])
            from noisy import work
            with spawn_node(allow=[work]) as child:
                print(type(child).__name__)
            """, self.dir)
        self.assertEqual((done.out, done.err), ("noise\nnoise\nChildNode\n", ""))

    def test_an_unread_failure_of_a_linked_thread_is_shown_at_the_end_of_the_process(self):
        result = script("spawn_linked(int, 'x', name='child').join()")
        self.assertEqual(result.status, 0)
        self.assertIn("Exception in thread MainThread", result.err)
        self.assertIn("'child', ended> failed: ValueError: invalid literal", result.err)

    def test_a_handle_of_a_node_that_does_not_listen_is_of_use_in_that_node(self):
        result = script("""if True:
            import copy
            handle = RemoteThread(local_node(), "me")
            register_remote_thread(current_thread(), "me")
            for each in handle, copy.copy(handle), deserialize(serialize(handle)):
                assert each == handle
                send("hello", each)
                print(receive(0))
            """)
        self.assertEqual(result.out, "hello\n" * 3, result.err)

    # Ports and paths

    def test_a_node_starts_and_stops_again_and_again_on_one_port(self):
        address = self.node.address
        for _ in range(LOOPS):
            stop_node()
            with start_node(address) as node:
                self.assertEqual(node.address, address)
                with RawPeer.dial(node) as peer:
                    peer.send("in", self.here(collect, name="kept").id)

    @not_on_windows("Unix sockets")
    def test_a_socket_file_comes_and_goes_with_its_node(self):
        path = os.path.join(self.dir, "sock")
        for _ in range(LOOPS):
            stop_node()
            with start_node(path) as node:
                self.assertEqual((node.address, str(node)), (path, path))
                self.assertTrue(os.path.exists(path))
                RawPeer.dial(node).close()
            self.assertFalse(os.path.exists(path))
        child = self.child(path)
        start_node()
        self.assertEqual(ask(child, echo, current_thread()), current_thread())
        self.assertEqual(ask(path, os.getpid), child.pid)
        child.stop()
        self.assertFalse(os.path.exists(path))
        with self.assertRaises(NodeUnreachable):
            connect(path)

    @not_on_windows("Unix sockets")
    def test_a_socket_is_taken_over_from_a_killed_node_and_from_no_other(self):
        path = os.path.join(self.dir, "sock")
        child = self.child(path)
        stop_node()
        self.assertRaisesRegex(OSError, "does a node run there", start_node, path)
        start_node()
        self.assertEqual(ask(child, echo, 1), 1)
        child.kill()
        self.assertTrue(os.path.exists(path))
        stop_node()
        with start_node(path) as node:
            RawPeer.dial(node).close()

    @not_on_windows("Unix sockets")
    def test_what_is_no_socket_is_not_removed_for_one(self):
        stop_node()
        path = os.path.join(self.dir, "thesis.txt")
        with open(path, "w") as file:
            file.write("all of it")
        link = self.mark()
        os.symlink(path, link)
        for wrong in path, link, self.dir:
            with self.subTest(wrong):
                self.assertRaisesRegex(OSError, re.escape(wrong), start_node, wrong)
        with open(link) as file:
            self.assertEqual(file.read(), "all of it")

    @not_on_windows("Unix sockets")
    def test_an_address_in_use_is_told_and_starts_nothing(self):
        other = self.child()
        stop_node()
        for address in other, os.path.join(self.dir, "no", "dir"):
            with self.assertRaises(OSError):
                start_node(address)
        start_node()

    def test_a_restarted_node_is_a_stranger_to_old_handles(self):
        port = free_port()
        first = self.child(port)
        old = spawn(hold, node=first, name="held", register=True)
        named = RemoteThread(port, "held")
        first.kill()
        second = self.child(port)
        new = self.collector(second, "held")
        with self.assertRaises(NoSuchThread):
            send_synchronous(0, old, T)
        with Records() as records:
            send("for the old", old)
            self.assertIn("1 message", records.get().getMessage())
        self.assertEqual(self.got(named), [])
        watch = monitor(old)
        self.assertIsInstance(receive(T).reason, NoSuchThread)
        self.assertNotEqual(old, new)
        del watch

    @not_on_windows("Unix sockets")
    def test_nobody_listening_is_told_at_once(self):
        for node in free_port(), os.path.join(self.dir, "none"):
            target = RemoteThread(node, "x")
            for func, *args in ((connect, node), (send, 1, target),
                                (send_synchronous, 1, target), (ask, node, echo, 1)):
                self.assert_raises_soon(NodeUnreachable, func, *args)

    def test_a_silent_listener_is_given_up_in_time_by_all_who_wait(self):
        stop_node()
        start_node(connect_timeout=1)
        silent = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(silent.close)
        target = RemoteThread(silent.getsockname(), "x")
        errors, start = queue.Queue(), monotonic()

        def call():
            try:
                send_synchronous(1, target, T)
            except Exception as error:
                errors.put(error)
        callers = [threading.Thread(target=call) for _ in range(20)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(T)
            self.assertIsInstance(errors.get(timeout=T), NodeUnreachable)
        self.assertLess(monotonic() - start, 2.5)

    @not_on_windows("Unix sockets")
    def test_an_address_that_swallows_packets_is_given_up_in_time_and_disturbs_nobody(self):
        """Its queue is full: no connection comes about, and none is refused."""
        stop_node()
        start_node(connect_timeout=1)
        good = spawn_server(handle_synchronous, echo, node=self.child())
        for family, at in ((socket.AF_UNIX, os.path.join(self.dir, "full")),
                           (socket.AF_INET, ("127.0.0.1", 0))):
            with self.subTest(family), socket.socket(family) as full, ExitStack() as stack:
                full.bind(at)
                full.listen(0)
                fits = True
                while fits:  # until one does not get a place in the queue
                    filler = stack.enter_context(socket.socket(family))
                    filler.setblocking(False)
                    filler.connect_ex(full.getsockname())
                    select.select([], [filler], [], 0.2)
                    fits = not isinstance(outcome(filler.getpeername), OSError)
                target, raised = RemoteThread(full.getsockname(), "x"), queue.Queue()

                def call(func, target=target, raised=raised):
                    start = monotonic()
                    raised.put((outcome(func, 1, target), monotonic() - start))
                callers = [threading.Thread(target=call, args=[func])
                           for func in (send, send_synchronous) * 10]
                for caller in callers:
                    caller.start()
                answered = 0
                while raised.qsize() < 20:
                    start = monotonic()
                    self.assertEqual(send_synchronous(1, good, T), 1)
                    self.assertLess(monotonic() - start, 0.9)
                    answered += 1
                self.assertGreater(answered, 5)  # one or two if the dial held up the others
                for caller in callers:
                    caller.join(T)
                    error, seconds = raised.get()
                    self.assertIsInstance(error, NodeUnreachable)
                    self.assertLess(seconds, 2.5)

    # Ctrl-C

    @not_on_windows("SIGINT for one process")
    def test_ctrl_c_within_a_send_of_20_mb_leaves_half_of_nothing_and_the_next_arrives(self):
        child = self.child()
        kept = spawn(keep_sizes, node=child, name="kept", register=True)
        sender = subprocess.Popen([sys.executable, "-c", """if True:
            import signal, sys
            from distconc import *
            target, large, within = RemoteThread(sys.argv[1], "kept"), bytes(20_000_000), False
            def interrupt(*_):
                if within:
                    raise KeyboardInterrupt
            signal.signal(signal.SIGINT, interrupt)
            for number, _ in enumerate(sys.stdin):
                try:
                    within = True
                    print("sending", flush=True)
                    send((number, large), target)
                    within, came = False, "sent"
                except KeyboardInterrupt:
                    within, came = False, "interrupted"
                print(came, flush=True)
                sys.stdin.readline()
                send((number, b"next"), target)
                print("next", flush=True)
            """, str(child)], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True)
        self.addCleanup(sender.__exit__, None, None, None)
        self.addCleanup(sender.kill)

        def order():
            sender.stdin.write("go\n")
            sender.stdin.flush()
        outcomes, expected = [], []
        moments = 0, 0.001, 0.003, 0.01, 0.02, 0.03, 0.04, 0.06, "frozen", "frozen", 0.01
        for number, moment in enumerate(moments):
            order()
            self.assertEqual(sender.stdout.readline(), "sending\n")
            if moment == "frozen":  # so that it has to wait in the middle
                freeze(child)
            receive(0.5 if moment == "frozen" else moment, None)
            start = monotonic()
            sender.send_signal(signal.SIGINT)
            outcomes.append(sender.stdout.readline())
            self.assertLess(monotonic() - start, 2)
            thaw(child.pid)
            order()
            self.assertEqual(sender.stdout.readline(), "next\n")
            expected += [(number, 20_000_000), (number, 4)]
        sender.stdin.close()
        self.assertEqual(sender.wait(T), 0)  # at its end, all has been sent
        self.assertIn("interrupted\n", outcomes)
        got = self.got(kept, None)
        self.assertEqual(got, [item for item in expected if item in got])
        must = [item for item in expected if item[1] == 4 or outcomes[item[0]] == "sent\n"]
        self.assertEqual([item for item in must if item not in got], [])

    def test_a_large_message_goes_in_a_frame_of_its_own_wherever_it_waits(self):
        target = self.collector(self.child())
        connect(target.node)
        connection, = self.node._connections
        sent = ["small", bytes(17 << 20), "small", bytes(17 << 20), "small"]  # too much for one
        with connection._write_lock:  # so that all wait together
            for message in sent:
                connection.post(target._send_header, pickle.dumps(message))
        self.assertEqual(self.got(target) == sent, True)
        self.assertEqual(self.node._connections, {connection})

    def test_as_many_of_the_longest_failures_as_go_in_one_frame_are_not_too_much_for_it(self):
        target = self.collector(self.child())
        connect(target.node)
        connection, = self.node._established
        text = "\U0001F600" * distconc.MAX_ERROR_TEXT
        with connection._write_lock:  # so that all wait together
            for number in range(distconc.MAX_BATCH):
                _, payload = failed("", "died", text, ("E", text))
                header = distconc._encode_header("failed", tag=f"tag {number}")
                connection.post(header, payload)
            connection.post(distconc._encode_header("send", id="collector"),
                            pickle.dumps("after them"))
        self.assertEqual(self.got(target, 1), ["after them"])
        self.assertEqual(self.node._established, [connection])

    def test_a_second_ctrl_c_while_a_connection_ends_lets_none_accept_what_nobody_writes(self):
        target = self.collector(self.child())
        connect(target.node)
        connection, = self.node._connections
        with mock.patch.object(connection, "_socket",
                               mock.Mock(wraps=connection._socket)) as sock:
            sock.sendall.side_effect = sock.shutdown.side_effect = KeyboardInterrupt
            self.assertRaises(
                KeyboardInterrupt, connection.send, target._send_header, b"no pickle")
        self.assertTrue(connection.closing)
        send("over the next", target)
        self.assertEqual(self.got(target), ["over the next"])

    def test_a_name_of_a_kind_of_its_own_is_sent_as_what_it_says(self):
        child, names = self.child(), enum.Enum("names", {"KEPT": "kept"}, type=str)
        spawn(collect, node=child, name="kept", register=True)
        send("hello", RemoteThread(child, names.KEPT))
        self.assertEqual(self.got(RemoteThread(child, "kept")), ["hello"])
        register_remote_thread(current_thread(), names.KEPT)
        self.assertIs(get_remote_thread("kept"), current_thread())

    def test_what_a_lost_node_was_sending_takes_no_memory_any_more(self):
        handle = RemoteThread(self.node, "nobody")
        with RawPeer.dial(self.node, address="127.0.0.1:9") as peer:
            peer.ask(1, "nobody")
            peer.read()
            connection, = self.node._established
            handle._connection = connection  # as a handle keeps it that was used
            peer.pour(peer.frame((("send", None, "x", None), bytes(20 << 20)))[:1 << 20])
        start = monotonic()
        while connection._socket.fileno() != -1:
            self.assertLess(monotonic() - start, T)

    @not_on_windows("fork")
    def test_a_forks_child_that_leaves_the_parents_block_stops_nothing(self):
        done = script("""if True:
            import os, sys
            with start_node() as node:
                pid = os.fork()
                if not pid:
                    sys.exit(0)
                print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                with spawn_node() as child:
                    connect(child)
                    print(nodes() == [child.address])
            """)
        self.assertEqual(done.out, "0\nTrue\n", done.err)
        self.assertNotIn("Traceback", done.err)  # from 3.12 on, a fork of threads is warned of

    @not_on_windows("SIGINT for one process")
    def test_ctrl_c_within_a_send_costs_nothing_that_was_accepted_before(self):
        child = self.child()
        kept = spawn(keep_sizes, node=child, name="kept", register=True)
        result = script("""if True:
            import os, signal, sys, threading, test_distconc
            address, pid = sys.argv[1], int(sys.argv[2])
            target = RemoteThread(address, "kept")
            spawn(test_distconc.murmur, current_thread(), node=address)
            receive()
            os.kill(pid, signal.SIGSTOP)
            for number in range(100):
                send((number, bytes(10_000)), target)
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            threading.Timer(0.3, os.kill, (pid, signal.SIGCONT)).start()
            try:
                send(("interrupted", bytes(20_000_000)), target)
            except KeyboardInterrupt:
                print("Ctrl-C")
            send(("next", b""), target)
            """, child, child.pid)
        self.assertEqual(result.out, "Ctrl-C\n", result.err)
        expected = [(number, 10_000) for number in range(100)] + [("next", 0)]
        self.assertEqual(self.got(kept, None), expected)

    # Keys

    def test_a_reply_to_where_a_stranger_is_by_now_is_dropped(self):
        port = free_port()
        child = self.child(port)
        spawn(send_synchronous, "well?", current_thread(), node=child)
        request = receive(T)
        child.kill()
        self.child(port, authkey=b"another key, not ours")
        lost = self.node.stats()["lost"]
        reply_synchronous("too late", request)
        self.assertEqual(self.node.stats()["lost"], lost + 1)

    def test_a_crowd_of_strangers_cuts_no_dial_of_ours(self):
        self.addCleanup(setattr, distconc, "MAX_STRANGERS", distconc.MAX_STRANGERS)
        distconc.MAX_STRANGERS, self.node._connect_timeout = 2, T
        with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as stack:
            here = spawn(connect, silent.getsockname())
            dialled = stack.enter_context(silent.accept()[0])
            strangers = [stack.enter_context(socket.create_connection(self.node.address, T))
                         for _ in range(6)]
            for stranger in strangers[:4]:  # the oldest have to go
                read_to_end(stranger, T)
            dialled.settimeout(0.2)
            self.assertRaises(TimeoutError, dialled.recv, 1)
            dialled.shutdown(socket.SHUT_RDWR)
            with mock.patch("threading.excepthook", lambda info: None):
                self.assertTrue(here.join(T))

    def test_the_wrong_key_is_refused_both_ways(self):
        other = self.child(authkey=b"another key, not ours")
        target = RemoteThread(other, "x")
        for act, *args in ((connect, other), (send, 1, target), (send_synchronous, 1, target),
                           (ask, other, echo, 1)):
            with self.assertRaises(AuthenticationError):
                act(*args)
        watch = monitor(other)
        self.assertIsInstance(receive(T).reason, NodeDown)
        del watch
        result = script("try: connect(sys.argv[1])\n"
                        "except AuthenticationError as error: print('refused')\n",
                        self.node, DISTCONC_AUTHKEY="another key, not ours")
        self.assertEqual(result.out, "refused\n", result.err)
        self.assertGreaterEqual(self.node.stats()["strangers"], 1)

    def test_bad_keys_are_refused(self):
        stop_node()
        everywhere = "0.0.0.0", 0
        for address, key in ((0, b""), (0, ""), (everywhere, "short"), (everywhere, b""),
                             (("127.evil.org", 0), "short")):
            with self.subTest(address, key=key), self.assertRaises(ValueError):
                start_node(address, authkey=key)
        start_node(authkey="short")
        stop_node()
        start_node(("0.0.0.0", 0), authkey=b"sixteen or more!")

    @not_on_windows("modes of files")
    def test_authkey_of_the_environment_cookie_and_argument(self):
        home = self.dir
        cookie = os.path.join(home, ".distconc.cookie")
        quiet = {"HOME": home, "DISTCONC_AUTHKEY": None}
        make = "start_node(); print('up')"
        self.assertEqual(script(make, **quiet).out, "up\n")
        self.assertEqual(os.stat(cookie).st_mode & 0o777, 0o600)
        with open(cookie) as file:
            key = file.read()
        self.assertGreaterEqual(len(key.strip()), 32)
        self.assertEqual(script(make, **quiet).out, "up\n")
        with open(cookie) as file:
            self.assertEqual(file.read(), key)
        for mode in 0o640, 0o604:
            os.chmod(cookie, mode)
            result = script("try: start_node()\nexcept PermissionError as e: print(e)", **quiet)
            self.assertIn(cookie, result.out, result.err)
        os.chmod(cookie, 0o600)
        for key, out in ("", "refused\n"), ("k", "up\n"):
            result = script(f"try: {make}\nexcept ValueError: print('refused')",
                            **{**quiet, "DISTCONC_AUTHKEY": key})
            self.assertEqual(result.out, out, result.err)
        named = os.path.join(home, "elsewhere")
        self.assertEqual(script(make, **quiet, DISTCONC_COOKIE=named).out, "up\n")
        self.assertEqual(os.stat(named).st_mode & 0o777, 0o600)
        with open(named) as file:
            other = file.read().strip()
        stop_node()
        with start_node(authkey=other):
            self.here(collect, name="kept")
            text = "try: print(send_synchronous(0, RemoteThread(sys.argv[1], 'kept'), 20))\n" \
                   "except AuthenticationError: print('refused')"
            for env, out in (({"DISTCONC_COOKIE": named}, "[]\n"), ({}, "refused\n"),
                             ({"DISTCONC_AUTHKEY": other, "DISTCONC_COOKIE": cookie}, "[]\n")):
                self.assertEqual(script(text, local_node(), **{**quiet, **env}).out, out)

    @not_on_windows("owner of a file")
    def test_a_cookie_of_another_user_lets_no_node_listen_or_dial(self):
        cookie = self.mark()
        with open(os.open(cookie, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write(KEY)
        text = """
for act in start_node, lambda: connect(sys.argv[1]):
    try:
        act()
        print("well")
    except PermissionError as error:
        print(error)
"""
        own = {"DISTCONC_AUTHKEY": None, "DISTCONC_COOKIE": cookie}
        self.assertEqual(script(text, self.node, **own).out, "well\n" * 2)
        try:
            os.chown(cookie, os.getuid() + 4321, -1)
        except OSError:
            self.skipTest("only root may give a file away")
        refused = script(text, self.node, **own).out.splitlines()
        self.assertEqual(len(refused), 2)
        for line in refused:
            self.assertRegex(line, f"{cookie} belongs to another user")

    def test_processes_that_make_the_cookie_at_once_share_one_key(self):
        for turn in range(3):
            cookie = self.mark()
            command = [sys.executable, "-c", "import sys; from distconc import *; "
                       "print('ready', flush=True); sys.stdin.read(); start_node(); "
                       f"print(open({cookie!r}).read().strip())"]
            env = environment(DISTCONC_AUTHKEY=None, DISTCONC_COOKIE=cookie)
            several = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env=env) for _ in range(4)]
            for one in several:
                self.assertEqual(one.stdout.readline().rstrip(), b"ready")
            for one in several:
                one.stdin.close()
            keys = set()
            for one in several:
                with one:
                    keys.add(one.stdout.read())
            self.assertEqual(len(keys), 1)
            self.assertGreaterEqual(len(keys.pop().strip()), 32)
        self.assertEqual(len([f for f in os.listdir(self.dir)]), 3, "drafts are left")


class AppendTo:
    def __init__(self, path):
        self.path = path

    def __call__(self, number):
        return append_and_count(self.path, number)


def flood(target):
    with contextlib.suppress(NodeDown):
        while True:
            send(bytes(1000), target)


######## Other people's programs


class OtherPrograms(Net):
    """multiprocessing and forks, imports, signals and streams, as other programs use them."""

    # Windows has spawn alone.
    METHODS = sorted(multiprocessing.get_all_start_methods())

    def program(self, text, *args, **env):
        """Run a file, which its children can import; return what it printed.

        Its last argument is the start methods that there are.
        """
        path = os.path.join(self.dir, "program.py")
        with open(path, "w") as file:
            file.write("from distconc import *\nimport os, sys\n" + textwrap.dedent(text))
        done = subprocess.run(
            [sys.executable, path, *map(str, args), " ".join(self.METHODS)],
            env=environment(**env), text=True, timeout=100, cwd=self.dir,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return types.SimpleNamespace(out=done.stdout, err=done.stderr, status=done.returncode)

    def test_what_a_process_of_multiprocessing_sent_last_arrives(self):
        done = self.program("""
            import multiprocessing, threading

            def work(whom, end):
                for number in range(100):
                    send(number, whom)
                if end == "a failure":
                    sys.stderr = None
                    raise ValueError(end)
                if end == "an exit":
                    sys.exit(3)
                if end == "a thread that lives on":
                    threading.Thread(target=work_late, args=[whom]).start()

            def work_late(whom):
                threading.main_thread().join(0.3)
                send("late", whom)

            if __name__ == "__main__":
                with start_node():
                    for method in sys.argv[-1].split():
                        start = multiprocessing.get_context(method).Process
                        for end in "a return", "a failure", "an exit", "a thread that lives on":
                            process = start(target=work, args=[current_thread(), end])
                            process.start()
                            process.join()
                            got = [receive(20) for _ in range(100)]
                            if end == "a thread that lives on":
                                got.append(receive(20))
                            print(method, end, got == [*range(100), "late"][:len(got)])
            """, PYTHONWARNINGS="ignore")
        lines = done.out.splitlines()
        self.assertEqual((len(lines), [line for line in lines if "True" not in line]),
                         (4 * len(self.METHODS), []), done.err)

    def test_what_a_pools_worker_sent_last_arrives_though_the_pool_is_terminated(self):
        done = self.program("""
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor

            def work(whom):
                for number in range(5000):
                    send(number, whom)

            if __name__ == "__main__":
                with start_node():
                    for method in sys.argv[-1].split():
                        context = multiprocessing.get_context(method)
                        for turn in range(3):
                            with context.Pool(1) as pool:
                                pool.apply(work, [current_thread()])
                            print(method, [receive(20) for _ in range(5000)] == [*range(5000)])
                        with ProcessPoolExecutor(1, context) as executor:
                            executor.submit(work, current_thread())
                        print(method, [receive(20) for _ in range(5000)] == [*range(5000)])
            """, PYTHONWARNINGS="ignore")
        told = "".join(f"{method} True\n" * 4 for method in self.METHODS)
        self.assertEqual(done.out, told, done.err)

    def test_a_given_key_goes_with_multiprocessing_and_in_no_message(self):
        done = self.program("""
            import multiprocessing, pickle

            def work(whom):
                send(os.getpid(), whom)

            def work_in_child(whom, method):
                with start_node():
                    work(whom)
                process = multiprocessing.get_context(method).Process(target=work, args=[whom])
                process.start()
                process.join()

            if __name__ == "__main__":
                key = "a key that only this program has"
                with start_node(authkey=key):
                    me = current_thread()
                    for method in sys.argv[-1].split():
                        context = multiprocessing.get_context(method)
                        process = context.Process(target=work_in_child, args=[me, method])
                        process.start()
                        process.join()
                        print(receive(20) == process.pid, receive(20) > 0)
                        with context.Pool(1, work, [me]) as pool:
                            print(receive(20) > 0)
                            pool.map(work, [me, RemoteThread(me.node, me.id)])
                            print(receive(20) == receive(20))
                    print(key.encode() in pickle.dumps(me) + serialize([me]))
                    print("DISTCONC_AUTHKEY" in os.environ)
                os.environ["DISTCONC_AUTHKEY"] = "another key, which the children have anyway"
                with start_node():
                    process = context.Process(target=work, args=[current_thread()])
                    process.start()
                    print(receive(20) == process.pid)
            """, DISTCONC_AUTHKEY=None, DISTCONC_COOKIE=os.path.join(self.dir, "none"),
            PYTHONWARNINGS="ignore")
        self.assertEqual(done.out, "True True\nTrue\nTrue\n" * len(self.METHODS)
                         + "False\nFalse\nTrue\n", done.err)
        self.assertEqual(os.listdir(self.dir), ["program.py"])

    def test_an_inherited_handle_means_the_parents_thread_under_every_start_method(self):
        done = self.program("""
            import multiprocessing, pickle

            def report(whom, server):
                try:
                    assert current_thread() not in (whom, server)
                    assert whom.node == server.node != local_node().address is None
                    assert whom.is_alive() and server.is_alive() and not server.join(0.01)
                    assert pickle.loads(pickle.dumps([whom, server])) == [whom, server]
                    assert send_synchronous(1, server, 20) == "1"
                    ended = monitor(server)
                    send("stop", server)
                    down = receive(20)
                    assert (down.monitor, down.target, down.reason) == (ended, server, None)
                    assert server.join(20) and not server.is_alive()
                    send("well", whom)
                except BaseException as error:
                    send(repr(error), whom)

            def serve():
                message = receive()
                if message == "stop":
                    return False
                reply_synchronous(str(message.data), message)
                return True

            if __name__ == "__main__":
                with start_node():
                    for method in sys.argv[-1].split():
                        start = multiprocessing.get_context(method).Process
                        whom = current_thread(), spawn_server(serve)
                        process = start(target=report, args=whom)
                        process.start()
                        process.join()
                        print(method, receive(20))
            """, PYTHONWARNINGS="ignore")
        told = "".join(f"{method} well\n" for method in self.METHODS)
        self.assertEqual(done.out, told, done.err)

    def test_a_handle_that_the_parent_has_used_is_dialled_anew_in_the_child(self):
        server = self.here(collect, name="kept")
        done = self.program("""
            import multiprocessing

            def work(kept, method):
                assert nodes() == []
                send(method, kept)
                send_synchronous(0, kept, 20)

            if __name__ == "__main__":
                kept = RemoteThread(sys.argv[1], "kept")
                send("parent", kept)
                for method in sys.argv[-1].split():
                    process = multiprocessing.get_context(method).Process(
                        target=work, args=[kept, method])
                    process.start()
                    process.join()
                    print(process.exitcode, nodes() == [kept.node])
                    send("parent", kept)
                send_synchronous(0, kept, 20)
            """, self.node, PYTHONWARNINGS="ignore")
        self.assertEqual(done.out, "0 True\n" * len(self.METHODS), done.err)
        told = ["parent"]
        for method in self.METHODS:
            told += method, "parent"
        self.assertEqual(self.got(server), told)

    @not_on_windows("fork")
    def test_a_handle_of_a_parent_that_does_not_listen_says_so_in_a_forks_child(self):
        for node in "", "local_node()":
            done = self.program(f"""
                {node}
                me = current_thread()
                if not os.fork():
                    try:
                        send("lost", me)
                    except NodeUnreachable as error:
                        print(error, flush=True)
                    os._exit(0)
                os.wait()
                """, PYTHONWARNINGS="ignore")
            self.assertIn("start_node() there", done.out, done.err)


    # Code of the user's that runs within the module

    def test_a_message_that_is_being_loaded_cannot_wait_in_any_way(self):
        other = self.child()
        server, kept = self.here(collect), self.collector(other)
        for wait in ((send_synchronous, 1, server), (partial(spawn, node=str(self.node)), echo),
                     (RemoteThread.is_alive, server), (RemoteThread.join, server, T)):
            for load in (partial(send_synchronous, Does(*wait), kept, T),
                         partial(spawn, echo, Does(*wait), node=other),
                         partial(ask, other, Does, send_synchronous, 1, server)):
                with self.subTest(wait[0]), self.assertRaises(RemoteError) as caught:
                    load()
                self.assertIn("being loaded cannot call", str(caught.exception))

    def test_what_is_loaded_within_a_loading_does_not_end_it(self):
        other = self.child()
        server, kept = self.here(collect), self.collector(other)
        with Records() as records:
            send(Does(receive_and_call, server), kept)
            send("taken within", kept)
            self.assertEqual(1, records.lost("being loaded cannot call"))

    def test_a_del_that_sends_wherever_it_strikes_deadlocks_nobody(self):
        other = self.child()
        here, there = self.here(collect), self.collector(other)
        server = spawn_server(handle_synchronous, echo, node=other)
        before = gc.get_threshold()
        self.addCleanup(gc.set_threshold, *before)
        boxes = [Mailbox() for _ in range(3)]
        dropped = []
        gc.set_threshold(5, 1, 1)
        for turn in range(200):
            Last(dropped, here, there)
            boxes[0].put(turn), boxes[1].put(Last(dropped, here, there))
            boxes[0].get_if(lambda n: n == turn), boxes[1].get_all()
            self.assertEqual(send_synchronous(turn, server, T), turn)
            send(turn, there), send(bytes(3000), here), send(bytes(3000), there)
            demonitor(monitor(there))
        gc.set_threshold(*before)
        gc.collect()
        for kept in here, there:
            got = self.got(kept)
            while sum(type(n) is tuple for n in got) < len(dropped):
                got = self.got(kept, len(got) + 1)
        send("stop", there)

    def test_a_del_that_sends_to_a_frozen_node_in_a_reader_holds_up_no_other(self):
        stop_node()
        start_node(heartbeat=4 * WAIT)  # for so long would a caller wait for the frozen node
        frozen, good = self.child(heartbeat=4 * WAIT), self.child()
        target, dropped = self.collector(frozen), []
        self.got(target)
        dispatch = distconc._Connection._dispatch

        def drop(connection, *message):
            if connection.address == good.address:
                SendAtEnd(bytes(1 << 20), target)
                dropped.append(1)
            dispatch(connection, *message)
        freeze(frozen)
        with mock.patch.object(distconc._Connection, "_dispatch", drop):
            start = monotonic()
            while len(dropped) < 20:  # far more than the network holds
                self.assertEqual(ask(good, echo, 1), 1)
            self.assertLess(monotonic() - start, 2 * WAIT)
        frozen.kill()

    def test_a_del_that_sends_in_a_reader_does_not_wait_for_the_end_of_a_connection(self):
        frozen, good = self.child(), self.child()
        target, dropped = self.collector(frozen), []
        self.got(target)
        self.assertEqual(ask(good, echo, 1), 1)
        dispatch = distconc._Connection._dispatch

        def drop(connection, *message):
            if connection.address == good.address and not dropped:
                dropped.append(outcome(send, "too late", target))
            dispatch(connection, *message)
        freeze(frozen)
        connection = self.node._established_with(None, frozen.address)
        connection.post(target._send_header, bytes(64 << 20))  # far more than the network holds
        connection.close()
        with mock.patch.object(distconc._Connection, "_dispatch", drop):
            start = monotonic()
            self.assertEqual(ask(good, echo, 2), 2)
            self.assertLess(monotonic() - start, 3)  # to connect may take 5 seconds
        self.assertIsInstance(dropped[0], NodeUnreachable)
        frozen.kill()

    def test_a_del_that_sends_while_its_thread_holds_a_lock_does_not_wait(self):
        frozen, good = self.child(), self.child()
        target = self.collector(frozen)
        self.got(target)
        freeze(frozen)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            nobody = RemoteThread(silent.getsockname(), "nobody")
            for lock in (self.node._lock, distconc._registry.lock, distconc._pending._lock,
                         distconc._log_thread._lock, distconc._losses._lock):
                with self.subTest(lock):
                    start = monotonic()
                    with lock:  # a `__del__` strikes, and sends more than the network holds
                        for _ in range(20):
                            send(bytes(1 << 20), target)
                        self.assertRaises(NodeUnreachable, send, 1, nobody)
                    self.assertLess(monotonic() - start, 4)  # the loss is noticed after 8
        self.assertEqual(ask(good, echo, 1), 1)
        frozen.kill()

    def test_a_logging_handler_that_sends_to_a_frozen_or_lost_node_delays_no_down(self):
        for strike in freeze, lambda child: os.kill(child.pid, 9):
            child = self.child(heartbeat=3)
            handler = Forward(self.collector(child, "logger"))
            logging.getLogger().addHandler(handler)
            self.addCleanup(logging.getLogger().removeHandler, handler)
            talker = spawn(log_until_told, name="talker")
            watch = monitor(child)
            while len(handler.sent) < 100:
                self.assertIs(receive_if(int, 0.01, NOTHING), NOTHING)
            strike(child)
            start = monotonic()
            self.assertEqual(receive(T).monitor, watch)
            self.assertLess(monotonic() - start, 1.6 * 3)
            child.kill()
            send("stop", talker)
            self.assertTrue(talker.join(T))
            logging.getLogger().removeHandler(handler)

    def test_a_handler_that_sends_lines_to_nobody_is_told_so_once_and_does_not_feed_itself(self):
        child = self.child()
        handler = Forward(RemoteThread(child, "nobody"))
        logging.getLogger().addHandler(handler)
        self.addCleanup(logging.getLogger().removeHandler, handler)
        patch = mock.patch.object(distconc, "LOG_INTERVAL", 0.001)
        patch.start()
        self.addCleanup(patch.stop)
        for _ in range(100):
            logging.getLogger("talker").warning("a line")
            send("lost, and told", RemoteThread(child, "nobody else"))
        while self.node.stats()["lost"] < 200 or not any("else" in line for line in handler.sent):
            self.assertIs(receive(0.01, NOTHING), NOTHING)
        logging.getLogger().removeHandler(handler)
        about_itself = [line for line in handler.sent if "'nobody' at" in line]
        self.assertLess(len(about_itself), 5, about_itself)

    def test_a_logging_handler_that_never_returns_costs_one_thread(self):
        go_on, held = threading.Event(), threading.Event()
        handler = logging.Handler()
        handler.emit = lambda record: (held.set(), go_on.wait(T))
        logging.getLogger("distconc").addHandler(handler)
        self.addCleanup(logging.getLogger("distconc").removeHandler, handler)
        self.addCleanup(go_on.set)
        with RawPeer.dial(self.node) as peer:
            before = threading.active_count()
            peer.monitor(0, "first")
            self.assertEqual(peer.read()[:2], ("failed", "first"))
            [connection] = self.node._established
            connection.sent += 3000
            peer.write(*((("undelivered", number, "why", 1, None), b"")
                         for number in range(1, 3001)))
            peer.monitor(0, "m")
            self.assertEqual(peer.read()[:2], ("failed", "m"))
            self.assertTrue(held.wait(T))
            self.assertLess(threading.active_count() - before, 5)
            go_on.set()

    def test_no_lock_is_held_while_a_handler_runs_however_many_targets_there_are(self):
        were_free = []

        def emit(record):
            other = threading.Thread(target=distconc._losses.mute, args=["nothing"])
            other.start()
            other.join(1)
            were_free.append(not other.is_alive())
        handler = logging.Handler()
        handler.emit = emit
        logging.getLogger("distconc").addHandler(handler)
        self.addCleanup(logging.getLogger("distconc").removeHandler, handler)
        with mock.patch.object(distconc, "MAX_LOG_KEYS", 2):
            for number in range(10):
                for _ in range(2):  # the second waits to be told
                    send(number, RemoteThread(self.node, f"nobody {number}"))
        self.assertGreater(len(were_free), 10)
        self.assertEqual(set(were_free), {True})

    def test_a_logging_handler_that_fails_fails_no_send(self):
        dead = spawn(echo, 1)
        self.assertTrue(dead.join(T))
        handler = logging.Handler()
        handler.emit = lambda record: fail(KeyError("handler"))
        logging.getLogger("distconc").addHandler(handler)
        self.addCleanup(logging.getLogger("distconc").removeHandler, handler)
        with mock.patch("threading.excepthook") as shown:
            send("lost", dead)
        self.assertEqual(shown.call_args.args[0].exc_type, KeyError)

    # Imports

    def test_a_call_from_within_an_import_is_answered_by_another_node(self):
        sys.path.append(self.dir)
        self.addCleanup(sys.path.remove, self.dir)
        child = self.child()
        spawn_server(handle_synchronous, echo, node=child, name="server", register=True)
        call = "from distconc import *\nanswer = send_synchronous(%s, RemoteThread(%r, 'server'))"
        modules = {
            "asks": call % ("'an answer'", child.address),
            # The other node needs the module to load the call, and would call as well.
            "both": "class Kind: pass\n" + call % ("Kind()", child.address)}
        for name, text in modules.items():
            with open(os.path.join(self.dir, name + ".py"), "w") as file:
                file.write(text)
            self.addCleanup(sys.modules.pop, name, None)
        importlib.invalidate_caches()
        self.assertEqual(importlib.import_module("asks").answer, "an answer")
        with self.assertRaisesRegex(RemoteError, "being loaded cannot call"):
            importlib.import_module("both")

    # Signals, streams, directories

    def test_the_programs_handling_of_signals_makes_no_difference(self):
        done = self.program("""
            import signal, socket, threading

            def hang_up():
                # All that it will say, and an end: who answers writes to nobody.
                with listener.accept()[0] as stranger:
                    stranger.sendall(challenge)

            if __name__ == "__main__":
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)
                challenge = b"#CHALLENGE#" + bytes(20)
                challenge = len(challenge).to_bytes(4, "big") + challenge
                with socket.socket(socket.AF_UNIX) as listener, start_node("./node") as node:
                    listener.bind("listener")
                    listener.listen()
                    threading.Thread(target=hang_up).start()
                    try:
                        connect("./listener")
                    except NodeDown:
                        print("NodeDown")
                    for _ in range(50):
                        with socket.socket(socket.AF_UNIX) as stranger:
                            stranger.connect("node")
                    while node.stats()["strangers"] < 50:
                        receive(0.01, None)
                    with spawn_node() as child:
                        held = RemoteThread(child, "nobody")
                        connect(child)
                        os.kill(child.pid, signal.SIGKILL)
                        try:
                            while True:
                                send(bytes(100_000), held)
                        except NodeDown:
                            print("NodeDown")
                        while child.is_alive():
                            receive(0.01, None)
                        child.stop()
                    with spawn_node() as child:
                        print(child.is_alive(), spawn(print, "there", node=child).join(20))
                    print(child.is_alive())
                print(signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL,
                      signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN,
                      signal.pthread_sigmask(signal.SIG_BLOCK, []))
            """)
        # The child prints "there" by a pipe of its own, so that may come a line later.
        self.assertEqual((sorted(done.out.splitlines()), done.status), (
            ["False", "NodeDown", "NodeDown", "True True", "True True set()", "there"], 0),
            done.err)

    @not_on_windows("Unix sockets")
    def test_closed_streams_any_locale_and_another_directory_make_no_difference(self):
        path = os.path.join(self.dir, "program.py")
        with open(path, "w") as file:
            file.write("""if True:
                from distconc import *
                import os, sys
                if __name__ == "__main__":
                    assert sys.stdin is sys.stdout is sys.stderr is None
                    os.mkdir("elsewhere")
                    with start_node("./node") as node:
                        os.chdir("elsewhere")
                        spawn(int, "no number").join()  # Its failure finds no stream.
                        send("lost", RemoteThread(node, "nobody"))
                        trace("traces")
                        with spawn_node(b"./n\\xc3\\xa4her", allow="anything") as child:
                            os.chdir("..")
                            server = spawn(handle_synchronous, print, node=child)
                            answers = [send_synchronous("ä", server, 20)]
                            reached = spawn(os.getcwd, node=str(node)).join(20)
                            answers += [reached, os.listdir("elsewhere/traces") != []]
                    with open("answers", "w") as file:
                        print(answers, file=file)
                """)
        subprocess.run(
            f"exec {sys.executable} program.py 0<&- 1>&- 2>&-", shell=True, timeout=60,
            cwd=self.dir, env=environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"))
        with open(os.path.join(self.dir, "answers")) as file:
            self.assertEqual(file.read(), "[None, True, True]\n")

    # Copies under other names

    def copy_to(self, path):
        """Copy the file into the test's directory, and the directories into packages."""
        path = os.path.join(self.dir, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copy(MODULE, path)
        directory = os.path.dirname(path)
        while directory != self.dir:
            with open(os.path.join(directory, "__init__.py"), "a"):
                directory = os.path.dirname(directory)

    def run_copy(self, *command, **env):
        done = subprocess.run(
            [sys.executable, *map(str, command)], env=environment(PYTHONPATH=self.dir, **env),
            text=True, timeout=60, cwd=self.dir, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return types.SimpleNamespace(out=done.stdout, err=done.stderr, status=done.returncode)

    def test_what_a_copy_of_another_name_sends_arrives_as_ours_and_ours_as_its(self):
        self.copy_to("mypkg/vendored/messages.py")
        with open(os.path.join(self.dir, "program.py"), "w") as file:
            file.write("""if True:
                import sys
                sys.path.append(sys.argv[3])
                if len(sys.argv) > 4:
                    import distconc as beside  # another copy, in use in the same process
                    beside.spawn(beside.receive)
                from mypkg.vendored.messages import *
                from mypkg.vendored import messages
                def check_own(items):
                    for item in items:
                        assert type(item).__module__ == "mypkg.vendored.messages", type(item)
                me = current_thread()
                items = [
                    me, RemoteThread(1, "x"), Synchronous(1, me, "t"), Reply(1, "t"),
                    Monitor(me, "t"), Down(Monitor(me, "t"), me, NodeDown("lost")),
                    NodeUnreachable("n"), NoSuchThread("n"), RemoteError("a", "b"),
                    ThreadDied(NodeDown("d"), RemoteError("a", "b"), "t"),
                    LinkedError(NodeDown("d"), me), SerializationError("s")]
                node = sys.argv[1]
                for each in node, sys.argv[2]:
                    door = RemoteThread(each, "door")
                    back = send_synchronous(items, door, 20)
                    check_own(back[1:])
                    assert back[:2] == [me, items[1]] and back[2:5] == items[2:5], back
                    try:
                        send_synchronous("fail", door, 20)
                    except ThreadDied as died:
                        check_own([died.reason])
                        print(type(died.reason).__name__)
                with spawn_node() as child:
                    server = spawn(handle_synchronous, str.upper, node=child)
                    print(send_synchronous("a child", server, 20))
                    server = spawn(handle_synchronous, str.upper, node=node)
                    print(send_synchronous("ours", server, 20))
                    spawn_linked(send_synchronous, 1, me, 0.1, node=node)
                    try:
                        receive_if(int, 20)
                    except LinkedError as failed:
                        print(type(failed.error).__name__)
                """)
        narrow = self.child(allow=[serve_copies])
        for beside in [], ["beside"]:
            doors = [spawn(serve_copies, node=node, name="door", register=True)
                     for node in (None, narrow)]
            with mock.patch("threading.excepthook", lambda info: None):
                done = self.run_copy("program.py", self.node, narrow, HERE, *beside)
                self.assertEqual(done.out, "NodeDown\nNodeDown\nA CHILD\nOURS\nTimeoutError\n",
                                 done.err)
                for door in doors:
                    self.assertTrue(door.join(T))

    def test_the_commands_work_under_another_name_and_in_a_package(self):
        self.copy_to("mypkg/vendored/messages.py")
        self.copy_to("my-messages.py")
        self.assertIn("CAN YOU HEAR ME?", self.run_copy("my-messages.py", "demo").out)
        with open(os.path.join(self.dir, "serve.py"), "w") as file:
            file.write("from mypkg.vendored.messages import *\n"
                       "spawn_server(handle_synchronous, str.upper, name='up', register=True)\n"
                       "print('ready', flush=True)\n")
        as_module, as_file = ["-m", "mypkg.vendored.messages"], ["mypkg/vendored/messages.py"]
        for start, asker in (as_module, as_file), (as_file, as_module), (as_file, [MODULE]):
            with self.subTest(start), subprocess.Popen(
                    [sys.executable, *start, "node", "0", "serve.py"], cwd=self.dir, text=True,
                    stdout=subprocess.PIPE, env=environment(PYTHONPATH=None)) as node:
                self.addCleanup(node.kill)
                address = re.match(r"node (\S+),", node.stdout.readline())[1]
                self.assertEqual(node.stdout.readline(), "ready\n")
                called, shown, sent = [self.run_copy(*asker, *command) for command in (
                    ["call", f"{address}/up", "'abc'"], ["ps", address],
                    ["send", f"{address}/up", "'abc'"])]
                self.assertEqual((called.out, sent.status), ("'ABC'\n", 0), called.err)
                self.assertIn("handle_synchronous", shown.out)
                node.kill()


def serve_copies():
    """Answer with what comes, if it is of this copy's kinds; then fail with such an error."""
    request = receive_if(Synchronous, T)
    for item in request.data:
        check(type(item).__module__ == "distconc", type(item))
    reply_synchronous(request.data, request)
    receive_if(Synchronous, T)
    raise NodeDown("ours")


def receive_and_call(server):
    receive(T)
    return send_synchronous(1, server, T)


class Last:
    """Sends a number, from wherever the last reference to it goes; is part of a cycle."""

    def __init__(self, dropped, *targets):
        self.dropped, self.targets, self.me = dropped, targets, self

    def __del__(self):
        self.dropped.append(None)
        number = len(self.dropped)
        for target in self.targets:
            send((number, bytes(number % 2 * 3000)), target)


class SendAtEnd:
    def __init__(self, *args):
        self.args = args

    def __del__(self):
        send(*self.args)


class Forward(logging.Handler):
    """A handler at the root, as programs have, that sends all lines to a thread."""

    def __init__(self, target):
        super().__init__()
        self.target, self.sent = target, []

    def emit(self, record):
        self.sent.append(record.getMessage())
        with suppress(NodeDown):
            send(self.sent[-1], self.target)


def log_until_told():
    while receive_if(str, 0, None) is None:
        logging.getLogger("talker").warning("%s", "x" * 5000)


class Notebooks(unittest.TestCase):
    """Cells of a notebook, run by a kernel."""

    @unittest.skipUnless(importlib.util.find_spec("ipykernel")
                         and importlib.util.find_spec("jupyter_client"),
                         "needs ipykernel and jupyter_client")
    def test_in_a_notebook_a_cells_own_names_are_refused_with_a_cure_that_helps(self):
        from jupyter_client.manager import start_new_kernel

        directory = tempfile.mkdtemp(prefix="dc")
        self.addCleanup(shutil.rmtree, directory)
        manager, kernel = start_new_kernel(cwd=directory, env=environment())
        self.addCleanup(manager.shutdown_kernel, now=True)
        self.addCleanup(kernel.stop_channels)

        def run(cell):
            shown = []

            def note(message):
                content = message["content"]
                shown.append(content.get("text") or content.get("data", {}).get("text/plain")
                             or "\n".join(content.get("traceback", [])))
            kernel.execute_interactive(textwrap.dedent(cell), timeout=T, output_hook=note)
            return "".join(filter(None, shown))

        for _, blocks in chapters(DOCUMENTS[0]):
            for block in blocks:
                if block.language == "ipython":
                    cells = "\n".join(block.lines).split("# The next cell\n")
        self.assertEqual([run(cell) for cell in cells], ["Writing mymodule.py\n", "42"])
        refused = run("""
            class Mine:
                pass
            def work(whom):
                send(1, whom)
            for each in Mine(), work:
                server = spawn(handle_synchronous, repr, node=child)
                try:
                    send_synchronous(each, server)
                except RemoteError as error:
                    print(error)
            try:
                spawn(work, current_thread(), node=child)
            except RemoteError as error:
                print(error)
            """)
        self.assertEqual(refused.count("begin its cell with %%writefile mymodule.py"), 3, refused)
        self.assertEqual(run("""
            spawn(print, "from the child", node=child).join(20)
            child.stop()
            """), "from the child\n")


######## Attackers


def send_slowly(words, target, leave):
    """Send words, each in a frame of its own, and then disconnect from where they went."""
    with suppress(NodeDown):
        for word in words:
            send(word, target)
            receive(0.1, None)
    if leave:
        disconnect(target.node)


def read_to_end(sock, seconds):
    """Read until the other side ends it; return how long that took, or raise TimeoutError."""
    start = monotonic()
    with contextlib.suppress(ConnectionError):
        while True:
            sock.settimeout(max(seconds - (monotonic() - start), 0.001))
            if not sock.recv(1 << 16):
                break
    return monotonic() - start


def crowd(number):
    """So many strangers; on Windows fewer, for Wine starts 60 threads a second, not 1,000."""
    if ON_WINDOWS:
        number //= 10
    return number


class Strangers(OneChild):
    """Who has no key hurts nobody: the victim is a process of its own."""

    child_options = {"connect_timeout": 2}
    options = {"connect_timeout": 5}

    def setUp(self):
        super().setUp()
        self.at_rest = ask(self.other, census)
        self.strangers = ask(self.other, stats_here)["strangers"]
        self.addCleanup(self.check_victim)

    def check_victim(self):
        """The victim answers a new honest caller at once, and is what it was."""
        self.honest()
        end, (threads, files) = monotonic() + T, self.at_rest
        now = ask(self.other, census)
        while (now[0] > threads or now[1] > files) and monotonic() < end:
            receive(0.05, None)
            now = ask(self.other, census)
        self.assertLessEqual(now[0], threads, "threads are left")
        self.assertLessEqual(now[1], files, "descriptors leak")

    def honest(self):
        """A caller is answered before a stranger who came first would have to go."""
        disconnect(self.other)
        start = monotonic()
        self.assertEqual(ask(self.other, echo, "well"), "well")
        self.assertLess(monotonic() - start, self.child_options["connect_timeout"])

    def knock(self):
        sock = socket.create_connection(self.other.address, T)
        self.addCleanup(sock.close)
        return sock

    def speak(self, door):
        """Shake hands through `door`, send one message, and end in order."""
        name = str(self.other)
        with RawPeer(Client(door), "dialler", meant=(name, name)) as peer:
            peer.challenge().greet().introduce().send("once", "replayed")
            peer.end()
            peer.is_cut()

    def knock_from(self, host):
        """Knock at this process's node from another of this machine's addresses."""
        sock = socket.create_connection(self.node.address, T, (host, 0))
        self.addCleanup(sock.close)
        return sock

    def limit_strangers(self, limit):
        self.addCleanup(setattr, distconc, "MAX_STRANGERS", distconc.MAX_STRANGERS)
        distconc.MAX_STRANGERS = limit

    def test_who_has_passed_our_challenge_is_spared_when_too_many_knock(self):
        self.limit_strangers(3)
        with RawPeer.knock(self.node) as slow:
            answer_challenge(slow.conn, slow.key)
            while not any(h.has_proved_key for h in self.node._handshakes):
                receive(0.01, None)
            crowd = [self.knock_from("127.0.0.1") for _ in range(10)]
            for sock in crowd[:7]:
                self.assertLess(read_to_end(sock, T), 4)
            deliver_challenge(slow.conn, slow.key)
            slow.greet().introduce().end()
            self.assertTrue(slow.is_cut() and slow.has_read_end)

    def test_when_too_many_knock_one_goes_from_where_most_come(self):
        self.limit_strangers(3)
        lonely = self.knock_from("127.0.0.9")
        for sock in [self.knock_from("127.0.0.1") for _ in range(10)][:8]:
            self.assertLess(read_to_end(sock, T), 4)
        self.assertTrue(lonely.recv(100))  # the challenge
        lonely.settimeout(0.1)
        self.assertRaises(TimeoutError, lonely.recv, 1)

    def test_wrong_keys_are_warned_of_in_one_line_a_second_for_all_hosts(self):
        attempts = 30
        with Records() as log:
            start = monotonic()
            for number in range(attempts):
                sock = self.knock_from(f"127.0.0.{2 + number % 5}")
                conn = Connection(sock.detach())
                with conn, self.assertRaises((AuthenticationError, EOFError, OSError)):
                    RawPeer(conn, "dialler", key="another key, not ours").challenge()
            while self.node.stats()["strangers"] < attempts:
                receive(0.01, None)
            stop_node()
            start_node()
            seconds, total, lines = monotonic() - start, 0, []
            while total < attempts:
                lines.append(log.get())
                total += int(re.match(r"(\d+) stranger", lines[-1].getMessage())[1])
        self.assertEqual(total, attempts)
        self.assertLess(len(lines), 3 + seconds)
        for line in lines:
            self.assertEqual(line.levelname, "WARNING")
            self.assertRegex(line.getMessage(), r"127\.0\.0\.[2-6]: digest .+")

    def test_a_stranger_takes_one_thread_and_those_of_one_node_are_timed_by_one(self):
        before = set(threading.enumerate())
        crowd = [self.knock_from("127.0.0.1") for _ in range(20)]
        for sock in crowd:
            self.assertTrue(sock.recv(100))  # the challenge
        names = Counter(t.name for t in set(threading.enumerate()) - before)
        self.assertEqual(names, {"distconc reader": 20, "distconc timer": 1})

    def test_500_silent_sockets_delay_nobody_and_are_cut_in_time(self):
        number = crowd(500)
        silent = [self.knock() for _ in range(number)]
        start = monotonic()
        for _ in range(10):
            self.honest()
        for sock in silent:
            read_to_end(sock, T)
        self.assertLess(monotonic() - start, 4)
        while ask(self.other, stats_here)["strangers"] - self.strangers < number:
            self.assertLess(monotonic() - start, T)  # each is counted just after it was cut

    def test_a_byte_now_and_then_does_not_stay(self):
        sock, start = self.knock(), monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in struct.pack("!i", 200) + bytes(200):
                sock.send(bytes([byte]))
                sock.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    while sock.recv(100):
                        pass
                    break  # the end
            else:
                self.fail("it stayed to the end")
        self.assertLess(monotonic() - start, 4)

    def test_1000_who_connect_and_close_and_100_who_reset(self):
        for number in range(crowd(1100)):
            with socket.create_connection(self.other.address, T) as sock:
                if number % 11 == 0:  # close with a reset
                    linger = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                if number % 100 == 0:
                    self.honest()

    def test_http_and_noise_are_cut_at_once_or_in_time(self):
        noise = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(1000), bytes(10_000),
                 b"\xff" * 10_000, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
                 struct.pack("!i", -1), struct.pack("!iQ", -1, 1 << 63),
                 struct.pack("!iQ", -1, (1 << 64) - 1), struct.pack("!i", 0x7fffffff),
                 struct.pack("!i", -(1 << 31)), struct.pack("!i", 0),
                 struct.pack("!iQ", -1, 1 << 31), struct.pack("!i", 20) + bytes(10)]
        before, socks = ask(self.other, memory), []
        for data in noise:
            socks.append(self.knock())
            with contextlib.suppress(ConnectionError):
                socks[-1].sendall(data)
        self.honest()
        start = monotonic()
        for sock in socks:
            read_to_end(sock, T)
        self.assertLess(monotonic() - start, 4)
        self.assertLess(ask(self.other, memory) - before, 50 << 20)

    def test_60_good_clients_in_one_instant_are_all_served(self):
        kept, number = self.collector(self.other, "sixty"), crowd(60)
        barrier, served = threading.Barrier(number), []

        def dial(client):
            barrier.wait(T)
            with RawPeer.dial(self.other) as peer:
                peer.send(client, "sixty")
                peer.end()
                served.append(peer.is_cut() and peer.has_read_end)
        start = monotonic()
        at_once(*((dial, client) for client in range(number)))
        self.assertEqual(sorted(self.got(kept, number)), list(range(number)))
        self.assertEqual(served, [True] * number)
        self.assertLess(monotonic() - start, 10)
        send("stop", kept)

    def test_a_connection_whose_writer_cannot_be_started_leaves_nothing_behind(self):
        start = threading.Thread.start

        def refuse(thread):
            if thread.name == "distconc writer":
                raise RuntimeError("can't start new thread")
            start(thread)
        disconnect(self.other)
        with mock.patch("threading.Thread.start", refuse):
            self.assertRaises(NodeUnreachable, connect, self.other)
        connect(self.other)

    @not_on_windows("limit of descriptors")
    def test_a_node_out_of_descriptors_does_not_spin_and_serves_as_soon_as_it_has_some(self):
        poor = self.child(connect_timeout=2)
        echoes = spawn_server(handle_synchronous, echo, node=poor, name="echo", register=True)
        at_rest = ask(poor, census)
        ask(poor, leave_descriptors, 7)
        strangers = [socket.create_connection(poor.address, T) for _ in range(40)]
        served, start = queue.Queue(), monotonic()

        def dial():
            while monotonic() - start < T:
                with suppress(OSError, EOFError, Cut), RawPeer.dial(poor) as peer:
                    return served.put(peer.call("let in", "echo"))
        clients = [threading.Thread(target=dial) for _ in range(5)]
        for client in clients:
            client.start()
        spent, start_spent = ask(poor, process_time), monotonic()
        while monotonic() - start_spent < 1:  # who was there before is served all the time
            self.assertEqual(send_synchronous(1, echoes, T), 1)
            receive(0.1, None)
        spent = (ask(poor, process_time) - spent) / (monotonic() - start_spent)
        self.assertLess(spent, 0.5, "it spins")
        for sock in strangers:
            sock.close()
        begin = monotonic()
        for _ in clients:
            self.assertEqual(served.get(timeout=T), "let in")
        self.assertLess(monotonic() - begin, 2)
        for client in clients:
            client.join(T)
        self.assertEqual(ask(poor, noted_on_stderr), "")
        while (now := ask(poor, census)) > at_rest and monotonic() - begin < T:
            receive(0.05, None)
        self.assertLessEqual(now, at_rest)

    def test_who_resets_in_the_middle_of_the_handshake_leaves_nothing(self):
        steps = [lambda peer: peer.conn.recv_bytes(256), RawPeer.challenge, RawPeer.greet,
                 lambda peer: peer.write((("serials", 1, 1), b"")), RawPeer.read_groups]
        for upto in [*range(len(steps) + 1)] * 10:
            with RawPeer.knock(self.other) as peer:
                for step in steps[min(upto, 1):upto]:
                    step(peer)
                with socket.fromfd(peer.conn.fileno(), socket.AF_INET,
                                   socket.SOCK_STREAM) as sock:
                    linger = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.honest()

    def test_a_whole_connection_recorded_and_replayed_lets_nobody_in(self):
        target, said = self.collector(self.other, "replayed"), []
        with socket.create_server(("127.0.0.1", 0)) as trap:
            door = trap.getsockname()
            talker = spawn(self.speak, door)
            client, _ = trap.accept()
            with client, socket.create_connection(self.other.address, T) as server:
                back = spawn(pump, server, client)
                pump(client, types.SimpleNamespace(
                    sendall=lambda data: (said.append(data), server.sendall(data)),
                    shutdown=server.shutdown))
                self.assertTrue(back.join(T) and talker.join(T))
        self.assertEqual(self.got(target), ["once"])
        with self.knock() as sock:
            with suppress(ConnectionError):
                sock.sendall(b"".join(said))
            self.assertLess(read_to_end(sock, T), 4)
        self.assertEqual(self.got(target), ["once"])
        send("stop", target)

    def test_a_silent_crowd_does_not_hinder_stop_node(self):
        stop_node()
        node = start_node()
        crowd = [socket.create_connection(node.address, T) for _ in range(200)]
        start = monotonic()
        stop_node()
        self.assertLess(monotonic() - start, 5.5)
        for sock in crowd:
            read_to_end(sock, T)
            sock.close()
        start_node()

    def test_a_relay_without_the_key_is_not_let_in(self):
        """A dials a stale address; who sits there passes all on to B, and all back."""
        target = self.collector(self.other, "relayed")
        self.got(target)
        disconnect(self.other)
        with Proxy(self.other.address, lambda *frame: [frame]) as relay:
            for act in connect, lambda node: send("x", RemoteThread(node, "relayed")):
                with self.assertRaises((NodeDown, AuthenticationError)):
                    act(relay.address)
            self.assertEqual(nodes(), [])
        self.assertEqual(self.got(target), [])
        self.assertGreater(ask(self.other, stats_here)["strangers"], self.strangers)
        send("stop", target)

    def test_a_challenge_passed_back_lets_nobody_in(self):
        """Who has no key has our node dial him, and passes on its own challenge to it."""
        with socket.create_server(("127.0.0.1", 0)) as trap:
            dialler = spawn(swallow, connect, trap.getsockname())
            out, _ = trap.accept()
            with out, socket.create_connection(self.node.address, T) as back:
                at_once((pump, out, back), (pump, back, out), (dialler.join, T))
        self.assertFalse(dialler.is_alive())
        self.assertEqual(nodes(), [self.other.address])
        end = monotonic() + T
        while not self.node.stats()["strangers"] and monotonic() < end:
            receive(0.01, None)  # it is counted just after it was cut
        self.assertGreaterEqual(self.node.stats()["strangers"], 1)


def swallow(func, *args):
    with contextlib.suppress(Exception):
        func(*args)


def pump(source, sink):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class Proxy:
    """Sits before an address and passes frames through `twist(to_acceptor, count, frame)`.

    `twist` gets each sealed frame and returns those to pass on instead; None: cut it off.
    """

    def __init__(self, target, twist):
        self.target, self.twist = target, twist
        self.server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = self.server.getsockname()
        self.socks, self.threads = [self.server], []
        self.run(self.accept)

    def run(self, func, *args):
        self.threads.append(threading.Thread(target=func, args=args, daemon=True))
        self.threads[-1].start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.server.accept()
                server = socket.create_connection(self.target, T)
                for sock in client, server:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.socks += [client, server]
                self.run(self.copy, client, server, True)
                self.run(self.copy, server, client, False)

    def copy(self, source, sink, inward):
        with contextlib.suppress(OSError, EOFError):
            with source.makefile("rb") as file:
                for _ in range(4):  # challenge, digest, welcome, hello: 4 each way
                    head = self.take(file, 4)
                    sink.sendall(head + self.take(file, *struct.unpack("!i", head)))
                count = 0
                while True:
                    start = self.take(file, 8)
                    size, large = struct.unpack(">II", start)
                    body, mac = self.take(file, size), self.take(file, 16)
                    rest = self.take(file, large + 16) if large else b""
                    frames = self.twist(inward, count, start + body + mac + rest)
                    if frames is None:
                        break
                    for frame in frames:
                        sink.sendall(frame if isinstance(frame, bytes) else frame[-1])
                    count += 1
        for sock in source, sink:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR if sock is sink else socket.SHUT_RD)

    def take(self, file, size):
        data = file.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sock in self.socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(T)
        for sock in self.socks:
            sock.close()


class InTheMiddle(Net):
    """A proxy that changes frames on their way; the key it has not."""

    def setUp(self):
        super().setUp()
        self.twist = lambda inward, count, frame: [frame]
        port = free_port()
        self.proxy = Proxy(("127.0.0.1", port), lambda *frame: self.twist(*frame))
        self.addCleanup(self.proxy.__exit__)
        self.victim = self.child(port, advertise=self.proxy.address, heartbeat=1)
        self.assertEqual(self.victim.address, self.proxy.address)
        self.target = self.collector(self.victim)
        self.echo = spawn_server(handle_synchronous, echo, node=self.victim)
        self.got(self.target)

    def test_what_is_changed_on_its_way_ends_the_connection_and_is_never_delivered(self):
        held = []

        def flip(frame):
            at = int.from_bytes(os.urandom(2), "big") % len(frame)
            return [frame[:at] + bytes([frame[at] ^ 1 << at % 8]) + frame[at + 1:]]

        def swap(frame):
            held.append(frame)
            return held[::-1] if len(held) == 2 else []
        twists = {"flip": flip, "swap": swap, "drop": lambda frame: [],
                  "repeat": lambda frame: [frame, frame],
                  "truncate": lambda frame: [frame[:-1]], "cut": lambda frame: None,
                  "inject": lambda frame: [frame[:28] + b"x" * (len(frame) - 28), frame],
                  "lengthen": lambda frame: [b"\0\0\xff\xff" + frame[4:]],
                  "shorten": lambda frame: [frame[:4] + bytes(8) + frame[12:]]}
        numbers = itertools.count()
        for name, twist in twists.items():
            for direction in True, False:
                with self.subTest(name, inward=direction):
                    held.clear()
                    disconnect(self.victim)
                    self.spoil(twist, direction, 2 if name == "swap" else 1)
                    watch = monitor(self.victim)
                    for number in itertools.islice(numbers, 1000):
                        with contextlib.suppress(NodeDown):  # a send between two may dial anew
                            send(("whole", number), self.target)
                            reply = send_synchronous(("q", number), self.echo, T)
                            self.assertEqual(reply, ("q", number))
                        if down := receive(0, None):
                            break
                    self.assertIsNotNone(down, "nothing was noticed")
                    self.assertEqual(down.monitor, watch)
                    start = monotonic()
                    self.assertEqual(send_synchronous("next", self.echo, T), "next")
                    self.assertLess(monotonic() - start, 2)
        got = self.got(self.target)
        self.assertEqual(got, sorted(set(got)))
        self.assertLessEqual(set(got), {("whole", n) for n in range(next(numbers))})

    def test_the_last_frame_swallowed_and_an_end_in_its_place_is_told_as_a_loss(self):
        def swallow(word):
            return lambda inward, count, frame: \
                None if not inward and word in frame else [frame]
        said = ["first", "the last words"]
        end = struct.pack(">IIB", 1, 0, 9)
        for word, whole in (b"the last words", said[:1]), (end, said), (b"nothing", said):
            with self.subTest(word), Records() as log:
                log.informed()
                self.assertEqual(send_synchronous("stands", self.echo, T), "stands")
                self.twist = swallow(word)
                spawn(send_slowly, said, current_thread(), word not in said[1].encode(),
                      node=self.victim)
                self.assertEqual([receive_if(str, T) for _ in whole], whole)
                if word != b"nothing":
                    self.assertIn("may be lost", log.get().getMessage())
                while nodes():
                    self.assertIs(receive(0.01, NOTHING), NOTHING)
                self.twist = lambda inward, count, frame: [frame]
                self.assertEqual([], [*log.queue.queue])

    def spoil(self, twist, direction, times):
        """Twist so many of the frames that go in a direction, once the connection stands."""
        hits = iter(range(times))

        def spoiled(inward, count, frame):
            hit = inward == direction and count >= 3 and next(hits, None) is not None
            return twist(frame) if hit else [frame]
        self.twist = spoiled

    def test_a_proxy_that_cuts_every_hundred_frames_keeps_order_and_doubles_nothing(self):
        self.twist = lambda inward, count, frame: None if inward and count > 100 else [frame]
        lost = 0
        for number in range(3000):
            try:
                send(number, self.target)
                if number % 3 == 0:
                    send_synchronous(number, self.echo, T)
            except NodeDown:
                lost += 1
        self.twist = lambda inward, count, frame: [frame]
        disconnect(self.victim)
        got = self.got(self.target)
        self.assertGreater(lost, 10)
        self.assertEqual(got, sorted(set(got)))

    def test_a_message_that_comes_in_slowly_is_no_silence(self):
        def slowly(inward, count, frame):
            for at in range(0, len(frame), 5_000):
                yield frame[at:at + 5_000]
                threading.Event().wait(0.15 if len(frame) > 5_000 else 0)

        self.twist, watch = slowly, monitor(self.victim)
        start = monotonic()
        self.assertEqual(send_synchronous(bytes(60_000), self.echo, T), bytes(60_000))
        self.assertGreater(monotonic() - start, 3)  # each way longer than the heartbeat
        demonitor(watch)
        self.assertIsNone(receive(0, None))

    def test_a_proxy_that_swallows_all_is_noticed_within_the_heartbeat(self):
        for direction in True, False:
            disconnect(self.victim)
            self.assertEqual(send_synchronous(1, self.echo, T), 1)
            self.twist = lambda inward, *rest, d=direction: [] if inward == d else rest[-1:]
            self.assert_raises_soon(NodeDown, send_synchronous, 2, self.echo, T)
            self.twist = lambda inward, count, frame: [frame]
            self.assertEqual(send_synchronous(3, self.echo, T), 3)


# Connects so many times a second, or as often as the node takes them, says nothing, and stays.
# After two seconds, and at the end, it tells how many a second there were.
KNOCKER = """
import collections, selectors, socket, sys, threading, time
host, port, rate = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
is_over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
knocks, count, start, has_told = collections.deque(), 0, time.monotonic(), False
with selectors.DefaultSelector() as unanswered:
    while not is_over.is_set():
        for key, _ in unanswered.select(0.005):
            unanswered.unregister(key.fileobj)
        while count < rate * (time.monotonic() - start) and len(unanswered.get_map()) < 64:
            knocks.append(socket.socket())
            knocks[-1].setblocking(False)
            knocks[-1].connect_ex((host, port))
            unanswered.register(knocks[-1], selectors.EVENT_READ)
            count += 1
            if len(knocks) > 2000:  # the node has dropped this one long ago
                knocks.popleft().close()
        if not has_told and time.monotonic() > start + 2:
            rate = count / 2  # no more from now on, if the node then has more time for it
            has_told = print(round(rate), flush=True) is None
print(round(count / (time.monotonic() - start)))
"""


class Distance(Proxy):
    """Passes all on as it comes, but every byte is under way for so many seconds."""

    def __init__(self, target, seconds):
        self.seconds = seconds
        super().__init__(target, None)

    def copy(self, source, sink, inward):
        under_way, data = queue.Queue(), None
        self.run(self.deliver, under_way, sink)
        while data != b"":
            data = outcome(source.recv, 1 << 16)
            data = data if isinstance(data, bytes) else b""
            under_way.put((monotonic() + self.seconds, data))

    def deliver(self, under_way, sink):
        data = None
        with suppress(OSError):
            while data != b"":
                due, data = under_way.get()
                time.sleep(max(due - monotonic(), 0))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


class FarAway(Net):
    """A round trip takes 200 ms."""

    def setUp(self):
        super().setUp()
        port = free_port()
        self.way = Distance(("127.0.0.1", port), 0.1)
        self.addCleanup(self.way.__exit__)
        self.far = self.child(port, advertise=self.way.address)
        self.port = port

    @contextmanager
    def knocks(self, rate):
        """Knock silently at the node from near by; yield a list with the rate, at the end two."""
        with subprocess.Popen([sys.executable, "-c", KNOCKER, "127.0.0.1", str(self.port),
                               str(rate)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True) as knocker:
            rates = [int(knocker.stdout.readline())]
            try:
                yield rates
            finally:
                knocker.stdin.close()
                rates.append(int(knocker.stdout.read()))

    def test_who_has_the_key_gets_in_from_afar_through_600_silent_knocks_a_second(self):
        times = []
        with self.knocks(600) as rates:
            # On a slow machine there are fewer, and as much less room for them.  A handshake
            # takes 0.9 seconds, 0.2 of them until the key is proved.
            ask(self.far, make_room_for_strangers, round(0.7 * rates[0]))
            for _ in range(3):
                disconnect(self.far)
                start = monotonic()
                connect(self.far)
                times.append(monotonic() - start)
            strangers = ask(self.far, stats_here)["strangers"]
        about = f"{rates} knocks a second, {strangers} were dropped; the honest took {times}"
        self.assertGreater(min(times), 0.8, about)
        self.assertGreater(strangers, 2 * rates[0], about)


######## Faults


def keep_all(until, whom):
    """Keep messages until one is `until`, then send all of them."""
    kept = []
    while (message := receive()) != until:
        kept.append(message)
    send(kept, whom)


class Faults(OneChild):
    """A network that is made worse, on this node's side."""

    options = child_options = {"heartbeat": 3.0}

    def through(self, count=200, **worse):
        """What of the numbers up to `count` comes through, sent to a thread over there."""
        target = spawn(keep_all, "end", current_thread(), node=self.other)
        with faults(**worse):
            for number in range(count):
                send(number, target)
        send("end", target)
        return receive(T)

    def test_a_lone_message_is_held_up_for_no_longer_than_the_delay(self):
        stop_node()
        self.node = start_node(heartbeat=20.0)
        server = spawn_server(handle_synchronous, echo, node=self.child())
        self.assertEqual(send_synchronous(0, server, T), 0)
        start = monotonic()
        with faults(delay=0.2, seed=3):
            for number in range(5):
                self.assertEqual(send_synchronous(number, server, T), number)
        self.assertLess(monotonic() - start, 4)  # a tick comes only every four seconds

    def test_drop_loses_some_and_the_seed_says_which(self):
        some = self.through(drop=0.3, seed=5)
        self.assertLess(80, len(some))
        self.assertLess(len(some), 190)
        self.assertEqual(some, sorted(some))
        self.assertEqual(self.through(drop=0.3, seed=5), some)
        self.assertNotEqual(self.through(drop=0.3, seed=6), some)

    def test_a_fault_entered_again_does_the_same_again(self):
        fault, got = faults(drop=0.3, seed=5), []
        for _ in range(2):
            target = spawn(keep_all, "end", current_thread(), node=self.other)
            with fault:
                for number in range(50):
                    send(number, target)
            send("end", target)
            got.append(receive(T))
        self.assertEqual(*got)

    def test_duplicate_sends_some_twice_and_loses_none(self):
        some = self.through(duplicate=0.3, seed=5)
        self.assertEqual(sorted(set(some)), list(range(200)))
        self.assertEqual(some, sorted(some))
        self.assertLess(210, len(some))
        self.assertLess(len(some), 320)

    def test_delay_holds_up_as_the_seed_says_and_keeps_order(self):
        target = spawn(keep_all, "end", current_thread(), node=self.other)
        draws = random.Random(1)
        _, _, part = draws.random(), draws.random(), draws.random()
        with faults(delay=0.2, seed=1):
            start = monotonic()
            send("end", target)
            self.assertEqual(receive(T), [])
            self.assertGreaterEqual(monotonic() - start, 0.2 * part)
        self.assertEqual(self.through(delay=0.01), list(range(200)))

    def test_what_is_held_up_goes_out_when_the_fault_is_left(self):
        start = monotonic()
        self.assertEqual(self.through(delay=1000), list(range(200)))
        self.assertLess(monotonic() - start, T)

    def test_what_is_held_up_for_longer_than_a_heartbeat_is_no_silence(self):
        other = self.child(heartbeat=1.5)
        target = self.collector(other)
        watch = monitor(other)
        with faults(delay=1000, seed=1):
            send(1, target)
            self.assertIs(receive(3.0, NOTHING), NOTHING)
        self.assertEqual(self.got(target, 1), [1])
        demonitor(watch)

    def test_a_fault_that_is_left_lets_go_only_what_no_other_holds_up(self):
        target = self.collector(self.other)
        with faults(to=self.other, delay=1000, seed=1):
            send(1, target)
            with faults(to=1):
                pass
            self.assertIs(receive(0.5, NOTHING), NOTHING)
            connection, = self.node._connections
            self.assertTrue(connection._outbox)
        self.assertEqual(self.got(target, 1), [1])

    def test_to_leave_faults_again_and_again_is_no_silence(self):
        other = self.child(heartbeat=1.5)
        watch, end = monitor(other), monotonic() + 3
        while monotonic() < end:
            with faults(to=1, drop=1):
                self.assertIs(receive(0.02, NOTHING), NOTHING)
        demonitor(watch)

    def test_too_much_to_be_held_up_goes_out_at_once_in_order(self):
        target = spawn(keep_all, "end", current_thread(), node=self.other)
        with faults(delay=1000):
            for number in range(5000):
                send(number, target)
            send("end", target)
            for _ in range(distconc.MAX_QUEUED):
                send("more", target)
            self.assertEqual(receive(T), list(range(5000)))

    def test_only_the_named_node_and_only_remote_messages_are_concerned(self):
        other = self.child()
        here, there = self.here(collect, name="kept"), self.collector(other)
        gone = self.collector(self.other)
        with faults(to=self.other, drop=0.999999, seed=1):
            for target in here, there, gone:
                send(1, target)
        for target in here, there, gone:
            send(2, target)
        self.assertEqual([self.got(here, 2), self.got(there, 2)], [[1, 2]] * 2)
        self.assertEqual(self.got(gone, 1), [2])

    def test_who_sends_while_a_delay_is_left_comes_after_what_was_held_up(self):
        target = spawn(keep_all, "end", current_thread(), node=self.other)
        go_on, count = threading.Event(), itertools.count()

        def send_on():
            while not go_on.is_set():
                send(next(count), target)

        sender = self.here(send_on)
        with faults(delay=0.3):
            receive(0.1, None)
        go_on.set()
        self.assertTrue(sender.join(T))
        send("end", target)
        got = receive(T)
        self.assertEqual(got, list(range(len(got))))

    def test_news_of_an_end_does_not_overtake_what_is_held_up(self):
        spawn(watch_and_tell, current_thread(), node=self.other)
        watcher = receive(T)
        mine = self.here(send_when_told, range(3), watcher)
        send(mine, watcher)
        self.assertEqual(receive(T), "watching")
        with faults(delay=0.3):
            send("now", mine)
            self.assertTrue(mine.join(T))
        got = receive(T)
        self.assertEqual(got[:3], [0, 1, 2])
        self.assertIsInstance(got[3], Down)

    def test_faults_may_be_entered_twice_and_again(self):
        again = faults(delay=0.2, seed=1)
        with again:
            with again:
                pass
            self.assertIn(again, distconc._faults._entered)
        self.assertEqual(distconc._faults._entered, ())
        start = monotonic()
        with again:
            self.assertEqual(ask(self.other, echo, 1), 1)
            self.assertGreater(monotonic() - start, 0.01)

    def test_the_last_entered_counts(self):
        with faults(drop=1), faults(to=self.other):
            self.assertEqual(self.through(20), list(range(20)))

    def test_nonsense_is_refused(self):
        for worse in {"drop": 2}, {"drop": -1}, {"duplicate": 1.1}, {"delay": -1}:
            with self.subTest(worse), self.assertRaises(ValueError):
                faults(**worse)
        with self.assertRaises(ValueError):
            faults(to=70000)

    def test_a_cut_node_is_down_on_both_sides_until_it_heals(self):
        third = self.child(heartbeat=3.0)
        there = self.here(keep_all, "stop", current_thread(), name="watched")
        watcher = spawn(watch, RemoteThread(self.node, "watched"), current_thread(),
                        node=self.other)
        self.assertEqual(receive(T), "watching")
        mine = monitor(self.other)
        with faults(to=self.other, drop=1):
            down = receive(T)
            self.assertEqual(down.monitor, mine)
            self.assertIsInstance(down.reason, NodeDown)
            with self.assertRaisesRegex(NodeUnreachable, "cuts"):
                send(1, watcher)
            self.assertEqual(ask(third, try_to_connect, str(self.other)), None)
            self.assertEqual(ask(third, try_to_connect, str(self.node)), None)
            refused = ask(third, ask, str(self.other), try_to_connect, str(self.node))
            self.assertIsInstance(refused, NodeUnreachable)
        send("end", RemoteThread(self.other, watcher.id))
        self.assertIsInstance(receive(T), NodeDown)
        there.send("stop")
        self.assertEqual(receive(T), [])

    def test_what_a_cut_drops_is_not_counted_as_sent(self):
        target = spawn(keep_all, "end", current_thread(), node=self.other)
        before = self.node.stats()["sent"]
        with faults(to=self.other, drop=1):
            for number in range(50):
                send(number, target)
                self.assertEqual(self.node.stats()["sent"], before)
            [connection] = self.node._established
            for number in range(10):
                header = distconc._encode_header("unwatch", tag=str(number))
                self.assertTrue(connection.post(header))
            while connection._outbox:
                receive(0.01, None)
            with connection._write_lock:
                self.assertEqual(self.node.stats()["sent"], before)
        send("end", target)
        self.assertEqual((receive(T), self.node.stats()["sent"]), ([], before + 1))
        with faults(to=self.other, drop=1):
            disconnect(self.other)
        self.assertEqual(self.node.stats()["sent"], before + 1)

    def test_a_short_cut_that_nobody_noticed_leaves_the_connection_in_step(self):
        target = self.collector(self.other, "steps")
        send(1, target)
        with faults(drop=1):
            send(2, target)
        send(3, target)
        self.assertEqual(self.got(target, 2)[-2:], [1, 3])


def watch_and_tell(whom):
    send(current_thread(), whom)
    monitor(receive(T))
    send("watching", whom)
    send([receive(T) for _ in range(4)], whom)


def send_when_told(messages, target):
    receive(T)
    for message in messages:
        send(message, target)


def watch(target, whom):
    """Tell `whom` that this thread watches `target`; then, when asked, of what that ended."""
    monitor(target)
    send("watching", whom)
    down = receive(T)
    receive_if(lambda message: message == "end", T)
    send(down.reason, whom)


def try_to_connect(node):
    """Return None, or the error."""
    try:
        connect(node)
    except NodeDown as error:
        return error


######## Traces


def records(directory):
    """All records of all traces there, in no order but each thread's."""
    found = []
    for name in sorted(os.listdir(directory)):
        with open(os.path.join(directory, name)) as file:
            found += map(json.loads, file)
    return found


def hand_on(actors=()):
    """Send what is left of a message's path to the first of it; the last tells the driver."""
    *actors, driver = actors or receive()
    while (path := receive()) != "stop":
        send(path[1:], actors[path[0]] if path else driver)


def fail_on_request_with_bad_lines():
    receive(T)
    raise SyntaxError("x", ("f", 1, 1, 5))


def fail_on_request():
    raise ValueError(receive(T))


class Traces(OneChild):
    """What is recorded while traced, and what it costs: nothing of the semantics."""

    def setUp(self):
        super().setUp()
        self.traces = os.path.join(self.dir, "traces")
        self.addCleanup(trace, None)

    def child(self, *args, **options):
        trace(self.traces)
        return super().child(*args, **options)

    def assert_lamport(self, found):
        """Each thread's clock rises, each cause is earlier, nothing is received twice."""
        clocks, events = {}, set()
        for record in found:
            thread = record["process"], record["thread"]
            self.assertLess(clocks.get(thread, 0), record["clock"])
            clocks[thread] = record["clock"]
            events.add((*thread, record["clock"]))
        received = [tuple(r["cause"]) for r in found if r["event"] == "receive"]
        self.assertEqual(len(received), len(set(received)))
        for record in found:
            if "cause" in record:
                self.assertIn(tuple(record["cause"]), events)
                self.assertLess(record["cause"][2], record["clock"])

    def test_a_send_that_raised_is_recorded_as_lost(self):
        trace(self.traces)
        for bad in threading.Lock(), 1:
            with self.assertRaises((SerializationError, NodeUnreachable)):
                send(bad, RemoteThread(free_port(), "nobody"))
        trace(None)
        found = records(self.traces)
        sends = [(r["process"], r["thread"], r["clock"]) for r in found if r["event"] == "send"]
        lost = [r for r in found if r["event"] == "lost"]
        self.assertEqual([tuple(r["cause"]) for r in lost], sends)
        for record, why in zip(lost, ("SerializationError", "NodeUnreachable")):
            self.assertIn(why, record["why"])

    def test_each_receive_names_its_send_and_is_later(self):
        node, me = self.child(), current_thread()

        @settings(max_examples=15, deadline=None)
        @given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8))
        def run(paths):
            before = records(self.traces)
            actors = [spawn(hand_on, name=f"actor{n}", node=node if n % 2 else None)
                      for n in range(4)]
            for actor in actors:
                send([*actors, me], actor)
            for path in paths:
                send(path, actors[0])
            for _ in paths:
                self.assertEqual(receive(T), [])
            for actor in actors:
                watched = monitor(actor)
                send("stop", actor)
                self.assertEqual(receive(T).monitor, watched)
            found = records(self.traces)
            self.assert_lamport(found)
            hops = sum(map(len, paths)) + 2 * len(paths) + 2 * 4  # in, on, out; begin and stop
            for event in "send", "receive":
                count = sum(r["event"] == event and "Down" not in r["message"] for r in found)
                old = sum(r["event"] == event and "Down" not in r["message"] for r in before)
                self.assertEqual(count - old, hops)

        run()

    def test_all_that_happens_is_recorded_on_both_nodes(self):
        node = self.child()
        server = spawn_server(handle_synchronous, echo, name="echo", node=node, register=True)
        self.assertEqual(send_synchronous("hello", server, T), "hello")
        self.assertIsNone(receive(0.01, None))
        with self.assertRaises(TimeoutError):
            send_synchronous(1, self.here(collect, name="mute"), 0.01)
        for where in None, node:
            watched = monitor(target := spawn(fail_quietly_when_asked, node=where))
            send("now", target)
            self.assertEqual(receive(T).monitor, watched)
        send("late", target)
        with self.assertRaises(NoSuchThread):
            send_synchronous("later", target, T)
        found = records(self.traces)
        self.assert_lamport(found)
        kinds = {record["event"] for record in found}
        self.assertLessEqual({"start", "spawn", "send", "receive", "timeout", "lost"}, kinds)
        self.assertEqual(len({record["process"] for record in found}), 2)
        shown = [r["message"] for r in found if r["event"] == "send"]
        self.assertEqual(2, shown.count("'hello'"))  # the call and the reply
        lost = [tuple(r["cause"]) for r in found if r["event"] == "lost"]
        late = [(r["process"], r["thread"], r["clock"]) for r in found
                if r["event"] == "send" and r["message"] == "'late'"]
        self.assertEqual(lost, late)

    def test_a_crash_and_a_lost_node_are_recorded_with_what_comes_of_them(self):
        node, noise = self.child(), mock.patch("threading.excepthook", lambda info: None)
        with noise:
            watched = monitor(target := spawn(fail_on_request))
            send("why", target)
            self.assertEqual(receive(T).monitor, watched)
        watched = monitor(node)
        node.kill()
        self.assertEqual(receive(T).monitor, watched)
        found = records(self.traces)
        for event in "crash", "down":
            [cause] = [(r["process"], r["thread"], r["clock"]) for r in found
                       if r["event"] == event]
            self.assertIn(cause, [tuple(r["cause"]) for r in found
                                  if r["event"] == "receive" and "cause" in r])

    def test_a_partition_of_two_in_three_shows_on_both_sides_and_in_the_chart(self):
        one, two = self.child(heartbeat=3.0), self.child(heartbeat=3.0)
        watched = monitor(one)
        with faults(to=one, drop=1):
            down = receive(T)
            self.assertEqual((down.monitor, type(down.reason)), (watched, NodeDown))
            self.assertIsNone(ask(two, try_to_connect, str(one)))
        self.assertIsNone(try_to_connect(one))
        self.assertEqual(ask(one, echo, "healed"), "healed")
        lost = {(r["process"], r["why"]) for r in records(self.traces) if r["event"] == "down"}
        here = f"{local_node().incarnation:016x}"
        self.assertIn((here, f"contact with {one} was lost"), lost)
        self.assertIn(f"contact with {self.node} was lost",
                      {why for process, why in lost if process != here})
        self.assertRegex(chart(self.traces, "text"), r"\n +\d+ [ |]*! .*contact with 127")
        self.assertIn('<g class="event down"', chart(self.traces))

    def test_dropped_messages_are_lost_ones(self):
        target = self.collector(self.child())
        with faults(drop=0.5, seed=3):
            for number in range(20):
                send(number, target)
        kept = self.got(target)
        found = records(self.traces)
        sent = {(r["process"], r["thread"], r["clock"]): r["message"] for r in found
                if r["event"] == "send"}
        lost = {sent[tuple(r["cause"])] for r in found if r["event"] == "lost"}
        self.assertEqual(lost, {repr(n) for n in range(20)} - set(map(repr, kept)))

    def test_off_again_nothing_is_recorded_and_nothing_is_sent_along(self):
        trace(self.traces)
        send("x", current_thread())
        self.assertEqual(receive(0), "x")
        before = records(self.traces)
        trace(None)
        send("y", current_thread())
        self.assertEqual(receive(0), "y")
        self.assertEqual(records(self.traces), before)
        self.assertEqual([r["event"] for r in before[-2:]], ["send", "receive"])

    def test_a_full_disk_ends_the_trace_and_nothing_else(self):
        trace(self.traces)
        full = mock.patch.object(os, "write", side_effect=OSError(28, "No space left"))
        with self.assertLogs("distconc", "WARNING") as logged, full:
            send("x", current_thread())
        self.assertEqual(receive(0), "x")
        self.assertEqual(len(logged.output), 1)
        self.assertIn("No space left", logged.output[0])
        self.assertEqual(records(self.traces), [])

    def test_the_untraced_understand_the_traced(self):
        target = self.collector(self.other, "untraced")
        trace(self.traces)
        send("x", target)
        self.assertEqual(self.got(target, 1), ["x"])
        found = records(self.traces)
        self.assertEqual([r["event"] for r in found[-3:]], ["send", "send", "receive"])
        self.assertNotIn("cause", found[-1])

    def test_the_environment_starts_a_trace(self):
        done = script("send(1, current_thread()); print(receive())", DISTCONC_TRACE=self.traces)
        self.assertEqual((done.out, done.err), ("1\n", ""))
        self.assertEqual([r["event"] for r in records(self.traces)],
                         ["send", "receive"])

    def test_kill_9_loses_no_record(self):
        done = script("send(1, current_thread()); receive(); os.kill(os.getpid(), 9)",
                      DISTCONC_TRACE=self.traces)
        self.assertEqual(abs(done.status), 9)  # on Windows a process has no negative status
        self.assertEqual(len(records(self.traces)), 2)

    @not_on_windows("fork")
    def test_a_forked_child_has_a_trace_of_its_own(self):
        done = script("send(1, current_thread())\nif os.fork() == 0:\n"
                      "    send(2, current_thread()); os._exit(0)\nos.wait()",
                      DISTCONC_TRACE=self.traces)
        self.assertEqual(done.err, "")
        shown = {r["process"]: r["message"] for r in records(self.traces)
                 if r["event"] == "send"}
        self.assertEqual(sorted(shown.values()), ["1", "2"])

    @not_on_windows("fork")
    def test_a_fork_ends_no_adopted_thread_and_waits_for_no_lock_of_one(self):
        done = script("""
import distconc, select, threading
begun, over = threading.Event(), threading.Event()
def guest():
    current_thread()
    with distconc._registry.lock:
        begun.set()
        over.wait()
threading.Thread(target=guest, daemon=True).start()
begun.wait()
pid = os.fork()
if not pid:
    os._exit(0)
print(select.select([os.pidfd_open(pid)], [], [], 20)[0] != [], flush=True)
os.kill(pid, 9)
os._exit(0)
""", DISTCONC_TRACE=self.traces, PYTHONWARNINGS="ignore")
        self.assertEqual(done.out, "True\n", done.err)
        self.assertEqual([r for r in records(self.traces) if r["event"] == "end"], [])

    def test_no_message_is_too_odd_to_be_shown(self):
        trace(self.traces)
        for message in (Odd(), 10**5000, type("array", (), {})(), "\ud800\n<&>", b"x" * 100_000,
                        [[[[[[[1]]]]]]], Mute()):
            send(message, current_thread())
            self.assertIs(receive(0), message)
        self.assertLess(max(len(r.get("message", "")) for r in records(self.traces)), 300)

    @not_on_windows("timer that interrupts")
    def test_ctrl_c_while_a_thread_waits_loses_nothing_while_traced(self):
        trace(self.traces)
        for at in range(20):
            with ctrl_c_storm(distconc._WaitQueue.wait_until):
                self.assertRaises(KeyboardInterrupt, receive, T)
            send(at, current_thread())
            self.assertEqual(receive(T), at)


def fail_quietly_when_asked():
    receive(T)


######## Charts

SHIVIZ = re.compile(r"(?P<host>\S*) (?P<clock>{.*})\n(?P<event>.*)")  # what ShiViz goes by
SVG = "{http://www.w3.org/2000/svg}"
WHAT = "spawn send send receive receive lost down timeout end crash stray restart".split()
STEPS = st.lists(st.tuples(st.sampled_from(WHAT), st.integers(0, 9), st.integers(0, 9)),
                 max_size=40)
ANY = st.none() | st.text() | st.integers() | st.floats() | st.booleans()
FIELDS = {
    "process": st.text(max_size=3), "node": st.text(), "thread": st.integers(),
    "name": st.text(), "clock": st.integers(), "time": st.floats(),
    "event": st.sampled_from(WHAT), "message": st.text(), "to": st.text(),
    "child": st.text(), "error": st.text(), "why": st.text(), "what": st.text(),
    "cause": st.lists(ANY) | st.tuples(st.text(), st.integers(), st.integers())}
CHANGES = st.lists(st.sampled_from(sorted(FIELDS)), max_size=3).flatmap(
    lambda fields: st.fixed_dictionaries(
        {"thread": st.integers(1, 3), **{field: FIELDS[field] | ANY for field in fields}}))


class Execution:
    """Makes the traces of a run, which is valid whatever `do` is told."""

    def __init__(self, directory):
        self.dir, self.records, self.clocks, self.threads, self.sent = directory, [], {}, [], []
        self.runs = [("%016x" % run, f"127.0.0.1:{9000 + run}") for run in range(2)]
        for run in self.runs:
            self.begin(run, "MainThread")

    def begin(self, run, name, cause=None):
        self.threads.append((*run, 1 + len(self.threads), name))
        return self.log(self.threads[-1], "start", cause)

    def log(self, thread, event, cause=None, **about):
        process, node, id, name = thread
        clock = 1 + max(self.clocks.get((process, id), 0), cause[2] if cause else 0)
        self.clocks[process, id] = clock
        record = {"process": process, "node": node, "thread": id, "name": name, "clock": clock,
                  "time": len(self.records) / 8, "event": event, **about}
        self.records.append({**record, "cause": cause} if cause else record)
        return [process, id, clock]

    def do(self, what, who, which):
        """Have thread `who` do something; if none is left, it is done by nobody."""
        if not self.threads:
            return
        thread = self.threads[who % len(self.threads)]
        message = f"<'{len(self.records)}'>"
        if what == "spawn":
            run, name = self.runs[which % len(self.runs)], ("worker", "a b", "w")[which % 3]
            self.begin(run, name, self.log(thread, "spawn", child=name))
        elif what == "send":
            sent = self.log(thread, "send", message=message, to="x")
            self.sent.append((sent, message))
        elif what == "receive" and self.sent:  # which may come twice
            sent, message = self.sent[which % len(self.sent)]
            self.log(thread, "receive", sent, message=message)
        elif what == "lost" and self.sent:
            self.log((*thread[:2], 0, "node"), "lost", self.sent.pop()[0], why="dropped")
        elif what == "stray":  # its cause is in no file
            self.log(thread, "receive", ["ab" * 8, 3, which + 1], message=message)
        elif what == "down":
            self.log((*thread[:2], 0, "node"), "down", why="contact was lost")
        elif what == "timeout":
            self.log(thread, "timeout", what="receive")
        elif what == "restart":
            self.runs.append(("%016x" % len(self.records), thread[1]))
            self.begin(self.runs[-1], "MainThread")
        elif what in ("end", "crash"):
            self.threads.remove(thread)
            self.sent.append((self.log(thread, what, error="E"), "Down"))

    def written(self, *more):
        for path in os.listdir(self.dir):
            os.remove(os.path.join(self.dir, path))
        for record in self.records:
            with open(os.path.join(self.dir, record["process"] + ".jsonl"), "a") as file:
                file.write(json.dumps(record) + "\n")
        return self


def key(record):
    return record["process"], record["thread"], record["clock"]


def happened_before(records):
    """The pasts of all events: what their threads did before, what caused them, its past."""
    pasts, latest = {}, {}
    for record in sorted(records, key=lambda record: record["clock"]):
        past = set()
        for before in latest.get(key(record)[:2]), tuple(record.get("cause") or ()):
            if before in pasts:
                past |= pasts[before] | {before}
        pasts[key(record)] = past
        latest[key(record)[:2]] = key(record)
    return pasts


def in_lamport_order(records):
    return sorted(records, key=lambda record: (
        record["clock"], record["time"], record["process"], record["thread"]))


class Charts(Case):
    def setUp(self):
        super().setUp()
        self.dir = tempfile.mkdtemp(prefix="dc")
        self.addCleanup(shutil.rmtree, self.dir)

    def ran(self, steps):
        execution = Execution(self.dir)
        for step in steps:
            execution.do(*step)
        return execution.written().records

    def lines(self, *lines, name="00.jsonl"):
        with open(os.path.join(self.dir, name), "wb") as file:
            file.writelines(lines)

    def drawn(self, **narrow):
        """Parse a drawing: for each row its title, its events' elements, and its arrow's path."""
        root = ElementTree.fromstring(chart(self.dir, **narrow))
        for row in root.iterfind(f"{SVG}g[@class='row']"):
            events = [group for group in row.iter(SVG + "g") if group is not row]
            yield row.find(SVG + "title").text, events, row.find(f".//{SVG}path[@class='arrow']")

    def arrows(self, **narrow):
        """(x, y) of the two ends of each arrow, and what it says."""
        for title, _, path in self.drawn(**narrow):
            if path is not None:
                x, y, right, down = map(int, re.findall(r"\d+", path.get("d")))
                yield (x, y), (right, down), title

    def marks(self, **narrow):
        """The kind of each event, where it is, and its clock."""
        for title, events, _ in self.drawn(**narrow):
            clocks = re.findall(r" at .*, clock (\d+)(?:\n|$)", title)
            for event, clock in zip(events, clocks[-len(events):]):
                circle = event.find(SVG + "circle")
                yield (event.get("class").split()[1], int(circle.get("cx")),
                       int(circle.get("cy")), int(clock))

    @given(STEPS)
    @settings(deadline=None, max_examples=30)
    def test_no_arrow_points_up_and_each_joins_a_cause_to_its_effect(self, steps):
        records = self.ran(steps)
        keys = set(map(key, records))
        joined = [record for record in records if tuple(record.get("cause") or ()) in keys]
        arrows, marks = list(self.arrows()), list(self.marks())
        check(len(arrows) == len(joined))
        places = {(x, y) for _, x, y, _ in marks}
        check(len(places) == len(marks) == len(records))
        for start, stop, _ in arrows:
            check(start[1] <= stop[1] and {start, stop} <= places)
        lost = [record for record in joined if record["event"] == "lost"]
        check(len(re.findall('"event lost"[^>]*><path class="arrow"', chart(self.dir))) ==
              len(lost))
        for column in {x for _, x, _, _ in marks}:
            own = sorted((clock, y) for _, x, y, clock in marks if x == column)
            check(all(before[1] < after[1] for before, after in zip(own, own[1:])))

    @given(STEPS, st.integers(0, 9), st.booleans())
    @settings(deadline=None, max_examples=30)
    def test_vector_clocks_order_what_happened_before_and_no_more(self, steps, first, mains):
        records = self.ran(steps)
        narrow = {"first": first, "threads": "MainThread" if mains else ()}
        shown = [record for record in in_lamport_order(records) if record["clock"] >= first
                 and (not mains or record["name"] == "MainThread")]
        if not shown:
            self.raised(ValueError, partial(chart, self.dir, "shiviz", **narrow))
            return
        text, pasts = chart(self.dir, "shiviz", **narrow), happened_before(records)
        events = [(host, json.loads(clock)) for host, clock, _ in SHIVIZ.findall(text)]
        check(len(events) == len(shown) and text.count("\n") == 2 * len(shown))
        hosts = {host for host, _ in events}
        threads = {(host, *key(record)[:2]) for (host, _), record in zip(events, shown)}
        check(len(threads) == len(hosts) == len({key(record)[:2] for record in shown}))
        for host in hosts:
            own = [clock[host] for at, clock in events if at == host]
            check(own == list(range(1, len(own) + 1)))
        for (_, early), one in zip(events, shown):
            for (_, late), other in zip(events, shown):
                before = early != late and all(late.get(at, 0) >= early[at] for at in early)
                check(before == (key(one) in pasts[key(other)]), one, other)

    @given(STEPS)
    @settings(deadline=None, max_examples=30)
    def test_text_fits_80_columns_and_no_effect_is_above_its_cause(self, steps):
        records = self.ran(steps)
        lines = chart(self.dir, "text").splitlines()
        columns = len(set(key(record)[:2] for record in records))
        check(max(map(len, lines)) <= max(80, 40 + 2 * columns))
        for record in records:
            if record["event"] == "send":
                told = [at for at, line in enumerate(lines) if record["message"] in line]
                received = [other for other in records if other["event"] == "receive"
                            and other["message"] == record["message"]]
                check(1 <= len(told) <= 1 + len(received), told)
                clock = int(lines[told[0]].split()[0])
                check(clock == record["clock"], lines[told[0]])

    @given(st.lists(CHANGES, max_size=9), st.lists(ANY | st.lists(ANY) | CHANGES), st.binary())
    @settings(deadline=None, max_examples=150)
    def test_whatever_is_in_the_files_is_drawn_or_left_out(self, changes, foreign, rest):
        whole = {"process": "é\ud800", "node": "<&\"'>\n\x00", "thread": 1,
                 "name": " \u2028\ufeff", "clock": 5, "time": 1, "event": "send",
                 "message": "]]>\x1b[2J\ud800\r\n{}" + "x" * 99, "to": "\"><script>\u202e"}
        records = [whole, *({**whole, **change} for change in changes), *foreign]
        self.lines(*(json.dumps(record).encode() + b"\n" for record in records), rest)
        logging.disable(logging.WARNING)
        try:
            check("send" in [kind for kind, *_ in self.marks()])
            check(all(start[1] <= stop[1] for start, stop, _ in self.arrows()))
            lines = chart(self.dir, "text").splitlines()
            check(all(line.isprintable() and len(line) <= 80 for line in lines))
            text = chart(self.dir, "shiviz")
        finally:
            logging.disable(logging.NOTSET)
        events = SHIVIZ.findall(text)
        check(2 * len(events) == text.count("\n") and all(
            json.loads(clock)[host] > 0 for host, clock, _ in events))

    def test_a_damaged_file_is_told_of_once_and_the_rest_is_drawn(self):
        records = self.ran([("send", 0, 0), ("receive", 1, 0)])
        before = chart(self.dir)
        path = os.path.join(self.dir, records[0]["process"] + ".jsonl")
        forged = {**records[0], "clock": 3, "cause": key({**records[0], "clock": 7})}
        with open(path, "ab") as file:
            for bad in b"[" * 99999, b"\xff\x00", b"null", b"{}", json.dumps(forged).encode():
                file.write(bad + b"\n")
            file.write(json.dumps({**records[0], "clock": 9 ** 99}).encode() + b'\n{"proc')
        self.lines(b"\x7fELF\x01\x01\n", name="foreign.jsonl")
        os.mkdir(os.path.join(self.dir, "directory.jsonl"))
        with self.assertLogs("distconc", "WARNING") as logged:
            self.assertEqual(before, chart(self.dir))
        self.assertEqual(2, len(logged.output))
        self.assertIn(f"{path}: 7 of its lines", logged.output[0])
        self.assertIn("foreign.jsonl: 1 of its lines", logged.output[1])

    def test_a_directory_without_traces_and_an_unknown_format_are_refused(self):
        for directory in self.dir, os.path.join(self.dir, "none"):
            error = self.raised(FileNotFoundError, chart, directory)
            self.assertIn(repr(directory), str(error))
        self.ran([])
        self.assertIn("svg, text, shiviz", str(self.raised(ValueError, chart, self.dir, "png")))
        for narrow in {"threads": ["nobody"]}, {"first": 2}, {"last": 0}:
            self.raised(ValueError, partial(chart, self.dir, **narrow))
        self.lines(b"", name="%016x.jsonl" % 0), self.lines(b"", name="%016x.jsonl" % 1)
        for format in "svg", "text", "shiviz":
            self.assertIn("nothing", str(self.raised(ValueError, chart, self.dir, format)))

    def test_text_reads_as_a_student_would_draw_it(self):
        self.ran([("spawn", 0, 1), ("send", 0, 0), ("receive", 2, 0), ("send", 2, 1),
                  ("lost", 2, 0), ("timeout", 0, 0), ("stray", 0, 1), ("spawn", 1, 2),
                  ("send", 3, 0), ("crash", 3, 0), ("receive", 0, 2), ("send", 0, 0),
                  ("down", 0, 0), ("end", 0, 0)])
        self.assertEqual("""\
       127.0.0.1:9000/node
       |     127.0.0.1:9000/MainThread
       |     |     127.0.0.1:9000/w
       |     |     |     127.0.0.1:9001/node
       |     |     |     |     127.0.0.1:9001/MainThread
       |     |     |     |     |     127.0.0.1:9001/a_b
    1        o
    1        |                 o
    1  !     |                 |           contact was lost
    2  |     +---------------------->o     spawns a b
    2  |     |     o<----------+     |     spawns w
    3  |     *---------------------->*     <'4'>
    4  |     ?     |           |     |     receive timed out
    4  |     |     *           |     |     <'12'> to x
    5  |     |     |     x<----------*     <'6'>; lost: dropped
    5  |     *     |     |     |     |     <'9'>
    5  |     *<----X     |     |     |     E; Down
    7  |     *           |     |     |     <'15'> to x
    8  |     =           |     |     |

o start  + spawn  * message  = end  X crash  x lost  ! node lost  ? time-out
""", chart(self.dir, "text"))

    def test_text_draws_what_came_late_or_twice_in_rows_of_its_own(self):
        self.ran([("spawn", 1, 1), ("send", 0, 0), ("send", 0, 0), ("receive", 1, 1),
                  ("receive", 1, 0), ("receive", 2, 1)])
        self.assertEqual("""\
       127.0.0.1:9000/MainThread
       |     127.0.0.1:9001/MainThread
       |     |     127.0.0.1:9001/a_b
    1  o
    1  |     o
    2  |     +---->o     spawns a b
    2  *     |     |     <'4'> to x
    3  *---->*     |     <'5'>
    4  |---------->*     <'5'>
    5  |---->*     |     <'4'>""", chart(self.dir, "text").split("\n\n")[0])

    def test_with_many_threads_text_names_them_all_and_grows_wide_at_last(self):
        self.ran([("spawn", at, at) for at in range(12)] + [("send", 1, 0), ("receive", 0, 0),
                                                            ("crash", 2, 0)])
        lines = chart(self.dir, "text").splitlines()
        for line in """\
       | | | | | 127.0.0.1:9000/w#2
    3  *<------------* |           <'26'>
    5  | X |         | | |         E
   12  |   | | | | | | | | | | +>o spawns w""".splitlines():
            self.assertIn(line, lines)
        self.ran([("spawn", at, at) for at in range(30)] + [("send", 31, 0), ("receive", 0, 0)])
        self.assertRegex(chart(self.dir, "text"), r"\n   32  \*<-{60}\* <'62'>\n")

    def test_a_later_run_of_a_node_has_columns_of_its_own(self):
        self.ran([("restart", 1, 0), ("send", 1, 0), ("receive", 2, 0)])
        drawing = chart(self.dir)
        self.assertIn("<title>127.0.0.1:9001/MainThread#2</title>MainThread#2</text>", drawing)
        (left, _), (right, _), _ = next(self.arrows())
        self.assertLess(left, right)

    def test_a_node_goes_by_the_last_address_it_had_or_by_its_process(self):
        execution = Execution(self.dir)
        execution.threads = [("ab" * 8, "", 1, "late"), ("cd" * 8, "", 1, "mute")]
        execution.runs = execution.threads
        for thread in *execution.threads, ("ab" * 8, "127.0.0.1:7", 1, "late"):
            execution.log(thread, "timeout", what="call")
        execution.written()
        drawing = chart(self.dir, threads=["127.0.0.1:7/late", "process cdcd/mute"])
        self.assertEqual(3, drawing.count("call timed out</text>"))

    def test_a_cause_that_has_a_cause_itself_leaves_its_effect_a_row_of_its_own(self):
        execution = Execution(self.dir)
        one, two, three = ("ab" * 8, "x", 1, "1"), ("ab" * 8, "x", 2, "2"), ("ab" * 8, "x", 3, "3")
        sent = execution.log(one, "send", message="m", to="2")
        for _ in range(2):
            execution.log(two, "timeout", what="receive")
        ended = execution.log(two, "crash", sent, error="E")
        execution.log(three, "receive", ended, message="Down")
        execution.written()
        self.assertEqual(["E\nsend", "Down\ncrash"],
                         [told.split(" at ")[0] for _, _, told in self.arrows()])

    def test_pointing_at_an_arrow_tells_message_sender_receiver_and_both_clocks(self):
        self.ran([("send", 0, 0), ("receive", 1, 0)])
        (_, _, told), = self.arrows()
        self.assertEqual("<'2'>\nsend at 127.0.0.1:9000/MainThread, clock 2\n"
                         "receive at 127.0.0.1:9001/MainThread, clock 3", told)

    def test_words_stand_amid_their_arrow_where_there_is_room_or_at_the_right(self):
        execution = Execution(self.dir)
        one, two = execution.threads
        for message in "short", "long " * 9, "\u4e2d" * 12:
            sent = execution.log(one, "send", message=message, to="x")
            execution.log(two, "receive", sent, message=message)
        execution.written()
        places = re.findall('<text class="(words.*?)" x="([0-9]+)"', chart(self.dir))[2:]
        (left, _), (right, _), _ = next(self.arrows())
        self.assertEqual([("words middle amid", str((left + right) // 2))] + 2 * [
            ("words", places[1][1])], places)
        self.assertGreater(int(places[1][1]), right)

    def test_what_went_wrong_is_told_by_shape_too(self):
        shapes = {kind: mark.shape for kind, mark in distconc._MARKS.items()}
        wrong = [shapes.pop(kind) for kind in ("crash", "lost", "down", "timeout")]
        self.assertEqual(4, len(set(wrong) - set(shapes.values())))

    def test_a_node_has_a_frame_with_its_address_once_and_a_hue_of_its_own(self):
        self.ran([("spawn", 0, 0), ("spawn", 1, 1), ("restart", 1, 0)])
        root = ElementTree.fromstring(chart(self.dir))
        [head] = root.iterfind(f"{SVG}g[@id='head']")
        frames = head.findall(f"{SVG}rect[@class='node']")
        addresses = [text.find(SVG + "title").text for text in head.findall(SVG + "text")
                     if "thread" not in text.get("class")]
        self.assertEqual(["127.0.0.1:9000"] + 2 * ["127.0.0.1:9001"], addresses)
        self.assertEqual(3, len({frame.get("style") for frame in frames}))
        marks = sorted({x for _, x, _, _ in self.marks()})
        within = [sum(int(frame.get("x")) < x < int(frame.get("x")) + int(frame.get("width"))
                      for x in marks) for frame in frames]
        self.assertEqual([2, 2, 1], within)

    def test_threads_and_clocks_narrow_it(self):
        self.ran([("send", 0, 0), ("receive", 1, 0), ("spawn", 1, 3), ("send", 2, 0)])
        self.assertEqual(7, len(list(self.marks())))
        self.assertEqual(3, len(list(self.marks(threads=["127.0.0.1:9001/MainThread"]))))
        self.assertEqual(5, len(list(self.marks(threads=["MainThread"]))))
        self.assertEqual(2, len(list(self.marks(first=2, last=3))))

    def test_no_host_of_shiviz_has_a_blank_in_its_name(self):
        execution = Execution(self.dir)
        for name in "a b", "a_b":
            execution.begin(execution.runs[0], name)
        execution.written()
        hosts = [host for host, _, _ in SHIVIZ.findall(chart(self.dir, "shiviz"))]
        self.assertEqual(["127.0.0.1:9000/a_b", "127.0.0.1:9000/a_b#2"], hosts[2:])

    def test_a_thread_named_like_the_second_of_others_is_another(self):
        for names in ("w", "w", "w#2"), ("w#2", "w", "w"):
            execution = Execution(self.dir)
            for name in names:
                execution.begin(execution.runs[0], name)
            execution.written()
            hosts = [host for host, _, _ in SHIVIZ.findall(chart(self.dir, "shiviz"))]
            self.assertEqual(5, len(set(hosts)), hosts)

    def test_it_says_which_way_it_is_light_and_dark_and_needs_nothing_else(self):
        self.ran([])
        drawing = chart(self.dir)
        self.assertIn("color-scheme: light dark", drawing)
        self.assertEqual(["http://www.w3.org/2000/svg"], re.findall(r"\w+://[^\"\s]+", drawing))

    def test_of_a_thousand_messages_each_of_forty_threads_is_named_once(self):
        self.ran([("spawn", at, at) for at in range(38)] + [
            (what, at * 7, at) for at in range(1000) for what in ("send", "receive")])
        start = perf_counter()
        drawing, marks = chart(self.dir), list(self.marks())
        self.assertLess(perf_counter() - start, WAIT)
        self.assertEqual(2000 + 38 * 2 + 2, len(marks))
        names = re.findall('<text class="thread"[^>]*><title>127.0.0.1:900[01]/', drawing)
        self.assertEqual((40, 2), (len(names), len(re.findall(":900[01]</text>", drawing))))
        for (_, up), (_, down), _ in self.arrows():
            self.assertLessEqual(up, down)


######## Charts in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """A headless Chromium, which is told what to do by its DevTools protocol, in pipes."""

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix="dc")
        orders, self.orders = os.pipe()
        self.answers, answers = os.pipe()
        self.process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" 3<&{orders} 4>&{answers}', "sh", CHROMIUM, "--headless",
             "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
             "--disable-background-networking", "--disable-dev-shm-usage", "--mute-audio",
             f"--user-data-dir={self.directory}"],
            pass_fds=(orders, answers), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, start_new_session=True)
        os.close(orders)
        os.close(answers)
        self.numbers, self.unread, self.events, self.session = itertools.count(1), b"", [], {}
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        self.do("Page.enable")
        self.do("Network.enable")
        self.size(1000, 700)

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.orders)
        os.close(self.answers)
        shutil.rmtree(self.directory, ignore_errors=True)

    def do(self, method, **params):
        """Have a command carried out; return its result."""
        number = next(self.numbers)
        order = {"id": number, "method": method, "params": params, **self.session}
        data = json.dumps(order).encode() + b"\0"
        while data:
            data = data[os.write(self.orders, data):]
        while (message := self.read()).get("id") != number:
            self.events.append(message)
        check("result" in message, method, params, message)
        return message["result"]

    def read(self):
        while b"\0" not in self.unread:
            check(select.select([self.answers], [], [], 3 * WAIT)[0], "the browser is silent")
            data = os.read(self.answers, 1 << 20)
            check(data, "the browser has ended")
            self.unread += data
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def size(self, width, height, scale=1):
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height,
                deviceScaleFactor=scale, mobile=False)

    def open(self, url):
        self.events.clear()
        self.do("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def asked(self):
        """The addresses that were asked for since the page was opened."""
        self.ask("0")
        return [event["params"]["request"]["url"] for event in self.events
                if event.get("method") == "Network.requestWillBeSent"]

    def ask(self, expression):
        """The value of an expression in the script's language."""
        answer = self.do("Runtime.evaluate", expression=expression, returnByValue=True,
                         awaitPromise=True)
        check("exceptionDetails" not in answer, expression, answer)
        return answer["result"].get("value")

    def click(self, x, y):
        for kind in "mousePressed", "mouseReleased":
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40}[key]
        for kind in "keyDown", "keyUp":
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                    windowsVirtualKeyCode=code, **(text if kind == "keyDown" else {}))


ELECTION = """
sys.path.insert(0, sys.argv[1])
from election import member
with start_node(), spawn_node() as one, spawn_node() as two:
    numbers = [4, 1, 6, 2, 5, 3]
    ring = [spawn(member, number, current_thread(), name=f"member {number}", node=node)
            for number, node in zip(numbers, [None, one, two] * 2)]
    for at, thread in enumerate(ring):
        send(("next", ring[(at + 1) % len(ring)]), thread)
    for thread in ring:
        send("elect", thread)
    for _ in ring:
        receive(20)
"""
SNAPSHOT = """
sys.path.insert(0, sys.argv[1])
from snapshot import account
with start_node(), spawn_node() as one, spawn_node() as two:
    accounts = [spawn(account, 100, name=f"account {number}", node=node)
                for number, node in enumerate([None, one, two])]
    for thread in accounts:
        send(("peers", [peer for peer in accounts if peer != thread]), thread)
        send_synchronous("are you ready?", thread, 20)
    for at in range(12):
        send(("pay", at, accounts[(at + 1) % 3]), accounts[at % 3])
    send(("snapshot", 1, current_thread()), accounts[0])
    for at in range(6):
        send(("pay", at, accounts[(at + 2) % 3]), accounts[at % 3])
    for _ in accounts:
        receive(20)
    for thread in accounts:
        send("stop", thread)
        thread.join(20)
"""
NAMES = """[...document.querySelectorAll(".event")].map(element => {
    const lines = element.parentNode.querySelector("title").textContent.split("\\n");
    const events = [...element.parentNode.querySelectorAll(".event")];
    const place = lines[lines.length - events.length + events.indexOf(element)];
    const {x, y, width, height} = element.querySelector("circle").getBoundingClientRect();
    return [place, element.dataset.relation ?? "", x + width / 2, y + height / 2];
})"""


class InABrowser(Case):
    """Charts in Chromium, where it is installed."""

    @classmethod
    def setUpClass(cls):
        if not CHROMIUM:
            raise unittest.SkipTest("no Chromium is installed: charts are tried in no browser")
        cls.browser = Browser()
        cls.addClassCleanup(cls.browser.close)

    def setUp(self):
        super().setUp()
        self.dir = tempfile.mkdtemp(prefix="dc")
        self.addCleanup(shutil.rmtree, self.dir)
        self.browser.size(1000, 700)

    def open(self, directory, **narrow):
        """Save a chart as a file, and open it; return the file's address."""
        path = os.path.join(self.dir, "chart.svg")
        with open(path, "w", encoding="ascii") as file:
            file.write(chart(directory, **narrow))
        self.browser.open("file://" + path)
        return "file://" + path

    def ran(self, steps):
        execution = Execution(os.path.join(self.dir, "traces"))
        os.makedirs(execution.dir, exist_ok=True)
        for step in steps:
            execution.do(*step)
        return execution.written().records

    def relations(self):
        """What each event is to the chosen one, by "kind at label, clock": as shown."""
        return {place: relation for place, relation, _, _ in self.browser.ask(NAMES)}

    def place(self, name):
        """Where an event is in the window, scrolled so that it is in the window."""
        at = [place for place, *_ in self.browser.ask(NAMES)].index(name)
        self.browser.ask(f"document.querySelectorAll('.event circle')[{at}].scrollIntoView("
                         "{block: 'center', inline: 'center'})")
        self.browser.ask("new Promise(requestAnimationFrame)")  # the head has moved, too
        return self.browser.ask(NAMES)[at][2:]

    def assert_pasts_and_futures(self, records, step, **narrow):
        """Click every `step`th event, and compare with what the causes say."""
        self.open(os.path.join(self.dir, "traces"), **narrow)
        shown = self.relations()
        labels = {key(record)[:2]: label for record, label in self.labelled(records)}
        names = {key(record): f"{record['event']} at {labels[key(record)[:2]]}, "
                              f"clock {record['clock']}" for record in records}
        pasts = {names[event]: {names[other] for other in past}
                 for event, past in happened_before(records).items()}
        self.assertLessEqual(set(shown), set(pasts))
        for chosen in list(shown)[::step]:
            self.browser.click(*self.place(chosen))
            found = self.relations()
            for other in shown:
                expected = "concurrent"
                if other == chosen:
                    expected = "chosen"
                elif other in pasts[chosen]:
                    expected = "past"
                elif chosen in pasts[other]:
                    expected = "future"
                self.assertEqual(expected, found[other], (chosen, other))

    def labelled(self, records):
        """Each record with the label of its thread, as ShiViz's form has it."""
        text = chart(os.path.join(self.dir, "traces"), "shiviz")
        return zip(in_lamport_order(records), (host for host, _, _ in SHIVIZ.findall(text)))

    def traced(self, program, name):
        """Run a program with the solution of an exercise; return what was recorded."""
        with open(os.path.join(self.dir, name + ".py"), "w") as file:
            file.write(SOLUTIONS[name])
        traces = os.path.join(self.dir, "traces")
        done = script(program, self.dir, DISTCONC_TRACE=traces)
        self.assertEqual((done.status, done.err), (0, ""))
        return records(traces)

    def test_past_future_and_the_concurrent_of_an_election_are_those_of_its_messages(self):
        self.assert_pasts_and_futures(self.traced(ELECTION, "election"), 4)

    def test_past_future_and_the_concurrent_of_a_snapshot_are_those_of_its_messages(self):
        self.assert_pasts_and_futures(self.traced(SNAPSHOT, "snapshot"), 7)

    def test_they_are_so_where_events_are_left_out_and_causes_are_strange(self):
        for seed in range(4):
            choose = random.Random(seed)
            steps = [(choose.choice(WHAT), choose.randrange(10), choose.randrange(10))
                     for _ in range(40)]
            for narrow in {}, {"first": 3, "last": 9}, {"threads": "MainThread"}:
                with self.subTest(seed=seed, **narrow):
                    self.assert_pasts_and_futures(self.ran(steps), 5, **narrow)

    def chosen(self):
        found = [place for place, relation in self.relations().items() if relation == "chosen"]
        return found[0] if found else None

    def test_keys_walk_along_a_thread_and_a_message_and_escape_clears(self):
        self.ran([("send", 0, 0), ("receive", 1, 0), ("send", 1, 0), ("timeout", 0, 0)])
        self.open(os.path.join(self.dir, "traces"))
        left, right = (f"127.0.0.1:900{run}/MainThread, clock " for run in (0, 1))
        for name, keys in ((f"start at {left}1", "ArrowDown"),
                           (f"send at {left}2", "ArrowDown"),
                           (f"receive at {right}3", "Enter"), (f"send at {left}2", "Enter"),
                           (f"timeout at {left}3", "ArrowDown"),
                           (f"timeout at {left}3", "ArrowDown"),
                           (f"timeout at {left}3", "Enter"), (f"send at {left}2", "ArrowUp"),
                           (f"send at {right}4", "Enter ArrowDown"), (None, "Escape")):
            with self.subTest(keys=keys, to=name):
                for key_ in keys.split():
                    self.browser.press(key_)
                self.assertEqual(name, self.chosen())
        self.assertEqual({""}, set(self.relations().values()))

    def test_a_click_beside_clears_and_one_on_the_words_chooses(self):
        self.ran([("send", 0, 0), ("receive", 1, 0)])
        self.open(os.path.join(self.dir, "traces"))
        self.browser.click(*self.browser.ask("""(() => {
            const {x, y} = document.querySelector(".row:has(.receive) .words").
                getBoundingClientRect();
            return [x + 4, y + 4];
        })()"""))
        self.assertEqual("send at 127.0.0.1:9000/MainThread, clock 2", self.chosen())
        told = self.browser.ask("document.querySelector('#legend').textContent")
        self.assertIn("1 past   1 future   1 concurrent", told)
        self.browser.click(800, 600)
        self.assertIsNone(self.chosen())
        self.assertEqual({""}, set(self.relations().values()))
        told = self.browser.ask("document.querySelector('#legend').textContent")
        self.assertNotIn("past", told)

    def test_arrows_lead_to_the_chosen_event_and_from_there_in_two_colors(self):
        self.ran([("send", 0, 0), ("receive", 1, 0), ("send", 1, 0), ("receive", 0, 1),
                  ("spawn", 0, 0), ("spawn", 1, 1)])
        self.open(os.path.join(self.dir, "traces"))
        self.browser.click(*self.place("receive at 127.0.0.1:9001/MainThread, clock 3"))
        look = """[...document.querySelectorAll(".arrow")].map(arrow =>
            [arrow.dataset.relation, getComputedStyle(arrow).stroke])"""
        arrows = self.browser.ask(look)
        self.assertEqual(["future"] * 3 + ["past"], sorted(relation for relation, _ in arrows))
        self.assertEqual(2, len(set(color for _, color in arrows)))
        self.browser.press("ArrowUp")
        self.assertEqual(["concurrent"] + ["future"] * 3,
                         [relation for relation, _ in self.browser.ask(look)])

    def test_the_head_stays_in_view_and_a_key_shows_where_it_leads(self):
        self.ran([("send", at % 2, 0) for at in range(400)] + [("receive", 1, 0)])
        self.open(os.path.join(self.dir, "traces"))
        head = "(({top, bottom}) => [top, bottom])(document.querySelector('#head')." \
               "getBoundingClientRect())"
        top, bottom = self.browser.ask(head)
        self.browser.click(*self.place("send at 127.0.0.1:9000/MainThread, clock 2"))
        self.browser.press("Enter")
        self.browser.ask("new Promise(requestAnimationFrame)")
        self.assertGreater(self.browser.ask("scrollY"), 7000)
        self.assertEqual([top, bottom], self.browser.ask(head))
        [at] = [y for _, relation, _, y in self.browser.ask(NAMES) if relation == "chosen"]
        self.assertTrue(bottom < at < 690, at)

    def test_nothing_is_asked_of_the_network_and_markup_stays_text(self):
        markup = "<script>window.ran = 1</script><img src=http://127.0.0.1:9/x onerror='ran=1'>"
        path = os.path.join(self.dir, "traces")
        os.mkdir(path)
        for name in markup, f'"/>{markup}', f"]]>{markup}", f"&lt;{markup}</style></title></svg>":
            record = {"process": name, "node": name, "thread": 1, "name": name, "clock": 1,
                      "time": 1, "event": "send", "message": name, "to": name}
            with open(os.path.join(path, "00.jsonl"), "ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
        address = self.open(path)
        self.assertEqual([address], self.browser.asked())
        self.assertEqual(4, self.browser.ask("events.length"))
        for at in range(4):
            self.browser.press("ArrowDown")
        self.assertIsNone(self.browser.ask("window.ran ?? null"))
        self.assertEqual([0, 1, 1], self.browser.ask(
            "['img', 'script', 'style'].map(name => document.getElementsByTagName(name).length)"))
        words = self.browser.ask("[...document.querySelectorAll('.words')].map(words => "
                                 "words.textContent)")
        self.assertEqual(4, sum(markup[:60] in word for word in words), words)

    def test_it_is_readable_in_light_and_dark(self):
        self.ran([("send", 0, 0), ("receive", 1, 0), ("crash", 1, 0), ("down", 0, 0)])
        self.open(os.path.join(self.dir, "traces"))
        self.browser.click(*self.place("receive at 127.0.0.1:9001/MainThread, clock 3"))
        for theme in "light", "dark":
            self.browser.do("Emulation.setEmulatedMedia", features=[
                {"name": "prefers-color-scheme", "value": theme}])
            paper, ink, *others = self.browser.ask("""["#head .sheet fill", "#hint fill",
                "[data-relation=past] color", "[data-relation=future] color",
                ".down color"].map(name => {
                    const [element, property] = name.split(/ (?=\\w+$)/);
                    const color = getComputedStyle(document.querySelector(element))[property];
                    return color.match(/[0-9.]+/g).map(Number);
                })""")
            for color in ink, *others:
                self.assertGreaterEqual(contrast(paper, color), 4.5, (theme, paper, color))
        self.browser.do("Emulation.setEmulatedMedia", features=[])

    def test_a_notebook_shows_each_picture_in_a_frame_of_its_own(self):
        self.ran([("send", 0, 0), ("receive", 1, 0)])
        picture = chart(os.path.join(self.dir, "traces"))
        self.assertIsInstance(picture, str)
        self.assertFalse(hasattr(chart(os.path.join(self.dir, "traces"), "text"), "_repr_html_"))
        path = os.path.join(self.dir, "notebook.html")
        with open(path, "w") as file:
            file.write("<!DOCTYPE html>" + 2 * picture._repr_html_())
        self.browser.open("file://" + path)
        self.assertEqual([4, 4], self.browser.ask(
            "[frames[0], frames[1]].map(frame => frame.document.querySelectorAll('.event').length)"))
        self.browser.click(*self.browser.ask("""(() => {
            const frame = document.querySelector("iframe").getBoundingClientRect();
            const mark = frames[0].document.querySelector(".send").getBoundingClientRect();
            return [frame.x + mark.x + 9, frame.y + mark.y + 9];
        })()"""))
        chosen = "[frames[0], frames[1]].map(frame => frame.document.querySelectorAll(" \
                 "'[data-relation=chosen]').length)"
        self.assertEqual([1, 0], self.browser.ask(chosen))

    def test_ten_thousand_events_are_drawn_in_5_seconds_and_10_megabytes(self):
        self.ran([("spawn", at, at) for at in range(38)] + [
            (what, at * 7, at) for at in range(5000) for what in ("send", "receive")])
        start = process_time()
        picture = chart(os.path.join(self.dir, "traces"))
        self.assertLess(process_time() - start, 5)
        self.assertLess(len(picture), 10_000_000)
        # Without this, Chromium takes five times as long to open it.
        self.assertEqual(SVG + "title", ElementTree.fromstring(picture)[0].tag)
        self.open(os.path.join(self.dir, "traces"))
        self.assertEqual(10_078, self.browser.ask("events.length"))
        self.browser.press("ArrowDown")
        self.assertEqual(1, list(self.relations().values()).count("chosen"))

    def test_a_page_watches_the_traces_grow(self):
        traces = os.path.join(self.dir, "traces")
        process = subprocess.Popen([sys.executable, MODULE, "chart", traces, "--watch"],
                                   text=True, env=environment(), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        self.browser.open(process.stdout.readline().split()[0])
        self.until("document.body.textContent.includes('no traces')")
        self.ran([("send", 0, 0)])
        self.until("events.length === 3")
        self.browser.press("ArrowDown")
        self.browser.press("ArrowDown")
        chosen = self.chosen()
        self.ran([("send", 0, 0), ("receive", 1, 0), ("send", 0, 0), ("spawn", 0, 1)])
        self.until("events.length === 7")
        self.assertEqual(chosen, self.chosen())
        self.ran([("send", 0, 0)] * 300)
        self.until("events.length === 302")
        self.assertGreater(self.browser.ask("scrollY"), 5000)  # it was seen to its end
        self.browser.ask("scrollTo(0, 1000)")
        self.ran([("send", 0, 0)] * 600)
        self.until("events.length === 602")
        self.assertEqual(1000, self.browser.ask("scrollY"))
        asked = {address.split(":")[1] for address in self.browser.asked()}
        self.assertEqual({"//127.0.0.1"}, asked)

    def until(self, condition):
        """Wait until the page says so."""
        self.browser.ask("new Promise(done => { const wait = () => " + condition +
                         " ? done() : setTimeout(wait, 20); wait() })")


def contrast(one, other):
    """The contrast of two colors, by WCAG: 1 to 21."""
    def light(color):
        return sum(weight * ((value / 255 + 0.055) / 1.055) ** 2.4
                   for weight, value in zip((0.2126, 0.7152, 0.0722), color))
    dark, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dark + 0.05)


######## Wrong arguments

NAN, INF, LONG = float("nan"), float("inf"), "x" * 256
HOST_OF_256 = LONG + ":9000"


class Nowhere:
    """Looks like a node that does not listen."""

    address = None


# For each kind of parameter: its wrong values, each with the error that it is.
NO_TIMEOUT = {"'x'": TypeError, "[1]": TypeError, "1j": TypeError, "True": TypeError,
              "NAN": ValueError, "INF": ValueError, "1e300": ValueError, "10**400": ValueError}
NO_BOUND = {**NO_TIMEOUT, "None": TypeError}  # where a wait for ever is wrong, too
NO_FUNCTION = {"None": TypeError, "3": TypeError, "'x'": TypeError, "me": TypeError}
NO_PREDICATE = {"None": TypeError, "5": TypeError, "'x'": TypeError, "b'x'": TypeError,
                "(int, 'x')": TypeError, "(type(None), 'x')": TypeError, "[int]": TypeError,
                "(object, (int, 3))": TypeError, "list[int]": TypeError,
                "(type(None), list[int])": TypeError, "type(None) | list[int]": TypeError,
                "typing.List[int]": TypeError, "typing.Optional[list[int]]": TypeError}
NO_THREAD = {"None": TypeError, "9000": TypeError, "'127.0.0.1:9000/x'": TypeError,
             "threading.current_thread()": TypeError, "unstarted": TypeError,
             "('127.0.0.1', 9000)": TypeError}
NO_NAME = {"3": TypeError, "b'x'": TypeError, "['x']": TypeError, "''": ValueError,
           "LONG": ValueError}
NO_ID = {**NO_NAME, "1.5": TypeError, "True": TypeError, "None": TypeError, "0": ValueError,
         "-1": ValueError, "1 << 64": ValueError}
del NO_ID["3"]
NO_NODE = {value: ValueError for value in (
    "-1", "70000", "1.5", "True", "''", "'host'", "'host:70000'", "'host:-1'", "'host:x'",
    "HOST_OF_256", "'a b:9000'", "'a\\nb:9000'", "'a\\0b:9000'", "'::1:9000'", "('::1', 9000)",
    "('h', True)", "('h', '9000')", "('h', 70000)", "('h', -1)", "('h',)", "('h', 1, 2)",
    "(9000, 'h')", "(None, 9000)", "(b'h', 9000)", "b'h:9000'", "'/tmp/a\\0b'", "{}", "thing")}
NO_ADVERTISED_NODE = {**NO_NODE, "0": ValueError, "('h', 0)": ValueError, "'h:0'": ValueError}
del NO_ADVERTISED_NODE["'host'"], NO_ADVERTISED_NODE["''"]
NO_DIALLED_NODE = {**NO_NODE, "None": ValueError, "me": ValueError}
NO_KEY = {"[]": TypeError, "[1]": TypeError, "(1, 2)": TypeError, "range(20)": TypeError,
          "bytearray(20)": TypeError, "memoryview(bytes(20))": TypeError, "20": TypeError,
          "0": TypeError, "True": TypeError, "b''": ValueError, "''": ValueError}
NO_SECONDS = {"'x'": TypeError, "None": TypeError, "True": TypeError, "[]": TypeError,
              "NAN": ValueError, "INF": ValueError, "0": ValueError, "-1": ValueError,
              "10**400": ValueError}
NO_SIZE = {"1.5": TypeError, "1e6": TypeError, "True": TypeError, "None": TypeError,
           "'x'": TypeError, "0": ValueError, "-1": ValueError, "1 << 40": ValueError}
NO_PROBABILITY = {"'x'": TypeError, "None": TypeError, "True": TypeError, "NAN": ValueError,
                  "-1": ValueError, "2": ValueError, "INF": ValueError}
NO_DELAY = {**NO_PROBABILITY, "1e300": ValueError}
del NO_DELAY["2"]
NO_DIRECTORY = {"''": ValueError, "'a\\0b'": ValueError, "3": TypeError, "True": TypeError,
                "[]": TypeError}
NO_BYTES = {"None": TypeError, "'x'": TypeError, "3": TypeError}

# Each parameter of each public name, in the contract's order: the call, with {} in its place,
# its wrong values, and a word of the error's text (none: it shows the value itself).
WRONG_CALLS = [
    ("Mailbox().get({})", NO_TIMEOUT, ""),
    ("Mailbox().get_if({}, 0)", NO_PREDICATE, "messages? "),
    ("Mailbox().get_if(int, {})", NO_TIMEOUT, ""),
    ("Mailbox().get_all({})", NO_TIMEOUT, ""),
    ("Thread({})", NO_NAME, ""),
    ("other.join({})", NO_TIMEOUT, ""),
    ("RemoteThread({}, 'x')", NO_DIALLED_NODE, ""),
    ("RemoteThread({}, 'x')", {"nowhere": ValueError}, "not a node"),
    ("RemoteThread(9000, {})", NO_ID, ""),
    ("RemoteThread(9000, 'x', {})", {"'x'": TypeError, "True": TypeError}, "incarnation"),
    ("far.join({})", NO_TIMEOUT, ""),
    *((f"{spawning}({call}", values, word)
      for spawning in ("spawn", "spawn_linked", "spawn_server")
      for call, values, word in (
          ("{})", NO_FUNCTION, ""),
          ("print, name={})", NO_NAME, ""),
          ("print, register={})", {"'logger'": TypeError, "3": TypeError}, ""),
          ("print, node={})", NO_NODE, ""),
          ("print, name={}, node=9000)", NO_NAME, ""),
          ("print, bogus={})", {"1": TypeError}, f"{spawning}.*bogus"))),
    ("send(1, {})", NO_THREAD, ""),
    ("receive({})", NO_TIMEOUT, ""),
    ("receive({}, 'default')", NO_TIMEOUT, ""),
    ("receive_if({})", NO_PREDICATE, "messages? "),
    ("receive_if(object, {})", NO_TIMEOUT, ""),
    ("Synchronous(1, {}, 't')", NO_THREAD, ""),
    ("Synchronous(1, me, {})", {"3": TypeError, "None": TypeError, "b't'": TypeError}, ""),
    ("Reply(1, {})", {"3": TypeError, "None": TypeError, "b't'": TypeError}, ""),
    ("send_synchronous(1, {})", NO_THREAD, ""),
    ("send_synchronous(1, far, {})", NO_TIMEOUT, ""),
    ("reply_synchronous(1, {})", NO_THREAD, ""),
    ("handle_synchronous({})", NO_FUNCTION, ""),
    ("handle_synchronous(print, {})", NO_TIMEOUT, ""),
    ("start_node({})", NO_NODE, ""),
    ("start_node(authkey={})", NO_KEY, "authkey"),
    ("start_node(None, authkey={})", NO_KEY, "authkey"),
    ("start_node(advertise={})", NO_ADVERTISED_NODE, ""),
    ("start_node(heartbeat={})", NO_SECONDS, "heartbeat"),
    ("start_node(connect_timeout={})", NO_SECONDS, "connect_timeout"),
    ("start_node(None, connect_timeout={})", NO_SECONDS, "connect_timeout"),
    ("start_node(max_message={})", NO_SIZE, "max_message"),
    ("start_node(bogus={})", {"1": TypeError}, "start_node.*bogus"),
    ("stop_node({})", NO_BOUND, ""),
    ("local_node().stop({})", NO_BOUND, ""),
    ("connect({})", NO_DIALLED_NODE, ""),
    ("disconnect({})", NO_DIALLED_NODE, ""),
    ("spawn_node({})", NO_DIALLED_NODE, ""),
    ("spawn_node(authkey={})", NO_KEY, "authkey"),
    ("spawn_node(heartbeat={})", {"NAN": ValueError}, "heartbeat"),
    ("spawn_node(max_message={})", {"True": TypeError}, "max_message"),
    ("spawn_node(bogus={})", {"1": TypeError}, "start_node.*bogus"),
    ("register_remote_thread({})", NO_THREAD, ""),
    ("register_remote_thread({})", {"far": TypeError}, "this node"),
    ("register_remote_thread(me, {})", NO_NAME, ""),
    ("unregister_remote_thread({})", {"None": TypeError, "3": TypeError, "['x']": TypeError,
                                      "'nobody'": NoSuchThread}, ""),
    ("get_remote_thread({})", {"None": TypeError, "1.5": TypeError, "True": TypeError,
                               "[]": TypeError, "b'x'": TypeError, "'nobody'": NoSuchThread,
                               "-5": NoSuchThread}, ""),
    ("serialize({})", {"threading.Lock()": SerializationError}, "lock"),
    ("deserialize({})", NO_BYTES, "bytes-like"),
    ("Monitor(me, {})", {"3": TypeError, "None": TypeError}, ""),
    ("Down({}, me, None)", {"None": TypeError, "3": TypeError, "me": TypeError}, ""),
    ("Down(Monitor(me, 't'), me, {})", {"3": TypeError, "'x'": TypeError}, ""),
    ("monitor({})", NO_NODE | {"None": ValueError, "unstarted": ValueError}, ""),
    ("demonitor({})", {"None": TypeError, "3": TypeError, "me": TypeError}, ""),
    ("trace({})", NO_DIRECTORY, ""),
    ("trace({})", {"file": FileExistsError}, ""),
    ("chart({})", {"None": TypeError, "3": TypeError}, "PathLike"),
    ("chart({})", {"file": FileNotFoundError, "directory": FileNotFoundError,
                   "directory + '/no'": FileNotFoundError}, ""),
    ("chart(directory, {})", {"'png'": ValueError, "None": ValueError, "[]": ValueError}, ""),
    ("chart(directory, first={})", {"'x'": TypeError, "None": TypeError}, "first"),
    ("chart(directory, last={})", {"'x'": TypeError, "None": TypeError}, "last"),
    ("chart(directory, threads={})", {"3": TypeError, "[3]": TypeError}, "threads"),
    ("faults(to={})", NO_NODE | {"nowhere": ValueError}, ""),
    ("faults(drop={})", NO_PROBABILITY, "drop"),
    ("faults(duplicate={})", NO_PROBABILITY, "duplicate"),
    ("faults(delay={})", NO_DELAY, "delay"),
    ("faults(seed={})", {"[]": TypeError, "{}": TypeError, "(1, 2)": TypeError,
                         "object()": TypeError}, "seed"),
]


class WrongArguments(Case):
    """A wrong argument is an error at once, at its maker, with nothing half done."""

    def test_wrong_arguments_are_refused_at_once_and_leave_nothing_behind(self):
        stop_node()
        directory = tempfile.mkdtemp(prefix="dc")
        self.addCleanup(shutil.rmtree, directory)
        file = os.path.join(directory, "file")
        open(file, "w").close()
        other = spawn(idle)
        self.addCleanup(end, other)
        names = {**globals(), "me": self.me, "far": RemoteThread(9, "x"), "other": other,
                 "unstarted": threading.Thread(), "thing": object(), "nowhere": Nowhere(),
                 "directory": directory, "file": file}
        for call, values, word in WRONG_CALLS:
            for value, error in values.items():
                with self.subTest(call=call, value=value):
                    self.check_row(call.format(value), error, word, value, names)

    def check_row(self, call, error, word, value, names):
        message = object()
        send(message, self.me)
        before = self.all_there_is(names["directory"])
        raised = outcome(eval, call, names)
        after = self.all_there_is(names["directory"])
        stop_node()
        self.assertIs(receive(0), message)
        self.assertIsInstance(raised, error)
        self.assertEqual(before, after)
        shown = re.escape(outcome(repr, eval(value, names))[:60])
        self.assertRegex(str(raised), word or shown)
        self.assertNotRegex(str(raised), r"\b_[a-z]\w*\(", "it names a private function")

    def all_there_is(self, directory):
        node = distconc._process.node
        runs = node is not None and node._is_started and not node._stopped
        return (set(threading.enumerate()), threads(), distconc._registry.by_name.copy(), runs,
                distconc._pending._by_tag.copy(), distconc._faults._entered,
                distconc._tracer.directory, os.listdir(directory), census()[1])


######## The shell


def compute(enough):
    while not enough:
        pass


class Shell(Net):
    """python3 distconc.py …"""

    def assert_one_line(self, result, *words, status=(1, 2)):
        self.assertIn(result.status, status, result.err)
        self.assertEqual(len(result.err.strip().splitlines()), 1, result.err)
        self.assertNotIn("Traceback", result.err)
        for word in words:
            self.assertIn(word, result.err)

    def test_the_demo_runs_on_two_processes_and_ends_well(self):
        result = shell("demo")
        self.assertEqual(result.status, 0, result.err)
        self.assertEqual(result.err, "")
        self.assertRegex(result.out, r"hello")
        self.assertRegex(result.out, r"RemoteThread\(")
        self.assertEqual(len(set(re.findall(r"pid (\d+)", result.out))), 2)
        self.assertRegex(result.out, r"\*-+>\* +'hello'")
        self.assertLessEqual(max(map(len, result.out.splitlines())), 80)

    def test_the_demo_is_traced_to_where_the_environment_says(self):
        shell("demo", DISTCONC_TRACE=self.dir)
        self.assertEqual(len({record["process"] for record in records(self.dir)}), 2)
        result = shell("chart", self.dir, "--format", "text", "--thread", "logger",
                       "--thread", "nobody")
        self.assertEqual(result.status, 0, result.err)
        self.assertIn("'hello'", result.out)
        self.assertNotIn("shouter", result.out)
        path = os.path.join(self.dir, "chart.svg")
        result = shell("chart", self.dir, "-o", path, "--from", "2", "--to", "6")
        self.assertEqual((result.status, result.out, result.err), (0, "", ""))
        ElementTree.parse(path)

    def test_a_watched_chart_is_served_to_those_who_know_its_path_until_ctrl_c(self):
        name = "&b" if ON_WINDOWS else "<b>\n"  # Windows has no such names
        line = name.replace("\n", "\\n")
        traces = os.path.join(self.dir, name)
        for options in ("-o", "x"), ("--format", "text"):
            self.assert_one_line(shell("chart", traces, "--watch", *options), "--watch")
        process = self.start("chart", traces, "--watch")
        told = process.stdout.readline()
        self.assertRegex(told, r"^http://127\.0\.0\.1:\d+/[0-9a-f]{32}/ shows .*"
                         + re.escape(line) + "; Ctrl-C")
        host, path = re.match(r"http://(.+?)(/\S+)", told).groups()

        def ask(path, **headers):
            connection = http.client.HTTPConnection(host, timeout=T)
            with contextlib.closing(connection):
                connection.request("GET", path, headers=headers)
                answer = connection.getresponse()
                return answer.status, answer.read().decode(), answer.headers["ETag"]

        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", int(host.partition(":")[2])), T)
        for wrong in "/", "/drawing", path[:-2] + "/", path + "x", path + "../../etc/passwd":
            self.assertEqual(404, ask(wrong)[0], wrong)
        status, page, _ = ask(path)
        self.assertEqual(200, status)
        self.assertIn(f"{html.escape(line)}</title>", page)
        status, drawing, none_yet = ask(path + "drawing")
        self.assertEqual(200, status)
        self.assertRegex(drawing, f"^<p>there are no traces .*{html.escape(name[:3])}")
        os.mkdir(traces)
        Execution(traces).written()
        status, drawing, version = ask(path + "drawing", **{"If-None-Match": none_yet})
        self.assertEqual((200, chart(traces)), (status, drawing))
        self.assertEqual((304, "", version), ask(path + "drawing", **{"If-None-Match": version}))
        if not ON_WINDOWS:  # which has no SIGINT for one process
            self.assert_ctrl_c(process)

    def test_ps_lists_the_threads_of_a_node_and_what_they_do(self):
        enough = []
        busy, kept = self.here(compute, enough, name="busy"), self.here(hold, name="kept")
        self.addCleanup(enough.append, True)
        send("unread", busy)
        lines = shell("ps", self.node).out.splitlines()
        self.assertEqual(lines[0].split(), ["id", "name", "registered", "unread", "age", "in"])
        shown = {line.split()[0]: line for line in lines[1:]}
        self.assertEqual(set(shown), set(map(str, threads())))
        self.assertRegex(shown[str(busy.id)], r"^\d+ +busy +busy +1 +\d+ s +running at \w+.py")
        self.assertRegex(shown[str(kept.id)], r" 0 +\d+ s +receive_if at test_\w+.py:\d+$")
        kept.send("end")

    def test_the_demo_runs_without_any_key_set(self):
        result = shell("demo", HOME=self.dir, DISTCONC_AUTHKEY=None)
        self.assertEqual((result.status, result.err), (0, ""))

    def test_key_prints_a_random_key_that_is_good_for_any_address(self):
        keys = [shell("key").out.strip() for _ in range(2)]
        for key in keys:
            self.assertRegex(key, "^[0-9a-f]{32}$")
            self.assertEqual(distconc._find_key(key, ("10.0.0.1", 1)), key.encode())
        self.assertNotEqual(*keys)

    def test_send_delivers_a_literal(self):
        kept = self.here(collect, name="kept")
        for message in (("hello", 1), "hello", {"a": [None, 1.5]}):
            result = shell("send", f"{self.node}/kept", repr(message))
            self.assertEqual((result.status, result.err), (0, ""))
        self.assertEqual(shell("send", f"{self.node}/{kept.id}", "7").status, 0)
        self.assertEqual(shell("send", f"{self.node.address[1]}/kept", "8").status, 0)
        self.assertEqual(self.got(kept), [("hello", 1), "hello", {"a": [None, 1.5]}, 7, 8])

    def test_send_to_a_misspelt_name_names_the_near_one(self):
        self.here(collect, name="kitchen")
        for command in "send", "call":
            result = shell(command, f"{self.node}/kitchn", "1")
            self.assert_one_line(result, "'kitchn'", "'kitchen'", status=(1,))

    def test_call_prints_the_reply(self):
        server = spawn_server(handle_synchronous, echo, name="echo", register=True)
        result = shell("call", f"{self.node}/echo", "{'a': (1, 'b')}")
        self.assertEqual((result.out, result.err, result.status), ("{'a': (1, 'b')}\n", "", 0))
        unregister_remote_thread("echo")
        del server

    def test_what_goes_wrong_is_one_line(self):
        file, no_path, no_room = self.mark(), "no node listens", "already in use"
        if ON_WINDOWS:
            no_path, no_room = "AF_UNIX is not recognized", "does a node run there?"
        with open(file, "w"):
            pass
        self.here(collect, name="kept")
        hush, target = self.here(hold, name="mute"), f"{self.node}/kept"
        for words, result in (
                (["no node listens"], shell("send", f"127.0.0.1:{free_port()}/x", "1")),
                ([no_path], shell("call", f"{self.dir}/none/x", "1")),
                (["no node listens"], shell("ps", free_port())),
                (["no traces"], shell("chart", self.dir)),
                (["key"], shell("send", target, "1", DISTCONC_AUTHKEY="wrong")),
                (["key"], shell("call", target, "1", DISTCONC_AUTHKEY="wrong")),
                (["literal"], shell("send", target, "hello")),
                (["literal"], shell("call", target, "open('x')")),
                (["literal", "\"'hello'\""], shell("send", target, "it's")),
                (["literal"], shell("send", target, "{[]: 1}")),
                (["literal"], shell("send", target, "1+" * 5_000 + "1")),
                (["x\\ny"], shell("send", f"{self.node}/x\ny", "1")),
                (["node ADDRESS"], shell("node", MODULE)),
                (["DISTCONC_TRACE"], shell("demo", DISTCONC_TRACE=file)),
                (["127.0.0.1:9000/logger"], shell("send", "nonsense", "1")),
                ([], shell("send", "a:b:c/x", "1")), ([], shell("send", ":99999/x", "1")),
                (["seconds"], shell("call", f"{self.node}/mute", "1", "--timeout", "0.2")),
                ([no_room], shell("node", self.node)),
                ([], shell("send", target, "1", DISTCONC_AUTHKEY=""))):
            with self.subTest(words, err=result.err):
                self.assert_one_line(result, *words)
        self.assertEqual(self.got(RemoteThread(self.node, "kept")), [])
        hush.send("end")

    def test_wrong_usage_and_help(self):
        for words in ([], ["nonsense"], ["send"], ["send", "x"], ["call", "a/b", "1", "2"],
                      ["call", "a/b", "1", "--timeout", "soon"], ["demo", "x"]):
            with self.subTest(words):
                result = shell(*words)
                self.assertEqual(result.status, 2)
                self.assertNotIn("Traceback", result.err)
                self.assertIn("usage", result.err)
        self.assertEqual(shell("--version").out, f"{distconc.__version__}\n")
        for words in [], ["demo"], ["node"], ["send"], ["call"], ["ps"], ["chart"], ["key"]:
            with self.subTest(words):
                result = shell(*words, "--help")
                self.assertEqual((result.status, result.err), (0, ""))
                self.assertIn("usage", result.out)

    def start(self, *args, stdin=subprocess.DEVNULL):
        process = subprocess.Popen([sys.executable, MODULE, *map(str, args)], text=True,
                                   env=environment(), stdin=stdin, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    @not_on_windows("SIGINT for one process")
    def test_a_node_runs_a_script_and_stays_up_after_it(self):
        path = os.path.join(self.dir, "script.py")
        with open(path, "w") as file:
            file.write("from distconc import *\nimport os\n"
                       "spawn_server(handle_synchronous, str.upper, name='up', register=True)\n"
                       "print('ran', __name__, os.path.basename(__file__), flush=True)\n")
        process = self.start("node", 0, path)
        address = re.search(r"\d+\.\d+\.\d+\.\d+:\d+", process.stdout.readline())[0]
        self.assertEqual(process.stdout.readline(), "ran __main__ script.py\n")
        self.assertEqual(send_synchronous("up", RemoteThread(address, "up"), T), "UP")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=T)
        self.assertEqual((process.returncode, err), (130, ""))

    def test_a_script_is_run_as_python_would(self):
        for name, text in ("beside.py", "word = 'beside'\n"), ("script.py", """if True:
                import beside, pickle, sys
                class Point: pass
                print(beside.word, sys.argv, pickle.loads(pickle.dumps(Point())).__class__)
                def fail(): raise ValueError("in the script")
                fail()
                """):
            with open(os.path.join(self.dir, name), "w") as file:
                file.write(textwrap.dedent(text))
        result = shell("node", 0, os.path.join(self.dir, "script.py"))
        self.assertEqual(result.status, 1)
        self.assertEqual(result.out.splitlines()[1:], [
            f"beside {[os.path.join(self.dir, 'script.py')]} <class '__main__.Point'>"])
        lines = result.err.splitlines()
        self.assertEqual((lines[0][:9], lines[-1]), ("Traceback", "ValueError: in the script"))
        self.assertNotIn("distconc", result.err)

    def test_any_text_can_be_printed_and_drawn_in_any_encoding(self):
        spawn_server(handle_synchronous, echo, name="é", register=True)
        self.here(hold, name="X\n\x1b[31mred")
        for encoding in "ascii", "latin-1":
            args = {"PYTHONIOENCODING": encoding, "DISTCONC_TRACE": self.dir}
            called = subprocess.run([sys.executable, MODULE, "call", f"{self.node}/é", "'é€'"],
                                    env=environment(**args), capture_output=True)
            self.assertEqual((called.returncode, called.stderr), (0, b""))
            self.assertEqual(ast.literal_eval(called.stdout.decode(encoding)), "é€")
            listed = subprocess.run([sys.executable, MODULE, "ps", str(self.node)],
                                    env=environment(**args), capture_output=True)
            self.assertEqual(listed.stdout.count(b"\n"), 1 + len(threads()))
            drawn = subprocess.run([sys.executable, MODULE, "chart", self.dir],
                                   env=environment(**args), capture_output=True)
            self.assertIn("é€", "".join(ElementTree.fromstring(drawn.stdout).itertext()))
        unregister_remote_thread("é")
        get_remote_thread("X\n\x1b[31mred").send("end")

    def test_a_node_has_a_prompt_with_all_names(self):
        process = self.start("node", stdin=subprocess.PIPE)
        out, err = process.communicate(
            "t = spawn_server(handle_synchronous, str.upper, name='upper', register=True)\n"
            "print(send_synchronous('up', RemoteThread(local_node(), 'upper'), 20))\n"
            "1 / 0\nprint(NoSuchThread.__name__, monitor.__name__, len(dir()) < 65)\n", timeout=T)
        self.assertEqual(process.returncode, 0)
        self.assertIn("UP", out)
        self.assertIn("NoSuchThread monitor True", out)
        self.assertIn("ZeroDivisionError", err)

    def assert_ctrl_c(self, process):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=T)
        self.assertEqual((process.returncode, out, err), (130, "", ""))

    @not_on_windows("SIGINT for one process")
    def test_ctrl_c_ends_quietly_with_130(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            process = self.start("send", "127.0.0.1:%d/x" % silent.getsockname()[1], "1")
            silent.settimeout(T)
            knocked, _ = silent.accept()
            self.assert_ctrl_c(process)
            knocked.close()
        self.here(pass_on, current_thread(), name="mute")
        process = self.start("call", f"{self.node}/mute", "1", "--timeout", "60")
        self.assertIsInstance(receive(T), Synchronous)
        self.assert_ctrl_c(process)


######## The documents, executed
#
# Every fenced block of tutorial.md and README.md is run, in order, and what it shows compared.
# The words after its language say how:
#
#   pycon A              a session in terminal A.  What follows `$ `, `>>> ` and `... ` is typed
#                        there, so is `^C`; all else must be shown, and no more.  It ends when
#                        the terminal asks for more; `pycon A waits` when all is shown (what
#                        comes after that, a later block may begin with).
#   python logger.py     a file, saved under that name.
#   python A [2>...]     a program, run in terminal A until it ends.
#   ... not run: WHY     skipped aloud; with `not run without X: WHY`, run where there is X.
#   python check echo    and `skeleton`: of an exercise; these have tests of their own.
#
# A terminal is a process, its keys a pty's, its screen a pipe.  A chapter (a `## `) has its own
# terminals and directory, key included, with all files of earlier chapters.  A prompt may come
# before, after or amid what other threads print: its place is not compared.  In what is shown,
# `...` stands for what varies in a line, and indented and alone for any lines; pids, ports of
# five digits, and tags may be any.  Ports 9000 to 9009 are others while this runs.

DOCUMENTS = [os.path.join(HERE, name) for name in ("README.md", "tutorial.md")]
TRACEBACK = "Traceback (most recent call last):"
TYPED = re.compile(r"(\$ |>>> |\.\.\. |\.\.\.$|\^C$)(.*)")


@dataclass
class Block:
    """A fenced block: where it stands, how it is run, its lines."""

    path: str
    number: int
    language: str
    how: str
    lines: list

    def is_file(self):
        return re.fullmatch(r"\S+\.\w+", self.how)

    def place(self, number):
        return f"{os.path.basename(self.path)}:{number}"

    def steps(self):
        """Yield (number, prompt, what is typed, [what is shown then])."""
        step = self.number, "", "", []
        for number, line in enumerate(self.lines, self.number + 1):
            typed = TYPED.match(line)
            if typed and (line[:3] != "..." or step[1] in (">>> ", "... ")):
                yield step
                prompt = "... " if line[:3] == "..." else typed[1]
                step = number, prompt, typed[2], []
            else:
                step[3].append(line)
        yield step


def chapters(path):
    """Yield (title, blocks) for each `## ` of a document, and for what is before the first."""
    title, blocks, fence = "start", [], None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(map(str.rstrip, file), 1):
            if fence:
                if line == "```":
                    blocks.append(fence)
                    fence = None
                else:
                    fence.lines.append(line)
            elif line.startswith("```"):
                language, _, how = line[3:].partition(" ")
                fence = Block(path, number, language, how, [])
            elif line.startswith("## "):
                yield title, blocks
                title, blocks = line[3:], []
            elif line.startswith("    "):
                raise ValueError(f"{path}:{number}: a block without a fence is not run")
    yield title, blocks


def pattern(lines):
    """Compile what the shown `lines` may be."""
    def one(line):
        if line.strip() == "..." and line != "...":
            return r"(?:.*\n)*?"
        if line == TRACEBACK:
            # Before it, Python 3.14 shows an error without lines that led to it.
            return rf"(?:\w+Error: .*\n(?:.*\n)*?)?{re.escape(line)}\n"
        line = re.escape(line).replace(r"\.\.\.", ".*?")
        for varies in r"(?<=pid\\ )\d+", r"(?<=127\\\.0\\\.0\\\.1:)\d{5}", "[0-9a-f]{16}":
            line = re.sub(varies, lambda _: varies.rpartition(")")[2], line)
        return line + r"\n"
    return re.compile("".join(map(one, lines)))


class Terminal:
    """What a reader has before him: a screen, keys, at most one running program."""

    def __init__(self, environment, directory, ports):
        self.environment, self.directory, self.ports = environment, directory, ports
        self.process, self.ended, self.asks, self.got = None, True, "$ ", b""

    def screen(self):
        written = {real: written for written, real in self.ports.items()}
        return re.sub(r"\b9\d\d\d\b", lambda port: written.get(port[0], port[0]),
                      self.got.decode(errors="replace"))

    def type(self, prompt, text):
        if prompt == "^C":
            os.killpg(self.process.pid, signal.SIGINT)
        elif prompt == "$ ":
            self.start(rewritten(text, self.ports))
        else:
            os.write(self.keys, rewritten(text, self.ports).encode() + b"\n")
        self.asks = None

    def start(self, command):
        self.close()
        self.keys, line = pty.openpty()
        tty.setraw(line)  # without an echo
        self.process = subprocess.Popen(
            command, shell=True, stdin=line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=self.environment, cwd=self.directory, start_new_session=True)
        os.close(line)
        self.ended = False

    def read(self, done):
        """Read until `done()`; return whether it came to that."""
        end = monotonic() + WAIT
        while not done():
            left = max(0, end - monotonic())
            if self.ended or not select.select([self.process.stdout], [], [], left)[0]:
                return False
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            self.got += data
            self.ended = not data
        return True

    def wait_to_ask(self, prompt):
        """Wait until the terminal asks with `prompt` ("$ ": until nothing runs; "": either)."""
        shown = (prompt if prompt.strip() else ">>> ").encode()
        if not self.asks:
            self.read(lambda: self.ended or prompt != "$ " and shown in self.got)
            self.asks = "$ " if self.ended else shown.decode() if shown in self.got else None
            self.got = self.got if self.ended else self.got.replace(shown, b"", 1)
        return self.asks == prompt or bool(self.asks and not prompt)

    def shows(self, fits):
        """Wait until the screen fits, and clear it."""
        holds = self.read(lambda: fits.fullmatch(self.screen()))
        self.got = b"" if holds else self.got
        return holds

    def close(self):
        """End what runs; what it showed until then is on the screen."""
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.read(lambda: self.ended)
            with self.process:
                self.process = None
            os.close(self.keys)


def rewritten(text, ports):
    return re.sub(r"\b900\d\b", lambda port: ports[port[0]], text)


def quiet_ports(count):
    """Ports in a row, near to those written: a chart may cut them short."""
    while True:
        first = random.randrange(9010, 9990)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return range(first, first + count)


@not_on_windows("terminals of the kind that tests can type into")
class Documents(unittest.TestCase):
    """A test for each chapter of README.md and tutorial.md, made below."""

    def run_chapter(self, files, blocks):
        self.directory, self.terminals = tempfile.mkdtemp(prefix="dc"), {}
        self.addCleanup(shutil.rmtree, self.directory)
        ports = quiet_ports(10)
        self.ports = {str(9000 + at): str(port) for at, port in enumerate(ports)}
        shutil.copy(MODULE, self.directory)
        # For `make check`.
        for name in "README.md", TUTORIAL, "Makefile", os.path.basename(__file__):
            shutil.copy(os.path.join(HERE, name), self.directory)
        self.save("bin/python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        self.save("lib/sitecustomize.py", "import sys\nsys.stdout.reconfigure("
                                          "line_buffering=True)  # as on a terminal\n")
        os.chmod(os.path.join(self.directory, "bin/python3"), 0o700)
        self.environment = {name: value for name, value in environment().items()
                            if not name.startswith(("DISTCONC", "PYTHONPATH"))}
        self.environment.update(
            ERL_FLAGS=f"-start_epmd false -erl_epmd_port {self.ports['9000']}",
            HOME=self.directory, PYTHON_BASIC_REPL="1", TERM="dumb", NO_COLOR="1",
            PYTHONPATH=os.path.join(self.directory, "lib"),
            PATH=os.path.join(self.directory, "bin") + os.pathsep + os.environ["PATH"])
        for block in files + blocks:
            if block.is_file():
                self.save(block.how, "\n".join(block.lines) + "\n")
            elif block not in files:
                self.run_block(block)
        for name, terminal in self.terminals.items():
            terminal.close()
            self.assertRegex(terminal.screen(), r"\A(>>> )?\Z", f"left on terminal {name}")

    def test_every_private_name_in_the_tutorials_prose_exists(self):
        with open(os.path.join(HERE, "tutorial.md"), encoding="utf-8") as file:
            text = file.read()
        text = re.sub(r"```.*?\n```", "", text, flags=re.S)
        names = [name for name in re.findall(r"`((?:\w+\.)?_\w+)`", text) if "__" not in name]
        self.assertIn("Mailbox._put", names)
        for name in names:
            self.assertTrue(operator.attrgetter(name)(distconc), name)

    def test_every_function_on_the_way_of_a_message_exists(self):
        with open(MODULE, encoding="utf-8") as file:
            text = file.read().split("######## The way of a message")[1].split("########")[0]
        steps = re.findall(r"(?m)^#.{22}([\w.]+)  ", text)
        self.assertGreater(len(steps), 20)
        for step in steps + re.findall(r"`([\w.]+)`", text):
            self.assertTrue(operator.attrgetter(step)(distconc), step)

    def test_every_break_tells_where_its_answer_stands_in_the_file(self):
        with open(DOCUMENTS[1], encoding="utf-8") as file:
            text = file.read()
        breaks = re.split(r"(?m)^### Break \d+: ", text)[1:]
        self.assertGreaterEqual(len(breaks), 12)
        for text in breaks:
            stands = re.search(r"\*\*In\s+the\s+file:\*\*\s+`([\w.]+)`", text)
            self.assertTrue(operator.attrgetter(stands[1])(distconc), text)
            # It is run on both: what the miniature says is not what the real file says.
            ran = re.search(r"\$ python3 (\w+\.py) mini\n(.*?)\n"
                            r"\$ python3 \1 distconc\n(.*?)\n```", text, re.S)
            self.assertNotEqual(ran[2], ran[3])

    def test_the_miniature_forgets_a_call_that_it_could_not_send(self):
        class Unsendable:
            def send(self, message):
                raise pickle.PicklingError("as for a lambda")
        miniature = {"__name__": "mini"}
        exec(file_of_the_tutorial("mini.py"), miniature)
        with self.assertRaises(pickle.PicklingError):
            miniature["send_synchronous"]("anybody?", Unsendable())
        self.assertEqual({}, miniature["_awaited"])

    def test_the_tutorial_has_every_public_name_and_an_exercise_in_each_chapter(self):
        with open(DOCUMENTS[1], encoding="utf-8") as file:
            text = file.read()
        self.assertEqual([], [name for name in distconc.__all__ if not re.search(
            rf"(?<!\w){name}(?!\w)", "".join(re.findall(r"`[^`]+`|```[^`]+", text)))])
        for chapter in re.split(r"(?m)^## (?=\d)", text)[1:]:
            self.assertRegex(chapter, r"(<!-- e|### E|\*\*E)xercise")
            self.assertRegex(chapter, r"^.+\n\n\*Guess: ")

    def save(self, name, text):
        path = os.path.join(self.directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(rewritten(text, self.ports))

    def run_block(self, block):
        name, _, how = block.how.partition(" ")
        without = re.search(r"not run(?: without (\S+))?: ", block.how)
        if without and not (without[1] and (
                shutil.which(without[1]) or importlib.util.find_spec(without[1]))):
            with self.subTest(block=block.place(block.number)):
                self.skipTest(block.how)
            return
        if name in ("check", "skeleton"):
            return
        if not re.fullmatch("[A-Z]", name):
            raise ValueError(f"{block.place(block.number)}: how to run {block.how!r}?")
        if name not in self.terminals:
            terminal = Terminal(self.environment, self.directory, self.ports)
            self.terminals[name] = terminal
            self.addCleanup(terminal.close)
        terminal = self.terminals[name]
        if block.language == "python":
            self.save(name + ".py", "\n".join(block.lines) + "\n")
            terminal.type("$ ", f"python3 {name}.py {how}")
            terminal.wait_to_ask("$ ")
        else:
            self.run_session(block, terminal, how[:5] == "waits")

    def run_session(self, block, terminal, waits):
        """Type what is typed; compare what is shown."""
        steps = list(block.steps())
        for (number, prompt, text, shown), after in itertools.zip_longest(steps, steps[1:]):
            if prompt:
                terminal.type(prompt, text)
            upcoming = after[1] if after else ""
            asks = upcoming == "^C" or waits and not after or (
                terminal.wait_to_ask(upcoming))
            if not terminal.shows(pattern(shown)) or not asks:
                self.fail("\n".join((f"{block.place(number)}: {prompt}{text}", "expected:",
                                     *shown, "got:", terminal.screen())))


def _tests_of_documents():
    for document in DOCUMENTS:
        files = []
        for at, (title, blocks) in enumerate(chapters(document)):
            words = re.sub(r"\W+", "_", title.lower().lstrip("0123456789")).strip("_")
            name = f"test_{os.path.basename(document)[:-3]}_{at:02}_{words}"
            if blocks:
                yield name, lambda self, files=files, blocks=blocks: (
                    self.run_chapter(files, blocks))
            files = files + [block for block in blocks if block.is_file()]


for _name, _test in _tests_of_documents():
    setattr(Documents, _name, _test)


######## Other versions of Python


def versions():
    root, found = os.path.expanduser("~/.pyenv/versions"), {}
    for name in sorted(os.listdir(root)) if os.path.isdir(root) else ():
        path = os.path.join(root, name, "bin", "python")
        if name.startswith("3.1") and os.path.exists(path):
            found[".".join(name.split(".")[:2])] = path
    found.pop("%d.%d" % sys.version_info[:2], None)
    return found


class Versions(Net):
    """Nodes of different Pythons understand each other."""

    def test_a_script_on_each_other_python_calls_and_is_called_back(self):
        if not versions():
            self.skipTest("no other Python 3.1x under ~/.pyenv/versions")
        for version, python in versions().items():
            with self.subTest(version):
                door = spawn(call_back, name="door", register=True)
                result = script("""
with start_node():
    serve = spawn_server(handle_synchronous, lambda x: [x, 'back'])
    data = {'serve': serve, 'm': [Down(Monitor(1, 't'), 1, None), 1 << 99]}
    print(send_synchronous(data, RemoteThread(sys.argv[1], 'door'), 20))
    try: send_synchronous('again', RemoteThread(sys.argv[1], 'dor'), 20)
    except NoSuchThread: print('no such')
    print('%d.%d' % sys.version_info[:2])
""", self.node, python=python)
                self.assertEqual(result.out, f"([7, 'back'], True)\nno such\n{version}\n",
                                 result.err)
                self.assertTrue(door.join(T))

    def test_they_refuse_each_others_wrong_keys(self):
        if not versions():
            self.skipTest("no other Python 3.1x under ~/.pyenv/versions")
        for version, python in versions().items():
            with self.subTest(version):
                result = script("try: connect(sys.argv[1])\n"
                                "except AuthenticationError: print('refused')", self.node,
                                python=python, DISTCONC_AUTHKEY="another key")
                self.assertEqual(result.out, "refused\n", result.err)


def call_back():
    request = receive_if(Synchronous, T)
    whole = request.data["m"] == [Down(Monitor(1, "t"), 1, None), 1 << 99]
    reply_synchronous((send_synchronous(7, request.data["serve"], 20), whole), request)


######## A classroom: three hosts, each with its own address, and no names

TEACHER = """
handles = {}

def keep(request):
    name, handle = request
    handles.setdefault(name, handle)
    return handles[name]

spawn_server(handle_synchronous, keep, name="board", register=True)
"""
STUDENT = """
address, heartbeat = sys.argv[1:]
start_node(address, heartbeat=float(heartbeat), connect_timeout=20.0)
board = RemoteThread("192.168.77.1:9000", "board")
print(local_node(), flush=True)
for line in sys.stdin:
    try:
        print(repr(eval(line)), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


class Host:
    """A host: a process that holds a network, a name and a /etc/hosts of its own."""

    def __init__(self, test, name, number):
        self.test, self.dir = test, os.path.join(test.dir, name)
        os.mkdir(self.dir)
        with open(os.path.join(self.dir, "hosts"), "w") as file:  # as Debian writes it
            file.write(f"127.0.0.1 localhost\n127.0.1.1 {name}-laptop\n")
        self.process = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "sh", "-ec",
             f"hostname {name}-laptop; ip link set lo up; "
             f"mount --bind {self.dir}/hosts /etc/hosts; echo ready; exec sleep 1000"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        test.addCleanup(self.end)
        if self.process.stdout.readline() != "ready\n":
            test.skipTest(f"no namespaces can be made here: {self.process.stderr.read()}")
        if number:
            test.ip(f"link add port{number} type veth peer name e0 netns {self.process.pid}")
            test.ip(f"link set port{number} master switch up")
            self.ip(f"addr add 192.168.77.{number}/24 dev e0")
            self.ip("link set e0 up")

    def end(self):
        self.process.kill()
        self.process.communicate()

    def inside(self, *command):
        return ["nsenter", "-t", str(self.process.pid), "-n", "-m", "-u", *command]

    def ip(self, words):
        subprocess.run(self.inside("ip", *words.split()), check=True)

    def python(self, *args):
        """Start a Python, which reads lines and prints others; return the function for that."""
        process = subprocess.Popen(
            self.inside(sys.executable, *args), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment(HOME=self.dir), bufsize=1)
        self.test.addCleanup(process.communicate)
        self.test.addCleanup(process.kill)

        def answer(line=None):
            if line:
                process.stdin.write(line + "\n")
            return process.stdout.readline().rstrip()
        return answer

    def student(self, address="0", heartbeat=10.0):
        """Start a student's program; return the function that has it evaluate a line."""
        text = "from distconc import *\nimport sys\n" + STUDENT
        return self.python("-c", text, address, str(heartbeat))


@unittest.skipUnless(shutil.which("ip") and shutil.which("nsenter") and not os.geteuid(),
                     "hosts are made by root, with ip, unshare and nsenter")
class Classroom(unittest.TestCase):
    """A teacher and two students on a switch, which leads nowhere else."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="dc")
        self.addCleanup(shutil.rmtree, self.dir)
        self.switch = None
        self.switch = Host(self, "switch", 0)
        self.ip("link add switch type bridge")
        self.ip("link set switch up")
        self.teacher, self.anna, self.ben = (
            Host(self, name, number) for number, name in enumerate(("teacher", "anna", "ben"), 1))
        self.lesson = os.path.join(self.dir, "lesson.py")
        with open(self.lesson, "w") as file:
            file.write("from distconc import *\n" + TEACHER)

    def ip(self, words):
        self.switch.ip(words)

    def teach(self):
        shown = self.teacher.python(MODULE, "node", "0.0.0.0:9000", self.lesson)
        self.assertRegex(shown(), r"^node 192\.168\.77\.1:9000, pid \d+$")

    def test_students_send_to_each_others_handles_which_they_have_from_the_teacher(self):
        self.teach()
        anna, ben = self.anna.student("0.0.0.0:0"), self.ben.student("0.0.0.0:9001")
        self.assertRegex(anna(), r"^192\.168\.77\.2:\d+$")
        self.assertEqual(ben(), "192.168.77.3:9001")
        anna("send_synchronous(('anna', current_thread()), board, 30)")
        handle = ben("send_synchronous(('anna', None), board, 30)")
        self.assertRegex(handle, r"^RemoteThread\('192\.168\.77\.2:\d+', 1\)$")
        ben("send(('hello', current_thread()), send_synchronous(('anna', None), board, 30))")
        self.assertEqual(anna("receive(30)"), "('hello', RemoteThread('192.168.77.3:9001', 1))")

    def test_a_cable_out_is_noticed_and_a_cable_in_needs_nothing(self):
        self.teach()
        ben = self.ben.student("0.0.0.0:0", heartbeat=4.0)
        ben()
        self.assertEqual(ben("send_synchronous(('one', 1), board, 30)"), "1")
        self.ip("link set port1 down")
        begin = monotonic()
        self.assertIn("NodeDown", ben("send_synchronous(('two', 2), board)"))
        self.assertLess(monotonic() - begin, WAIT)  # not after TCP's quarter of an hour
        self.assertIn("its firewall", ben("connect('192.168.77.1:9000')"))
        self.ip("link set port1 up")
        self.assertEqual(ben("send_synchronous(('three', 3), board, 30)"), "3")

    def test_behind_a_door_of_another_host_a_node_needs_advertise_and_is_told_so(self):
        self.assertEqual(self.ben.python("-c", DOOR)(), "open")
        inside = "192.168.77.2", 9000
        anna = self.anna.student("0.0.0.0:9000")
        self.assertEqual(anna(), "%s:%d" % inside)
        teacher = self.teacher.student()
        teacher()
        teacher("stop_node()")
        teacher("start_node(None, connect_timeout=20)")
        said = teacher("connect('192.168.77.3:7000')")
        self.assertIn("its start_node needs advertise='192.168.77.3:7000'", said)
        anna("stop_node()")
        anna("start_node('0.0.0.0:9000', advertise='192.168.77.3:7000')")
        self.assertEqual(teacher("connect('192.168.77.3:7000')"), "None")
        self.assertEqual(teacher("nodes()"), "[('192.168.77.3', 7000)]")

    def test_a_node_that_does_not_listen_is_told_of_as_such(self):
        self.teach()
        anna, ben = self.anna.student("0.0.0.0:0"), self.ben.student()
        anna(), ben()
        ben("stop_node()")
        ben("start_node(None)")
        ben("send_synchronous(('ben', current_thread()), board, 30)")
        said = anna("send(1, send_synchronous(('ben', None), board, 30))")
        self.assertIn("start_node() there lets others dial it", said)


DOOR = """
import contextlib, socket, threading

def pump(source, sink):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    # The other side hears of the end as well if this one was reset.
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)

door = socket.create_server(("192.168.77.3", 7000))
print("open", flush=True)
while True:
    client, _ = door.accept()
    inner = socket.create_connection(("192.168.77.2", 9000))
    for ends in (client, inner), (inner, client):
        threading.Thread(target=pump, args=ends, daemon=True).start()
"""


######## Exercises: check, how one is judged, solutions, wrong ones
#
# An exercise of the tutorial is a heading, "### Exercise: ring", the minutes that it takes and
# how hard it is, a statement whose first sentence is its title, and two blocks of code: "python
# skeleton ring", what a student starts from, and "python check ring", which defines check().
# That runs in a fresh process, in a module check_ring of its own, with the names of distconc
# and those that the skeleton defines; its functions, and the student's, can run on other nodes.
# It says what is wrong by `assert`.  A lab's file stands for distconc: its check has the names
# of that file, and those of LAB_TOOLS.

EXERCISE = re.compile(r"^### Exercise: (?P<name>[\w-]+)\n\s*"
                      r"\*(?P<minutes>\d+) minutes, (?P<difficulty>\w+)\.\*\s*"
                      r"(?P<statement>.*?)\n\s*"
                      r"^```python skeleton (?P=name)\n(?P<skeleton>.*?)^```\n.*?"
                      r"^```python check (?P=name)\n(?P<check>.*?)^```\n", re.M | re.S)
TUTORIAL = "tutorial.md"
LIMIT = 60.0  # seconds that a check may take
PARSING = threading.Lock()  # CPython 3.11 cannot parse in two threads at the same time


def parsed(source):
    with PARSING:
        return ast.parse(source)


@dataclass
class Exercise:
    name: str
    minutes: str
    difficulty: str
    statement: str
    skeleton: str
    check: str
    line: int  # of the tutorial, where its check begins

    @property
    def title(self):
        return re.match(r".*?[.:?](?=\s|$)|.*", " ".join(self.statement.split()))[0]

    @property
    def wanted(self):
        """The names that a student is to define."""
        return [part.name for part in parsed(self.skeleton).body if hasattr(part, "name")]

    @property
    def is_lab(self):
        return self.name.startswith("lab-")

    @property
    def module(self):
        """The name of the module that its check becomes."""
        return "check_" + self.name.replace("-", "_")

    @property
    def suggested(self):
        """What a student might call the file."""
        return "mini.py" if self.is_lab else f"my_{self.name}.py"

    @property
    def beginning(self):
        """A file to begin with."""
        if self.is_lab:
            return self.skeleton
        return "from distconc import *\n\n\n" + self.skeleton

    def seems_solved_in(self, file):
        """Whether the file defines all that is wanted."""
        try:
            with open(file, "rb") as source:
                tree = parsed(source.read())
        except (OSError, SyntaxError, ValueError):
            return False
        names = {part.name for part in tree.body if hasattr(part, "name")}
        names.update(target.id for part in tree.body if isinstance(part, ast.Assign)
                     for target in part.targets if isinstance(target, ast.Name))
        # A lab's file has the names of other labs; an exercise's has none of a lab.
        return names.issuperset(self.wanted) and self.is_lab == ("Mailbox" in names)

    def check_module(self, student):
        """The check as the source of a module; each line has its number in the tutorial."""
        names = f"from distconc import *; from {student} import {', '.join(self.wanted)}"
        if self.is_lab:
            names = f"from lab_tools import *; from {student} import *"
        return names + "\n" * (self.line - 1) + self.check


# What the checks share, those of the labs above all: a module beside each of them.
LAB_TOOLS = '''
"""What the checks share: a time limit, free ports, other nodes, and how one is frozen."""

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack

KEY = b"the key of this check"


def within(seconds, what, func, *args):
    """Return func(*args), but fail if that takes longer."""
    outcome = []

    def run():
        try:
            outcome.append((func(*args), None))
        except BaseException as error:
            outcome.append((None, error))
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"{what} did not end within {seconds} seconds"
    result, error = outcome[0]
    if error:
        raise error
    return result


def free_ports(count):
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                   for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def freeze(pid):
    """Stop a process until thaw(pid)."""
    if os.name == "nt":
        tell_windows_process("NtSuspendProcess", pid)
    else:
        os.kill(pid, signal.SIGSTOP)


def thaw(pid):
    """Let a process that freeze(pid) has stopped go on."""
    if os.name == "nt":
        tell_windows_process("NtResumeProcess", pid)
    else:
        os.kill(pid, signal.SIGCONT)


def tell_windows_process(function, pid):
    kernel = ctypes.WinDLL("kernel32")
    kernel.OpenProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.OpenProcess(0x1FFFFF, False, pid))
    getattr(ctypes.WinDLL("ntdll"), function)(process)
    kernel.CloseHandle(process)


class OtherNode:
    """A process that has imported the student's file, started a node and run a program."""

    def __init__(self, known, port, program, key=KEY):
        words = (f"import sys; sys.path[:0] = {sys.path!r}\\n"
                 f"from {known.__module__} import *\\n"
                 f"start_node({port}, {key!r})\\n{program}\\nprint('ready', flush=True)\\n"
                 "sys.stdin.read()")
        self.process = subprocess.Popen([sys.executable, "-c", words], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()
        line = self.line(15)
        assert line == "ready", (
            f"a second process was to call start_node({port}, key) and run a few lines; within "
            f"15 seconds it was not ready, but printed {line!r}")

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line.rstrip())

    def line(self, seconds):
        """The next line that it prints, or None."""
        try:
            return self.lines.get(timeout=seconds)
        except queue.Empty:
            return None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def freeze(self):
        freeze(self.process.pid)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
'''.lstrip()


def exercises():
    """All exercises of the tutorial by name, in their order."""
    with open(os.path.join(HERE, TUTORIAL), encoding="utf-8") as file:
        text = file.read()
    return {match["name"]: Exercise(**match.groupdict(),
                                    line=text.count("\n", 0, match.start("check")) + 1)
            for match in EXERCISE.finditer(text)}


RIGHTS = ("What is checked runs here, with all your rights: check only what you would run,\n"
          "or use an account that has nothing to lose.")


def check_exercise(arguments):
    """Check solutions of exercises of the tutorial."""
    parser = argparse.ArgumentParser(prog="check", description=check_exercise.__doc__,
                                     epilog=RIGHTS)
    parser.add_argument("exercise", nargs="?", help="its name, or all (without: list them)")
    parser.add_argument("files", nargs="*", metavar="file",
                        help="solutions, or directories of them (without: print a beginning)")
    parser.add_argument("--json", action="store_true", help="tell of each as a line of JSON")
    parser.add_argument("--jobs", type=int, default=4, help="how many at the same time (4)")
    parser.add_argument("--limit", type=float, default=LIMIT,
                        help=f"seconds that each may take ({LIMIT:g})")
    options, all_ = parser.parse_intermixed_args(arguments), exercises()
    if not options.exercise:
        list_exercises(all_)
    elif options.exercise.endswith(".py"):
        print(f"which exercise? make check EXERCISE=... FILE={options.exercise}")
        return 2
    elif options.exercise not in all_ and os.path.isdir(options.exercise):
        print(f"which exercise, or all? make check EXERCISE=all DIR={options.exercise}")
        return 2
    elif options.exercise != "all" and options.exercise not in all_:
        near = difflib.get_close_matches(options.exercise, all_, cutoff=0.4) or all_
        print(f"there is no exercise {options.exercise}; there is", ", ".join(near))
        sys.exit(1)
    elif not options.files:
        if options.exercise == "all":
            parser.error("all exercises of which files?")
        print(all_[options.exercise].beginning, end="")
    else:
        try:
            sys.exit(not check_files(options, all_))
        except KeyboardInterrupt:
            sys.exit(130)


def list_exercises(all_):
    """Print a line for each: its name, how long, how hard, what."""
    width = max(map(len, all_), default=0) + 2
    for exercise in all_.values():
        about = f"{exercise.minutes:>3} min  {exercise.difficulty:8}"
        title = textwrap.shorten(exercise.title, 96 - width - len(about), placeholder=" ...")
        print(f"{exercise.name:{width}}{about}{title}")


def check_files(options, all_):
    """Check one file, or many, as `options` say; return whether all passed."""
    files = [path for name in options.files for path in solutions_in(name)]
    pairs = [(file, exercise) for file in files for exercise in all_.values()
             if exercise.name == options.exercise
             or options.exercise == "all" and exercise.seems_solved_in(file)]
    if len(pairs) == 1 and options.files == files and not options.json:
        passed, report = examined(pairs[0][1], files[0], options.limit)
        print(report)
        return passed

    def verdict(pair):
        file, exercise = pair
        begin = monotonic()
        passed, report = examined(exercise, file, options.limit, stdout=subprocess.DEVNULL)
        *shown, said = report.splitlines()
        said = said.removeprefix(f"{exercise.name}: ")
        if shown:  # a table and JSON have one line for it
            said = re.sub(r", as shown( above)?$", lambda _: f": {shown[-1].strip()}", said)
        return dict(file=file, exercise=exercise.name, passed=passed, said=said,
                    seconds=round(monotonic() - begin, 1))
    if not options.json:
        print(RIGHTS + "\n")
    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = list(pool.map(verdict, pairs))
    judged_files = {each["file"] for each in verdicts}
    unsolved = [file for file in files if file not in judged_files]
    if options.json:
        for each in verdicts:
            print(json.dumps(each))
        for file in unsolved:
            print(json.dumps(dict(file=file, exercise=None, passed=False, said=UNSOLVED,
                                  seconds=0.0)))
    else:
        print_table(verdicts)
        for file in unsolved:
            print(f"{file}: {UNSOLVED}")
    return bool(verdicts) and all(each["passed"] for each in verdicts)


UNSOLVED = "no exercise is solved in it, or it is no Python"


def solutions_in(name):
    """The file of that name, or all Python files in the directory of that name."""
    if not os.path.isdir(name):
        return [name]
    return sorted(os.path.join(directory, file) for directory, _, files in os.walk(name)
                  for file in files if file.endswith(".py")
                  and file not in ("distconc.py", "test_distconc.py"))


def print_table(verdicts):
    """Print who passed what, then a line for each that did not, with the reason."""
    names = list(dict.fromkeys(each["exercise"] for each in verdicts))
    files = list(dict.fromkeys(each["file"] for each in verdicts))
    by_place = {(each["file"], each["exercise"]): each for each in verdicts}
    width = max(map(len, files), default=0) + 2
    print(f"{'':{width}}" + "  ".join(names))
    for file in files:
        cells = []
        for name in names:
            each = by_place.get((file, name))
            word = "-" if each is None else "passed" if each["passed"] else "no"
            cells.append(f"{word:{len(name)}}")
        print(f"{file:{width}}" + "  ".join(cells).rstrip())
    print()
    for each in verdicts:
        if not each["passed"]:
            print(f"{each['file']}, {each['exercise']}: {each['said']}")
    passed = sum(each["passed"] for each in verdicts)
    print(f"{passed} of {len(verdicts)} passed")


def handout(arguments):
    """Write a copy of the course for students: all that `check` needs, and no solutions."""
    parser = argparse.ArgumentParser(prog="handout", description=handout.__doc__)
    parser.add_argument("directory")
    directory = parser.parse_args(arguments).directory
    if not directory:
        parser.error("into which directory? make handout DIR=for_students")
    os.makedirs(directory, exist_ok=True)

    def save(name, text):
        with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
            file.write(text)

    def read(name):
        with open(os.path.join(HERE, name), encoding="utf-8") as file:
            return file.read()
    ours = read(os.path.basename(__file__))
    begin, end = (re.search(rf"(?m)^######## Exercises: {words}", ours).start()
                  for words in ("check, how one is judged", "how they are tested"))
    imports = "".join(f"import {name}\n" for name in HANDOUT_IMPORTS)
    save("test_distconc.py", f"""# Checks: python3 test_distconc.py check ring my_ring.py

{imports}from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

HERE = os.path.dirname(os.path.abspath(__file__))
WAIT = {WAIT}  # seconds of grace


{ours[begin:end].rstrip()}


if __name__ == "__main__":
    sys.exit(check_exercise(sys.argv[2:]))
""")
    save("distconc.py", read("distconc.py"))
    text = re.sub(r"(?s)Here is the whole of a solution.*?</details>\n\n", "", read(TUTORIAL))
    save(TUTORIAL, re.sub(r"(?s)\n+## For the teacher\n.*", "\n", text))
    save("README.md", read("README.md"))
    rules = [re.search(rf"(?m)^{name}.*\n(\t.*\n)+", read("Makefile"))[0]
             for name in ("NEEDS", "demo:", "check:")]
    save("Makefile", "PYTHON ?= python3\n" + "\n".join(rules))
    print(f"{directory} has distconc.py, {TUTORIAL}, README.md, and what `make check` needs")


HANDOUT_IMPORTS = ("argparse", "ast", "difflib", "inspect", "json", "keyword", "os", "re",
                   "shutil", "signal", "subprocess", "sys", "tempfile", "textwrap", "threading")


def examined(exercise, file, limit=LIMIT, stdout=None):
    """Run the check on a student's file: (whether it passed, what to tell the student)."""
    fault = fault_of(exercise, file)
    if fault:
        return False, f"{exercise.name}: {fault}"
    # On Windows a file cannot be removed while a node that has it open is just ending.
    with tempfile.TemporaryDirectory(prefix="dc", ignore_cleanup_errors=True) as directory:
        module = os.path.splitext(os.path.basename(file))[0]
        with open(os.path.join(directory, exercise.module + ".py"), "w",
                  encoding="utf-8") as check_file:
            check_file.write(exercise.check_module(module))
        with open(os.path.join(directory, "lab_tools.py"), "w", encoding="utf-8") as tools_file:
            tools_file.write(LAB_TOOLS)
        # The check imports a copy: here may be another file of that name, the teacher's own.
        copy = shutil.copyfile(file, os.path.join(directory, module + ".py"))
        verdict = os.path.join(directory, "verdict")
        about = (exercise.module, exercise.wanted, TUTORIAL, os.path.abspath(file),
                 HERE, directory, limit)
        env = {name: value for name, value in os.environ.items()
               if not name.startswith(("DISTCONC_", "PYTHONOPTIMIZE"))}
        env["DISTCONC_AUTHKEY"] = os.urandom(16).hex()
        with open(os.path.join(directory, "stderr"), "w+", errors="replace") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", f"{inspect.getsource(judge)}\njudge(*{about!r})"],
                env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                start_new_session=True)
            try:
                process.wait(limit + WAIT)
            except subprocess.TimeoutExpired:
                pass  # it cannot even give up; what can be said is said below
            finally:
                end_with_all_that_it_started(process)
            stderr.seek(max(0, os.fstat(stderr.fileno()).st_size - 65536))
            shown = stderr.read().replace(copy, os.path.abspath(file))
            noise = without_ours(shown).splitlines()[-12:]
        if not os.path.exists(verdict):
            return False, "\n".join([*noise, f"{exercise.name}: Python ended (status "
                                     f"{process.returncode}) before the check did"])
        with open(verdict) as told:
            trace, sentence = json.load(told)
        trace = trace.replace(copy, os.path.abspath(file))
        if sentence == "passed":
            return True, f"{exercise.name}: passed"
        return False, "\n".join([*(without_ours(trace).splitlines() or noise),
                                 f"{exercise.name}: {sentence}"])


def end_with_all_that_it_started(process):
    """End the process of a check, and those of its group, which may be frozen.

    Windows has no such groups: there the nodes that it has started end as their input ends.
    """
    if os.name == "nt":
        process.kill()
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def without_ours(text):
    """Tracebacks without the lines that say how threads are run and messages are sent."""
    return re.sub(r'^  File "[^"\n]*\b(threading|distconc)\.py", .*\n(    .*\n)*', "", text,
                  flags=re.M)


def fault_of(exercise, file):
    """What is wrong with a student's file before it runs, or None."""
    module, extension = os.path.splitext(os.path.basename(file))
    if not os.path.isfile(file):
        return f"there is no file {file}"
    if extension != ".py" or not module.isidentifier() or keyword.iskeyword(module):
        return (f"other nodes cannot import {file}: its name should be letters, digits and _, "
                f"no digit first, and .py; name it like {exercise.suggested}")
    taken = {*sys.stdlib_module_names, "distconc", "test_distconc", "lab_tools",
             exercise.module}
    if module in taken:
        return f"there is a module {module} already; name it like {exercise.suggested}"
    try:
        with open(file, "rb") as source:
            tree = parsed(source.read())
    except SyntaxError as error:
        return f"{file}, line {error.lineno}, is no Python: {error.msg}"
    except ValueError as error:
        return f"{file} is no Python: {error}"
    if exercise.is_lab and re.search(r"(?m)^\s*(from|import) +distconc\b", ast.unparse(tree)):
        return f"{file} imports distconc; a lab's file is to do without"
    names = {part.name for part in ast.walk(parsed(exercise.skeleton))
             if isinstance(part, ast.FunctionDef)}
    unwritten = [part.name for part in ast.walk(tree)
                 if isinstance(part, ast.FunctionDef) and part.name in names
                 and ast.unparse(part.body[-1]).startswith("raise NotImplementedError")]
    unwritten = list(dict.fromkeys(unwritten))  # a method may have a function's name
    if unwritten:
        return "not written yet" + f": {', '.join(unwritten)}" * (len(names) > 1)
    return None


def judge(name, wanted, tutorial, file, home, directory, limit):
    """Run a check, write the verdict into `directory`; the whole of a fresh process."""
    import importlib, json, os, sys, threading, traceback  # noqa: E401

    if os.name != "nt":  # Windows has no such limits
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 26, 1 << 26))  # who prints all the time

    sys.path[:1] = [directory, home, os.path.dirname(file)]
    short, path = os.path.basename(file), os.path.join(directory, name + ".py")
    copy = os.path.join(directory, short)
    ours = path, os.path.join(directory, "lab_tools.py")
    deciding = threading.Lock()

    def places(stack, where):
        return [frame for frame in stack if frame.filename == where]

    failures = []  # of threads, in the student's own lines or in a call of ours from there

    def show(died):
        words = traceback.format_exception(*died[:3])
        sys.stderr.write(f"Exception in thread {died.thread.name}:\n{''.join(words)}")
        stack = traceback.extract_tb(died.exc_traceback)
        while stack and os.path.basename(stack[-1].filename) == "distconc.py":
            stack.pop()  # the call of ours that raised it
        if stack and stack[-1].filename == copy:
            failures.append(f"line {stack[-1].lineno} of {short}: {words[-1].strip()}")

    def end(sentence, trace=()):
        if sentence != "passed":  # a moment for threads that are just showing what they died of
            for thread in threading.enumerate():
                if thread.daemon and thread is not threading.current_thread():
                    thread.join(0.02)
            if failures and not trace:
                sentence += f" (a thread had failed, {failures[0]})"
        deciding.acquire()  # for ever: there is one verdict
        with open(os.path.join(directory, "draft"), "w") as draft:
            json.dump(("".join(trace), sentence), draft)
        os.rename(draft.name, os.path.join(directory, "verdict"))
        sys.stdout.flush()
        os._exit(0)  # whatever threads there are

    def give_up(main=threading.get_ident()):
        stack = traceback.extract_stack(sys._current_frames()[main])
        at = "".join(f"; line {frame.lineno} of {shown}, `{frame.line}`, did not end"
                     for where, shown in ((copy, short), (path, tutorial))
                     for frame in places(stack, where)[-1:])
        end(f"did not finish within {limit:g} seconds{at}")

    def explain(error):
        """What to tell of an error that was not foreseen: (a sentence, a traceback)."""
        stack = traceback.extract_tb(error.__traceback__)
        mine, at = places(stack, copy), places(stack, path)
        words = traceback.format_exception_only(error)
        cause = str(error.__cause__ or "")
        if isinstance(error, NotImplementedError) or "\nNotImplementedError" in cause:
            return "not written yet", ()
        if mine:
            trace = ["Traceback (most recent call last):\n", *traceback.format_list(mine[-4:])]
            return f"line {mine[-1].lineno} of {short} failed, as shown", trace + words
        where = f"line {at[-1].lineno} of {tutorial}, `{at[-1].line}`, " if at else ""
        if type(error).__name__ == "ThreadDied" and cause:
            return where + "called a thread that died, as shown", cause[-1500:]
        return f"{where}failed: {words[-1].strip()}", ()

    timer = threading.Timer(limit, give_up)
    timer.daemon = True
    timer.start()
    threading.excepthook = show  # as usual, but in one piece
    try:
        module = importlib.import_module(short[:-3])
        for want in wanted:
            if not hasattr(module, want):
                end(f"{short} does not define {want}")
        importlib.import_module(name).check()
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        told = traceback.extract_tb(error.__traceback__)[-1].filename in ours
        if isinstance(error, AssertionError) and told and error.args:
            end(str(error))
        end(*explain(error))
    end("passed")


######## Exercises: how they are tested
#
# Solutions are texts by the exercise's name.  For each there are replacements that make it
# wrong as a student's might be, (what, by what), with the reason in a comment.

SOLUTIONS, WRONG = {}, {}
OTHERS = {}  # other right solutions, which a check has refused once, or might


def answers(name):
    """(a label, the text, whether it is right) for all that we have to hand in."""
    yield "skeleton", exercises()[name].beginning, False
    yield "solution", solution(name), True
    for number, text in enumerate(OTHERS.get(name, ()), 1):
        yield f"other solution {number}", text, True
    for number, (what, by) in enumerate(WRONG[name], 1):
        yield f"wrong {number}", solution(name).replace(what, by), False


def handed_in(exercise, label, text, right):
    """What is amiss with the verdict on this answer, or None."""
    with tempfile.TemporaryDirectory(prefix="dc") as directory:
        file = os.path.join(directory, exercise.module.replace("check_", "my_") + ".py")
        with open(file, "w") as mine:
            mine.write(text)
        passed, report = examined(exercise, file, stdout=subprocess.DEVNULL)
    said = report.splitlines()[-1].removeprefix(f"{exercise.name}: ")
    if label == "skeleton":
        names = said.partition(": ")[2].split(", ")
        well = said.startswith("not written yet") and len(names) == len(set(names))
    elif right:
        well = passed and said == "passed"
    else:
        unsaid = (r"not written|other nodes cannot|there is|did not finish|Python|"
                  r".* is no Python|line \d+ of \w+\.md")
        well = not passed and not re.match(unsaid, said)
    return None if well else f"{exercise.name}, {label}: {report}"


def judged(exercise, label, text, right):
    """As `handed_in`; a wrong answer whose fault depends on the timing has three chances to fail."""
    amiss = handed_in(exercise, label, text, right)
    for _ in range(2):
        if amiss and label.startswith("wrong"):
            amiss = handed_in(exercise, label, text, right)
    return amiss


class Exercises(unittest.TestCase):
    def test_all_have_a_check_a_solution_and_a_wrong_one(self):
        found = exercises()
        with open(os.path.join(HERE, TUTORIAL), encoding="utf-8") as file:
            headings = re.findall(r"^### Exercise: *(.*)", file.read(), re.M)
        self.assertEqual(headings, list(found))
        self.assertGreaterEqual(len(found), 16)
        self.assertEqual(sorted(found), sorted(SOLUTIONS))
        for name, exercise in found.items():
            self.assertIn("Hint: ", exercise.statement)
            self.assertTrue(exercise.wanted)
            self.assertTrue(WRONG[name])
            for what, by in WRONG[name]:
                self.assertEqual(solution(name).count(what), 1, (name, what))

    def run_check(self, *arguments, where=HERE):
        """Run the command as a teacher would: (status, what it prints)."""
        ended = subprocess.run([sys.executable, "test_distconc.py", "check", *arguments],
                               cwd=where, capture_output=True, text=True, timeout=300)
        self.assertEqual("", ended.stderr)
        return ended.returncode, ended.stdout

    def solutions_of_a_class(self, texts):
        directory = tempfile.mkdtemp(prefix="dc")
        self.addCleanup(shutil.rmtree, directory)
        for name, text in texts.items():
            path = os.path.join(directory, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(text)
        return directory

    def test_a_class_is_checked_in_one_go_though_some_hang_or_crash_or_fork_or_print_much(self):
        echo = "from distconc import *\n\n\ndef echo():\n    "
        texts = {
            "ann/my_echo.py": SOLUTIONS["echo"],
            "bob/my_echo.py": SOLUTIONS["echo"].replace("send(data", "sennd(data"),
            "dora/my_echo.py": SOLUTIONS["echo"].replace("send(data, sender", "send(data, None"),
            "hangs.py": echo + "while True: pass\n",
            "crashes.py": echo + "import os; os._exit(3)\n",
            "forks.py": echo + "import os, time; os.fork() or time.sleep(999); receive()\n",
            "prints.py": echo + "while True: print('x' * 10000)\n",
            "never_loads.py": echo + "pass\nwhile True: pass\n",
            "no_python.py": "def echo(:\n",
            "carl/mini.py": solution("lab-mailbox")}
        directory = self.solutions_of_a_class(texts)
        status, said = self.run_check("echo", "--limit", "15", "--json", directory)
        self.assertEqual(1, status)
        told = {os.path.relpath(each["file"], directory): each
                for each in map(json.loads, said.splitlines())}
        self.assertEqual(sorted(texts), sorted(told))
        self.assertEqual(["ann/my_echo.py"], [name for name in told if told[name]["passed"]])
        self.assertIn("line 8 of my_echo.py: NameError", told["bob/my_echo.py"]["said"])
        self.assertIn("line 8 of my_echo.py: TypeError", told["dora/my_echo.py"]["said"])
        self.assertIn("(status 3)", told["crashes.py"]["said"])
        self.assertIn("did not finish within 15 seconds", told["never_loads.py"]["said"])
        self.assertIn("is no Python", told["no_python.py"]["said"])
        self.assertIn("does not define echo", told["carl/mini.py"]["said"])

    def test_all_exercises_of_a_directory_are_told_in_a_table(self):
        directory = self.solutions_of_a_class({
            "ann.py": SOLUTIONS["echo"] + SOLUTIONS["counter"], "bob.py": "x = 1\n",
            "carl.py": SOLUTIONS["counter"].replace("count += number", "count = number"),
            "dora.py": "from distconc import *\necho = input\ninput()\n"})
        status, said = self.run_check("all", directory)
        self.assertEqual(1, status)
        self.assertIn("with all your rights", said)
        rows = {line.split()[0].rpartition("/")[2]: line.split()[1:]
                for line in said.splitlines() if "/" in line and ":" not in line}
        self.assertEqual({"ann.py": ["passed", "passed"], "carl.py": ["-", "no"],
                          "dora.py": ["no", "-"]}, rows)
        self.assertRegex(said, r"carl.py, counter: after 5 and -2 .*\n")
        self.assertRegex(said, r"dora.py, echo: line 3 of dora.py failed: EOFError: .*\n")
        self.assertRegex(said, r"bob.py: no exercise is solved in it")
        self.assertIn("2 of 4 passed", said)

    def test_a_file_in_which_nothing_is_solved_has_its_line_of_json_too(self):
        directory = self.solutions_of_a_class({
            "ann.py": SOLUTIONS["echo"], "bob.py": "def echo(:\n"})
        status, said = self.run_check("all", "--json", directory)
        self.assertEqual(0, status)
        told = [json.loads(line) for line in said.splitlines()]
        self.assertEqual([("ann.py", "echo", True), ("bob.py", None, False)],
                         [(os.path.basename(each["file"]), each["exercise"], each["passed"])
                          for each in told])
        self.assertRegex(told[1]["said"], "no exercise is solved in it")

    def test_a_directory_without_an_exercise_is_asked_about(self):
        directory = self.solutions_of_a_class({"ann.py": SOLUTIONS["echo"]})
        self.assertEqual(
            (2, f"which exercise, or all? make check EXERCISE=all DIR={directory}\n"),
            self.run_check(directory))

    def test_a_handout_without_a_directory_says_how_to_name_one(self):
        ended = subprocess.run([sys.executable, "test_distconc.py", "handout", ""], cwd=HERE,
                               capture_output=True, text=True, timeout=60)
        self.assertEqual(2, ended.returncode)
        self.assertIn("make handout DIR=for_students", ended.stderr)

    def test_a_handout_checks_solutions_and_has_none(self):
        directory = self.solutions_of_a_class({"copy/my_echo.py": SOLUTIONS["echo"]})
        copy = os.path.join(directory, "copy")
        subprocess.run([sys.executable, "test_distconc.py", "handout", copy], cwd=HERE,
                       check=True, capture_output=True)
        self.assertEqual({"Makefile", "README.md", "distconc.py", "my_echo.py",
                          "test_distconc.py", TUTORIAL},
                         {*os.listdir(copy)})
        given = ""
        for name in "Makefile", "README.md", "test_distconc.py", TUTORIAL:
            with open(os.path.join(copy, name)) as file:
                given += file.read()
        for name, exercise in exercises().items():
            if name in SOLUTIONS:
                lines = solution(name).splitlines()
                answer = [line for line in lines if line not in exercise.skeleton]
                self.assertFalse("\n".join(answer[-2:]) in given, name)
        self.assertEqual((0, "echo: passed\n"),
                         self.run_check("echo", "my_echo.py", where=copy))
        listed = self.run_check(where=copy)
        self.assertEqual(self.run_check(), listed)
        self.assertRegex(listed[1], r"raft +180 min +hard +Elect a leader")

    def test_a_teachers_own_file_is_not_taken_for_a_students_of_the_same_name(self):
        directory = self.solutions_of_a_class({
            "course/my_election.py": "raise SystemExit\n",
            "class/ann/my_election.py": SOLUTIONS["election"]})
        course = os.path.join(directory, "course")
        subprocess.run([sys.executable, "test_distconc.py", "handout", course], cwd=HERE,
                       check=True, capture_output=True)
        status, said = self.run_check("election", os.path.join("..", "class"), where=course)
        self.assertEqual(0, status, said)

    def test_solutions_pass_and_skeletons_and_wrong_ones_are_told_why(self):
        with ThreadPoolExecutor(8) as pool:  # mostly they wait
            verdicts = [pool.submit(judged, exercise, *answer)
                        for name, exercise in exercises().items() for answer in answers(name)]
        self.assertEqual([], [said for verdict in verdicts if (said := verdict.result())])


######## Exercises: solutions, part 1

SOLUTIONS["echo"] = """
from distconc import *


def echo():
    while (message := receive()) != "stop":
        sender, data = message
        send(data, sender)
"""
WRONG["echo"] = [
    ("        sender, data = message\n        send(data, sender)",  # always to the first one
     "        echo.first = getattr(echo, 'first', message[0])\n"
     "        send(message[1], echo.first)"),
    ("send(data, sender)", "send(message, sender)"),  # the whole pair goes back
    ("while (message", "if (message"),  # one answer and no more
    ("while (message := receive()) != \"stop\":", "while message := receive():"),  # no end
    ("(message := receive()) != \"stop\"", "\"stop\" not in (message := receive())"),  # data, too
]

SOLUTIONS["counter"] = """
from distconc import *


def counter():
    count = 0
    while True:
        match receive():
            case "add", number:
                count += number
            case "get", sender:
                send(("count", count), sender)
            case "stop":
                return
"""
WRONG["counter"] = [
    ("def counter():\n", "count = 0\n\n\ndef counter():\n    global count\n"),  # shared by all
    ("count += number", "count = number"),
    ("(\"count\", count)", "count"),  # what the answer is about is not said
]

SOLUTIONS["priority"] = """
from distconc import *


def is_urgent(message):
    return isinstance(message, tuple) and message[:1] == ("urgent",)


def receive_by_priority(timeout=None):
    urgent = receive_if(is_urgent, 0, None)
    return receive(timeout) if urgent is None else urgent
"""
WRONG["priority"] = [
    ("is_urgent, 0, None", "is_urgent, timeout, None"),  # waits though others are there
    ("is_urgent, 0, None", "is_urgent, 0.1"),  # nothing urgent: an error
    ("receive(timeout) if", "receive(0) if"),  # never waits
    ("receive(timeout) if", "receive() if"),  # waits for ever
    ("receive(timeout) if", "receive_if(lambda message: not is_urgent(message), timeout) if"),
    ("isinstance(message, tuple) and message[:1] == (\"urgent\",)", "message[0] == \"urgent\""),
    ("isinstance(message, tuple) and ", "\"urgent\" in message and "),  # what of 3?
]

SOLUTIONS["kvstore"] = """
from distconc import *


def serve(request, values):
    match request:
        case "put", key, value:
            values[key] = value
        case "get", key:
            return values.get(key)
        case "delete", key:
            there = key in values
            values.pop(key, None)
            return there
        case "cas", key, old, new:
            if values.get(key) != old:
                return False
            values[key] = new
            return True
        case _:
            raise ValueError(f"not a request: {request!r}")


def kvstore():
    values = {}
    while True:
        call = receive()
        if not isinstance(call, Synchronous):
            continue
        try:
            reply = serve(call.data, values)
        except Exception as error:
            reply = error
        reply_synchronous(reply, call)
"""
WRONG["kvstore"] = [
    ("except Exception", "except ValueError"),  # dies of a key that is a list
    ("except Exception as error", "except ZeroDivisionError as error"),  # of any bad request
    ("raise ValueError(", "return print("),  # None, as if it were well
    # Dies of a message that is no call.
    ("        if not isinstance(call, Synchronous):\n            continue\n", ""),
    # Leaves such a message in the mailbox.
    ("call = receive()\n", "call = receive_if(Synchronous)\n"),
    ("    values = {}\n", "    values = kvstore.__dict__\n"),  # one for all stores
    ("if values.get(key) != old:", "if values.get(key) is not old:"),  # not the same object
    ("        try:\n            reply = serve(call.data, values)\n"
     "        except Exception as error:\n            reply = error\n"
     "        reply_synchronous(reply, call)",  # a thread for each call, without a lock
     "        def answer(call):\n            try:\n"
     "                reply = serve(call.data, values)\n"
     "            except Exception as error:\n                reply = error\n"
     "            reply_synchronous(reply, call)\n        spawn(answer, call)"),
    ("if values.get(key) != old:", "if False:"),  # sets without comparing
    ("values.pop(key, None)", "values.pop(key)"),  # what is not there is an error
    ("            return there", "            return True"),
    ("there = key in values", "there = bool(values.get(key))"),  # a value of 0 is none
    ("there = key in values", "there = values.get(key) is not None"),  # nor is None a value
    ("return values.get(key)\n", "return values.get(key) or None\n"),  # takes 0 for None
]

SOLUTIONS["ring"] = """
from distconc import *


def station(follower, rounds):
    for _ in range(rounds):
        _, handles = receive()
        send(("token", handles + [current_thread()]), follower)


def is_token(message):
    return isinstance(message, tuple) and message[0] == "token"


def ring(count, nodes, rounds):
    first = current_thread()
    for number in reversed(range(count)):
        first = spawn(station, first, rounds, node=nodes[number % len(nodes)])
    token = "token", []
    for _ in range(rounds):
        send(token, first)
        token = receive_if(is_token)
    return token[1]
"""
OTHERS["ring"] = ["""
from distconc import *


def station(follower, rounds):
    for _ in range(rounds):
        request = receive_if(Synchronous)
        handles = request.data + [current_thread()]
        if follower is not None:
            handles = send_synchronous(handles, follower)
        reply_synchronous(handles, request)


def ring(count, nodes, rounds):
    first = None
    for number in reversed(range(count)):
        first = spawn(station, first, rounds, node=nodes[number % len(nodes)])
    handles = []
    for _ in range(rounds):
        handles = send_synchronous(handles, first)
    return handles
""", """
from distconc import *


def station(follower, rounds):
    for number in range(rounds):
        request, handles = receive_if(tuple)
        handles = handles + [current_thread()]
        if follower is not None:
            send((request, handles), follower)
        else:
            reply_synchronous(handles, request)


def entrance(first, rounds):
    for _ in range(rounds):
        request = receive_if(Synchronous)
        send((request, request.data), first)
    receive_if(lambda message: message == "end")


def ring(count, nodes, rounds):
    first = None
    for number in reversed(range(count)):
        first = spawn(station, first, rounds, node=nodes[number % len(nodes)])
    door = spawn(entrance, first, rounds)
    handles = []
    for _ in range(rounds):
        handles = send_synchronous(handles, door)
    send("end", door)
    return handles
"""]
WRONG["ring"] = [
    ("receive_if(is_token)", "receive()"),  # takes the message of another
    ("isinstance(message, tuple) and message[0] == \"token\"", "isinstance(message, tuple)"),
    ("node=nodes[number % len(nodes)]", "node=None"),  # all on this node
    ("rounds):\n    for _ in range(rounds)", "rounds):\n    while True"),  # its threads stay
    ("reversed(range(count))", "range(count)"),  # the wrong way round
    ("[current_thread()]", "[current_thread().id]"),  # no handle
    # There is no token: the caller asks each thread who it is.
    ("    first = current_thread()\n    for number in reversed(range(count)):\n"
     "        first = spawn(station, first, rounds, node=nodes[number % len(nodes)])\n"
     "    token = \"token\", []\n    for _ in range(rounds):\n        send(token, first)\n"
     "        token = receive_if(is_token)\n    return token[1]",
     "    handles = []\n    for number in range(count):\n"
     "        handles.append(spawn(station, current_thread(), 1, node=nodes[number % len(nodes)]))\n"
     "        send((\"token\", []), handles[-1])\n        receive_if(is_token)\n"
     "    return handles * rounds"),
]

SOLUTIONS["chat"] = """
from distconc import *


def tell(message, handle):
    try:
        send(message, handle)
    except NodeDown:
        pass  # we shall hear of it


def chat():
    rooms = {}  # name: the handles in it
    while True:
        match receive():
            case "join", room, handle:
                monitor(handle)
                rooms.setdefault(room, set()).add(handle)
            case "leave", room, handle:
                rooms.get(room, set()).discard(handle)
            case "say", room, who, text:
                for handle in rooms.get(room, ()):
                    tell(("said", room, who, text), handle)
            case Down(target=handle):
                for handles in rooms.values():
                    handles.discard(handle)
            case Synchronous(data=("members", room)) as call:
                reply_synchronous(set(rooms.get(room, ())), call)
"""
WRONG["chat"] = [
    ("    except NodeDown", "    except ZeroDivisionError"),  # dies of a node that is lost
    ("                monitor(handle)\n", ""),  # keeps the dead
    ("for handles in rooms.values()", "for handles in [*rooms.values()][:1]"),  # in one room
    ("set()).add(handle)", "[]).append(handle)"),  # joins twice
    ("rooms.get(room, set()).discard(handle)", "rooms[room].remove(handle)"),  # no such room
    ("for handle in rooms.get(room, ())", "for handle in rooms[room]"),  # unless nobody says
    ("rooms.get(room, ()):", "set().union(*rooms.values()):"),  # tells all rooms
    ("set(rooms.get(room, ()))", "rooms.get(room, set())"),  # its own set, which changes later
    # Watches each handle once, also if it ends and joins again.
    ("    while True:\n        match receive():\n            case \"join\", room, handle:\n"
     "                monitor(handle)\n",
     "    watched = set()\n    while True:\n        match receive():\n"
     "            case \"join\", room, handle:\n"
     "                if handle not in watched:\n                    monitor(handle)\n"
     "                watched.add(handle)\n"),
]

SOLUTIONS["lookup"] = """
from distconc import *


def call_named(message, name, nodes, pause, attempts=3, timeout=5.0):
    last = None
    for attempt in range(attempts):
        if attempt:
            pause()
        for node in nodes:
            try:
                return send_synchronous(message, RemoteThread(node, name), timeout)
            except (NoSuchThread, NodeUnreachable) as error:
                last = error
    raise last
"""
WRONG["lookup"] = [
    ("(NoSuchThread, NodeUnreachable)", "DistconcError"),  # ThreadDied may have run
    ("(NoSuchThread, NodeUnreachable)", "(NoSuchThread, NodeDown)"),  # this may, too
    ("(NoSuchThread, NodeUnreachable)", "(NoSuchThread, NodeUnreachable, TimeoutError)"),
    ("(NoSuchThread, NodeUnreachable)", "NoSuchThread"),  # a node that is gone ends it
    ("        if attempt:\n            pause()\n", ""),
    ("        if attempt:", "        if True:"),  # pauses before the first, too
    ("        for node in nodes:", "        for node in nodes[:1]:"),
    ("(NoSuchThread, NodeUnreachable)", "(NoSuchThread, NodeUnreachable, RemoteError)"),
    ("RemoteThread(node, name), timeout)", "RemoteThread(node, name), 5)"),  # its own time
    ("    raise last", "    raise error"),  # the name has ended
    ("    raise last", "    return None"),
]

SOLUTIONS["vector_clocks"] = """
from distconc import *


def tick(clock, name):
    return {**clock, name: clock.get(name, 0) + 1}


def merge(one, other):
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in {**one, **other}}


def knows(one, other):
    return all(one.get(name, 0) >= count for name, count in other.items())


def compare(one, other):
    if knows(one, other):
        return "equal" if knows(other, one) else "after"
    return "before" if knows(other, one) else "concurrent"


def chatter(name):
    clock, log = {}, []
    while True:
        match receive():
            case "say", text, handles:
                clock = tick(clock, name)
                log.append(("say", text, clock))
                for handle in handles:
                    send(("said", text, clock), handle)
            case "said", text, other:
                clock = tick(merge(clock, other), name)
                log.append(("said", text, clock))
            case "log", sender:
                send(log.copy(), sender)
            case "stop":
                return
"""
WRONG["vector_clocks"] = [
    ('                log.append(("said", text, clock))\n', ''),
    ("for handle in handles:", "for handle in handles[:1]:"),
    ("return {**clock, name: clock.get(name, 0) + 1}",  # alters what was sent and logged
     "clock[name] = clock.get(name, 0) + 1\n    return clock"),
    ("max(one.get(name, 0), other.get(name, 0))", "one.get(name, 0) + other.get(name, 0)"),
    (" for name in {**one, **other}", " for name in one"),  # forgets who is new
    ("send(log.copy(), sender)", "send(log, sender)"),  # the list that it goes on writing
    ("tick(merge(clock, other), name)", "merge(clock, other)"),  # to receive is an event
    ("tick(merge(clock, other), name)", "tick(clock, name)"),  # learns nothing
    ("                clock = tick(clock, name)\n", ""),  # to send is an event
    (" else \"concurrent\"", " else \"after\""),
    ("one.get(name, 0) >= count", "one[name] >= count"),  # what is missing is 0
    ("one.get(name, 0) >= count", "one.get(name, 0) > count"),
]

SOLUTIONS["concurrent"] = """
from distconc import *


STEPS = {
    "ann": [("writes", "a", "bob"), ("writes", "b", "dan"), ("reads", "e", "cat")],
    "bob": [("writes", "c", "cat"), ("reads", "a", "ann"), ("writes", "d", "dan")],
    "cat": [("reads", "c", "bob"), ("writes", "e", "ann"), ("reads", "f", "dan")],
    "dan": [("reads", "b", "ann"), ("reads", "d", "bob"), ("writes", "f", "cat")],
}


def follow(steps):
    friends = receive_if(dict)
    for verb, letter, friend in steps:
        if verb == "writes":
            send(letter, friends[friend])
        else:
            receive_if(letter.__eq__)


def play(directory):
    trace(directory)
    friends = {name: spawn(follow, steps, name=name) for name, steps in STEPS.items()}
    for friend in friends.values():
        send(friends, friend)
    for friend in friends.values():
        friend.join()
    trace(None)


def concurrent():
    return {'ac', 'ea', 'bc', 'bd', 'be', 'de', 'ef'}


if __name__ == "__main__":
    play("letters")
"""
WRONG["concurrent"] = [
    ("'be', ", ""),  # by their numbers, b comes before e
    ("'ef'", "'ef', 'af'"),  # a chain of three messages is one
    ("'ef'", "'ef', 'ab'"),  # so is the order of a thread
    ("'ef'", "'ef', 'xy'"),
    ("{'ac', 'ea', 'bc', 'bd', 'be', 'de', 'ef'}", "'ac'"),
]

SOLUTIONS["mutex"] = """
from distconc import *


def contender(number, times, record):
    is_all = lambda message: isinstance(message, tuple) and message[0] == "all"
    _, handles = receive_if(is_all)
    others = [handle for handle in handles if handle != current_thread()]
    clock, finished = 0, 0

    def tell_others(message):
        for other in others:
            send(message, other)

    for _ in range(times):
        clock += 1
        mine = clock, number
        tell_others(("request", mine, current_thread()))
        agreed, waiting = 0, []
        while agreed < len(others):
            match receive():
                case "request", stamp, other:
                    clock = max(clock, stamp[0])
                    if stamp < mine:
                        send("agreed", other)
                    else:
                        waiting.append(other)
                case "agreed":
                    agreed += 1
                case "finished":
                    finished += 1
        send_synchronous(("enter", mine), record)
        send_synchronous(("leave", mine), record)
        for other in waiting:
            send("agreed", other)

    tell_others("finished")
    while finished < len(others):
        match receive():
            case "request", stamp, other:
                send("agreed", other)
            case "finished":
                finished += 1
"""
WRONG["mutex"] = [
    ("                    if stamp < mine:", "                    if True:"),  # always agrees
    ("                    if stamp < mine:", "                    if stamp > mine:"),
    ("while agreed < len(others)", "while agreed < len(others) // 2"),  # a majority
    ("for other in waiting", "for other in ()"),  # never agrees later
    ("    while finished < len(others):", "    while False:"),  # leaves the others alone
    ("tell_others(\"finished\")", "pass"),  # nobody ends
    ("        send_synchronous((\"leave\", mine), record)\n", ""),
    # While it waits it does not take over the clocks of others.
    ("                    clock = max(clock, stamp[0])\n", ""),
]


######## Exercises: solutions, part 2

SOLUTIONS["supervisor"] = """
from collections import deque
from distconc import *


def supervisor(children, intensity, period, clock):
    running = {spawn_linked(func): func for func in children}
    failures = deque()  # when they were
    try:
        while True:
            try:
                if receive() == "stop":
                    return
            except LinkedError as failure:
                func = running.pop(failure.thread)
                failures.append(clock())
                while failures[0] < failures[-1] - period:
                    failures.popleft()
                if len(failures) > intensity:
                    raise
                running[spawn_linked(func)] = func
    finally:
        for child in running:
            if child.is_alive():
                send("stop", child)
        for child in running:
            child.join()
"""
WRONG["supervisor"] = [
    # The failure of a child that was told to stop ends the waiting.
    ("child.join()", "monitor(child)\n            receive_if(Down)"),
    # Each child has a count of its own.
    ("    failures = deque()  # when they were\n    try:\n"
     "        while True:\n            try:\n"
     '                if receive() == "stop":\n                    return\n'
     "            except LinkedError as failure:\n"
     "                func = running.pop(failure.thread)\n",
     "    each = {func: deque() for func in children}\n    try:\n"
     "        while True:\n            try:\n"
     '                if receive() == "stop":\n                    return\n'
     "            except LinkedError as failure:\n"
     "                func = running.pop(failure.thread)\n"
     "                failures = each[func]\n"),
    # Who was started again is not told to stop.
    ("running[spawn_linked(func)] = func", "spawn_linked(func)"),
    # Exactly a period ago is over.
    ("while failures[0] < failures[-1]", "while failures[0] <= failures[-1]"),
    # What has failed once counts for ever.
    ("while failures[0] < failures[-1] - period:", "while False:"),
    # It never gives up.
    ("len(failures) > intensity", "False"),
    # It gives up one failure too early.
    ("len(failures) > intensity", "len(failures) >= intensity"),
    # All are started again (one_for_all, without even a stop).
    ("running[spawn_linked(func)] = func",
     "running.update({spawn_linked(func): func for func in children})"),
    # What returned is started, too.
    ('if receive() == "stop":',
     'message = receive_if(lambda m: True, 0.05, None)\n'
     '                for child in [child for child in running if not child.is_alive()]:\n'
     '                    func = running.pop(child)\n'
     '                    running[spawn_linked(func)] = func\n'
     '                if message == "stop":'),
    # The children run on when it has given up.
    ("    finally:", "    except ZeroDivisionError:"),
    # It does not wait for them.
    ("child.join()", "pass"),
    # A monitor set after the start misses nothing here, but other messages end it.
    ('if receive() == "stop":', "if receive():"),
]


SOLUTIONS["detector"] = """
from contextlib import suppress
from distconc import *


def detector(watched, owner, patience=2):
    unanswered = dict.fromkeys(watched, 0)  # pings since the last pong
    patiences = dict.fromkeys(watched, patience)
    suspected = set()
    while (message := receive()) != "stop":
        match message:
            case "tick":
                for thread in watched:
                    if unanswered[thread] >= patiences[thread] and thread not in suspected:
                        suspected.add(thread)
                        send(("suspect", thread), owner)
                for thread in watched:
                    unanswered[thread] += 1
                    with suppress(NodeDown):
                        send(("ping", current_thread()), thread)
            case ("pong", thread):
                unanswered[thread] = 0
                if thread in suspected:
                    suspected.remove(thread)
                    patiences[thread] += 1
                    send(("trust", thread), owner)
"""
WRONG["detector"] = [
    # A node that is gone takes the detector with it.
    ("suppress(NodeDown)", "suppress()"),
    # It never learns: a slow thread is suspected again and again.
    ("patiences[thread] += 1", "pass"),
    # One patience for all.
    ("patiences[thread] += 1",
     "patiences = {thread: patience + 1 for thread, patience in patiences.items()}"),
    # Once suspected, always suspected.
    ("if thread in suspected:", "if False:"),
    # The owner is told at every tick.
    (" and thread not in suspected", ""),
    # One tick too late.
    (">= patiences", "> patiences"),
    # Who is suspected gets no ping any more.
    ("                    unanswered[thread] += 1\n",
     "                    if thread in suspected: continue\n"
     "                    unanswered[thread] += 1\n"),
    # Each pong makes up for one ping only.
    ("unanswered[thread] = 0", "unanswered[thread] -= 1"),
    # Who is gone is suspected before its patience has run out, and at every tick.
    ("suppress(NodeDown):\n                        send((\"ping\", current_thread()), thread)",
     "suppress(ValueError):\n"
     "                        try: send((\"ping\", current_thread()), thread)\n"
     "                        except NodeDown:\n"
     "                            suspected.add(thread); send((\"suspect\", thread), owner)"),
]


SOLUTIONS["reliable"] = """
from collections import Counter
from distconc import *


def send_reliably(messages, to, patience=0.05):
    for number, message in enumerate(messages):
        arrived = False
        while not arrived:
            send(("data", number, message, current_thread()), to)
            arrived = receive_if(lambda ack: ack == ("ack", number + 1), patience, None)


def receive_reliably(owner):
    counts = Counter()  # by sender: how many were passed on
    while (data := receive()) != "stop":
        _, number, message, sender = data
        if number == counts[sender]:
            counts[sender] += 1
            send(message, owner)
        send(("ack", counts[sender]), sender)
"""
WRONG["reliable"] = [
    # Nothing is sent twice.
    ("patience, None)", "60)"),
    # Any ack will do.
    ("lambda ack: ack == (\"ack\", number + 1)", "tuple"),
    # Doubles are passed on.
    ("if number == counts[sender]:", "if number <= counts[sender]:"),
    # What is the same as before is taken for a double.
    ("send(message, owner)", "message in counts or send(message, owner)\n"
                             "            counts[message] += 1"),
    # What comes early is passed on at once.
    ("if number == counts[sender]:", "if number >= counts[sender]:"),
    # Doubles get no ack: if the first was lost, the sender sends for ever.
    ("            send(message, owner)\n        send(",
     "            send(message, owner)\n            send("),
    # All senders share one count.
    ("        if number == counts[sender]:\n            counts[sender] += 1\n"
     "            send(message, owner)\n        send((\"ack\", counts[sender]), sender)",
     "        if number == counts[0]:\n            counts[0] += 1\n"
     "            send(message, owner)\n        send((\"ack\", counts[0]), sender)"),
    # It acknowledges before it passes on.
    ("        if number == counts[sender]:\n            counts[sender] += 1\n"
     "            send(message, owner)\n        send((\"ack\", counts[sender]), sender)",
     "        is_next = number == counts[sender]\n        counts[sender] += is_next\n"
     "        send((\"ack\", counts[sender]), sender)\n        if is_next:\n"
     "            send(message, owner)"),
    # The ack says which number came, not how many.
    ("(\"ack\", counts[sender])", "(\"ack\", number)"),
]


SOLUTIONS["election"] = """
from distconc import *


def member(number, owner):
    (_, neighbour), takes_part = receive(), False
    while True:
        match receive():
            case ("leader", leader):
                send(("knows", number, leader), owner)
                if leader != number:
                    send(("leader", leader), neighbour)
                return
            case ("candidate", other) if other == number:
                send(("leader", number), neighbour)
            case ("candidate", other) if other > number:
                send(("candidate", other), neighbour)
                takes_part = True
            case _ if not takes_part:  # a smaller candidate, or "elect"
                send(("candidate", number), neighbour)
                takes_part = True
"""
WRONG["election"] = [
    # Smaller candidates are passed on: each comes home and thinks that it has won.
    ("if other > number:", "if True:"),
    # Each smaller candidate is answered by the own number, again and again.
    ("case _ if not takes_part:", "case _:"),
    # Having passed on a greater one is forgotten.
    ("send((\"candidate\", other), neighbour)\n                takes_part = True",
     "send((\"candidate\", other), neighbour)"),
    # A smaller candidate is dropped by one who has not started.
    ("case _ if not takes_part:", "case \"elect\" if not takes_part:"),
    # The leader passes its own message on for ever.
    ("if leader != number:", "if True:"),
    # Nobody passes it on.
    ("if leader != number:", "if False:"),
    # Who has won keeps it to himself.
    ("send((\"leader\", number), neighbour)", "send((\"knows\", number, number), owner)"),
    # Who has won tells that and returns at once: the own message, back from the ring, is lost.
    ("send((\"leader\", number), neighbour)",
     "send((\"leader\", number), neighbour)\n                "
     "return send((\"knows\", number, number), owner)"),
]


SOLUTIONS["gossip"] = """
import random
from contextlib import suppress
from distconc import *


def gossiper():
    state, peers = {}, []

    def learn(news):
        for key, (version, value) in news.items():
            if version > state.get(key, (0, None))[0]:
                state[key] = version, value

    def tell(message, thread):
        with suppress(NodeDown):
            send(message, thread)

    while (message := receive()) != "stop":
        match message:
            case ("peers", threads):
                peers = threads
            case ("put", key, version, value):
                learn({key: (version, value)})
            case "round" if peers:
                tell(("push", state.copy(), current_thread()), random.choice(peers))
            case ("push", news, sender):
                learn(news)
                tell(("pull", state.copy()), sender)
            case ("pull", news):
                learn(news)
            case Synchronous():
                reply_synchronous(state.copy(), message)
"""
WRONG["gossip"] = [
    ('("pull", state.copy())', '("pull", state)'),
    # The state itself is given away.
    ("(\"push\", state.copy(),", "(\"push\", state,"),
    # What is as new wins, too.
    ("if version > state", "if version >= state"),
    # What comes last wins.
    ("if version > state.get(key, (0, None))[0]:", "if True:"),
    # Always the same peer.
    ("random.choice(peers)", "peers[0]"),
    # Everybody is told.
    ("tell((\"push\", state.copy(), current_thread()), random.choice(peers))",
     "[tell((\"push\", state.copy(), current_thread()), peer) for peer in peers]"),
    # A node that is gone ends it.
    ("suppress(NodeDown)", "suppress()"),
    # The answer to a push is what was known before.
    ("                learn(news)\n                tell((\"pull\", state.copy()), sender)",
     "                tell((\"pull\", state.copy()), sender)\n                learn(news)"),
    # News is not learnt from a pull.
    ("case (\"pull\", news):\n                learn(news)",
     "case (\"pull\", news):\n                pass"),
    # The state itself is the reply.
    ("reply_synchronous(state.copy(), message)", "reply_synchronous(state, message)"),
    # One after the other, by altering the list that was sent.
    ("random.choice(peers)", "peers.append(peers.pop(0)) or peers[0]"),
    # One after the other.
    ("                tell((\"push\", state.copy(), current_thread()), random.choice(peers))",
     "                peers = [*peers[1:], peers[0]]\n"
     "                tell((\"push\", state.copy(), current_thread()), peers[0])"),
    # New peers are more peers.
    ("peers = threads", "peers = peers + threads"),
]


SOLUTIONS["allow_list"] = '''
from distconc import *


class Order:
    """An order of `item`, a str of 1 to 40 characters, and `count` of it, an int, 1 to 100."""

    def __init__(self, item, count):
        if not 1 <= len(item) <= 40 or not 1 <= count <= 100:
            raise ValueError(f"nobody can order {count} of {item!r}")
        self.item, self.count = item, count


def write_note(text, path="notes.txt"):
    """Append a line to a file.  Good enough among friends."""
    with open(path, "a") as file:
        file.write(text + "\\n")


def allowed():
    return [Order, note]


def note(text):
    if not isinstance(text, str) or not 1 <= len(text) <= 100 or not text.isprintable():
        raise ValueError("a note is one line of 1 to 100 characters")
    write_note(text)


def shop(till):
    while True:
        message = receive()
        if type(message) is Order:
            match vars(message):
                case {"item": str(item), "count": int(count)}:
                    if 1 <= len(item) <= 40 and 1 <= count <= 100:
                        send(("order", item, count), till)
'''
WRONG["allow_list"] = [
    # It can be sent to anybody, in the name of the shop.
    ("[Order, note]", "[Order, note, send]"),
    # Customers could start shops of their own.
    ("[Order, note]", "[Order, note, shop]"),
    # Friends only.
    ("[Order, note]", "[Order, note, write_note]"),
    # So that it works at last.
    ("[Order, note]", '"anything"'),
    # Nobody can order.
    ("[Order, note]", "[note]"),
    # Nobody can write a note.
    ("[Order, note]", "[Order]"),
    # The path can be chosen.
    ('def note(text):\n    if not isinstance(text, str) or not 1 <= len(text) <= 100 or not '
     'text.isprintable():\n'
     '        raise ValueError("a note is one line of 1 to 100 characters")\n'
     '    write_note(text)',
     'def note(text, path="notes.txt"):\n    if not isinstance(text, str):\n'
     '        raise ValueError("a note is a text")\n    write_note(text, path)'),
    # What should be text is not looked at.
    ("not isinstance(text, str) or ", ""),
    # Two lines are a note, too.
    (" or not text.isprintable()", ""),
    # It relies on __init__.
    ("if 1 <= len(item) <= 40 and 1 <= count <= 100:", "if True:"),
    # It relies on the types.
    ('{"item": str(item), "count": int(count)}', '{"item": item, "count": count}'),
    # It relies on the attributes.
    ('match vars(message):', "match {'item': message.item, 'count': message.count}:"),
    # Anything else ends it.
    ("if type(message) is Order:", "if message.item:"),
]


SOLUTIONS["snapshot"] = """
from distconc import *


def account(balance):
    me, peers = current_thread(), []
    silent = set()  # the peers whose markers are still to come, while a snapshot is on
    noted, channels = 0, {}

    def begin(number, collector):
        nonlocal noted, channels, silent
        noted, channels, silent = balance, {peer: [] for peer in peers}, set(peers)
        for peer in peers:
            send(("marker", number, collector, me), peer)

    while (message := receive()) != "stop":
        match message:
            case ("peers", threads):
                peers = threads
            case ("pay", amount, to):
                if amount <= balance:
                    balance -= amount
                    send(("transfer", amount, me), to)
            case ("transfer", amount, sender):
                balance += amount
                if sender in silent:
                    channels[sender].append(amount)
            case ("snapshot", number, collector):
                begin(number, collector)
            case ("marker", number, collector, sender):
                if not silent:
                    begin(number, collector)
                silent.remove(sender)
                if not silent:
                    send(("recorded", number, me, noted, channels), collector)
            case Synchronous():
                reply_synchronous(balance, message)
"""
WRONG["snapshot"] = [
    # What is on its way is not counted.
    ("channels[sender].append(amount)", "pass"),
    # What comes after the marker is counted as well.
    ("if sender in silent:", "if silent:"),
    # The marker that begins it is not counted as its sender's: it never ends.
    ("                silent.remove(sender)\n",
     "                else:\n                    silent.remove(sender)\n"),
    # The balance at the end, not at the beginning.
    ("number, me, noted, channels)", "number, me, balance, channels)"),
    # A thread of its own sends the markers: no order between them and the transfers.
    ("            send((\"marker\", number, collector, me), peer)",
     "            spawn(lambda peer: (receive(0.5, None), send("
     "(\"marker\", number, collector, me), peer)), peer)"),
    # Nobody can pay all that he has.
    ("if amount <= balance:", "if amount < balance:"),
    # What is on its way is not added.
    ("                balance += amount\n                if sender in silent:\n"
     "                    channels[sender].append(amount)",
     "                if sender in silent:\n"
     "                    channels[sender].append(amount)\n"
     "                else:\n                    balance += amount"),
]


SOLUTIONS["two_phase_commit"] = """
from contextlib import suppress
from distconc import *


def tell(message, *threads):
    for thread in threads:
        with suppress(NodeDown):
            send(message, thread)


def coordinator(participants, owner, patience=1.0):
    tell(("prepare", participants, current_thread()), *participants)
    missing, decision = set(participants), "commit"
    while missing and decision == "commit":
        match receive(patience, "silence"):
            case ("vote", True, thread):
                missing.discard(thread)
            case ("vote", False, _) | "silence":
                decision = "abort"
    tell(("decision", decision), *participants)
    send(("decided", decision, current_thread()), owner)


def participant(vote, owner, patience=0.2):
    me, others, state = current_thread(), [], "unasked"

    def decide(decision):
        nonlocal state
        if state not in ("commit", "abort"):
            state = decision
            send(("decided", decision, me), owner)

    while (message := receive(patience, "silence")) != "stop":
        match message:
            case ("prepare", participants, coordinator):
                others = [thread for thread in participants if thread != me]
                if state == "unasked" and vote():
                    state = "yes"
                else:
                    decide("abort")
                tell(("vote", state == "yes", me), coordinator)
            case ("decision", decision):
                decide(decision)
            case ("decision?", asker):
                if state == "unasked":
                    decide("abort")
                if state != "yes":
                    tell(("decision", state), asker)
            case "silence" if state == "yes":
                tell(("decision?", me), *others)
"""
WRONG["two_phase_commit"] = [
    # The owner hears that all is decided before anybody else does.
    ("    tell((\"decision\", decision), *participants)\n"
     "    send((\"decided\", decision, current_thread()), owner)",
     "    send((\"decided\", decision, current_thread()), owner)\n"
     "    tell((\"decision\", decision), *participants)"),
    # Who has voted yes and hears nothing gives up on its own.
    ("tell((\"decision?\", me), *others)", "decide(\"abort\")"),
    # Or it commits: after all, it has voted yes.
    ("tell((\"decision?\", me), *others)", "decide(\"commit\")"),
    # It just waits.
    ("tell((\"decision?\", me), *others)", "pass"),
    # Who is asked without having voted does not know, and may still vote yes.
    ("if state == \"unasked\":", "if False:"),
    # It promises to abort, and votes yes all the same.
    ("tell((\"vote\", state == \"yes\", me), coordinator)",
     "tell((\"vote\", vote(), me), coordinator)"),
    # Who does not know says so, as if that were a decision.
    ("if state != \"yes\":", "if True:"),
    # The coordinator counts votes, not voters.
    ("missing.discard(thread)", "missing.pop()"),
    # It does not wait for all.
    ("while missing and", "while len(missing) > 1 and"),
    # It waits for all, though one has said no.
    ('while missing and decision == "commit":', "while missing:"),
    # It waits for the dead.
    ("match receive(patience, \"silence\"):", "match receive():"),
    # Who is gone ends it.
    ("suppress(NodeDown)", "suppress()"),
    # A second word changes the decision.
    ("if state not in (\"commit\", \"abort\"):", "if True:"),
    # It asks only once.
    ("tell((\"decision?\", me), *others)",
     "tell((\"decision?\", me), *others)\n                patience = None"),
]


SOLUTIONS["raft"] = """
import random
from contextlib import suppress
from distconc import *
from time import monotonic


def raft(owner, patience=0.3):
    me, (_, peers) = current_thread(), receive()
    role, term = "follower", 0
    voted_for, voters = None, set()  # in this term

    def tell_peers(message):
        for peer in peers:
            with suppress(NodeDown):
                send(message, peer)

    def some_time():
        return monotonic() + random.uniform(patience, 2 * patience)

    alarm = some_time()  # when something has to be done, if nothing happens before
    while (message := receive(max(0, alarm - monotonic()), ("alarm", 0))) != "stop":
        if message[1] > term:
            if role == "leader":
                send(("follower", message[1], me), owner)
                alarm = some_time()
            role, term, voted_for = "follower", message[1], None
        match message:
            case ("alarm", _) if role == "leader":
                tell_peers(("leader", term, me))
                alarm = monotonic() + patience / 5
            case ("alarm", _):
                role, term, voted_for, voters = "candidate", term + 1, me, {me}
                tell_peers(("vote?", term, me))
                alarm = some_time()
            case ("vote?", its_term, candidate):
                granted = its_term == term and voted_for in (None, candidate)
                if granted:
                    voted_for, alarm = candidate, some_time()
                with suppress(NodeDown):
                    send(("vote", term, granted, me), candidate)
            case ("vote", its_term, True, voter) if its_term == term and role == "candidate":
                voters.add(voter)
                if 2 * len(voters) > len(peers) + 1:
                    role, alarm = "leader", monotonic()
                    send(("leader", term, me), owner)
            case ("leader", its_term, _) if its_term == term:
                role, alarm = "follower", some_time()
"""
WRONG["raft"] = [
    # Two votes in one term.
    ("its_term == term and voted_for in (None, candidate)", "its_term == term"),
    # An old term's candidate gets a vote.
    ("granted = its_term == term and", "granted ="),
    # Who asks twice is refused the second time.
    ("voted_for in (None, candidate)", "voted_for is None"),
    # Votes are counted, not voters.
    ("voters.add(voter)", "voters.add(len(voters))"),
    # Late votes count.
    ("if its_term == term and role == \"candidate\":", "if role == \"candidate\":"),
    # Half of all is enough, where their number is even.
    ("2 * len(voters) > len(peers) + 1", "2 * len(voters) >= len(peers) + 1"),
    # Every message is a reason to wait anew.
    ("        match message:\n            case (\"alarm\", _) if role == \"leader\":",
     "        if message[0] != \"alarm\":\n            alarm = some_time()\n"
     "        match message:\n            case (\"alarm\", _) if role == \"leader\":"),
    # Half of all is enough.
    ("2 * len(voters) > len(peers) + 1", "2 * len(voters) > len(peers) - 1"),
    # A refused vote counts, too.
    ("(\"vote\", its_term, True, voter)", "(\"vote\", its_term, _, voter)"),
    # A candidate remains one, though somebody else leads.
    ('role, alarm = "follower", some_time()', "alarm = some_time()"),
    # It does not wait anew when it hears from the leader.
    ('role, alarm = "follower", some_time()', 'role = "follower"'),
    # It steps down and tells nobody.
    ('send(("follower", message[1], me), owner)', "pass"),
    # A leader remains one.
    ("role, term, voted_for = \"follower\", message[1], None",
     "role, term, voted_for = role, message[1], None"),
    # Nobody hears of the leader a second time.
    ("alarm = monotonic() + patience / 5", "alarm = monotonic() + 60"),
    # A node that is gone ends all others.
    ("            with suppress(NodeDown):\n                send(message, peer)",
     "            send(message, peer)"),
    # A candidate has not voted for itself, and so may vote for another.
    ("\"candidate\", term + 1, me, {me}", "\"candidate\", term + 1, None, {me}"),
    # A granted vote is no reason to wait anew.
    ("voted_for, alarm = candidate, some_time()", "voted_for = candidate"),
    # Who was only a candidate tells that it is no leader.
    ('if role == "leader":\n                send((',
     'if role != "follower":\n                send(('),
    # Every vote makes it leader once more.
    ('its_term == term and role == "candidate"', 'its_term == term and role != "follower"'),
    # It tells of itself too seldom.
    ("alarm = monotonic() + patience / 5", "alarm = monotonic() + patience"),
    # All wait for the same time.
    ("random.uniform(patience, 2 * patience)", "patience * 1.5"),
    # They wait for too short a time.
    ("random.uniform(patience, 2 * patience)", "random.uniform(0, patience)"),
]


######## Exercises: the labs; their solution is the mini.py that the tutorial shows


def file_of_the_tutorial(name):
    for _, blocks in chapters(DOCUMENTS[1]):
        for block in blocks:
            if block.how == name:
                return "\n".join(block.lines) + "\n"
    raise LookupError(f"the tutorial has no file {name}")


# Read when it is needed: other nodes import this module, while their heartbeat waits.
def solution(name):
    return SOLUTIONS[name] or file_of_the_tutorial("mini.py")


SOLUTIONS.update(dict.fromkeys(("lab-mailbox", "lab-threads", "lab-handles", "lab-nodes",
                                "lab-calls", "lab-monitors")))
WRONG["lab-mailbox"] = [
    # It wakes one of those who wait, who may want another message.
    ("self.changed.notify_all()", "self.changed.notify()"),
    # The newest message that fits.
    ("self.messages.pop(places[0])", "self.messages.pop(places[-1])"),
    # It takes what is equal to the message that fits.
    ("return self.messages.pop(places[0])",
     "message = self.messages[places[0]]\n            self.messages.remove(message)\n"
     "            return message"),
    # None, as if that had been a message.
    ('raise TimeoutError(f"no message came within {timeout} seconds")', "return None"),
    # It does not wait.
    ("self.changed.wait_for(lambda: self.places(pred), timeout)", "self.places(pred)"),
    # It waits anew after each message.
    ("            places = self.changed.wait_for(lambda: self.places(pred), timeout)\n"
     "            if not places:\n"
     '                raise TimeoutError(f"no message came within {timeout} seconds")\n',
     "            while not (places := self.places(pred)):\n"
     "                if not self.changed.wait(timeout):\n"
     "                    raise TimeoutError\n"),
    # What is false is no message.
    ("if pred(message)]", "if message and pred(message)]"),
    # Who gets first finds it empty, and never looks again.
    ("            self.changed.notify_all()\n", ""),
    # Of two that wait in `get`, both believe that the message is theirs.
    ("        return self.get_if(lambda message: True, timeout)",
     "        with self.changed:\n"
     "            if not self.messages and not self.changed.wait(timeout):\n"
     "                raise TimeoutError\n"
     "            return self.messages.pop(0)"),
    # The first place is 0, which is false, so it waits though the message is there.
    ("            places = self.changed.wait_for(lambda: self.places(pred), timeout)\n"
     "            if not places:\n",
     "            self.changed.wait_for(lambda: any(self.places(pred)), timeout)\n"
     "            places = self.places(pred)\n"
     "            if not places:\n"),
    # No lock: two threads take the same message.
    ("        with self.changed:\n            places = self.changed.wait_for("
     "lambda: self.places(pred), timeout)",
     "        if True:\n            import time\n"
     "            end = time.monotonic() + (timeout or 0)\n"
     "            while not (places := self.places(pred)) and time.monotonic() < end:\n"
     "                time.sleep(0.0001)"),
]
WRONG["lab-threads"] = [
    # Each time another handle.
    ('if not hasattr(_running, "handle"):', "if True:"),
    # One handle for all threads.
    ("_running = threading.local()", "_running = Mailbox()"),
    # One mailbox for all threads.
    ("self.mailbox = Mailbox()", 'self.mailbox = globals().setdefault("_box", Mailbox())'),
    # It runs the function at once, and waits for it.
    ("    threading.Thread(target=thread.run, args=(func, args), name=thread.name,\n"
     "                     daemon=True).start()\n", "    thread.run(func, args)\n"),
    # A failure is not shown.
    ("            raise  # so that it is printed\n", ""),
    # A server serves once.
    ("        while func(*args):\n            pass", "        func(*args)"),
    # A server never ends.
    ("        while func(*args):\n            pass",
     "        while True:\n            func(*args)"),
    # The name is forgotten.
    ("thread = Thread(name or func.__name__)", "thread = Thread(func.__name__)"),
    # So are the arguments.
    ("args=(func, args)", "args=(func, ())"),
    # A server has the name of the function that calls the one given.
    ("spawn(serve, name=name or func.__name__,", "spawn(serve, name=name,"),
    # The process cannot end while the thread runs.
    ("name=thread.name,\n                     daemon=True)", "name=thread.name)"),
    # The number of a thread that is gone is given to another.
    ("self.id = next(_numbers)", "self.id = id(self)"),
    # A thread that spawn did not make gets the handle of one that has ended.
    ("    return _running.handle\n",
     "    handles = globals().setdefault('_handles', {})\n"
     "    return handles.setdefault(threading.get_ident(), _running.handle)\n"),
    # Of a failure the text is shown, but not where it was.
    ("            raise  # so that it is printed\n",
     "            import sys\n            print(self.name, repr(error), file=sys.stderr)\n"),
]
WRONG["lab-handles"] = [
    # A handle is pickled with all that is in it.
    ("    def __reduce__(self):\n        return RemoteThread, (self.node, self.id)\n\n", ""),
    # The node is forgotten on the way.
    ("return RemoteThread, (self.node, self.id)",
     "return RemoteThread, (Thread.node, self.id)"),
    # What comes back is another thread.
    ("return RemoteThread, (self.node, self.id)", "return Thread, (self.id,)"),
    # Two copies are two things.
    ("    def __eq__(self, other):\n        return isinstance(other, Handle) and "
     "(self.node, self.id) == (other.node, other.id)\n\n", ""),
    # The same number on another node is the same thread.
    ("(self.node, self.id) == (other.node, other.id)", "self.id == other.id"),
    # To compare it with anything else is an error.
    ("isinstance(other, Handle) and (self", "(self"),
    # No two have the same hash.
    ("return hash(self.id)", "return id(self)"),
    # It cannot be hashed.
    ("    def __hash__(self):\n        return hash(self.id)\n\n", ""),
    # What comes home is dropped.
    ("        if self.node == Thread.node:\n            _deliver(self.id, message)",
     "        if self.node == Thread.node:\n            self.mailbox.put(message)"),
]
WRONG["lab-nodes"] = [
    # No key is asked for.
    ("Listener((HOST, port), authkey=authkey)", "Listener((HOST, port))"),
    # The accepter reads as well: one connection is served, and no other.
    ("        threading.Thread(target=self.read, daemon=True).start()", "        self.read()"),
    # Two threads write at the same time.
    ("        with self.writing:\n            self.wire",
     "        if True:\n            self.wire"),
    # A thread keeps the node that it had when it was made: none.
    ("        self.name = name\n",
     "        self.name = name\n        self.node = Thread.node\n"),
    # An unknown name ends the reader.
    ("_threads.get(_names.get(id, id))", "_threads[_names.get(id, id)]"),
    # Names are not known.
    ("        _names[thread.name] = thread.id", "        pass"),
    # A connection for each message: they overtake each other.
    ("connection = _connections.get(port)", "connection = None"),
    # A thread for each message that arrives: they overtake each other.
    ("_deliver(*self.wire.recv())",
     "threading.Thread(target=_deliver, args=self.wire.recv()).start()"),
    # A key of one's own, the same for all.
    ("    listener = Listener(", "    authkey = b'mine'\n    listener = Listener("),
    # start_node does not return.
    ("    threading.Thread(target=_accept, args=(listener,), daemon=True).start()",
     "    _accept(listener)"),
]
WRONG["lab-calls"] = [
    # Any reply will do.
    ('getattr(m, "tag", None) == request.tag', "isinstance(m, (Reply, Down))"),
    # Any message will do.
    ("receive_if(lambda m: getattr(m, \"tag\", None) == request.tag, timeout)",
     "receive(timeout)"),
    # All calls have the same tag.
    ("Synchronous(message, current_thread(), uuid4().hex)",
     "Synchronous(message, current_thread(), 1)"),
    # Two nodes have the same tags.
    ("Synchronous(message, current_thread(), uuid4().hex)",
     "Synchronous(message, current_thread(), next(_numbers))"),
    # A caller whose node is gone ends the server.
    ("    _tell(request.sender, Reply(reply, request.tag))",
     "    request.sender.send(Reply(reply, request.tag))"),
    # Nobody is told of an end.
    ("            _tell(watcher, Down(self, reason, tag))", "            pass"),
    # Only of a failure.
    ("for tag, watcher in self.watchers.items():",
     "for tag, watcher in self.watchers.items() if reason else ():"),
    # A call that is over is told of an end all the same.
    ("    if isinstance(message, Down) and not _awaited.pop(message.tag, None):",
     "    if False:"),
    # Whoever asks for a thread that has ended is not told.
    ("    if not thread and is_question:", "    if False:"),
    # Only who is there can be told, for a watcher is noted when the request is received.
    ("        if thread and is_question:", "        if False:"),
    # The exception is returned.
    ('raise ThreadDied(f"{thread} ended before it replied") from answer.reason',
     "return ThreadDied(thread)"),
    # It serves once.
    ("    reply_synchronous(func(request.data), request)\n    return True",
     "    reply_synchronous(func(request.data), request)"),
    # A message that is no call ends the server.
    ("request = receive_if(lambda m: isinstance(m, Synchronous))", "request = receive()"),
]
WRONG["lab-monitors"] = [
    # What has ended already is never heard of.
    ("    if not thread and is_question:",
     "    if not thread and isinstance(message, Synchronous):"),
    # Nor is the loss of a node.
    ("            if target.node == self.port:", "            if False:"),
    # With one node all others count as lost.
    ("            if target.node == self.port:", "            if target.node != Thread.node:"),
    # A frozen node is waited for.
    ("self.wire.poll(PATIENCE)", "self.wire.poll(None)"),
    # Who has nothing to say is taken for dead.
    ('connection.send(None, "I am alive")', "pass"),
    # A node that cannot be reached is an error of the one who asked.
    ("    except OSError as error:\n        question",
     "    except ZeroDivisionError as error:\n        question"),
    # Every end is a natural death.
    ("            self.end(error)\n", "            self.end(None)\n"),
    # The loss of its node ends a thread a second time.
    ("not _awaited.pop(message.tag, None)", "not _awaited.get(message.tag)"),
    # The Down does not say which monitor it is for.
    ("Down(self, reason, tag)", "Down(self, reason, None)"),
    # The monitor arrives as a message.
    ("    if thread and not isinstance(message, Monitor):", "    if thread:"),
]


######## Bench: bench, its sets of processes, what is measured, the peers measured against
#
# A set is a fresh process, pinned to one CPU, with fresh peers, which inherit that.  It yields
# rows: the work, the unit, ours, raw, and what is asked of ours / raw (with a third word:
# of ours).  Ours and raw take turns.  "Raw" is Connection.send and recv with NODELAY, a thread
# at each end of each connection, unless the row names another.  Rates run from the first send
# until the consumer has received all and said so.

SMALL = "work", 7, 3.5  # the small message
BENCH = ("import sys; sys.modules['hypothesis'] = None; "  # it takes long, and is not needed
         f"import {__name__} as it; it.")  # how other processes reach the functions here


def bench(arguments):
    """Measure distconc beside the bare standard library; print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="bench", description=bench.__doc__)
    parser.add_argument("--json", action="store_true", help="one object, in s, 1/s, B, B/s")
    parser.add_argument("--sets", type=int, default=2, help="fresh sets of processes (2)")
    options = parser.parse_args(arguments)
    os.environ["DISTCONC_AUTHKEY"] = os.urandom(16).hex()  # for all processes of the bench
    os.environ["PYTHONPATH"] = HERE
    for unwanted in "DISTCONC_TRACE", "PYTHONDONTWRITEBYTECODE":  # import, not compile
        os.environ.pop(unwanted, None)
    sets = []
    for number in range(options.sets):
        print(f"set {number + 1} of {options.sets} ", end="", file=sys.stderr, flush=True)
        parts = f"_bench_pinned({number})", "_bench_unpinned()"
        sets.append(sum((json.loads(_bench_run(BENCH + part)) for part in parts), []))
        print(file=sys.stderr)
    name, cpu = platform.processor(), _bench_cpu()
    with suppress(OSError), open("/proc/cpuinfo") as file:
        models = (line.split(": ")[1].strip() for line in file if "model name" in line)
        name = next(models, name)
    about = {"python": platform.python_version(), "sets": options.sets, "pinned_to_cpu": cpu,
             "machine": f"{name}, {os.cpu_count()} CPUs, {platform.system()}",
             "rows": [_bench_summary(results) for results in zip(*sets)]}
    print(json.dumps(about)) if options.json else _bench_table(about)


def _bench_summary(results):
    """One row for the table from that row of all sets."""
    work, unit, _, _, asked = results[0]
    figures = [row[2:4] for row in results if row[2] and row[3]]
    ours, raw = map(median, zip(*figures)) if figures else (None, None)
    ratio = median([ours / raw for ours, raw in figures]) if figures else None
    met, meant = None, ours if asked and asked[2:] else ratio
    if asked and figures:
        met = meant <= asked[1] if asked[0] == "<=" else meant >= asked[1]
    return {"work": work, "unit": unit, "ours": ours, "raw": raw, "ratio": ratio,
            "asked": asked, "met": met, "sets": figures}


def _bench_table(about):
    cpu = about["pinned_to_cpu"]
    pinned = "not pinned" if cpu is None else f"all pinned to CPU {cpu}, but for the last row"
    print(f"Python {about['python']}; {about['machine']}; medians over {about['sets']} sets of "
          f"fresh processes, {pinned}; ! misses what is asked\n")
    shown = {"s": lambda s: f"{s * 1e6:,.1f} us" if s < 1e-3 else f"{s * 1e3:,.1f} ms",
             "/s": "{:,.0f}/s".format, "B/s": lambda b: f"{b / (1 << 20):,.0f} MiB/s",
             "B": lambda b: f"{b / 1024:,.1f} KiB", "ratio": "{:.2f}".format}
    lines = [("work", "ours", "raw", "ratio", "asked")]
    for row in about["rows"]:
        sign, number, *of = row["asked"] or ("", 0)
        asked = f"{sign} {shown[of[0]](number) if of else number}" if sign else ""
        units = row["unit"], row["unit"], "ratio"
        figures = [shown[unit](row[what]) if row[what] else "-"
                   for what, unit in zip(("ours", "raw", "ratio"), units)]
        lines.append((row["work"], *figures, asked + " !" * (row["met"] is False)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for work, *figures, asked in lines:
        figures = map(str.rjust, figures, widths[1:])
        print("  ".join([work.ljust(widths[0]), *figures, asked]).rstrip())


######## Bench: one set


def _bench_run(code):
    """Run `code` in a fresh Python; return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, stdout=subprocess.PIPE, timeout=600, check=True).stdout


def _bench_cpu():
    """The CPU to pin to, the last of those we may use; None where one cannot."""
    return max(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else None


def _bench_pinned(number):
    """Measure all but the last row."""
    if _bench_cpu() is not None:
        os.sched_setaffinity(0, {_bench_cpu()})  # of this thread; what it starts inherits it
    with ExitStack() as stack:
        children = [stack.enter_context(spawn_node()) for _ in range(4)]
        peers = [stack.enter_context(_bench_peer("_bench_raw_peer()")) for _ in range(4)]
        manager = stack.enter_context(_bench_peer("_bench_manager()"))
        _bench_print(chain(
            _bench_calls(children[0], peers[0], manager), _bench_floods(children, peers),
            _bench_starts(children[0], peers[0]), _bench_local(), _bench_mailbox(),
            _bench_traces(number), _bench_memory(number)))


def _bench_unpinned():
    with spawn_node() as child, _bench_peer("_bench_raw_peer()") as peer:
        _bench_print([_bench_row("one-way flood, unpinned", "/s", (">=", 2.5), 5,
                                 partial(_bench_flood, child, SMALL, 30_000),
                                 partial(_bench_flood_raw, _bench_dial(peer), SMALL, 30_000))])


def _bench_print(source):
    rows = []
    for row in source:
        rows.append(row)
        print(".", end="", file=sys.stderr, flush=True)
    print(json.dumps(rows))


def _bench_turns(rounds, *works):
    """Call the works in turn, after once to warm up; return the figures of each, sorted."""
    turns = [[work() for work in works] for _ in range(rounds + 1)]
    return [sorted(chain(*figures)) for figures in zip(*turns[1:])]


def _bench_row(work, unit, asked, rounds, ours, raw):
    return work, unit, *map(median, _bench_turns(rounds, ours, raw)), asked


def _bench_each(times, work):
    """The seconds that each of `times` calls took."""
    took = []
    for _ in range(times):
        start = perf_counter()
        work()
        took.append(perf_counter() - start)
    return took


def _bench_together(times, works):
    """Calls a second, if as many threads as works each do theirs `times` times."""
    with ThreadPoolExecutor(len(works)) as pool:
        start = perf_counter()
        list(pool.map(partial(_bench_each, times), works))
        return [times * len(works) / (perf_counter() - start)]


######## Bench: what is measured


def _bench_calls(child, peer, manager):
    server = spawn_server(handle_synchronous, _bench_same, node=child)
    wires = [_bench_dial(peer) for _ in range(4)]
    for wire in wires:
        wire.send(("echo", 1 << 60))
    BaseManager.register("Proxied")
    managed = BaseManager(manager, _bench_key())
    managed.connect()
    proxy = managed.Proxied()

    def ours(message=SMALL):
        send_synchronous(message, server)

    def bare(message=SMALL, wire=wires[0]):
        wire.send(message)
        wire.recv()

    works = ours, bare, lambda: proxy.same(SMALL)
    o, r, p = _bench_turns(8, *(partial(_bench_each, 250, work) for work in works))
    yield "round trip, median", "s", median(o), median(r), ("<=", 2.5)
    yield "round trip, 99th percentile", "s", o[len(o) * 99 // 100], r[len(r) * 99 // 100], None
    yield "round trip / a BaseManager proxy's", "s", median(o), median(p), None
    yield _bench_row("four callers", "/s", (">=", 0.42), 3,
                     partial(_bench_together, 400, [ours] * 4),
                     partial(_bench_together, 400, [partial(bare, SMALL, w) for w in wires]))
    large = bytes(20_000)
    yield _bench_row("round trip of 20 kB", "s", None, 3,
                     partial(_bench_each, 200, partial(ours, large)),
                     partial(_bench_each, 200, partial(bare, large)))


def _bench_floods(children, peers):
    wires = [_bench_dial(peer) for peer in peers]
    for work, message, times, asked in (
            ("one-way flood", SMALL, 30_000, 3.5), ("flood of 1 kB", bytes(1_000), 12_000, 1.3),
            ("flood of 10 kB", bytes(10_000), 3_000, 0.22),
            ("flood of 60 kB", bytes(60_000), 800, None)):
        yield _bench_row(work, "/s", asked and (">=", asked), 2,
                         partial(_bench_flood, children[0], message, times),
                         partial(_bench_flood_raw, wires[0], message, times))
    yield _bench_row("fan-in from four processes", "/s", (">=", 2.6), 2,
                     partial(_bench_fan_in, children, 8_000),
                     partial(_bench_fan_in_raw, wires, 8_000))
    large = bytes(64 << 20)
    o, r = _bench_turns(2, partial(_bench_flood, children[0], large, 1),
                        partial(_bench_flood_raw, wires[0], large, 1))
    yield "64 MiB", "B/s", median(o) * len(large), median(r) * len(large), (">=", 0.55)


def _bench_flood(node, message, times):
    """Messages a second to a thread of `node` (None: this one)."""
    sink = spawn(_bench_sink, times, current_thread(), node=node)
    start = perf_counter()
    for _ in range(times):
        send(message, sink)
    receive()
    return [times / (perf_counter() - start)]


def _bench_flood_raw(wire, message, times):
    wire.send(("sink", times))
    start = perf_counter()
    for _ in range(times):
        wire.send(message)
    wire.recv()
    return [times / (perf_counter() - start)]


def _bench_fan_in(children, times):
    """Messages a second from all children to this thread."""
    sources = [spawn(_bench_source, times, current_thread(), node=child) for child in children]
    start = perf_counter()
    for source in sources:
        send("go", source)
    for _ in range(times * len(sources)):
        receive()
    return [times * len(sources) / (perf_counter() - start)]


def _bench_fan_in_raw(wires, times):
    def take(wire):
        wire.send(("source", times))
        for _ in range(times):
            wire.recv()

    return [times * _bench_together(1, [partial(take, wire) for wire in wires])[0]]


def _bench_starts(child, peer):
    spawn_server(handle_synchronous, _bench_same, node=child, name="echo", register=True)
    ours = ("from distconc import RemoteThread, send_synchronous\n"
            f"print(send_synchronous(1, RemoteThread({child.address!r}, 'echo')), flush=True)")
    raw = ("import socket; from multiprocessing.connection import Client\n"
           f"wire = Client({peer!r}, authkey={_bench_key()!r})\n"
           "with socket.fromfd(wire.fileno(), socket.AF_INET, socket.SOCK_STREAM) as sock:\n"
           "    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n"
           "wire.send(('echo', 1)); wire.send(1); print(wire.recv(), flush=True)")
    clock = "from time import perf_counter as now; t = now(); import {}; print([now() - t])"

    def first_reply(code):
        start = perf_counter()
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            if process.stdout.readline().strip() != b"1":
                raise RuntimeError(f"no reply to {code}")
            return [perf_counter() - start]

    def imported(module):
        return json.loads(_bench_run(clock.format(module)))

    yield _bench_row("process start to first reply", "s", ("<=", 1.3), 2,
                     partial(first_reply, ours), partial(first_reply, raw))
    yield _bench_row("import / of multiprocessing.connection", "s", None, 2,
                     partial(imported, "distconc"),
                     partial(imported, "multiprocessing.connection"))


def _bench_local():
    server = spawn_server(handle_synchronous, _bench_same)

    def echo(there, back):
        while True:
            back.put(there.get())

    def call_over(kind):
        there, back = kind(), kind()
        _bench_thread(echo, there, back)
        return lambda: (there.put(SMALL), back.get())

    def flood_bare(times):
        there, back = queue.SimpleQueue(), queue.SimpleQueue()
        _bench_thread(lambda: back.put([there.get() for _ in range(times)]))
        start = perf_counter()
        for _ in range(times):
            there.put(SMALL)
        back.get()
        return [times / (perf_counter() - start)]

    works = lambda: send_synchronous(SMALL, server), *map(call_over, (queue.SimpleQueue,
                                                                      queue.Queue))
    o, s, q = map(median, _bench_turns(8, *(partial(_bench_each, 500, w) for w in works)))
    yield "local round trip / two SimpleQueues", "s", o, s, ("<=", 2.5)
    yield "local round trip / two queue.Queues", "s", o, q, None
    yield _bench_row("local flood / a SimpleQueue's", "/s", (">=", 8e5, "/s"), 3,
                     partial(_bench_flood, None, SMALL, 100_000), partial(flood_bare, 100_000))
    yield _bench_row("thread start to its end / bare", "s", None, 3,
                     partial(_bench_each, 100, lambda: spawn(_bench_same, 0).join()),
                     partial(_bench_each, 100, lambda: _bench_thread(_bench_same, 0).join()))


def _bench_mailbox():
    server, me = spawn_server(handle_synchronous, _bench_same), current_thread()

    def among(unread, times, work):
        """Time `work` with that many messages in the mailbox, then empty it."""
        for number in range(unread):
            send(number, me)
        took = _bench_each(times, work)
        while receive(0, None) is not None:
            pass
        return took

    def scan():
        send(-1, me)
        receive_if(is_last, 0)

    def is_last(message):
        return message < 0

    def scan_bare():
        next(filter(is_last, numbers))

    call, numbers = lambda: send_synchronous(SMALL, server), deque([*range(100_000), -1])
    yield _bench_row("local call, 100,000 unread / none", "s", ("<=", 1.2), 4,
                     partial(among, 100_000, 1000, call), partial(among, 0, 1000, call))
    whole, half, bare = map(median, _bench_turns(
        5, partial(among, 100_000, 1, scan), partial(among, 50_000, 1, scan),
        partial(_bench_each, 1, scan_bare)))
    yield "receive_if over 100,000 / a bare scan", "s", whole, bare, ("<=", 0.040, "s")
    yield "receive_if over 100,000 / over 50,000", "s", whole, half, ("<=", 2.5)


class _BenchCut(ast.NodeTransformer):
    """Cuts out of distconc what it does to know whether it is traced."""

    def visit_Attribute(self, node):
        self.generic_visit(node)
        reads = node.attr == "is_recording" and isinstance(node.ctx, ast.Load)
        return ast.copy_location(ast.Constant(False), node) if reads else node



def _bench_traces(number):
    """What tracing costs, in CPU time of both nodes: off, beside a module without it; on."""
    rows = [[None] * 3] * 2
    if number == 0:
        with tempfile.TemporaryDirectory() as directory, open(MODULE) as file:
            cut = ast.fix_missing_locations(_BenchCut().visit(ast.parse(file.read())))
            with open(os.path.join(directory, "distconc.py"), "w") as copied:
                copied.write(ast.unparse(cut))
            turns = [(directory, None), (HERE, None)] * 6
            turns.append((HERE, os.path.join(directory, "traces")))
            runs = [_bench_costs_in(*turn) for turn in turns]
            rows = [[min(row) for row in (row[:12:2], row[1:12:2], row[12:])]
                    for row in zip(*runs)]
    for work, (cut, off, on) in zip(("round trip", "flood"), rows):
        yield f"CPU of a {work}, tracing off / cut out", "s", off, cut, ("<=", 1.02)
        yield f"CPU of a {work}, tracing on / off", "s", on, off, None


def _bench_costs_in(directory, traces):
    """Run `_bench_costs` with the distconc.py of that directory; return what it prints."""
    path = os.pathsep.join([directory, HERE])
    env = {**os.environ, "PYTHONPATH": path, "DISTCONC_TRACE": traces or ""}
    done = subprocess.run([sys.executable, "-c", f"{BENCH}_bench_costs()"], env=env, check=True,
                          cwd=directory, stdout=subprocess.PIPE, timeout=120)
    return json.loads(done.stdout)


def _bench_costs():
    """Print the seconds of CPU, of both nodes, of a round trip and of a flood's message."""
    with spawn_node() as child:
        clock = spawn_server(handle_synchronous, _bench_clock, node=child)

        def cost(times, work):
            start = time.process_time() + send_synchronous(None, clock)
            work()
            return (time.process_time() + send_synchronous(None, clock) - start) / times

        calls = lambda: [send_synchronous(None, clock) for _ in range(1000)]
        print([min(cost(1000, calls) for _ in range(3)),
               min(cost(10_000, partial(_bench_flood, child, SMALL, 10_000))
                   for _ in range(3))])


def _bench_clock(_):
    return time.process_time()


def _bench_memory(number):
    ours = raw = None
    if number == 0 and os.path.exists("/proc/self/statm"):  # it hardly varies: once will do
        ours, raw = (json.loads(_bench_run(f"{BENCH}_bench_idle_threads({kind})"))
                     for kind in (True, False))
    yield "an idle thread of 10,000 / bare with queue", "B", ours, raw, ("<=", 1.3)


def _bench_idle_threads(with_mailbox):
    """Print the bytes that each of 10,000 idle threads takes; null if so many cannot be."""
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def idle(wait):
        ready.release()
        wait()

    ready, before, size = threading.Semaphore(0), resident(), None
    with suppress(RuntimeError):  # can't start new thread
        for _ in range(10_000):
            if with_mailbox:
                spawn(idle, receive)
            else:
                _bench_thread(idle, queue.SimpleQueue().get)
            ready.acquire()
        size = (resident() - before) / 10_000
    print(json.dumps(size), flush=True)
    os._exit(0)  # at once, without the end of 10,000 threads


######## Bench: the peers, and what runs there


def _bench_same(data):
    return data


def _bench_sink(times, whom):
    for _ in range(times):
        receive()
    send("done", whom)


def _bench_source(times, whom):
    receive()
    for _ in range(times):
        send(SMALL, whom)


def _bench_thread(func, *args):
    thread = threading.Thread(target=func, args=args, daemon=True)
    thread.start()
    return thread


def _bench_key():
    return os.environ["DISTCONC_AUTHKEY"].encode()


def _bench_dial(peer):
    return _bench_no_delay(Client(peer, authkey=_bench_key()))


def _bench_no_delay(wire):
    with socket.fromfd(wire.fileno(), socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return wire


@contextmanager
def _bench_peer(call):
    """A new process that does `call`, which prints an address; it ends with its stdin."""
    with subprocess.Popen([sys.executable, "-c", BENCH + call], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        yield tuple(json.loads(process.stdout.readline()))
        process.stdin.close()


def _bench_be_peer(address, serve):
    _bench_thread(serve)
    print(json.dumps(address), flush=True)
    sys.stdin.read()
    os._exit(0)


class _BenchProxied:
    same = staticmethod(_bench_same)


def _bench_manager():
    BaseManager.register("Proxied", _BenchProxied)
    server = BaseManager(("127.0.0.1", 0), _bench_key()).get_server()
    _bench_be_peer(server.address, server.serve_forever)


def _bench_raw_peer():
    listener = Listener(("127.0.0.1", 0), backlog=16, authkey=_bench_key())

    def accept():
        while True:
            _bench_thread(_bench_obey, _bench_no_delay(listener.accept()))

    _bench_be_peer(listener.address, accept)


def _bench_obey(wire):
    """Do what comes over a raw connection, until that ends."""
    with suppress(EOFError, OSError):
        while True:
            order, times = wire.recv()
            if order == "echo":
                for _ in range(times):
                    wire.send(wire.recv())
            elif order == "sink":
                for _ in range(times):
                    wire.recv()
                wire.send("done")
            elif order == "source":
                for _ in range(times):
                    wire.send(SMALL)


######## Soak: a million messages, 200 clients, 2,000 connections, then faults for a minute
#
# In the last part faults strike three nodes that send to each other and to this one, which
# survives.  All connections lead through proxies, which can be cut at any byte and held up.
# Whoever sees a promise broken, in whatever process, writes a line into the file "broken"; the
# first such line ends the soak.

SOAK_BEAT = 2.0  # seconds: the heartbeat and the connect_timeout of all nodes
SOAK_LIMIT = 15.0  # seconds: no call and no Down takes longer, on a busy machine either
SOAK_CLIENT = """
import sys, time
from distconc import *
server, client, longest = RemoteThread(sys.argv[1], "server"), int(sys.argv[2]), 0.0
connect(sys.argv[1])
print("connected", flush=True)
sys.stdin.readline()
data = lambda number: bytes([number % 251]) * (3_000 if number % 50 == 0 else number % 30)
for number in range(1, 501):
    start = time.monotonic()
    if send_synchronous((client, number, data(number)), server)[1] != number:
        sys.exit("this is another call's reply")
    longest = max(longest, time.monotonic() - start)
print(longest, flush=True)
"""


class _SoakBroken(Exception):
    """A promise was not kept."""


def soak():
    """Put nodes under load and under faults; print figures; status 1 for a broken promise."""
    seed = int(os.environ.get("DISTCONC_SEED") or int.from_bytes(os.urandom(4), "big"))
    seconds = float(os.environ.get("DISTCONC_SOAK") or 60)
    print(f"seed {seed} (with DISTCONC_SEED={seed} the same faults are drawn)", flush=True)
    faulthandler.dump_traceback_later(5 * seconds + 900, exit=True)  # should the soak hang
    rows = []
    try:
        with tempfile.TemporaryDirectory(prefix="soak") as directory:
            _soak_prepare(directory)
            for row in chain(_soak_million(), _soak_clients(directory), _soak_connections(),
                             _soak_faults(directory, seed, seconds)):
                print(*row, sep=": ", file=sys.stderr, flush=True)
                rows.append(row)
    except _SoakBroken as broken:
        sys.exit(f"soak: {broken} (seed {seed})")
    finally:
        faulthandler.cancel_dump_traceback_later()
        stop_node()
    print(f"Python {platform.python_version()}; {_soak_machine()}\n")
    for name, figures in rows:
        print(f"{name:{max(len(name) for name, _ in rows)}}  {figures}")


def _soak_machine():
    name = platform.processor()
    with suppress(OSError), open("/proc/cpuinfo") as file:
        models = (line.split(": ")[1].strip() for line in file if "model name" in line)
        name = next(models, name)
    return f"{name}, {os.cpu_count()} CPUs, {platform.system()}"


def _soak_check(holds, sentence):
    if not holds:
        raise _SoakBroken(sentence)


def _soak_prepare(directory):
    """Have this process report the failure of any thread, ours or the module's own."""
    def report(failure):
        _soak_breach(directory, f"a thread, {failure.thread.name}, died of "
                                f"{type(failure.exc_value).__name__}: {failure.exc_value}")
        sys.__excepthook__(*failure[:3])
    threading.excepthook = report


def _soak_breach(directory, sentence):
    with open(os.path.join(directory, "broken"), "a") as file:
        file.write(f"{sentence}\n")


def _soak_unbroken(directory):
    with suppress(FileNotFoundError), open(os.path.join(directory, "broken")) as file:
        raise _SoakBroken(file.readline().strip())


def _soak_size():
    """Threads, descriptors, objects, bytes of this process, when garbage is gone."""
    gc.collect()
    with suppress(OSError, AttributeError):  # else what free() keeps looks like a leak
        ctypes.CDLL(None).malloc_trim(0)
    return *census(), len(gc.get_objects()), memory()


def _soak_growth(before, size, objects=1000, mib=16):
    """Wait until threads and descriptors are back where they were; say what has grown."""
    end = monotonic() + T
    while (now := size())[:2] > before[:2] and monotonic() < end:
        receive(0.1, None)
    grown = [late - early for late, early in zip(now, before)]
    words = "threads {:+}, descriptors {:+}, objects {:+}, memory {:+.1f} MiB".format(
        *grown[:3], grown[3] / (1 << 20))
    _soak_check(grown[0] <= 0 and grown[1] <= 0 and grown[2] <= objects
                and grown[3] <= mib << 20, f"after all had gone, too much was left: {words}")
    return words


######## Soak: load


def _soak_million():
    """Four processes send 250,000 messages each to one thread, as fast as they can."""
    with start_node(), ExitStack() as stack:
        children = [stack.enter_context(spawn_node()) for _ in range(4)]
        sources = [spawn(_soak_numbers, 250_000, number, current_thread(), node=child)
                   for number, child in enumerate(children)]
        start, last = monotonic(), [0] * 4
        for source in sources:
            send("go", source)
        for _ in range(1_000_000):
            sender, number = receive(60)
            last[sender] += 1
            _soak_check(number == last[sender], f"message {number} of sender {sender} came "
                        f"where {last[sender]} should have")
        took = monotonic() - start
        for child in children:
            ask(child, echo, 0)  # comes after all that the child had sent
        _soak_check(receive(0, NOTHING) is NOTHING, "more messages came than were sent")
    yield ("1,000,000 messages, from four processes to one thread",
           f"none lost, doubled or out of order; {took:.1f} s, {1e6 / took:,.0f}/s")


def _soak_numbers(times, sender, whom):
    receive()
    for number in range(1, times + 1):
        send((sender, number), whom)


def _soak_clients(directory):
    """200 processes, each a node with a connection of its own, make 500 calls each."""
    with start_node(), spawn_node() as child, ExitStack() as stack:
        spawn(_soak_server, directory, "calls", node=child, name="server", register=True)
        before, clients = ask(child, _soak_size), []
        for number in range(200):
            command = [sys.executable, "-c", SOAK_CLIENT, str(child), str(number)]
            clients.append(stack.enter_context(subprocess.Popen(
                command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)))
            stack.callback(clients[-1].kill)
            if number % 20 == 19:  # 200 that start at once would starve each other
                for client in clients[-20:]:
                    connected = client.stdout.readline() == b"connected\n"
                    _soak_check(connected, "a client could not connect")
        _soak_check(ask(child, census)[1] >= before[1] + 200, "there are no 200 connections")
        start = monotonic()
        for client in clients:
            client.stdin.write(b"go\n")
            client.stdin.flush()
        lines = [client.stdout.readline() for client in clients]
        took = monotonic() - start
        _soak_check(all(lines), "a client failed")
        for number, client in enumerate(clients):
            client.communicate(timeout=60)
            ran = _soak_recorded(os.path.join(directory, "calls"), number)
            _soak_check(ran == 500, f"of 500 calls of a client, {ran} were processed")
        _soak_unbroken(directory)
        yield ("200 client processes, 500 calls each, at once",
               f"each ran once and got its reply; {took:.1f} s, {1e5 / took:,.0f}/s, "
               f"the longest took {max(map(float, lines)) * 1000:,.0f} ms")
        yield "when they had gone, at the server", _soak_growth(before, partial(ask, child,
                                                                                _soak_size))


def _soak_connections():
    """Open 2,000 connections, speak on them, close half in order and reset the others."""
    with start_node(), spawn_node() as server, spawn_node() as client:
        def work(times):
            at_once((ask, client, _soak_connect, times // 2, server.address),
                    (_soak_reset, times // 2, server))

        work(500)
        before_there, before_here = ask(server, _soak_size), ask(client, _soak_size)
        start, entered = monotonic(), ask(server, stats_here)["received"]
        work(2000)
        took = monotonic() - start
        entered = ask(server, stats_here)["received"] - entered
        _soak_check(entered >= 3000, f"only {entered} messages came over 2,000 connections")
        yield ("2,000 connections opened and closed, 1,000 by reset",
               f"{took:.1f} s, {2000 / took:,.0f}/s")
        yield "when they had gone, at the node dialled", _soak_growth(
            before_there, partial(ask, server, _soak_size), mib=4)
        yield "when they had gone, at the node that dialled", _soak_growth(
            before_here, partial(ask, client, _soak_size), mib=4)


def _soak_connect(times, node):
    for _ in range(times):
        connect(node)
        ask(node, echo, 1)
        disconnect(node)


def _soak_reset(times, node):
    for _ in range(times):
        with RawPeer.knock(node) as peer:
            _bench_no_delay(peer.conn)
            peer.challenge().greet().introduce().request("ps")
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


######## Soak: faults

SOAK_ALLOWED = NodeDown, NoSuchThread, TimeoutError  # what may come of a call; no server dies


def _soak_faults(directory, seed, seconds):
    """Kill, freeze and cut three nodes again and again, while they and this one speak."""
    with _SoakProxy() as door:
        with start_node(advertise=door.address, heartbeat=SOAK_BEAT,
                        connect_timeout=SOAK_BEAT) as node:
            door.target = node._listen_address
            spawn(_soak_sink, directory, name="sink", register=True)
            spawn_server(handle_synchronous, echo, name="echo", register=True)
            run, start = _SoakRun(directory, seed, door), monotonic()
            run.strike(seconds / 10)  # by then there is all that is made once and stays
            before = _soak_size()
            run.strike(seconds - seconds / 10)
            print(file=sys.stderr)
            took = monotonic() - start
            grown = _soak_growth(before, _soak_size, mib=32)
            idle = _soak_idle(node)
            came, _ = send_synchronous(None, get_remote_thread("sink"), T)
    faults = ", ".join(f"{count} {fault}" for fault, count in sorted(run.faults.items()))
    errors = ", ".join(f"{run.counts[kind]:,} {kind.__name__}" for kind in SOAK_ALLOWED)
    yield f"faults in {took:.0f} s, seed {seed}", faults
    yield "messages from the three nodes that came here", f"{came:,}, in order, none twice"
    yield ("calls from here", f"{run.counts['answered']:,} answered, {errors}; the longest "
           f"took {run.longest:.1f} s")
    yield "monitors and links", f"{run.counts['watched']:,}, each told once"
    yield "when all was over, at the node that survived", f"{grown}; {idle}"


def _soak_idle(node):
    """The node that survived answers a newcomer at once, and then does nothing."""
    answer = script("from time import monotonic as now; target = RemoteThread(sys.argv[1], "
                    "'echo'); start = now(); print(send_synchronous('well', target, 9))\n"
                    "print(now() - start)", node)
    _soak_check(answer.status == 0, f"the node that survived did not answer: {answer.err}")
    well, seconds = answer.out.split()
    _soak_check(well == "well" and float(seconds) < 1, f"it answered after {seconds} s")
    start, spent = monotonic(), process_time()
    receive(2, None)
    share = (process_time() - spent) / (monotonic() - start)
    _soak_check(share < 0.1, f"the node that survived, idle, takes {share:.0%} of a CPU")
    return f"a newcomer was answered in {float(seconds) * 1000:.0f} ms"


class _SoakRun:
    """The faults and, on this node, the traffic and what has come of it."""

    def __init__(self, directory, seed, door):
        self.directory, self.door, self.random = directory, door, random.Random(seed)
        self.faults, self.counts, self.longest = Counter(), Counter(), 0.0
        self.over, self.names = threading.Event(), itertools.count(1)
        self.busy = {}  # who is within a call: since when
        self.lock = threading.Lock()  # guards: counts, longest

    def strike(self, seconds):
        """Have three nodes and the traffic between all; strike them; end all that."""
        self.over.clear()
        with ExitStack() as stack:
            slots = [stack.enter_context(_SoakSlot(self.directory)) for _ in range(3)]
            for slot, other in zip(slots, slots[1:] + slots[:1]):
                slot.start(other)
            workers = [spawn(work, self, slot, number) for slot in slots for number, work in
                       enumerate((_soak_call, _soak_call, _soak_send, _soak_watch))]
            stack.callback(self.over.set)
            end = monotonic() + seconds
            while monotonic() < end:
                self.step(slots)
            self.calm(slots)
            self.over.set()
            for slot in slots:
                slot.child.kill()
            for worker in workers:
                if not worker.join(2 * SOAK_LIMIT):
                    self.unbroken()
                    raise _SoakBroken(f"{worker!r} has not been told that its node has ended")
        self.unbroken()

    def step(self, slots):
        """One fault, or two at once; wait until those have been told whom they concern."""
        fault = self.random.choice((*3 * ["kill"], *3 * ["short freeze"], "long freeze",
                                    *5 * ["cut"], *2 * ["cut of all"], "long silence of all"))
        struck = slots if fault.endswith("all") else self.random.sample(
            slots, self.random.choice((1, 1, 2)))
        calm = self.random.uniform(0, 0.5)
        self.over.wait(calm)
        self.wait(lambda: all(slot.watched for slot in struck), "no contact comes about")
        turns = [slot.turn for slot in slots]
        getattr(self, "do_" + fault.replace(" ", "_"))(struck, lambda: all(
            slot.turn > turn for slot, turn in zip(slots, turns) if slot in struck))
        self.faults[fault] += 1
        self.unbroken()
        print(f"\r{sum(self.faults.values())} faults ", end="", file=sys.stderr, flush=True)

    def calm(self, slots):
        """When no fault strikes any more, nothing is lost any more."""
        self.wait(lambda: all(slot.watched for slot in slots), "no contact comes about")
        for slot in slots:
            sink, me = RemoteThread(slot.address, "sink"), f"calm {next(self.names)}"
            for number in range(1, 1001):
                send((me, number, _soak_data(number)), sink)
            _, last = send_synchronous(me, sink, SOAK_LIMIT)
            _soak_check(last == 1000, f"message {last} was the last of 1000 to come, in calm")

    def wait(self, holds, sentence):
        """Wait until `holds()`; meanwhile nobody may have seen a promise broken."""
        end = monotonic() + SOAK_LIMIT
        while not holds():
            self.unbroken()
            _soak_check(monotonic() < end, f"{sentence} within {SOAK_LIMIT:g} s")
            self.over.wait(0.01)

    def unbroken(self):
        _soak_unbroken(self.directory)
        for what, since in self.busy.copy().values():
            took = monotonic() - since
            _soak_check(took < SOAK_LIMIT, f"{what} has not ended for {took:.1f} s")

    # The faults.  After a cut between two nodes it is not known which proxy carried their
    # connection, so that nobody need have been told; after the others, all must.

    def do_kill(self, struck, told):
        for slot in struck:
            slot.child.kill()
        self.wait(told, "a killed node is not reported")
        for slot in struck:
            slot.boot()

    def do_short_freeze(self, struck, told):
        for slot in struck:
            freeze(slot.child)
        self.over.wait(self.random.uniform(0, SOAK_BEAT / 3))
        for slot in struck:
            thaw(slot.child.pid)

    def do_long_freeze(self, struck, told):
        for slot in struck:
            freeze(slot.child)
        try:
            self.wait(told, "a frozen node is not reported")
            self.over.wait(self.random.uniform(0, SOAK_BEAT))
        finally:
            for slot in struck:
                thaw(slot.child.pid)

    def do_cut(self, struck, told):
        for slot in struck:
            slot.proxy.cut()

    def do_cut_of_all(self, struck, told):
        for proxy in self.door, *(slot.proxy for slot in struck):
            proxy.cut()
        self.wait(told, "a cut is not reported")

    def do_long_silence_of_all(self, struck, told):
        proxies = self.door, *(slot.proxy for slot in struck)
        for proxy in proxies:
            proxy.flows.clear()
        self.wait(told, "silence is not reported")
        self.over.wait(self.random.uniform(0, SOAK_BEAT))
        for proxy in proxies:
            proxy.flows.set()

    # The traffic

    def count(self, name, times=1, took=0.0):
        with self.lock:
            self.counts[name] += times
            self.longest = max(self.longest, took)

    def attempt(self, func, *args):
        """Return what a call or send gives, None after an error that is allowed."""
        me, start = current_thread(), monotonic()
        self.busy[me] = f"{func.__name__} to {args[1]}", start
        try:
            result = func(*args)
        except SOAK_ALLOWED as error:
            kind = next(kind for kind in SOAK_ALLOWED if isinstance(error, kind))
            if func is send_synchronous:
                self.count(kind, 1, monotonic() - start)
            self.over.wait(0.02)  # not to fill the time with errors while a node is down
            return None
        finally:
            del self.busy[me]
        if func is send_synchronous:
            self.count("answered", 1, monotonic() - start)
        return result


class _SoakSlot:
    """A place for one node after the other, at one address: that of a proxy."""

    def __init__(self, directory):
        self.directory, self.proxy = directory, _SoakProxy()
        self.address, self.child = self.proxy.address, None
        self.turn, self.watched = 0, False  # how often all watches were told; all are set
        self.generations = itertools.count(1)

    def start(self, other):
        """Have the first node, whose threads will also send to the slot `other`."""
        self.other = other.address
        self.boot()

    def boot(self):
        while self.child is None or not self.child.is_alive():
            self.proxy.target = "127.0.0.1", free_port()
            with suppress(OSError):  # somebody else was faster to take the port
                self.child = spawn_node(self.proxy.target, advertise=self.address,
                                        heartbeat=SOAK_BEAT, connect_timeout=SOAK_BEAT)
        here = local_node().address
        sinks = RemoteThread(here, "sink"), RemoteThread(self.other, "sink")
        for _ in range(10):  # a cut may strike here, too
            # A name of its own, as what seems to have failed may have begun, and sends, too.
            name = f"{self.address[1]}.{next(self.generations)}"
            with suppress(NodeDown):
                self.server = spawn(_soak_be, self.directory, name, sinks,
                                    RemoteThread(here, "echo"), node=self.address)
                break

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.proxy.__exit__()
        if self.child:
            self.child.kill()


class _SoakProxy:
    """Passes bytes on to `target`, both ways; can be cut, and held up by `flows.clear()`."""

    def __init__(self):
        self.server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = self.server.getsockname()
        self.target = "127.0.0.1", 0  # where nobody ever listens
        self.socks, self.flows = set(), threading.Event()
        self.flows.set()
        self.accepter = _bench_thread(self.accept)

    def accept(self):
        with suppress(OSError):
            while True:
                _bench_thread(self.serve, self.server.accept()[0])

    def serve(self, client):
        with client, suppress(OSError), socket.create_connection(self.target, T) as server:
            server.settimeout(None)
            for sock in client, server:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.socks.add(sock)
            back = _bench_thread(self.copy, server, client)
            self.copy(client, server)
            back.join()
            self.socks -= {client, server}

    def copy(self, source, sink):
        try:
            while data := source.recv(1 << 16):
                self.flows.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            self.cut(source, sink)

    def cut(self, *socks):
        for sock in socks or self.socks.copy():
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.flows.set()
        self.cut(self.server)
        self.accepter.join()
        self.server.close()
        self.cut()


######## Soak: what the threads do, here and on the nodes that are struck


def _soak_call(run, slot, number):
    """Call a slot's server again and again, by name or by handle, and see what it has done."""
    me = next(run.names)
    for count in itertools.count(1):
        if run.over.is_set():
            return
        server = RemoteThread(slot.address, "server") if number else slot.server
        message, timeout = (me, count, _soak_data(count)), None if number else 2 * SOAK_BEAT
        if reply := run.attempt(send_synchronous, message, server, timeout):
            ran = _soak_recorded(reply[0], me)
            if reply[1:] != (count, message[2]) or ran != count:
                _soak_breach(run.directory, f"call {count} got the reply {reply[1]}; {ran} "
                                            "was the last to be processed")


def _soak_send(run, slot, _):
    """Send numbers to a slot's sink; call it now and then, so as not to overrun it.

    Not too often: much must be on its way when a fault strikes.
    """
    me, sink = f"here {next(run.names)}", RemoteThread(slot.address, "sink")
    for number in itertools.count(1):
        if run.over.is_set():
            return
        run.attempt(send, (me, number, _soak_data(number)), sink)
        if number % 2000 == 0 and (reply := run.attempt(send_synchronous, me, sink)):
            if reply[1] > number:
                _soak_breach(run.directory, f"{reply[1]} came, {number} was the last sent")


def _soak_watch(run, slot, _):
    """Link to a slot's thread, monitor it and its node; each must tell its end, once."""
    while not run.over.is_set():
        held = run.attempt(_soak_link, hold, slot.address)
        if held is None:
            continue
        awaited = {monitor(held), monitor(slot.address), held}
        run.count("watched", 3)
        slot.watched = True
        while awaited:
            try:
                told = receive().monitor
            except LinkedError as error:
                told = error.thread
            if told not in awaited:
                _soak_breach(run.directory, f"told twice, or never asked for: {told}")
            awaited.discard(told)
        slot.watched = False
        slot.turn += 1
        run.attempt(send, "end", held)
    if (more := outcome(receive, 1, None)) is not None:
        _soak_breach(run.directory, f"told twice, or never asked for: {more!r}")


def _soak_link(func, node):
    return spawn_linked(func, node=node)


def _soak_data(number):
    """What goes with a number, so that an altered message shows; at times large."""
    size = 300_000 if number % 997 == 0 else 3_000 if number % 50 == 0 else number % 30
    return bytes([number % 251]) * size


def _soak_be(directory, name, sinks, echo):
    """Be the server of a node that is struck, with a sink and two sources beside it."""
    _soak_prepare(directory)
    spawn(_soak_sink, directory, name="sink", register=True)
    for number, sink in enumerate(sinks):
        spawn(_soak_source, directory, f"{name} to {number}", sink, echo)
    register_remote_thread(current_thread(), "server")
    _soak_server(directory, name)


def _soak_server(directory, name):
    """Answer calls; note in a file, which outlives kill -9, which was the last of each caller.

    The reply says in which.
    """
    path, last = os.path.join(directory, name), Counter()
    with open(os.open(path, os.O_RDWR | os.O_CREAT), "wb") as file:
        while True:
            request = receive()
            caller, number, data = request.data
            if number <= last[caller] or data != _soak_data(number):
                _soak_breach(directory, f"call {number} came after {last[caller]}, or altered")
            last[caller] = number
            os.pwrite(file.fileno(), struct.pack("q", number), 8 * caller)
            reply_synchronous((path, number, data), request)


def _soak_recorded(path, caller):
    with open(path, "rb") as file:
        return struct.unpack("q", os.pread(file.fileno(), 8, 8 * caller))[0]


def _soak_sink(directory):
    """Take numbers, and see that each sender's come in order, once, with the right data.

    A call is answered with how many came in all, and the last of one sender.
    """
    came, last = 0, Counter()
    while True:
        message = receive()
        if isinstance(message, Synchronous):
            reply_synchronous((came, last[message.data]), message)
            continue
        sender, number, data = message
        if number <= last[sender] or data != _soak_data(number):
            _soak_breach(directory, f"{number} of {sender!r} came after {last[sender]}, or "
                                    "altered")
        last[sender] = number
        came += 1


def _soak_source(directory, name, sink, echo):
    """Send numbers to a sink, and call it and this run's survivor now and then, for ever."""
    for number in itertools.count(1):
        try:
            send((name, number, _soak_data(number)), sink)
            if number % 2000 == 0:
                start = monotonic()
                _, last = send_synchronous(name, sink)
                same = send_synchronous(number, echo)
                took = monotonic() - start
                if last > number or same != number:
                    _soak_breach(directory, f"{last} came, {number} was the last sent")
                if took > 4 * SOAK_LIMIT:  # frozen in between, perhaps more than once
                    _soak_breach(directory, f"two calls took {took:.1f} s")
        except SOAK_ALLOWED:
            receive(0.02, None)


######## All tests

# These wait much and compute little, so each list runs in a process of its own.
APART = [["Documents", "Faults"], ["Exercises", "InTheMiddle"],
         ["Processes", "OtherPrograms", "Children"], ["TheWire", "Strangers", "Plain", "Shell"]]


def run_all():
    """Run all tests, in a few processes at once; return 1 if one of them failed, else 0."""
    setUpModule()
    kinds = [name for name, thing in globals().items()
             if isinstance(thing, type) and issubclass(thing, unittest.TestCase)]
    rest = [name for name in kinds if name not in chain(*APART)]
    runs = [start_tests(names) for names in (rest, *APART)]
    for process, output in runs:
        process.wait()
        output.seek(0)
        print(output.read())
    return int(any(process.returncode for process, _ in runs))


def start_tests(names):
    """Start tests in a process of their own; return that, and the file that it writes to."""
    output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    tests = [f"test_distconc.{name}" for name in names]
    command = [sys.executable, *distconc._interpreter_flags(), "-m", "unittest", *tests]
    return subprocess.Popen(command, cwd=HERE, stdout=output, stderr=output), output


if __name__ == "__main__":
    import test_distconc as by_its_name  # under which other nodes find what they are to run

    if sys.argv[1:2] == ["bench"]:
        by_its_name.bench(sys.argv[2:])
    elif sys.argv[1:2] == ["soak"]:
        by_its_name.soak()
    elif sys.argv[1:2] == ["check"]:
        sys.exit(by_its_name.check_exercise(sys.argv[2:]))
    elif sys.argv[1:2] == ["handout"]:
        by_its_name.handout(sys.argv[2:])
    elif sys.argv[1:]:
        unittest.main(by_its_name)
    else:
        sys.exit(by_its_name.run_all())
