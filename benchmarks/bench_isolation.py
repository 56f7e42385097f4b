"""Do rivals' threads disturb us? Native turns beside resting workers against native turns after FAISS's, within 5 %.

FAISS brings an OpenMP and a BLAS of its own, whose threads spin for a while after a call. Were they left to, ours
would share the cores with them.
"""

import statistics

from worker import Worker

NAME = "LlamaGen"
TURNS = 25


def bench_isolation(benchmark, tmp_path):
    with Worker("bench_nearest_code", NAME, "native") as native, Worker("bench_nearest_code", NAME, "FAISS") as faiss:
        alone, beside = [], []
        for worker in (native, faiss):
            worker.first(tmp_path / "results.pt")
            worker.repeat = max(1, int(0.02 / worker.estimate()))
        for _ in range(TURNS):
            native.turn()  # as FAISS's turn, it comes before the one that counts
            alone.append(native.turn()[0])
            faiss.turn()
            beside.append(native.turn()[0])
    ratio = statistics.median(b / a for a, b in zip(alone, beside))
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["native beside FAISS / alone"] = ratio
    print(f"native takes {ratio:.3f} of its time alone when FAISS's turns stand between its own")
    assert 0.95 <= ratio <= 1.05, ratio
