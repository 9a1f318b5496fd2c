"""Label fields and words that are added to a pipeline: `medisyn.extension`."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from medisyn.backbone import model_hash
from medisyn.extension import (
    added,
    extend_labels,
    extend_words,
    extension_parameters,
    fuse_extensions,
    load_extension,
    new_words,
    remove_extension,
    save_extension,
    scale_extension,
)
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from tests.components import LABEL_SCHEMA, TEXT_WIDTH, tiny_pipeline, tiny_tokenizer

KNEE = {"kl_grade": {"type": "ordinal", "values": ["0", "1", "2", "3", "4"], "display": "Kellgren-Lawrence grade"}}
BREAST = {"density": {"type": "ordinal", "values": ["1", "2", "3"], "display": "Breast density"}}
BOTH = ("text", "labels")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def images(pipe, prompt="eye", labels="dr_grade=2"):
    given = {"prompt": prompt if "text" in pipe.kinds else None, "labels": labels if "labels" in pipe.kinds else None}
    return pipe(**given, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images


def new_images(pipe):
    return images(pipe, "a mammogram", "kl_grade=3")


def train(pipe, name="default", steps=3):
    """A few steps towards an arbitrary target, with new labels and words in the gradient's way."""
    parameters = extension_parameters(pipe, name)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)).to(pipe.unet.dtype)
    for _ in range(steps):
        embeds = {"label_embeds": pipe.encode_labels("kl_grade=3")}
        if "text" in pipe.kinds:
            embeds["prompt_embeds"] = pipe.encode_prompt("a mammogram")
        output = pipe.unet(latents, torch.tensor([500]), **pipe.unet_conditions(**embeds)).sample
        (output - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters


def extend(pipe, fields=KNEE, words=("mammogram",), name="default"):
    """Add label fields and words with weights that show."""
    extend_labels(pipe, fields, name)
    extend_words(pipe, words, name)
    generator = torch.Generator().manual_seed(len(name))
    for parameter in extension_parameters(pipe, name).values():
        parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter)


def traces(pipe):
    """All by which one could tell that something was added."""
    texts = ["Mammogram, a Kellgren-Lawrence grade", "eye"]
    parts = (pipe.unet, pipe.text_encoder)
    return {
        "hash": model_hash(pipe),
        "modules": [(name, type(module)) for part in parts for name, module in part.named_modules()],
        "weights": [(name, id(p), p.requires_grad) for part in parts for name, p in part.named_parameters()],
        "tokens": (id(pipe.tokenizer), len(pipe.tokenizer), pipe.tokenizer(texts).input_ids),
        "configs": (list(pipe.config.items()), list(pipe.unet.config.items()), pipe.text_encoder.config.to_dict()),
        "attributes": sorted(vars(pipe)),
    }


def test_an_extended_model_starts_as_it_was_bit_for_bit():
    pipe = tiny_pipeline(BOTH)
    before, null = images(pipe), pipe.null_embeds("text")
    assert extend_labels(pipe, KNEE) == ["kl_grade"]
    assert extend_words(pipe, ["Mammogram", "a"]) == ["mammogram"]  # "a" is one token already
    assert np.array_equal(images(pipe), before)
    assert np.array_equal(images(pipe, labels="dr_grade=2, kl_grade=4"), before)
    assert torch.equal(pipe.null_embeds("text"), null)
    assert pipe.embeds_width("labels") == pipe.null_embeds("labels").shape[1] == 9 + 5
    assert pipe.encode_labels("kellgren-lawrence grade=1")[0].nonzero().tolist() == [[10]]


