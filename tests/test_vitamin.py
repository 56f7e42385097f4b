"""ViTamin and the text tower against plain twins in float64, published names, sizes of any kind, and bad input."""

import json

import pytest
import torch
import torch.nn.functional as F
from golden_values import FOLDER
from tokenflow.errors import Missing
from tokenflow.models.text import TextTokenizer, TextTower
from tokenflow.models.upsample import UpConv
from tokenflow.models.vitamin import Block, DropPath, MBConv, ViTamin, ViTaminDecoder

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64, no parameter at its neutral start."""
    module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.add_(0.3 * normal(*p.shape, seed=i))
    return module


def agree(module, twin, x: torch.Tensor) -> None:
    """Values and gradients, to the input and to every parameter."""
    leaves, results = [x.clone().requires_grad_(), *module.parameters()], []
    for f in (module, twin):
        y = f(leaves[0])
        results.append((y, torch.autograd.grad((y * normal(*y.shape, seed=9)).sum(), leaves)))
    (y, gradients), (want, wanted) = results
    assert y.shape == want.shape and torch.allclose(y, want, rtol=1e-10, atol=1e-10)
    for got, expected in zip(gradients, wanted, strict=True):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)


def layer_norm(x: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def attend(q, k, v, heads: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax attention written out, one head after the other."""
    out = []
    for a, b, c in zip(*(t.chunk(heads, -1) for t in (q, k, v))):
        scores = a @ b.transpose(1, 2) / a.shape[-1] ** 0.5
        out.append((scores if mask is None else scores + mask).softmax(-1) @ c)
    return torch.cat(out, -1)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 2, 1, 1), (1, 3, 5, 2), (0, 2, 2, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling_convolution(shape, layout):
    up = scrambled(UpConv(shape[1], 5))

    def twin(x):
        doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return F.conv2d(doubled, up.weight, up.bias, padding=1)

    agree(up, twin, normal(*shape).contiguous(memory_format=layout))


def test_block():
    block = scrambled(Block(12, 3))

    def twin(x):
        q, k, v = block.attn.qkv(layer_norm(x, block.norm1)).chunk(3, -1)
        x = x + block.attn.proj(attend(q, k, v, 3))
        y = layer_norm(layer_norm(x, block.norm2), block.mlp.norm)
        gate, value = block.mlp.w0(y), block.mlp.w1(y)
        gelu = gate / 2 * (1 + ((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)).tanh())
        return x + block.mlp.w2(gelu * value)

    agree(block, twin, normal(2, 5, 12))


@pytest.mark.parametrize(
    ("width", "out", "resample"), [(4, 4, None), (4, 4, "down"), (4, 6, "down"), (6, 4, "up"), (4, 4, "up")]
)
def test_mbconv(width, out, resample):
    block = scrambled(MBConv(width, out, resample))

    def gelu(x):
        return x / 2 * (1 + torch.erf(x / 2**0.5))

    def twin(x):
        y = layer_norm(x.permute(0, 2, 3, 1), block.pre_norm).permute(0, 3, 1, 2)
        y = gelu(block.conv1_1x1(y))
        shortcut = x
        if resample == "up":
            shortcut, y = (
                F.conv2d(F.interpolate(t, scale_factor=2), c.conv.weight, c.conv.bias, padding=1)
                for t, c in ((x, block.shortcut), (y, block.up))
            )
        if resample == "down":
            ones = F.pad(torch.ones_like(x[:, :1]), (1, 1, 1, 1))
            total = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
            shortcut = block.shortcut.expand(total / F.avg_pool2d(ones, 3, 2))
        y = gelu(F.conv2d(y, block.conv2_kxk.weight, block.conv2_kxk.bias, block.conv2_kxk.stride, 1, groups=4 * out))
        return block.conv3_1x1(y) + shortcut

    agree(block, twin, normal(2, width, 6, 4))


def test_text_tower():
    tower = TextTower(width=8, heads=2, depth=2, out=6, context=7, vocabulary=20)
    scrambled(tower)
    ids = torch.tensor([[18, 3, 4, 19, 0, 0], [18, 19, 19, 5, 7, 19]])

    def norm(x, layer):
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)

    x = tower.token_embedding.weight[ids] + tower.positional_embedding[:6]
    mask = torch.full((6, 6), -torch.inf).triu(1)
    for block in tower.transformer["resblocks"]:
        qkv = norm(x, block.ln_1) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        x = x + block.attn.out_proj(attend(*qkv.chunk(3, -1), 2, mask))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(norm(x, block.ln_2))))
    want = torch.stack([norm(x, tower.ln_final)[0, 3], norm(x, tower.ln_final)[1, 1]]) @ tower.text_projection
    assert torch.allclose(tower(ids), want, rtol=1e-10, atol=1e-10)
    assert torch.allclose(tower(ids[:, :4]), want, rtol=1e-10, atol=1e-10), "padding changes nothing"
    assert tower(ids[:0]).shape == (0, 6)


