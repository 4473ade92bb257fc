import numpy as np

from ortlm.runtime.sampler import greedy
from ortlm.runtime.search import Sampling


def one_hot(*tokens):
    return np.eye(10, dtype=np.float32)[list(tokens)]


def test_rows_end_on_their_own():
    search = Sampling([[1, 2, 3], [4]], processors=[], sampler=greedy, stop_ids=[9], max_new_tokens=3)
    assert search.step(one_hot(5, 9)).tolist() == [5, 9]
    assert search.reasons == [None, "stop"]
    assert search.history.tolist() == [[1, 2, 3, 5], [4, 9, -1, -1]]
    # A finished row repeats itself and counts no more.
    assert search.step(one_hot(6, 7)).tolist() == [6, 9]
    assert not search.finished
    search.step(one_hot(7, 7))
    assert search.finished
    assert search.reasons == ["length", "stop"]
    assert search.best() == [[5, 6, 7], [9]]


def test_history_grows():
    seen = []

    def look(history, logits):
        seen.append(history.shape[1])
        return logits

    search = Sampling([[1]], processors=[look], sampler=greedy, max_new_tokens=300)
    while not search.finished:
        search.step(one_hot(3))
    assert seen == list(range(1, 301))
    assert search.history[0].tolist() == [1, *[3] * 300]


def test_no_tokens_wanted():
    search = Sampling([[1]], processors=[], sampler=greedy, max_new_tokens=0)
    assert search.finished
    assert search.best() == [[]]