def test_only_the_blocks_learn_and_the_images_of_old_labels_stay():
    pipe = tiny_pipeline(BOTH)
    before = images(pipe)
    for module in (pipe.unet, pipe.text_encoder):
        module.requires_grad_(False)
    extend_labels(pipe, KNEE)
    extend_words(pipe, ["mammogram"])
    start = new_images(pipe)
    old = {name: value.clone() for name, value in pipe.unet.state_dict().items() if "extensions" not in name}
    parameters = train(pipe)
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {
        "label_embedding": (64, 5),
        "learned_embeds": (1, TEXT_WIDTH),
    }
    everything = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    assert {id(p) for p in everything if p.requires_grad} == {id(p) for p in parameters.values()}
    assert all(torch.equal(pipe.unet.state_dict()[name], value) for name, value in old.items())
    assert parameters["label_embedding"][:, 3].any() and not parameters["label_embedding"][:, :3].any()
    assert np.array_equal(images(pipe), before)
    assert not np.allclose(new_images(pipe), start, atol=1e-4)


def test_the_base_is_frozen_even_where_the_caller_forgot_to():
    pipe = tiny_pipeline(BOTH)
    extend(pipe)
    train(pipe)
    assert pipe.unet.class_embedding.original.weight.grad is None
    assert pipe.text_encoder.get_input_embeddings().original.weight.grad is None


def test_saved_and_loaded_it_draws_the_same(tmp_path):
    pipe, other = tiny_pipeline(BOTH), tiny_pipeline(BOTH)
    extend(pipe, KNEE | BREAST, ["mammogram", "kellgren-lawrence"])
    save_extension(pipe, tmp_path)
    manifest = added(pipe)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "label_embedding.safetensors",
        "learned_embeds.safetensors",
    ]
    assert manifest["tokens"] == ["mammogram", "kellgren-lawrence"]
    # JSON that lost the order of fields: the columns keep theirs
    manifest["label_schema"]["fields"] = dict(reversed(manifest["label_schema"]["fields"].items()))
    load_extension(other, tmp_path, manifest, "breast")
    assert np.array_equal(new_images(other), new_images(pipe))
    assert other.label_schema == pipe.label_schema and added(other, "breast")["tokens"] == manifest["tokens"]
    assert not any(block.weight.requires_grad for block in other.unet.class_embedding.extensions.values())


def test_only_what_there_is_is_saved_and_loaded(tmp_path):
    pipe = tiny_pipeline(BOTH)
    save_extension(pipe, tmp_path / "nothing")
    load_extension(pipe, tmp_path / "nothing", added(pipe))
    extend_words(pipe, ["mammogram"])
    save_extension(pipe, tmp_path / "words")
    assert [file.name for file in (tmp_path / "words").iterdir()] == ["learned_embeds.safetensors"]
    assert not list((tmp_path / "nothing").iterdir()) and added(pipe)["label_schema"] is None


