"""The generator on a tiny random tokenizer: exactness of draft, head, mask and cache, and repeatable training and sampling."""

import itertools
import json
import os
import signal

import pytest
import torch
from tokenflow.data.pictures import Pictures
from tokenflow.generator import draft as draft_module
from tokenflow.generator.draft import Draft
from tokenflow.generator.figures import cross_entropy, figures, judge
from tokenflow.generator.head import CodeCrossEntropy
from tokenflow.generator.model import Generator
from tokenflow.generator.sample import draw, generate, limit, sample_tokens
from tokenflow.generator.train import Recipe, build, train_generator
from tokenflow.generator.vocabulary import Vocabulary
from tokenflow.models.tokenflow import Config, TokenFlow

SIZES = {"width": 32, "heads": 2, "low_rank": 8, "rank": 12, "text_blocks": 1, "blocks": 2}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return TokenFlow(
        Config(
            image_size=32,
            scales=(1, 2, 4, 8),
            semantic_dim=6,
            pixel_dim=4,
            codebook_size=48,
            widths=(8, 16, 32),
            teacher_dim=8,
        )
    ).eval()


@pytest.fixture(scope="module")
def pictures():
    """3 x 4 x 3 captions; one (base, tone) pair and one base are hidden. The pictures are smooth random fields."""
    torch.manual_seed(1)
    names = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("apple", "cat", "dog", "hat")]
    bases, tones = zip(*itertools.product(names, ("", "light", "dark")), strict=True)
    captions = [f"{b}, {t} tone" if t else b for b, t in zip(bases, tones, strict=True)]
    split = [
        "pair" if c == "red cat, dark tone" else "test" if b == "green hat" else "train"
        for c, b in zip(captions, bases, strict=True)
    ]
    coarse = torch.randn(len(captions), 3, 4, 4)
    images = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear").tanh()
    return Pictures(
        ((images + 1) * 127.5).to(torch.uint8), captions, list(bases), list(tones), [""] * len(captions), split
    )


@pytest.fixture(scope="module")
def coded(tokenizer, pictures):
    """Features before the quantizer, tokens, accumulated codes."""
    with torch.no_grad():
        features = tokenizer.encode_features(pictures.float_images())
        indices = tokenizer.encode(pictures.float_images())
        return features, indices, tokenizer.quantizer.decode(indices)