def test_published_names_of_tokenflow_l():
    table = json.loads((FOLDER / "state_dict_keys" / "tokenflow_l.json").read_text())["tensors"]
    prefix = "encoder_vqkd."
    published = {key.removeprefix(prefix): tuple(e["shape"]) for key, e in table.items() if key.startswith(prefix)}
    with torch.device("meta"):
        tower = ViTamin((192, 384), 1152, depth=32, heads=16, final_norm=False)
    assert {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()} == published


def test_any_size():
    tower = ViTamin((4, 8), 16, depth=1, heads=2).eval()
    x = torch.rand(2, 3, 32, 80)
    assert tower(x).shape == (2, 10, 16)
    assert tower(x[:0]).shape == (0, 10, 16)
    assert torch.allclose(tower(x.contiguous(memory_format=torch.channels_last)), tower(x), atol=1e-5)
    decoder = ViTaminDecoder((4, 8), 16, depth=1, heads=2).eval()
    assert decoder(torch.rand(2, 10, 16), (2, 5)).shape == x.shape
    assert decoder(torch.rand(0, 10, 16), (2, 5)).shape == (0, 3, 32, 80)


def test_drop_path():
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(20000, 1, 1)
    y = layer(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(y.mean()) == pytest.approx(1, abs=0.02)
    assert layer.eval()(x) is x
    rates = [block.drop_path.rate for block in ViTamin((4, 8), 16, depth=3, heads=2, drop_path=0.1).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1])


def test_text_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"a": 0, "cat": 1, "sat": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = TextTokenizer(tmp_path, context=5)
    assert read(["cat sat", "a cat sat a cat sat", ""]).tolist() == [[3, 1, 2, 4, 0], [3, 0, 1, 2, 4], [3, 4, 0, 0, 0]]
    assert torch.equal(read("cat"), torch.tensor([[3, 1, 4, 0, 0]]))
    with pytest.raises(FileNotFoundError, match="wanted a tokenizer.json"):
        TextTokenizer(tmp_path / "other.json")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match="wanted a vocabulary with <|startoftext|>".replace("|", r"\|")):
        TextTokenizer(tmp_path / "bare.json")
    (tmp_path / "torn.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"TextTokenizer: path: wanted a tokenizer.json, got .*torn.json \("):
        TextTokenizer(tmp_path / "torn.json")


def test_text_tokenizer_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(Missing, match="pip install tokenizers"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: ViTamin((4,), 16, depth=1, heads=2), "ViTamin: widths: wanted two positive integers"),
    (lambda: ViTamin((4, 8), 16, depth=0, heads=2), "depth: wanted a positive integer, got 0"),
    (lambda: ViTamin((4, 8), 16, depth=1, heads=3), "heads: wanted a divisor of dim 16, got 3"),
    (lambda: ViTamin((4, 8), 16, depth=1, heads=2, drop_path=1.0), "drop_path: wanted a rate in"),
    (lambda: ViTaminDecoder((4, 8), 16, depth=1, heads=2, stage_depths=(1, 0)), "ViTaminDecoder: stage_depths"),
    (lambda: ViTamin((4, 8), 16, depth=1, heads=2)(torch.zeros(1, 3, 16, 20)), r"multiples of 16, got \[1, 3, 16, 20\]"),
    (lambda: TextTower(width=10, heads=4), "heads: wanted a divisor of width 10, got 4"),
    (lambda: TextTower(depth=0), "depth: wanted a positive integer"),
    (lambda: TextTower(width=8, heads=2, depth=1, vocabulary=20)(torch.tensor([[3, 20]])), "ids: wanted 0 to 19, got 3 to 20"),
    (lambda: TextTower(width=8, heads=2, depth=1, vocabulary=20)(torch.tensor([[-1, 2]])), "ids: wanted 0 to 19, got -1 to 2"),
])  # fmt: skip
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