def test_what_does_not_fit_is_refused_and_leaves_no_trace(tmp_path):
    pipe = tiny_pipeline(BOTH)
    extend(pipe)
    save_extension(pipe, tmp_path)
    manifest = added(pipe)
    remove_extension(pipe)
    before = traces(pipe)
    clash = {"name": "x", "fields": {"kl_grade": {"type": "binary"}}}
    with pytest.raises(ValueError, match="columns for"):
        load_extension(pipe, tmp_path, manifest | {"label_schema": {"name": "x", "fields": BREAST}})
    with pytest.raises(ValueError, match=r"shape \(64, 5\), not \(64, 2\)"):
        load_extension(pipe, tmp_path, manifest | {"label_schema": clash})
    with pytest.raises(ValueError, match="vectors for"):
        load_extension(pipe, tmp_path, manifest | {"tokens": ["arthrosis"]})
    assert traces(pipe) == before
    (tmp_path / "label_embedding.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"label_embedding\.safetensors"):
        load_extension(pipe, tmp_path, manifest)
    save_file({"mammogram": torch.zeros(7)}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(ValueError, match=r"\(7,\), not \(16,\)"):
        load_extension(pipe, tmp_path, manifest | {"label_schema": None})
    assert traces(pipe) == before


def test_the_scale_weighs_label_columns():
    pipe = tiny_pipeline(BOTH)
    before = images(pipe)
    extend(pipe, words=[])
    labels = "dr_grade=2, kl_grade=3"
    full = images(pipe, labels=labels)
    scale_extension(pipe, "default", 0.5)
    half = images(pipe, labels=labels)
    scale_extension(pipe, "default", 0.0)
    assert np.array_equal(images(pipe, labels=labels), before)
    assert not np.allclose(half, before) and not np.allclose(half, full)
    scale_extension(pipe, "default", 1.0)
    assert np.array_equal(images(pipe, labels=labels), full)


@pytest.mark.parametrize("first", ["knee", "breast"])
def test_two_extensions_come_off_in_any_order_without_a_trace(first):
    pipe = tiny_pipeline(BOTH)
    pipe.unet.class_embedding.bias.requires_grad_(False)
    old, before, alone = images(pipe), traces(pipe), {}
    parts = {"knee": (KNEE, ["kellgren-lawrence", "mammogram"]), "breast": (BREAST | KNEE, ["mammogram"])}
    for name, (fields, words) in parts.items():
        extend(pipe, fields, words, name)
        alone[name] = traces(pipe)["hash"], new_images(pipe)
        remove_extension(pipe)
    for name, (fields, words) in parts.items():
        extend(pipe, fields, words, name)
    assert list(pipe.label_schema["fields"])[3:] == ["kl_grade", "density"]  # the shared field is there once
    assert np.array_equal(images(pipe), old)
    remove_extension(pipe, first)
    (last,) = set(parts) - {first}
    if last == "knee":  # its word was the one in use; that of the other one was not trained here
        assert np.array_equal(new_images(pipe), alone[last][1])
    assert np.array_equal(images(pipe), old)
    remove_extension(pipe, last)
    assert traces(pipe) == before
    assert np.array_equal(images(pipe), old)
    remove_extension(pipe, "unknown")  # as of adapters that add nothing
    assert traces(pipe) == before


def test_a_word_of_two_extensions_has_the_vector_of_the_greater_scale(tmp_path):
    pipe, drawn = tiny_pipeline(("text",)), {}
    for name, value in (("one", 1.0), ("two", -1.0)):
        (tmp_path / name).mkdir()
        save_file({"mammogram": torch.full((TEXT_WIDTH,), value)}, tmp_path / name / "learned_embeds.safetensors")
        load_extension(pipe, tmp_path / name, {"label_schema": None, "tokens": ["mammogram"]}, name)
        drawn[name] = new_images(pipe)
        remove_extension(pipe)
    for name in drawn:
        load_extension(pipe, tmp_path / name, {"label_schema": None, "tokens": ["mammogram"]}, name)
    assert np.array_equal(new_images(pipe), drawn["one"])
    scale_extension(pipe, "one", 0.0)
    assert np.array_equal(new_images(pipe), drawn["two"])
    scale_extension(pipe, "one", 1.0)
    remove_extension(pipe, "one")
    assert np.array_equal(new_images(pipe), drawn["two"])


def test_two_extensions_read_a_field_that_they_share_each_in_its_own_way():
    pipe = tiny_pipeline(BOTH)
    extend(pipe, KNEE, [], "one")
    one = new_images(pipe)
    extend(pipe, BREAST | KNEE, [], "another")
    assert not np.allclose(new_images(pipe), one)
    scale_extension(pipe, "another", 0.0)
    assert np.array_equal(new_images(pipe), one)


@pytest.mark.parametrize("kinds", [("text",), (), ("image",)])
def test_a_base_without_labels_gets_its_first_ones(kinds, tmp_path):
    pipe = tiny_pipeline(kinds)
    config, unet_config, before = dict(pipe.config), dict(pipe.unet.config), images(pipe, labels=None)
    extend_labels(pipe, KNEE, "knee", schema_name="knees")
    assert pipe.kinds == (*kinds, "labels") and pipe.label_schema["name"] == "knees"
    assert np.array_equal(images(pipe, labels=None), before)
    train(pipe, "knee")
    assert np.array_equal(images(pipe, labels=None), before)
    drawn = images(pipe, labels="kl_grade=3")
    assert not np.allclose(drawn, before)
    fuse_extensions(pipe)
    pipe.save_pretrained(tmp_path)
    saved = MediSynPipeline.from_pretrained(tmp_path)
    saved.set_progress_bar_config(disable=True)
    assert np.allclose(images(saved, labels="kl_grade=3"), drawn, atol=1e-5)
    pipe = tiny_pipeline(kinds)
    extend_labels(pipe, KNEE, "knee")
    remove_extension(pipe, "knee")
    assert (dict(pipe.config), dict(pipe.unet.config)) == (config, unet_config) and pipe.unet.class_embedding is None


def test_a_field_of_the_base_is_shared_if_it_is_the_same_and_refused_if_not():
    pipe = tiny_pipeline(BOTH)
    before = traces(pipe)
    glaucoma = {"gc": LABEL_SCHEMA["fields"]["gc"]}
    assert extend_labels(pipe, glaucoma) == [] and extension_parameters(pipe) == {}
    with pytest.raises(ValueError, match="'dr_grade'"):
        extend_labels(pipe, {"dr_grade": LABEL_SCHEMA["fields"]["dr_grade"] | {"values": ["0", "1"]}})
    with pytest.raises(ValueError, match="'dr_grade'"):  # the values are the same, the meaning is not
        extend_labels(pipe, {"dr_grade": LABEL_SCHEMA["fields"]["dr_grade"] | {"display": "Dry eye grade"}})
    with pytest.raises(ValueError, match="'opacity' .* taken for the field 'gc'"):
        extend_labels(pipe, {"opacity": {"type": "binary", "display": "glaucoma"}})
    assert traces(pipe) == before
    assert extend_labels(pipe, glaucoma | KNEE) == ["kl_grade"]
    with pytest.raises(ValueError, match="'kl_grade'"):  # of another extension
        extend_labels(pipe, {"kl_grade": {"type": "binary"}}, "other")


def test_what_cannot_be_extended_is_refused():
    pipe = tiny_pipeline(("labels",))
    with pytest.raises(ValueError, match="no text encoder"):
        extend_words(pipe, ["mammogram"])
    with pytest.raises(ValueError, match=r"'a\.b'"):
        extend_labels(pipe, KNEE, "a.b")
    extend_labels(pipe, KNEE)
    with pytest.raises(ValueError, match="already"):
        extend_labels(pipe, BREAST)
    pipe = tiny_pipeline(("text",))
    before = traces(pipe)
    with pytest.raises(ValueError, match="not a word"):
        extend_words(pipe, [" "])
    pipe.unet.class_embedding = torch.nn.Embedding(3, 64)
    with pytest.raises(ValueError, match="Embedding"):
        extend_labels(pipe, KNEE)
    pipe.unet.class_embedding = None
    assert traces(pipe) == before


def bert():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *",-", *(f"##{letter}" for letter in LETTERS)]
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=32)
    return tokenizer, BertModel(BertConfig(vocab_size=len(tokens), max_position_embeddings=32, **shape))


