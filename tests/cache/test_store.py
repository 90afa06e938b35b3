"""The table of plans: how many it holds, and what of it stays when there are more."""

import random
from threading import Thread

from asyncorm._cache.store import Store


def rotate(store: Store, keys: range) -> int:
    """How many of the keys are there, when each new one is kept if it is let in."""
    there = 0
    for key in keys:
        if key in store:
            there += 1
        elif store.lets_in():
            store.keep(key, str(key))
    return there


def test_it_holds_no_more_than_its_size() -> None:
    store = Store(100)
    for key in range(1000):
        store.keep(key, str(key))
        assert len(store) == min(key + 1, 100)
    assert 999 in store  # what is kept is kept
    assert all(store[key] == str(key) for key in store)


def test_of_a_rotation_a_share_is_there() -> None:
    for count, least in ((125, 0.6), (200, 0.25), (400, 0.08)):
        store = Store(100)
        for _ in range(30):
            rotate(store, range(count))
        found = sum(rotate(store, range(count)) for _ in range(30))
        assert found / (30 * count) > least


def test_what_is_asked_for_now_is_let_in_soon() -> None:
    store = Store(100)
    rotate(store, range(100))
    for _ in range(200):
        rotate(store, range(1000, 1050))
    assert all(key in store for key in range(1000, 1050))


def test_what_is_dropped_makes_room() -> None:
    store = Store(3)
    for key in "abc":
        store.keep(key, key)
    for key in ("c", "a", "unknown"):
        store.drop(key)
    assert store.lets_in() and store == {"b": "b"}
    for key in "de":
        store.keep(key, key)
    assert set(store) == {"b", "d", "e"}
    store.keep("b", "again")
    assert store["b"] == "again" and len(store) == 3
    store.clear()
    store.keep("x", "x")
    assert store == {"x": "x"}


def test_the_programs_random_numbers_stay_what_they_are() -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    rotate(Store(5), range(50))
    assert random.random() == expected


def test_threads_may_use_it_at_once() -> None:
    store = Store(50)

    def work(first: int) -> None:
        for number in range(3000):
            key = (first * 7 + number) % 120
            store.keep(key, str(key))
            store.drop((key + 60) % 120)

    threads = [Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store) <= 50
    for key in range(1000, 1100):  # its own account is right, or this would raise
        store.keep(key, str(key))
    assert len(store) == 50
