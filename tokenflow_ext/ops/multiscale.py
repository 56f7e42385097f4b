"""The multi-scale ops."""

from tokenflow_ext import reference


def multiscale_quantize(*args, backend="auto", **options):
    return reference.multiscale_quantize(*args, **options)


def multiscale_rows(*args, backend="auto", **options):
    return reference.multiscale_rows(*args, **options)


def multiscale_decode(*args, backend="auto", **options):
    return reference.multiscale_decode(*args, **options)


def multiscale_inputs(*args, backend="auto", **options):
    return reference.multiscale_inputs(*args, **options)