def roberta():
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    tokenizer = RobertaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=32)
    return tokenizer, RobertaModel(RobertaConfig(vocab_size=len(tokens), max_position_embeddings=40, **shape))


def t5():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS + "KL,-")]
    shape = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=2, model_max_length=32)
    # as of the published models, the embedding has more rows than the tokenizer has tokens
    return tokenizer, T5EncoderModel(T5Config(vocab_size=len(tokenizer) + 28, **shape))


@pytest.mark.parametrize("family", [bert, roberta, t5])
def test_words_work_for_other_encoders(family, tmp_path):
    pipe = tiny_pipeline(("text",))
    tokenizer, encoder = family()
    pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder.eval())
    weights = {name: id(parameter) for name, parameter in encoder.named_parameters()}
    before, old, ids = images(pipe, "a knee"), model_hash(pipe), tokenizer("a kellgren-lawrence b").input_ids
    words = ["kellgren-lawrence", "mammogram"]
    assert extend_words(pipe, words) == words
    tokens = pipe.tokenizer("a kellgren-lawrence b").input_ids
    assert len(tokens) == len(ids) - len(tokenizer(" kellgren-lawrence", add_special_tokens=False).input_ids) + 1
    assert len(tokenizer) in tokens and len(tokenizer) == pipe.tokenizer.convert_tokens_to_ids("kellgren-lawrence")
    assert np.array_equal(images(pipe, "a knee"), before)
    extension_parameters(pipe)["learned_embeds"].data += 1
    drawn = images(pipe, "a mammogram")
    save_extension(pipe, tmp_path / "extension")
    manifest = added(pipe)
    remove_extension(pipe)
    assert {name: id(parameter) for name, parameter in encoder.named_parameters()} == weights
    assert pipe.tokenizer is tokenizer and model_hash(pipe) == old and np.array_equal(images(pipe, "a knee"), before)
    load_extension(pipe, tmp_path / "extension", manifest)
    assert np.array_equal(images(pipe, "a mammogram"), drawn)
    fuse_extensions(pipe)
    pipe.save_pretrained(tmp_path / "fused")
    saved = MediSynPipeline.from_pretrained(tmp_path / "fused")
    saved.set_progress_bar_config(disable=True)
    assert np.array_equal(images(saved, "a mammogram"), drawn)


