"""An actor's class that is imported by the actor itself alone."""

import asyncio
from collections import Counter

import pytest

from cppo_verl.cpu.rollout_server import Deferred, deferred


def test_it_does_as_the_other_class_does():
    counter = deferred(Counter)("aab")
    assert counter.most_common(1) == [("a", 2)]
    counter.update("bb", c=1)
    assert counter.total() == 6
    assert counter.actor == Counter(a=2, b=3, c=1)


def test_attributes_of_the_object_are_found_on_it():
    lock = deferred(asyncio.Semaphore)(3)
    assert lock._value == 3
    with pytest.raises(AttributeError, match="no_such"):
        lock.no_such  # noqa: B018


def test_coroutines_stay_coroutines():
    async def run():
        lock = deferred(asyncio.Lock)()
        return await lock.acquire(), lock.locked(), lock.release()

    assert asyncio.run(run()) == (True, True, None)


def test_a_constructor_that_fails_says_why():
    with pytest.raises(ValueError, match="initial value must be >= 0"):
        deferred(asyncio.Semaphore)(-1)
    with pytest.raises(AttributeError, match="actor"):
        object.__new__(Deferred).actor  # noqa: B018
