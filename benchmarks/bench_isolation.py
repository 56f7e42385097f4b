"""Do rivals' threads disturb us? FAISS brings an OpenMP and a BLAS of its own, whose threads spin for a while after a call.

Native turns after FAISS's are held against native turns after as long a rest. The FAISS process must not use the
processor meanwhile; the ratio of the times is printed, and is 1 but for the noise of the machine.
"""

import statistics
import time

from worker import Worker

NAME = "LlamaGen"
ROUNDS = 15


def bench_isolation(benchmark, tmp_path):
    after = {"rest": [], "FAISS": []}
    disturbed = 0.0
    with Worker("bench_nearest_code", NAME, "native") as native, Worker("bench_nearest_code", NAME, "FAISS") as faiss:
        for worker in (native, faiss):
            worker.first(tmp_path / "results.pt")
            worker.repeat = max(1, int(0.02 / worker.estimate()))
        for _ in range(ROUNDS):
            for before in after:
                time.sleep(2 * faiss.seconds * faiss.repeat) if before == "rest" else faiss.turn()
                start = faiss.cpu_seconds()
                after[before].append(native.turn()[0])
                disturbed += faiss.cpu_seconds() - start
    benchmark.pedantic(lambda: None)
    used = disturbed / (native.repeat * sum(map(sum, after.values())))
    ratio = statistics.median(after["FAISS"]) / statistics.median(after["rest"])
    print(f"native after FAISS / after a rest: {ratio:.3f}; FAISS used {100 * used:.2f} % of native's time meanwhile")
    benchmark.extra_info.update({"native after FAISS / after a rest": ratio})
    assert used < 0.01