@pytest.fixture(scope="module")
def model(tokenizer, pictures, coded):
    """A generator whose every weight is random, so that nothing is hidden behind a zero."""
    rows = pictures.rows("train")
    torch.manual_seed(2)
    model, _, _ = build(tokenizer, pictures.take(rows), coded[2][rows], **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def conditions(model, pictures, coded):
    """ids, inputs, draft rows and doubts of five pictures, captions of different lengths."""
    captions = pictures.captions[:4] + [""]
    maps, doubt = model.draft(*model.vocabulary.sets(captions))
    return model.vocabulary.ids(captions), model.inputs(coded[1][:5]), model.rows(maps), doubt


def test_vocabulary_names_unknown_words_bases_and_the_null_caption():
    vocabulary = Vocabulary.fit(["man scientist, medium-dark skin tone", "keycap #"], ["man scientist", "keycap #"])
    assert vocabulary.unknown("Purple man, medium-dark zebra zebra") == ["purple", "zebra"]
    assert vocabulary.bases[vocabulary.base("Man scientist, light skin tone")] == "man scientist"
    assert vocabulary.base("scientist") == -1 and vocabulary.base("keycap #") >= 0
    assert vocabulary.ids([""]).tolist() == [[1, 0, 0, 0, 0]]
    assert vocabulary.ids(["zebra man"])[0, 0] == 2
    assert Vocabulary.from_dict(vocabulary.to_dict()).ids(["man #"]).equal(vocabulary.ids(["man #"]))


def features_of(words, base, count, bases):
    """The 0/1 features that the kernel stands for: words, pairs of words, base."""
    single = torch.zeros(count, dtype=torch.float64)
    single[words] = 1
    pairs = torch.tensor(
        [float(i in words and j in words) for i, j in itertools.combinations(range(count), 2)], dtype=torch.float64
    )
    return torch.cat([single, pairs, torch.tensor([float(b == base) for b in range(bases)], dtype=torch.float64)])


def test_draft_is_ridge_regression_and_its_left_out_values_are_those_of_real_refits():
    torch.manual_seed(3)
    words = [sorted(set(torch.randint(0, 6, (3,)).tolist())) for _ in range(14)]
    bases = torch.randint(-1, 4, (14,)).tolist()
    maps = torch.randn(14, 2, 2, 2, dtype=torch.float64)
    fitted, left_out, doubts = Draft.fit(words, bases, maps.float(), count=6, rank=8, strength=0.1)
    x = torch.stack([features_of(w, b, 6, 4) for w, b in zip(words, bases, strict=True)])
    y = maps.flatten(1)
    mean, ridge = y.mean(0), float(fitted.ridge)

    def primal(rows, query):
        inverse = torch.linalg.inv(x[rows].T @ x[rows] + ridge * torch.eye(x.shape[1], dtype=torch.float64))
        return mean + query @ inverse @ x[rows].T @ (y[rows] - mean), ridge * query @ inverse @ query / (query @ query)

    new_words, new_base = [0, 2, 5], 1
    got, doubt = fitted([new_words], [new_base])
    want, want_doubt = primal(list(range(14)), features_of(new_words, new_base, 6, 4))
    torch.testing.assert_close(got.flatten().double(), want, atol=1e-4, rtol=0)
    assert float(doubt) == pytest.approx(float(want_doubt), abs=1e-5)
    for i in (0, 7, 13):
        want, want_doubt = primal([j for j in range(14) if j != i], x[i])
        torch.testing.assert_close(fitted.maps(left_out[i : i + 1]).flatten().double(), want, atol=1e-4, rtol=0)
        assert float(doubts[i]) == pytest.approx(float(want_doubt), abs=1e-5)


def test_draft_of_unknown_words_is_the_mean_in_full_doubt_and_many_pictures_are_thinned(monkeypatch):
    monkeypatch.setattr(draft_module, "LARGEST", 10)
    maps = torch.randn(25, 2, 2, 2)
    fitted, left_out, doubts = Draft.fit(
        [[i % 5, 5] for i in range(25)], [-1] * 25, maps, count=6, rank=8, strength=0.1
    )
    assert len(fitted.words) == 10 and left_out.shape == (25, 8) and doubts.shape == (25,)
    got, doubt = fitted([[], [0, 5]], [-1, -1])
    torch.testing.assert_close(got[0], fitted.mean.view(2, 2, 2))
    assert doubt[0] == 1 and doubt[1] < 0.5


def test_head_with_the_true_features_returns_the_tokens(tokenizer, model, pictures, coded):
    """At the start the head's best code is the tokenizer's, except where two codes score equally to rounding."""
    features, indices, _ = coded
    rows = pictures.rows("train")
    torch.manual_seed(4)
    fresh, _, _ = build(tokenizer, pictures.take(rows), coded[2][rows], **SIZES)
    with torch.no_grad():
        fresh.head.correction.weight.zero_()
        fresh.head.low_rank.weight.zero_()
        y = torch.randn(len(indices), indices.shape[1], SIZES["width"])
        logits = fresh.head(y, fresh.rows(features), fresh.inputs(indices), fresh.level)
    gap = logits.max(-1).values - logits.gather(-1, indices[..., None])[..., 0]
    ties = int((logits.argmax(-1) != indices).sum())
    print(f"near-ties: {ties} of {indices.numel()}")
    assert gap.max() < 1e-3


def test_logits_with_the_cache_equal_those_without(model, conditions):
    ids, inputs, draft, doubt = conditions
    with torch.no_grad():
        whole = model(ids, inputs, draft, doubt).split(model.lengths, dim=1)
        session = model.start(ids, doubt)
        for scale, (x, d) in enumerate(zip(inputs.split(model.lengths, 1), draft.split(model.lengths, 1), strict=True)):
            torch.testing.assert_close(model.step(session, scale, x, d), whole[scale], atol=TOLERANCE, rtol=TOLERANCE)


def test_some_positions_of_the_last_scale_equal_those_of_all(model, conditions):
    early = len(model.level) - model.lengths[-1]
    last = early + torch.stack([torch.randperm(model.lengths[-1])[:7] for _ in range(5)])
    with torch.no_grad():
        whole, some = model(*conditions), model(*conditions, last=last)
    torch.testing.assert_close(some[:, :early], whole[:, :early], atol=TOLERANCE, rtol=TOLERANCE)
    picked = whole.gather(1, last[..., None].expand(-1, -1, whole.shape[-1]))
    torch.testing.assert_close(some[:, early:], picked, atol=TOLERANCE, rtol=TOLERANCE)


def test_loss_in_chunks_equals_the_plain_cross_entropy_with_its_gradients(model, conditions, coded, monkeypatch):
    monkeypatch.setattr(CodeCrossEntropy, "CHUNK", 37)
    tokens, weights = coded[1][:5], torch.rand(len(model.level)) + 0.1
    last = (len(model.level) - model.lengths[-1] + torch.arange(model.lengths[-1])).expand(5, -1)
    mean, each = model.loss(*conditions, tokens, weights, last=last)
    got = torch.autograd.grad(3 * mean, list(model.parameters()), allow_unused=True)
    plain = torch.nn.functional.cross_entropy(
        model(*conditions).flatten(0, 1), tokens.flatten(), reduction="none"
    ).view_as(tokens)
    total = (plain * weights).sum() / (5 * weights.sum())
    want = torch.autograd.grad(3 * total, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(each, plain.detach(), atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(mean, total, atol=TOLERANCE, rtol=TOLERANCE)
    for (name, _), g, w in zip(model.named_parameters(), got, want, strict=True):
        assert g is not None, name
        torch.testing.assert_close(g, w, atol=TOLERANCE, rtol=1e-3, msg=name)


@pytest.mark.parametrize("scale", [0, 1, 2, 3])
def test_a_code_changes_no_logits_of_its_own_or_an_earlier_scale(model, conditions, coded, scale):
    ids, inputs, draft, doubt = conditions
    changed = coded[1][:5].clone()
    place = sum(model.lengths[:scale])
    changed[:, place] = (changed[:, place] + 1) % model.config.codes
    with torch.no_grad():
        before = model(ids, inputs, draft, doubt).split(model.lengths, 1)
        after = model(ids, model.inputs(changed), draft, doubt).split(model.lengths, 1)
    for k in range(scale + 1):
        torch.testing.assert_close(after[k], before[k], atol=0, rtol=0)
    for k in range(scale + 1, len(before)):
        assert (after[k] - before[k]).abs().max() > 1e-3


def test_padding_does_not_change_the_words(model, conditions):
    ids, inputs, draft, doubt = conditions
    short = int((ids[0] != 0).sum())
    with torch.no_grad():
        padded = model(ids[:1], inputs[:1], draft[:1], doubt[:1])
        bare = model(ids[:1, :short], inputs[:1], draft[:1], doubt[:1])
    torch.testing.assert_close(bare, padded, atol=TOLERANCE, rtol=TOLERANCE)


def test_limit_and_draw_follow_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = lambda **options: limit(logits, **options).isfinite().tolist()  # noqa: E731
    assert kept(top_k=0, top_p=1.0) == [True] * 4
    assert kept(top_k=2, top_p=1.0) == [True, True, False, False]
    assert kept(top_k=0, top_p=0.6) == [True, True, False, False]
    assert kept(top_k=0, top_p=0.01) == [True, False, False, False]
    assert kept(top_k=3, top_p=0.8) == [True, True, False, False]
    drawn = draw(logits.expand(4000, 4), torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(share, logits.exp(), atol=0.03, rtol=0)


def test_sampling_follows_seed_and_guidance(model):
    captions = ["red cat, dark tone", "purple zebra", ""]
    sample = lambda **options: sample_tokens(model, captions, top_k=0, top_p=1.0, **options)  # noqa: E731
    first = sample(seed=5)
    assert first.shape == (3, 85) and first.min() >= 0 and first.max() < model.config.codes
    assert first.equal(sample(seed=5)) and first.equal(sample(seed=[5, 6, 7]))
    assert not first.equal(sample(seed=6))
    assert not first.equal(sample(seed=5, guidance=0.0))
    assert sample_tokens(model, []).shape == (0, 85)


def test_guided_greedy_sampling_equals_the_uncached_formula(model):
    """Token by token the code is the best of (1 + t) cond - t null, computed without cache; rounding may only swap equals."""
    captions, guidance = ["blue dog, light tone", "green apple"], 1.5
    tokens = sample_tokens(model, captions, guidance=guidance, top_k=1, top_p=1.0)
    inputs, sides = model.inputs(tokens), []
    for texts, (maps, doubt) in (
        (captions, model.draft(*model.vocabulary.sets(captions))),
        (["", ""], model.draft.null(2)),
    ):
        with torch.no_grad():
            sides.append(model(model.vocabulary.ids(texts), inputs, model.rows(maps), doubt))
    t = guidance * model.level / (len(model.lengths) - 1)
    logits = (1 + t)[None, :, None] * sides[0] - t[None, :, None] * sides[1]
    gap = logits.max(-1).values - logits.gather(-1, tokens[..., None])[..., 0]
    print(f"near-ties: {int((logits.argmax(-1) != tokens).sum())} of {tokens.numel()}")
    assert gap.max() < 1e-3


@pytest.mark.parametrize(
    ("options", "word"), [({"top_p": 0.0}, "top_p"), ({"top_k": -1}, "top_k"), ({"guidance": -1.0}, "guidance")]
)
def test_options_out_of_range_are_named(model, options, word):
    with pytest.raises(ValueError, match=f"sample_tokens: {word}: wanted"):
        sample_tokens(model, ["red cat"], **options)


def trained(tokenizer, pictures, coded, folder, steps, **options):
    return train_generator(
        tokenizer,
        pictures,
        coded[1],
        coded[2],
        folder,
        seed=7,
        steps=steps,
        recipe=Recipe(batch=4, warmup=2),
        **SIZES,
        **options,
    )


def test_training_repeats_learns_and_goes_on_after_a_stop(tokenizer, pictures, coded, tmp_path, monkeypatch):
    start, whole = (trained(tokenizer, pictures, coded, tmp_path / str(steps), steps)[0] for steps in (1, 200))
    rows = pictures.rows("train")
    captions = [pictures.captions[int(r)] for r in rows]
    before, after = (sum(cross_entropy(m, captions, coded[1][rows])) for m in (start, whole))
    assert after < 0.8 * before, (before, after)
    again, _ = trained(tokenizer, pictures, coded, tmp_path / "b", 200)

    clip, calls = torch.nn.utils.clip_grad_norm_, itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == 85:
            os.kill(os.getpid(), signal.SIGINT)
        return clip(*args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tokenizer, pictures, coded, tmp_path / "c", 200)
    monkeypatch.undo()
    resumed, _ = trained(tokenizer, pictures, coded, tmp_path / "c", 200)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_training_looks_at_training_pictures_only(tokenizer, pictures, coded, tmp_path):
    features, indices, f_hat = (part.clone() for part in coded)
    hidden = pictures.rows("pair", "test")
    indices[hidden], f_hat[hidden] = 0, 100.0
    captions = [c if s == "train" else "secret words" for c, s in zip(pictures.captions, pictures.split, strict=True)]
    changed = Pictures(pictures.images, captions, pictures.bases, pictures.tones, pictures.groups, pictures.split)
    before, _ = trained(tokenizer, pictures, coded, tmp_path / "a", 3)
    after, _ = trained(tokenizer, changed, (features, indices, f_hat), tmp_path / "b", 3)
    assert after.vocabulary.unknown("secret hat") == ["secret"]
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    with pytest.raises(ValueError, match='train_generator: pictures: wanted some in split "train"'):
        trained(tokenizer, pictures.select("test"), coded, tmp_path / "c", 3)


def test_saved_and_loaded_generators_write_the_same_pictures(tokenizer, model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    captions = ["red cat, dark tone", "purple zebra"]
    first, second = (generate(m, tokenizer, captions, seed=3) for m in (model, loaded))
    assert first.shape == (2, 3, 32, 32) and first.abs().max() <= 1 and torch.equal(first, second)
    with pytest.raises(FileNotFoundError, match="Generator.from_pretrained: folder: wanted"):
        Generator.from_pretrained(tmp_path / "nothing")
    # Other words of the same number: every shape agrees, and a caption would mean something else.
    other = json.loads((tmp_path / "config.json").read_text())
    other["vocabulary"]["words"] = other["vocabulary"]["words"][::-1]
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(
        ValueError, match="of one model, got .* where they differ in vocabulary: a saving was interrupted"
    ):
        Generator.from_pretrained(tmp_path)


def test_figures_mark_what_was_never_seen(tokenizer, model, pictures, coded):
    shown = figures(model, tokenizer, pictures, coded[1], typed=("blue apple", "red zebra"), columns=3, measured=4)
    marks = {item["caption"]: item["mark"] for row in shown["rows"] for item in row["items"]}
    assert (
        marks["red cat, dark tone"] == "unseen pair"
        and marks["green hat"] == "unseen name"
        and marks["red zebra"] == "typed"
    )
    last = shown["rows"][-1]["items"]
    assert [i["caption"] for i in last] == ["red zebra"] and last[0]["unknown"] == ["zebra"] and last[0]["real"] is None
    for row in shown["rows"]:
        for item in row["items"]:
            assert item["draft"].shape == item["generated"].shape == (3, 32, 32) and item["draft"].dtype == torch.uint8
    assert set(shown["numbers"]) == {"seen", "unseen pair", "unseen name"}
    own = shown["numbers"]["seen"]
    assert len(own["cross_entropy"]) == 4 and set(own["draft"]) == {"psnr", "base", "tone"}


def test_nearest_picture_of_a_picture_is_itself(pictures):
    rows = torch.arange(0, len(pictures), 5)
    assert judge(pictures.float_images(rows), rows, pictures) == pytest.approx(
        {"psnr": pytest.approx(96, abs=1), "base": 1.0, "tone": 1.0}
    )
