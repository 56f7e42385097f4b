"""VAR's transformer: values of the published implementation, the cached sampler against teacher forcing, files and errors."""

import golden_values as golden
import pytest
import torch
import torch.nn.functional as F
from released_files import shapes
from tokenflow.cli import main
from tokenflow.models import VAR, VQVAE, checkpoint, var, vqvae
from tokenflow.models.model import Model

TOKENS = {"scales": (1, 2, 3), "dim": 4, "codebook_size": 16}


def tokenizer_of(scales, codes, *, salt=None, dim=32):
    """A VQVAE with small networks around a quantizer of these sizes, with the golden rule's codes where a salt is given."""
    side = 8 * scales[-1]
    torch.manual_seed(0)
    config = vqvae.Config(image_size=side, scales=scales, dim=dim, codebook_size=codes, widths=(8, 8, 8, 16))
    model = VQVAE(config).eval()
    if salt is not None:
        made = lambda name, shape: torch.from_numpy(golden.value(name, shape, salt))  # noqa: E731
        with torch.no_grad():
            model.quantizer.codebooks()[0].copy_(made("quantize.embedding.weight", [codes, dim]))
            for i in range(config.phis):
                name = f"quantize.quant_resi.qresi_ls.{i}."
                model.quantizer.phi_weight[i] = made(name + "weight", [dim, dim, 3, 3])
                model.quantizer.phi_bias[i] = made(name + "bias", [dim])
    return model


@pytest.fixture(scope="module", params=golden.case_names("var_transformer"))
def published(request):
    """Model and tokenizer of a golden case, through the reader of released names."""
    case = golden.Case("var_transformer", request.param)
    options = case.options
    rule = options["weights"]
    state = {name: golden.value(name, shape, rule["salt"]) for name, shape in rule["shapes"].items()}
    state = {name: torch.from_numpy(value) for name, value in state.items() if value is not None}
    lengths = torch.tensor([side * side for side in options["scales"]])
    state["lvl_1L"] = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    config = VAR.recognise(state)
    assert config.scales == tuple(options["scales"]) and config.depth == options["depth"]
    assert (config.shared_adaln, config.unit_attention) == (options["shared_adaln"], options["attn_l2_norm"])
    model = VAR(config).eval()
    checkpoint.fit(VAR.convert(state, config), model, request.param)
    return model, tokenizer_of(config.scales, options["codebook_size"], salt=rule["salt"]), case


def test_teacher_forced_logits(published):
    model, tokenizer, case = published
    with torch.inference_mode():
        inputs = model.inputs(tokenizer, case["codes"])
        logits = model(case["labels"], inputs)
    torch.testing.assert_close(inputs.norm(dim=-1), case["teacher_input_token_norm"], atol=1e-4, rtol=1e-4)
    every = int(case._tensors["logits_rows"]["meaning"].split("every ")[1].split("th")[0])
    case.check("logits", logits[:, ::every], case["logits_rows"])
    case.check("logits", logits.logsumexp(-1), case["logits_logsumexp"])
    target = logits.log_softmax(-1).gather(-1, case["codes"][..., None])[..., 0]
    case.check("logits", target, case["target_logprob"])
    assert torch.equal(logits.argmax(-1), case["logits_argmax"])


def test_loss_and_gradients(published):
    model, tokenizer, case = published
    model.zero_grad()
    loss = model.loss(case["labels"], case["codes"], tokenizer)
    assert abs(float(loss.detach()) - case.scalars["cross_entropy"]) < 1e-4
    loss.backward()
    names = [name.removeprefix("grad_norm/") for name in case.scalars if name.startswith("grad_norm/")]
    marked = {name: torch.full([1], float(i)) for i, name in enumerate(names)}
    ours = {int(value): name for name, value in VAR.convert(marked, model.config).state.items()}
    parameters = dict(model.named_parameters())
    assert len(ours) == len(names) == len(parameters)
    for i, name in enumerate(names):
        norm, expected = float(parameters[ours[i]].grad.norm()), case.scalars[f"grad_norm/{name}"]
        assert abs(norm - expected) < 1e-3 * expected + 1e-6, (name, norm, expected)
    model.zero_grad()


