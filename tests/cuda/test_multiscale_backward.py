"""The multi-scale backwards on the emulated kernels: autograd of the twins in float64, odd ids, edges."""

import pytest
import torch
from harness import assert_gradients, leaves, normal, same_bits
from multiscale_cases import SCALES

from cuda.test_multiscale_decode import CALLS, OPTIONS, made, prefixes


def with_leaves(tables, options):
    """Leaves of the tables and of phi, and the options with phi's in them."""
    inputs = leaves(*tables)
    if options.get("phi"):
        inputs += leaves(*options["phi"][:2])
        options = {**options, "phi": (*inputs[-2:], *options["phi"][2:])}
    return inputs, options


def gradients_of_ids(name: str, ids, tables, options, backend: str, **more):
    """Of the tables and, where the call has it, phi; the call's value is weighed with fixed numbers."""
    inputs, options = with_leaves(tables, options)
    if name == "chain":
        inputs = inputs[: len(tables)]
    out = CALLS[name](ids, inputs[: len(tables)], **options, **more, backend=backend)
    nothing = sum(0 * i.sum() for i in inputs)  # an empty prefix may depend on none of them
    return torch.autograd.grad((out * normal(*out.shape, seed=5, dtype=out.dtype)).sum() + nothing, inputs)


def check_ids(ids, single, wide, **more):
    (tables, options), (wide_tables, wide_options) = single, wide
    for name in CALLS:
        if "refine" in more and name != "chain":
            continue
        got = gradients_of_ids(name, ids, tables, options, "emulated", **more)
        assert_gradients(
            got, gradients_of_ids(name, ids, wide_tables, wide_options, "reference", **more), 2e-6, size=1e-3
        )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grid", SCALES)
def test_decode_and_inputs(grid, options):
    """Of no scale, the first and all of them; with the last one refined."""
    ids, *single = made(grid, options)
    _, *wide = made(grid, options, dtype=torch.float64)
    ends = prefixes(single[1]["scales"])
    for length in {0, ends[1], ends[-1]}:
        check_ids(ids[:, :length], single, wide)
    if len(ends) > 2:
        check_ids(ids, single, wide, refine=len(ends) - 1)


@pytest.mark.parametrize("options", ["cosine", "l2", "phi partially shared"])
def test_dropped_scales(options):
    ids, *single = made("any order, repeated, short of the map", options)
    _, *wide = made("any order, repeated, short of the map", options, dtype=torch.float64)
    ends = prefixes(single[1]["scales"])
    for image, scale in ((0, 1), (1, 0), (1, 3)):
        ids[image, ends[scale] : ends[scale + 1]] = -1
    check_ids(ids, single, wide)
    ids[2] = -1
    check_ids(ids, single, wide)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("options", ["cosine", "phi shared"])
def test_ids_outside_the_table_send_no_gradient(name, options):
    """As though their rows were not there; the other rows and phi keep finite gradients."""
    ids, tables, options = made("square", options)
    expected = gradients_of_ids(name, ids, tables, options, "emulated")
    one = (ids == ids[1, 2]).nonzero()
    for b, n in one.tolist():
        ids[b, n] = 1000
    got = gradients_of_ids(name, ids, tables, options, "emulated")
    code = int(made("square", "cosine")[0][1, 2])
    others = torch.arange(len(tables[0])) != code
    for g, e in zip(got[:2], expected[:2]):
        assert not g[code].any() and e[code].any() and same_bits(g[others], e[others])
    assert all(g.isfinite().all() for g in got[2:])


@pytest.mark.parametrize(
    "grid, widths, batch, options",
    [
        (((3, 3), [1, (2, 3)]), (32, 8), 40, "cosine"),
        (((4, 5), [(3, 2), (4, 5)]), (41,), 3, "phi per scale"),  # channels in two tiles of phi's gradient
        (((61, 67), [2, (7, 5), (61, 67)]), (2, 1), 2, "cosine"),  # maps beyond shared memory
        (((9, 37), [(2, 37), (9, 3)]), (2, 1), 2, "phi shared"),  # more rows and columns than a tile of it
        (((1, 3800), [(1, 3)]), (2,), 1, "l2"),  # lines beyond shared memory
        (((4, 4), [1, 4]), (8, 1, 1), 0, "phi shared"),
    ],
    ids=str,
)
def test_sizes(grid, widths, batch, options):
    ids, *single = made(grid, options, batch, widths)
    _, *wide = made(grid, options, batch, widths, dtype=torch.float64)
    check_ids(ids, single, wide)
