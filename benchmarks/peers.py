"""The rivals, each set up at its best: what can be prepared outside of the timing is.

A library that is not installed raises ImportError when its call is prepared, and the benchmark reports it as skipped.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import tokenflow_ext


class Prepared:
    """A call that its own process builds before it is weighed and timed."""

    def __init__(self, build: Callable[[], Callable]):
        self._build = build

    def prepare(self) -> None:
        self._call = self._build()

    def __call__(self):
        return self._call()


def compiled(call: Callable) -> Prepared:
    """torch.compile of a call, compiled before."""

    def build():
        fast = torch.compile(call)
        fast()
        return fast

    return Prepared(build)


def on_threads(threads: int, call: Callable) -> Prepared:
    """The call with this many threads."""

    def build():
        torch.set_num_threads(threads)
        return call

    return Prepared(build)


def float32_search(call: Callable) -> Callable:
    """The native call with the float32 scan, where the default may be the certified int8 scan."""

    def forced():
        with tokenflow_ext.search_precision("full"):
            return call()

    return forced


def faiss_flat(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> Prepared:
    """FAISS's exhaustive search, k = 1, of x [N, D] or [N, G, D] in [K, D] or [G, K, D]: ids [N] or [N, G].

    Its index is built and, for cosine, rows and codes are made unit outside of the timing.
    """

    def build():
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        rows, codes = (t if metric != "cosine" else F.normalize(t, dim=-1) for t in (x, codebook))
        rows = [r.contiguous().numpy() for r in (rows.unbind(1) if rows.dim() == 3 else [rows])]
        codes = codes.unbind() if codes.dim() == 3 else [codes]
        indexes = []
        for group in codes:
            index = faiss.IndexFlatL2(group.shape[1]) if metric == "l2" else faiss.IndexFlatIP(group.shape[1])
            index.add(group.contiguous().numpy())
            indexes.append(index)

        def search():
            found = [torch.from_numpy(index.search(r, 1)[1][:, 0]) for index, r in zip(indexes, rows)]
            return torch.stack(found, 1) if x.dim() == 3 else found[0]

        return search

    return Prepared(build)


def lucidrains(codebook: torch.Tensor, metric: str, **options) -> torch.nn.Module:
    """vector-quantize-pytorch's module that starts from this codebook [K, D]; gradients pass straight through."""
    from vector_quantize_pytorch import VectorQuantize

    codes, width = codebook.shape
    module = VectorQuantize(width, codes, use_cosine_sim=metric == "cosine", rotation_trick=False, **options)
    for name in ("embed", "embed_avg"):
        getattr(module._codebook, name).data.copy_(codebook[None])
    return module


def lucidrains_eval(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> Prepared:
    """Ids [N] of vector-quantize-pytorch in eval, whose codes are unit for cosine."""

    def build():
        unit = F.normalize(codebook, dim=-1) if metric == "cosine" else codebook
        module = lucidrains(unit, metric).eval()
        return torch.no_grad()(lambda: module(x)[1])

    return Prepared(build)
