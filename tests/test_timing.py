import time
import types

import torch
from speed.timing import Stopwatch, matmul_tflops, medians


def test_a_stopwatch_adds_up_the_calls_of_a_name_and_leaves_no_trace():
    class Owner:
        def nap(self, seconds):
            time.sleep(seconds)
            return seconds

    owner, module = Owner(), types.ModuleType("module")
    module.work = lambda: "done"
    given, watch = module.work, Stopwatch(torch.device("cpu"))
    with watch.on((owner, "nap", "sleep"), (module, "work", "work")):
        assert owner.nap(0.02) == 0.02 and owner.nap(0.01) == 0.01 and module.work() == "done"
    times = watch.read()
    assert 30 <= times["sleep"] < 1000 and 0 <= times["work"] < 1000
    assert module.work is given and "nap" not in vars(owner)
    owner.nap(0)
    assert watch.read() == {}


def test_medians_by_name():
    assert medians([{"a": 1.0, "b": 5.0}, {"a": 9.0, "b": 4.0}, {"a": 2.0, "b": 6.0}]) == {"a": 2.0, "b": 5.0}


def test_the_rate_of_matrix_products_is_that_of_a_computer():
    assert 1e-4 < matmul_tflops(torch.device("cpu"), torch.float32) < 1e4
