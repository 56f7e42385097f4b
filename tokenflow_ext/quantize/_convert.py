"""convert: the originals' quantizers inside a model become ours, weights and all."""

import logging
import re
import sys
from collections.abc import Callable

from torch import nn

from tokenflow_ext.compat.tokenflow import VectorQuantizer
from tokenflow_ext.compat.unitok import VectorQuantizerM
from tokenflow_ext.compat.var import VectorQuantizer2
from tokenflow_ext.ops import _check
from tokenflow_ext.quantize._precision import HALVES

LOOKS = re.compile(r"quantiz|codebook|^vq|vq$", re.IGNORECASE)
"""Names of classes that may quantize vectors."""


class _Unknown(Exception):
    """Why a module that looks like an original is left alone."""


def _read(module: nn.Module, *names: str):
    """The first of these attributes that the module has."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise _Unknown(f"it has no {' or '.join(names)}")


def _tokenflow(old: nn.Module, options: dict) -> nn.Module | None:
    if type(old).__name__ != "VectorQuantizer" or not hasattr(old, "embedding_vqkd"):
        return None
    if getattr(old, "kmeans", False):
        raise _Unknown("its tables are moving averages (kmeans=True)")
    tables = _read(old, "embedding_vqkd").weight, _read(old, "embedding_vqgan").weight
    split = [table.shape[1] for table in tables]
    new = VectorQuantizer(
        tables[0].shape[0], sum(split), _read(old, "beta"), _read(old, "entropy_loss_ratio"), bool(_read(old, "l2_norm")),
        bool(_read(old, "show_usage")), split, **options,
    )  # fmt: skip
    new.e_dim = getattr(old, "e_dim", new.e_dim)
    return new


def _unitok(old: nn.Module, options: dict) -> nn.Module | None:
    if type(old).__name__ != "VectorQuantizerM" or not hasattr(old, "codebooks"):
        return None
    parts = list(old.codebooks)
    # Its options stand on the whole or on each part.
    holder = next((m for m in (old, *parts[:1]) if hasattr(m, "beta")), old)
    codes, width = _read(_read(parts[0], "codebook"), "weight").shape
    return VectorQuantizerM(
        codes * len(parts), width * len(parts), _read(holder, "beta"), bool(_read(holder, "use_entropy_loss")),
        _read(holder, "entropy_temp"), len(parts), **options,
    )  # fmt: skip


def _var(old: nn.Module, options: dict) -> nn.Module | None:
    if type(old).__name__ != "VectorQuantizer2" or not hasattr(old, "ema_vocab_hit_SV"):
        return None
    phi = _read(old, "quant_resi")
    if hasattr(phi, "qresi"):
        share, counts, first = 1, 0, phi.qresi
    elif hasattr(phi, "qresi_ls"):
        share, counts, first = len(phi.qresi_ls), 0, phi.qresi_ls[0]
        if share < 2:
            raise _Unknown(f"its qresi_ls hold {share} phi")
    else:
        share, counts, first = 0, len(phi), phi[0]
    ratio = 0.0
    if any(True for _ in first.parameters()):
        ratio = _read(first, "resi_ratio") if hasattr(first, "resi_ratio") else _read(old, "quant_resi_ratio")
    codes, width = _read(old, "embedding").weight.shape
    new = VectorQuantizer2(
        codes, width, bool(_read(old, "using_znorm")), _read(old, "beta"), counts, tuple(_read(old, "v_patch_nums")),
        ratio, share, **options,
    )  # fmt: skip
    if new.quirks:
        new.record_hit.fill_(int(getattr(old, "record_hit", 0)))
    return new


KINDS = (_tokenflow, _unitok, _var)


def _is_ours(kind: type) -> bool:
    """Whether a module of tokenflow_ext defines the class."""
    package = kind.__module__.split(".")[0] == "tokenflow_ext"
    return package and getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind


def _tensors(module: nn.Module) -> dict:
    """Parameters and buffers by name, those that share one tensor too."""
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {name: tensor for pairs in named for name, tensor in pairs}


def _made_of(old: nn.Module, options: dict) -> nn.Module | None:
    """Ours in place of `old`, with its very parameters and buffers; None where it is no original."""
    new = next((made for made in (kind(old, options) for kind in KINDS) if made is not None), None)
    if new is None:
        return None
    theirs, ours = (_tensors(m) for m in (old, new))
    wanted = new.state_dict().keys()
    if old.state_dict().keys() != wanted:
        raise _Unknown(f"its state dict differs in {', '.join(sorted(old.state_dict().keys() ^ wanted))}")
    for name in wanted:
        if theirs[name].shape != ours[name].shape:
            raise _Unknown(f"{name} has shape {list(theirs[name].shape)} for {list(ours[name].shape)}")
    for name in wanted:
        *path, last = name.split(".")
        holder = new.get_submodule(".".join(path))
        # The same tensors, so that an optimizer that holds them goes on.
        if last in holder._parameters:
            holder._parameters[last] = theirs[name]
        else:
            buffer = theirs[name].detach()
            holder._buffers[last] = buffer.float() if buffer.dtype in HALVES else buffer  # ids above 2048 need it
    device = next(iter(theirs.values())).device
    for holder in new.modules():
        for name in holder._non_persistent_buffers_set:
            holder._buffers[name] = holder._buffers[name].to(device)
    if hasattr(new, "resume"):
        new.resume()
    return new.train(old.training)


def convert(
    model: nn.Module, *, quirks: bool = False, backend: str = "auto", say: Callable[[str], None] | None = None
) -> nn.Module:
    """Replaces TokenFlow's, UniTok's and VAR's quantizers inside a model by those of `tokenflow_ext.compat`, in place.

    They are recognised by class name, attributes and state dict; their code is not imported. The new modules hold the very
    parameters and buffers of the old ones (an optimizer goes on), their device and training mode. Quantizers that a module
    keeps in a list, tuple or dict of its own are found too. What looks like a quantizer and is not known stays. Hooks on a
    replaced module are not taken along; convert before DistributedDataParallel or torch.compile wrap the model.

    Args:
        model: any module, or a quantizer itself.
        quirks: usage counters as the originals have them.
        backend: of the new modules.
        say: gets a sentence for every module replaced or left; by default the logger "tokenflow_ext" does, a warning where
            one was left.

    Returns:
        The model, or what replaced it where it is a quantizer itself.

    Raises:
        TypeError, ValueError: `model` is no nn.Module, quirks or backend are none.

    Example:
        >>> from tokenflow_ext.compat.unitok import SubCodebook
        >>> class VectorQuantizerM(nn.Module):  # stands for UniTok's own
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.beta, self.use_entropy_loss, self.entropy_temp = 0.25, False, 0.01
        ...         self.codebooks = nn.ModuleList(SubCodebook(16, 4, "auto") for _ in range(2))
        >>> model = convert(nn.Sequential(nn.Linear(8, 8), VectorQuantizerM()), say=print)
        1: VectorQuantizerM is now tokenflow_ext.compat.unitok.VectorQuantizerM
        >>> model[1].f_to_idx(torch.randn(1, 9, 8)).shape
        torch.Size([1, 2, 9])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model: wanted an nn.Module, got {type(model).__name__}")
    options = {"quirks": _check.flag("convert", "quirks", quirks), "backend": _check.backend("convert", backend)}
    log = logging.getLogger("tokenflow_ext")
    done: dict[nn.Module, nn.Module] = {}

    def visit(old: nn.Module, path: str) -> nn.Module:
        """What stands in `old`'s place from now on."""
        if old in done:
            return done[old]
        done[old] = old
        where, name = path or "the model", type(old).__name__
        if _is_ours(type(old)):
            return old
        try:
            new = _made_of(old, options)
            why = "it is of no kind that convert knows"
        except (_Unknown, AttributeError, TypeError, ValueError) as unknown:
            new, why = None, str(unknown)
        if new is not None:
            done[old] = done[new] = new
            (say or log.info)(f"{where}: {name} is now {type(new).__module__}.{name}")
            return new
        if LOOKS.search(name):
            (say or log.warning)(f"{where}: {name} stays as it is, {why}")
        for key, child in list(old._modules.items()):
            if child is not None:
                old._modules[key] = visit(child, f"{path}.{key}" if path else key)
        for key, value in list(vars(old).items()):
            if not key.startswith("_"):
                kept = inside(value, f"{path}.{key}" if path else key)
                if kept is not value:
                    vars(old)[key] = kept
        return old

    def inside(value, path: str):
        """A list, tuple or dict that hides modules, with those that were replaced; itself where there is none."""
        if isinstance(value, nn.Module):
            return visit(value, path)
        if isinstance(value, dict) and any(isinstance(v, nn.Module) for v in value.values()):
            value.update({k: inside(v, f"{path}[{k!r}]") for k, v in value.items()})
        elif isinstance(value, list) and any(isinstance(v, nn.Module) for v in value):
            value[:] = [inside(v, f"{path}[{i}]") for i, v in enumerate(value)]
        elif type(value) is tuple and any(isinstance(v, nn.Module) for v in value):
            made = tuple(inside(v, f"{path}[{i}]") for i, v in enumerate(value))
            return value if all(a is b for a, b in zip(made, value)) else made
        return value

    return visit(model, "")