def test_greedy_samples(published):
    model, tokenizer, case = published
    guidance = case.options["guidance"]["cfg"]
    codes = var.var_sampling.sample(model, tokenizer, case["labels"], guidance=guidance, top_k=1, top_p=1.0)
    assert float(case["greedy_gap"].min()) > 1e-3, "no position of these cases is a near-tie"
    assert torch.equal(codes, case["greedy_codes"])
    torch.testing.assert_close(tokenizer.codes(codes), case["greedy_f_hat"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"shared_adaln": True, "unit_attention": False}])
def test_steps_with_a_cache_are_the_whole_pass(options):
    torch.manual_seed(1)
    config = var.Config(depth=2, width=32, heads=2, classes=5, **TOKENS, **options)
    model, tokenizer = VAR(config).eval(), tokenizer_of(config.scales, 16, dim=4)
    indices, labels = torch.randint(16, (3, 14)), torch.tensor([0, 3, 5])
    with torch.inference_mode():
        inputs = model.inputs(tokenizer, indices)
        whole = model(labels, inputs)
        cache = [None] * 2
        rows = [None, *inputs.split([4, 9], 1)]
        steps = [model.step(labels, row, scale, cache) for scale, row in enumerate(rows)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


def test_a_token_sees_no_finer_scale():
    torch.manual_seed(1)
    model = VAR(var.Config(depth=1, width=32, heads=2, classes=5, **TOKENS)).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.condition.weight)
    inputs = torch.randn(1, 13, 4, requires_grad=True)
    logits = model(torch.tensor([2]), inputs)
    logits[:, 1:5].sum().backward()
    seen = inputs.grad.abs().sum(-1)[0] > 0
    assert seen[:4].all() and not seen[4:].any()


def test_pictures_do_not_depend_on_the_batch():
    torch.manual_seed(1)
    model = VAR(var.Config(depth=1, width=32, heads=2, classes=5, **TOKENS)).eval()
    torch.nn.init.normal_(model.head.weight)
    tokenizer = tokenizer_of((1, 2, 3), 16, dim=4)
    together = var.var_sampling.sample(model, tokenizer, [1, 4], top_k=0, top_p=1.0, seed=7)
    alone = var.var_sampling.sample(model, tokenizer, [4], top_k=0, top_p=1.0, seed=8)
    assert torch.equal(together[1:], alone)
    assert not torch.equal(together, var.var_sampling.sample(model, tokenizer, [1, 4], top_k=0, top_p=1.0, seed=70))
    images = model.generate(tokenizer, [1, 4], seed=7)
    assert images.shape == (2, 3, 24, 24) and float(images.abs().max()) <= 1
    assert model.generate(tokenizer, []).shape == (0, 3, 24, 24)