def test_a_word_is_one_token_wherever_it_stands_and_starts_as_the_mean_of_its_pieces():
    pipe = tiny_pipeline(("text",))
    original = pipe.tokenizer
    assert extend_words(pipe, ["Kellgren-Lawrence", "mammogram"]) == ["kellgren-lawrence", "mammogram"]
    first = len(original)
    for text in ("a Kellgren-Lawrence, b", "kellgren-lawrence", "b (KELLGREN-LAWRENCE). mammogram"):
        assert first in pipe.tokenizer(text).input_ids
    for text in ("mammograms", "amammogram", "kellgren lawrence", "kellgren-lawrences"):
        assert pipe.tokenizer(text).input_ids == original(text).input_ids
    assert pipe.tokenizer.decode(pipe.tokenizer("a knee").input_ids) == original.decode(original("a knee").input_ids)
    layer = pipe.text_encoder.get_input_embeddings()
    pieces = layer.original(torch.tensor(original("mammogram", add_special_tokens=False).input_ids))
    assert torch.allclose(layer(torch.tensor([first + 1]))[0], pieces.mean(dim=0), atol=1e-6)


def test_a_piece_of_longer_words_cannot_become_a_word():
    pipe = tiny_pipeline(("text",))
    tokenizer, _ = bert()
    tokenizer = BertTokenizer(vocab=tokenizer.get_vocab() | {"##": len(tokenizer)}, model_max_length=32)
    pipe.register_modules(tokenizer=tokenizer)
    before = traces(pipe)
    with pytest.raises(ValueError, match="piece of longer words"):
        extend_words(pipe, ["##b"])
    assert traces(pipe) == before


def test_new_words_are_those_that_the_tokenizer_breaks_most_frequent_first():
    captions = ["Knee X-ray, Kellgren-Lawrence grade 3", "knee x-ray, grade 12: osteophytes", None, "a b 2024-01-12"]
    captions = [*captions[:1] * 5, *captions[1:2] * 4, *captions[2:] * 9]
    words = new_words(captions, tiny_tokenizer())
    # every letter is a token here: "x-ray" is broken as well, and "osteophytes" is too rare
    assert words == ["grade", "knee", "x-ray", "kellgren-lawrence"]
    assert new_words(captions, tiny_tokenizer(), minimum_count=1, minimum_pieces=6) == [
        "kellgren-lawrence",
        "osteophytes",
    ]
    pipe = tiny_pipeline(("text",))
    extend_words(pipe, words)
    assert new_words(captions, pipe.tokenizer) == []  # they are whole now
    known, _ = bert()
    known.add_tokens(["high", "resolution"])
    assert new_words(["a high-resolution image"] * 5, known) == ["image"]  # known parts make no new word
    known.add_tokens(["year", "old"])
    assert new_words(["a 70-year-old image"] * 5, known) == ["image"]  # nor do known parts and a number
    assert new_words(["ﬁß"] * 5, known) == ["ﬁß"]  # unknown letters: one token that says nothing


def test_stock_pipelines_read_the_words_as_textual_inversion(tmp_path):
    pipe = tiny_pipeline(("text",), vae="kl")
    extend_words(pipe, ["mammogram", "kellgren-lawrence"], "two")
    train_words = extension_parameters(pipe, "two")["learned_embeds"]
    train_words.data += torch.randn(train_words.shape, generator=torch.Generator().manual_seed(3))
    prompts = ["a Mammogram", "kellgren-lawrence"]
    expected = pipe.encode_prompt(prompts)
    save_extension(pipe, tmp_path, "two")
    remove_extension(pipe)
    parts = {name: getattr(pipe, name) for name in ("vae", "unet", "text_encoder", "tokenizer")}
    absent = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    stock = StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(), **absent)
    vectors = load_file(tmp_path / "learned_embeds.safetensors")
    stock.load_textual_inversion([{word: vector} for word, vector in vectors.items()])
    embeds, _ = stock.encode_prompt(prompts, "cpu", 1, False)
    assert torch.allclose(embeds, expected, atol=1e-6)


def test_a_file_of_one_word_loads_by_its_path_in_stock_pipelines(tmp_path):
    pipe = tiny_pipeline(("text",), vae="kl")
    extend_words(pipe, ["mammogram"])
    expected = pipe.encode_prompt("a mammogram")
    save_extension(pipe, tmp_path)
    remove_extension(pipe)
    parts = {name: getattr(pipe, name) for name in ("vae", "unet", "text_encoder", "tokenizer")}
    absent = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    stock = StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(), **absent)
    stock.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    assert torch.allclose(stock.encode_prompt("a mammogram", "cpu", 1, False)[0], expected, atol=1e-6)


def test_fused_it_is_a_model_of_stock_layers_that_draws_the_same_when_saved_and_loaded(tmp_path):
    pipe = tiny_pipeline(BOTH)
    extend(pipe, KNEE, ["mammogram"], "knee")
    extend(pipe, BREAST | KNEE, ["arthrosis"], "breast")
    scale_extension(pipe, "breast", 0.5)
    prompts = [("a mammogram, arthrosis", "kl_grade=3, density=2"), ("eye", "dr_grade=2")]
    extended = [images(pipe, *prompt) for prompt in prompts]
    fuse_extensions(pipe)
    fused = [images(pipe, *prompt) for prompt in prompts]
    assert type(pipe.unet.class_embedding) is torch.nn.Linear
    assert type(pipe.text_encoder.get_input_embeddings()) is torch.nn.Embedding
    assert all(np.allclose(one, two, atol=1e-5) for one, two in zip(extended, fused, strict=True))
    pipe.save_pretrained(tmp_path)
    saved = MediSynPipeline.from_pretrained(tmp_path)
    saved.set_progress_bar_config(disable=True)
    assert all(np.array_equal(images(saved, *prompt), one) for prompt, one in zip(prompts, fused, strict=True))
    assert model_hash(saved) == model_hash(pipe) and saved.label_schema == pipe.label_schema
    again = traces(saved)
    extend(saved, {"kl2": KNEE["kl_grade"] | {"display": "second"}}, ["osteophyte"])  # a new base like any other
    remove_extension(saved)
    assert traces(saved) == again


@pytest.mark.parametrize("kinds", [BOTH, ("text",), ("labels",), ()])
def test_saved_as_it_is_it_draws_the_same_and_stays_extended(kinds, tmp_path):
    pipe = tiny_pipeline(kinds)
    if "text" in kinds:
        extend(pipe, KNEE, ["mammogram"], "knee")
        extend(pipe, BREAST | KNEE, ["arthrosis"], "breast")
        scale_extension(pipe, "breast", 0.5)
    else:
        extend_labels(pipe, KNEE, "knee")
        extension_parameters(pipe, "knee")["label_embedding"].data += 0.1
    drawn, before = images(pipe, "a mammogram, arthrosis", "kl_grade=3"), [*pipe.unet.named_parameters()]
    pipe.save_pretrained(tmp_path)
    saved = MediSynPipeline.from_pretrained(tmp_path)
    assert np.allclose(images(saved, "a mammogram, arthrosis", "kl_grade=3"), drawn, atol=1e-5)
    assert (saved.label_schema, saved.kinds) == (pipe.label_schema, pipe.kinds)
    assert [(name, id(p)) for name, p in pipe.unet.named_parameters()] == [(name, id(p)) for name, p in before]
    assert np.array_equal(images(pipe, "a mammogram, arthrosis", "kl_grade=3"), drawn)
    fuse_extensions(pipe)
    assert model_hash(pipe) == model_hash(saved)