def test_training_lowers_the_loss_and_drops_labels(one_thread):
    torch.manual_seed(0)
    model = VAR(var.Config(depth=1, width=32, heads=2, classes=2, label_dropout=0.5, **TOKENS)).train()
    tokenizer = tokenizer_of((1, 2, 3), 16, dim=4)
    codes, labels = torch.randint(16, (2, 14)).repeat(8, 1), torch.tensor([0, 1]).repeat(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    inputs, losses = model.inputs(tokenizer, codes).detach(), []
    for _ in range(30):
        loss = F.cross_entropy(model(labels, inputs).flatten(0, 1), codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert float(model.class_embedding.weight.grad[2].norm()) > 0


@pytest.mark.parametrize(("table", "preset", "millions"), [
    ("var_d16", "var-d16", 310), ("var_d20", "var-d20", 600), ("var_d24", "var-d24", 1000), ("var_d30", "var-d30", 2000),
    ("var_d36_512", "var-d36-512", 2350),
])  # fmt: skip
def test_names_and_shapes_say_which_model(table, preset, millions):
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes(table).items()}
        config = VAR.recognise(state)
        model, converted = VAR(config), VAR.convert(state, config)
        checkpoint.fit(converted, model, table)
    assert config == VAR.presets[preset]
    dropped = [name for names in converted.dropped.values() for name in names]
    assert len(dropped) == 2 + config.depth
    kept = sum(value.numel() for name, value in state.items() if name not in dropped)
    assert kept == sum(p.numel() for p in model.parameters())
    assert abs(kept / 1e6 - millions) < 0.04 * millions


def test_saved_and_read_again(tmp_path, capsys):
    model = VAR(var.Config(depth=1, width=32, heads=2, classes=5, shared_adaln=True, **TOKENS)).eval()
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    assert type(again) is VAR and again.config == model.config
    labels, inputs = torch.tensor([1]), torch.randn(1, 13, 4)
    assert torch.equal(again(labels, inputs), model(labels, inputs))


def test_info_describes_a_transformer_too(tmp_path, capsys):
    model = VAR(var.Config(depth=1, width=32, heads=2, classes=10, **TOKENS))
    model.save_pretrained(tmp_path / "var")
    main(["info", str(tmp_path / "var")])
    assert "14 an image, 16 codes of 4 channels" in capsys.readouterr().out


def test_errors_are_sentences(tmp_path):
    model, other = VAR(var.Config(depth=1, width=32, heads=2, classes=5, **TOKENS)), tokenizer_of((1, 2), 16, dim=4)
    with pytest.raises(ValueError, match="tokenizer: wanted scales"):
        model.generate(other, [1])
    with pytest.raises(ValueError, match="labels: wanted 0 to 4, or 5 for none"):
        model.generate(tokenizer_of((1, 2, 3), 16, dim=4), [6])
    with pytest.raises(ValueError, match="inputs: wanted"):
        model(torch.tensor([1]), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="labels: wanted 0 to 4, or 5 for none, got .6."):
        model(torch.tensor([6]), torch.zeros(1, 13, 4))
    with pytest.raises(TypeError, match="labels: wanted integers, got torch.float32"):
        model(torch.tensor([1.5]), torch.zeros(1, 13, 4))
    with pytest.raises(ValueError, match="top_p: wanted"):
        model.generate(tokenizer_of((1, 2, 3), 16, dim=4), [1], top_p=0.0)
    with pytest.raises(ValueError, match="divisor of the width"):
        VAR(var.Config(width=32, heads=3))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="from_checkpoint: path: wanted the weights of a VAR"):
        VAR.from_checkpoint(tmp_path / "other.pth")


def test_half_precision_and_autocast_stay_near():
    torch.manual_seed(0)
    model = VAR(var.Config(depth=2, width=64, heads=1, classes=5, **TOKENS)).eval()
    labels, inputs = torch.tensor([1]), torch.randn(1, 13, 4)
    with torch.inference_mode():
        full = model(labels, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(labels, inputs)
        half = model.to(torch.bfloat16)(labels, inputs)
    assert F.cosine_similarity(full.flatten(), mixed.float().flatten(), dim=0) > 0.99
    assert F.cosine_similarity(full.flatten(), half.float().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("shared", [False, True])
def test_a_fresh_model_has_small_gates_and_whole_layers(shared):
    """Width 48 is a multiple of 6, as the number of rows of a conditioning layer is."""
    torch.manual_seed(0)
    model = VAR(var.Config(depth=1, width=48, heads=2, classes=5, shared_adaln=shared, **TOKENS))
    block = model.blocks[0]
    condition = model.condition if shared else block.condition
    for layer in (block.attention.out, block.mlp.fc1, block.mlp.fc2, model.enter, model.head_condition):
        assert 0.015 < float(layer.weight.detach().std()) < 0.025
    for layer in (condition, model.head):
        assert float(layer.weight.detach().std()) < 0.0005