def test_new_words_go_into_a_stock_pipeline(tmp_path):
    pipe = tiny_pipeline(("text",), vae="kl")
    extend_words(pipe, ["mammogram"])
    extension_parameters(pipe)["learned_embeds"].data += 1
    expected = pipe.encode_prompt("a mammogram")
    pipe.export_stable_diffusion(tmp_path)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.allclose(stock.encode_prompt("a mammogram", "cpu", 1, False)[0], expected, atol=1e-6)
    assert torch.equal(pipe.encode_prompt("a mammogram"), expected) and added(pipe)["tokens"] == ["mammogram"]


@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
def test_words_of_other_encoders_are_saved_with_the_pipeline(family, tmp_path):
    pipe = tiny_pipeline(("text",))
    tokenizer, encoder = {"bert": bert, "roberta": roberta, "t5": t5}[family]()
    pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder.eval())
    extend_words(pipe, ["kellgren-lawrence", "mammogram"])
    extension_parameters(pipe)["learned_embeds"].data += 1
    drawn = images(pipe, "a mammogram")
    pipe.save_pretrained(tmp_path)
    assert np.array_equal(images(MediSynPipeline.from_pretrained(tmp_path), "a mammogram"), drawn)
    assert np.array_equal(images(pipe, "a mammogram"), drawn)
    remove_extension(pipe)
    assert pipe.tokenizer is tokenizer


def test_a_pipeline_in_half_precision_keeps_it(tmp_path):
    pipe = tiny_pipeline(BOTH).to(torch.bfloat16)
    before, old = traces(pipe)["hash"], images(pipe)
    extend(pipe)
    assert {p.dtype for p in extension_parameters(pipe).values()} == {torch.bfloat16}
    assert np.array_equal(images(pipe), old)
    train(pipe)
    drawn = new_images(pipe)
    save_extension(pipe, tmp_path)
    manifest = added(pipe)
    remove_extension(pipe)
    assert model_hash(pipe) == before
    load_extension(pipe, tmp_path, manifest)
    assert np.array_equal(new_images(pipe), drawn)
    for parameter in extension_parameters(pipe).values():  # trained in full precision on a base in half
        parameter.data = parameter.data.float()
    assert np.array_equal(new_images(pipe), drawn)
    fuse_extensions(pipe)
    assert pipe.unet.class_embedding.weight.dtype == torch.bfloat16
    assert pipe.text_encoder.get_input_embeddings().weight.dtype == torch.bfloat16


def test_blocks_follow_the_pipeline_to_another_precision():
    pipe = tiny_pipeline(BOTH)
    extend(pipe)
    pipe.to(torch.float64)
    assert new_images(pipe).dtype == np.float32
    assert {p.dtype for p in extension_parameters(pipe).values()} == {torch.float64}


def test_compiled_and_checkpointed_models_give_the_same():
    pipe = tiny_pipeline(BOTH)
    extend(pipe)
    labels, ids = pipe.encode_labels("kl_grade=3, dr_grade=1"), pipe.tokenizer("a mammogram", return_tensors="pt")
    for layer, given in (
        (pipe.unet.class_embedding, labels),
        (pipe.text_encoder.get_input_embeddings(), ids.input_ids),
    ):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(given), layer(given))
    pipe.unet.enable_gradient_checkpointing()
    pipe.text_encoder.gradient_checkpointing_enable()
    pipe.unet.train(), pipe.text_encoder.train()
    start = {name: parameter.clone() for name, parameter in extension_parameters(pipe).items()}
    parameters = train(pipe, steps=1)
    assert all(not torch.equal(parameters[name], value) for name, value in start.items())
