"""Zero-shot segmentation: attention maps that leave the model alone, DiffSeg, words, clusters, rules, scores, command.

python -m pytest tests/test_segmentation.py
"""

import itertools
import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor
from peft import LoraConfig
from PIL import Image
from torch.nn.functional import kl_div
from typer.testing import CliRunner

from medisyn.cli import app
from medisyn.evaluation.segmentation import (
    baseline_segments,
    best_match,
    dice,
    evaluate_segmentation,
    intersection_over_union,
    open_masks,
    scan,
    score,
)
from medisyn.segmentation import Segmenter, Settings, aggregate_attention, diffseg, record_attention, word_maps
from medisyn.segmentation.checkpoints import open_model
from medisyn.segmentation.clusters import assign, fit_clusters, guided_filter
from medisyn.segmentation.diffseg import symmetric_divergence
from medisyn.segmentation.probing import Probe, encode_images, feature_layers, unet_features
from medisyn.segmentation.rules import choose, describe
from medisyn.segmentation.words import word_tokens
from medisyn.trainer import Trainer
from tests.components import TEXT_WIDTH, tiny_pipeline, tiny_tokenizer, tiny_unet
from tests.training import diffusion_config, write_base, write_images

SIZE = 32
PROMPT = "a chest x-ray with clear lungs"


def pictures(count=3, size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3)).astype(np.uint8)) for _ in range(count)]


def chest(size=64, seed=0):
    """A bright body on black, two dark lungs, a brighter spine; and the mask of the lungs."""
    rows, columns = np.mgrid[:size, :size] / size
    pixels = np.full((size, size), 160.0) + np.random.default_rng(seed).normal(0, 6, (size, size))
    pixels[:, (columns[0] < 0.08) | (columns[0] > 0.92)] = 0
    pixels[:, np.abs(columns[0] - 0.5) < 0.07] = 230
    lungs = np.zeros((size, size), dtype=bool)
    for centre in (0.3, 0.7):
        lungs |= ((columns - centre) / 0.13) ** 2 + ((rows - 0.45) / 0.3) ** 2 < 1
    pixels[lungs] = 70
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB"), lungs


# --- attention -------------------------------------------------------------------------------------------------------


def cross_unet(prepare=None):
    unet = tiny_unet()
    if prepare is not None:
        prepare(unet)
    conditions = {"encoder_hidden_states": torch.randn(2, 5, TEXT_WIDTH)}
    conditions["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    return unet, conditions


def add_lora(unet):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights="gaussian"))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    unet.eval()


def added_kv_unet():
    unet = tiny_unet(
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return unet, {"encoder_hidden_states": torch.randn(2, 5, TEXT_WIDTH)}


def unconditional_unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=4,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
    return unet.eval(), {}


MODELS = {
    "sdpa": cross_unet,
    "plain": lambda: cross_unet(lambda unet: unet.set_attn_processor(AttnProcessor())),
    "sliced": lambda: cross_unet(lambda unet: unet.set_attn_processor(SlicedAttnProcessor(1))),
    "fused": lambda: cross_unet(UNet2DConditionModel.fuse_qkv_projections),
    "lora": lambda: cross_unet(add_lora),
    "added keys": added_kv_unet,
    "unconditional": unconditional_unet,
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_recording_changes_nothing_and_gives_distributions(name):
    unet, conditions = MODELS[name]()
    latents = torch.randn(2, 4, 4, 4)
    layers = {layer: module for layer, module in unet.named_modules() if isinstance(module, Attention)}
    processors = {layer: module.processor for layer, module in layers.items()}
    attributes = {layer: set(vars(module)) for layer, module in layers.items()}
    weights = {key: value.clone() for key, value in unet.state_dict().items()}
    before = unet(latents, 10, **conditions).sample
    with record_attention(unet, (4, 4)) as maps:
        during = unet(latents, 10, **conditions).sample
    assert torch.equal(before, during)
    assert torch.equal(before, unet(latents, 10, **conditions).sample)
    assert all(module.processor is processors[layer] for layer, module in layers.items())
    assert all(set(vars(module)) == attributes[layer] for layer, module in layers.items())
    assert list(unet.state_dict()) == list(weights)
    assert {one.layer for one in maps} == set(layers)
    for one in maps:
        assert one.weights.shape[:2] == (2, one.size[0] * one.size[1])
        assert one.weights.shape[2] == (5 if one.kind == "cross" else one.weights.shape[1])
        torch.testing.assert_close(one.weights.sum(dim=-1), torch.ones(one.weights.shape[:2]))
    if "encoder_attention_mask" in conditions:  # masked tokens draw nothing
        assert all(float(one.weights[1, :, 3:].max()) < 1e-6 for one in maps if one.kind == "cross")


@torch.no_grad()
def test_recorded_weights_are_what_the_layer_multiplies_values_with():
    layer = Attention(query_dim=8, heads=2, dim_head=4).eval()
    hidden = torch.randn(2, 6, 8)
    with record_attention(torch.nn.ModuleList([layer]), (2, 3)) as maps:
        layer(hidden)
    query, key = (layer.head_to_batch_dim(project(hidden)) for project in (layer.to_q, layer.to_k))
    expected = layer.get_attention_scores(query, key).unflatten(0, (2, 2)).mean(dim=1)
    torch.testing.assert_close(maps[0].weights, expected)
    assert maps[0].size == (2, 3)


def test_lora_is_part_of_the_recorded_weights():
    unet, conditions = cross_unet(add_lora)
    latents = torch.randn(1, 4, 4, 4)
    conditions = {name: value[:1] for name, value in conditions.items()}
    recorded = []
    for enabled in (True, False):
        (unet.enable_adapters if enabled else unet.disable_adapters)()
        with torch.no_grad(), record_attention(unet, (4, 4), ("self",)) as maps:
            unet(latents, 10, **conditions)
        recorded.append(maps[0].weights)
    assert not torch.allclose(*recorded)


def test_processors_come_back_after_an_error():
    class WithWeights(torch.nn.Module):  # a processor that is a submodule, as those of IP-Adapter
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, fail=False):
            if fail:
                raise RuntimeError("stop")
            return self.scale * AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask)

    layer = Attention(query_dim=8, heads=2, dim_head=4, processor=WithWeights())
    parent, processor = torch.nn.ModuleList([layer]), layer.processor
    with pytest.raises(RuntimeError, match="stop"), record_attention(parent, (2, 3)):
        layer(torch.randn(1, 6, 8), fail=True)  # the processor's own keyword reaches it
    assert layer.processor is processor and "processor" in layer._modules and "processor" not in vars(layer)


def test_a_model_without_attention_and_a_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="no attention layers"), record_attention(torch.nn.Linear(2, 2), (4, 4)):
        pass
    with pytest.raises(ValueError, match="self, cross"), record_attention(tiny_unet(), (4, 4), ("both",)):
        pass


# --- DiffSeg ---------------------------------------------------------------------------------------------------------


def halves(height, width):
    """Attention of a picture of two halves: every place looks at its own half."""
    side = (torch.arange(height * width) % width) >= width // 2
    weights = (side[:, None] == side).float() + 1e-4
    return (height, width), weights / weights.sum(dim=1, keepdim=True)


def test_aggregation_keeps_distributions_and_weighs_by_resolution():
    uniform = ((2, 2), torch.full((4, 4), 0.25))
    fine = ((4, 4), torch.eye(16))
    total = aggregate_attention([uniform, fine])
    torch.testing.assert_close(total.sum(dim=(2, 3)), torch.ones(4, 4))
    # shares 2 : 4, and a uniform map of 16 places
    assert float(total[1, 2, 1, 2]) == pytest.approx(2 / 3 + 1 / 3 / 16, rel=1e-5)
    with pytest.raises(ValueError, match="no self-attention maps"):
        aggregate_attention([])
    with pytest.raises(ValueError, match="do not fit"):
        aggregate_attention([((2, 2), torch.eye(3))])


def test_divergence_is_the_symmetric_kullback_leibler_divergence():
    first, second = torch.rand(3, 7).softmax(dim=1), torch.rand(2, 7).softmax(dim=1)
    value = symmetric_divergence(first, second)
    for i, j in itertools.product(range(3), range(2)):
        p, q = first[i], second[j]
        expected = (kl_div(q.log(), p, reduction="sum") + kl_div(p.log(), q, reduction="sum")) / 2
        assert float(value[i, j]) == pytest.approx(float(expected), abs=1e-5)


def test_diffseg_finds_two_halves_and_one_segment_when_everything_merges():
    maps = [halves(4, 4), halves(8, 8)]
    segments = diffseg(maps, (16, 16), threshold=0.5)
    assert segments.unique().tolist() == [0, 1]
    assert segments[:, :8].unique().numel() == segments[:, 8:].unique().numel() == 1
    assert diffseg(maps, (16, 16), threshold=1e6).unique().tolist() == [0]
    with pytest.raises(ValueError, match="threshold must be above 0"):
        diffseg(maps, (16, 16), threshold=0)


# --- words -----------------------------------------------------------------------------------------------------------


def test_a_word_is_all_its_tokens():
    tokenizer = tiny_tokenizer(max_length=40)
    positions = word_tokens(tokenizer, "an x-ray of Lungs, lungs", "lungs", 40)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("an x-ray of Lungs, lungs").input_ids)
    assert "".join(tokens[position] for position in positions).replace("</w>", "") == "lungslungs"
    with pytest.raises(ValueError, match="not in the prompt"):
        word_tokens(tokenizer, "an x-ray of lungs", "lung", 40)  # half a word is none
    with pytest.raises(ValueError, match="past the text encoder's window"):
        word_tokens(tokenizer, "an x-ray of lungs", "lungs", 5)


def test_word_maps_do_not_depend_on_the_batch():
    pipe = tiny_pipeline(("text", "image", "labels"))
    latents, probe = encode_images(pipe, pictures()), Probe(100, "lungs of a b", draws=1)
    maps = word_maps(pipe, latents, probe, "lungs", (SIZE, SIZE))
    assert maps.shape == (3, SIZE, SIZE) and float(maps.min()) >= 0
    torch.testing.assert_close(maps.amax(dim=(1, 2)), torch.ones(3))
    torch.testing.assert_close(word_maps(pipe, latents[1:2], probe, "lungs", (SIZE, SIZE))[0], maps[1])
    with pytest.raises(ValueError, match="needs a prompt"):
        word_maps(pipe, latents, Probe(100), "lungs", (SIZE, SIZE))
    with pytest.raises(ValueError, match="no text condition"):
        word_maps(tiny_pipeline(("labels",)), latents, probe, "lungs", (SIZE, SIZE))


# --- features and clusters -------------------------------------------------------------------------------------------


def test_features_of_every_layer_and_the_error_that_lists_them():
    pipe = tiny_pipeline()
    latents = encode_images(pipe, pictures())
    for layer in feature_layers(pipe.unet):
        features = unet_features(pipe, latents, Probe(50, PROMPT), layer)
        assert features.ndim == 4 and len(features) == 3
    torch.testing.assert_close(unet_features(pipe, latents[2:], Probe(50, PROMPT), layer)[0], features[2])
    with pytest.raises(ValueError, match="up_blocks.0"):
        unet_features(pipe, latents, Probe(50), "up_blocks.9")
    with pytest.raises(ValueError, match="0..999"):
        unet_features(pipe, latents, Probe(1000), layer)


def test_clusters_number_equal_features_equally_and_follow_edges():
    left = torch.arange(4) < 2
    features = torch.where(left, 1.0, -1.0).expand(2, 1, 4, 4).clone()
    features[1] = features[1].flip(-1)
    clusters = fit_clusters(features, 2)
    pixels = torch.zeros(2, 3, 32, 32)
    segments = assign(clusters, features, pixels)
    assert torch.equal(segments[0], segments[1].flip(-1))
    assert torch.equal(segments[0, :, :14].unique(), segments[0, 0, :1])
    # the true edge is at 17, a pixel from that of the coarse map at 16
    edge = torch.where(torch.arange(32) < 17, -1.0, 1.0).expand(1, 3, 32, 32)
    plain, refined = (assign(clusters, features[:1], edge, refine) for refine in (False, True))
    truth = torch.arange(32).expand(1, 32, 32) < 17
    wrong = [int(((one == one[0, 0, 0]) != truth).sum()) for one in (plain, refined)]
    assert wrong[1] < wrong[0]
    with pytest.raises(ValueError, match="number of segments"):
        fit_clusters(features, 1)


def test_guided_filter_keeps_constants_and_what_is_linear_in_the_guide():
    guide = torch.rand(1, 1, 16, 16) * 2 - 1
    constant = torch.full((1, 2, 16, 16), 3.0)
    torch.testing.assert_close(guided_filter(guide, constant, 2), constant)
    torch.testing.assert_close(guided_filter(guide, 5 * guide + 1, 2, 1e-8), 5 * guide + 1, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="does not fit"):
        guided_filter(guide, constant, 16)


# --- rules -----------------------------------------------------------------------------------------------------------


def test_the_lungs_are_found_by_the_rule_and_not_by_their_number():
    image, mask = chest()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    grey = pixels[0].mean(dim=0)
    segments = torch.bucketize(grey, torch.tensor([-0.8, 0.0, 0.6]))[None]
    for numbers in itertools.permutations(range(4)):
        relabelled = torch.tensor(numbers)[segments]
        chosen = choose("lungs", describe(relabelled, pixels))
        found = torch.isin(relabelled, torch.tensor(chosen))
        assert float(dice(found, torch.from_numpy(mask)[None])) > 0.95
    with pytest.raises(ValueError, match="lungs, polyp"):
        choose("liver", [])


def test_a_red_bright_spot_in_the_middle_is_the_polyp():
    pixels = torch.full((1, 3, 64, 64), -0.2)
    segments = torch.zeros(1, 64, 64, dtype=torch.int64)
    segments[0, 24:40, 24:40], pixels[0, 0, 24:40, 24:40] = 1, 0.8
    segments[0, 50:60, 5:15] = 2
    assert choose("polyp", describe(segments, pixels)) == [1]


# --- scores ----------------------------------------------------------------------------------------------------------


def test_dice_and_iou_follow_their_formulas():
    predicted, mask = torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(3, 4, 4, dtype=torch.bool)
    predicted[0, 0], mask[0, 0, :2] = True, True  # 4 and 2 pixels, 2 shared
    predicted[1, 0] = True
    assert dice(predicted, mask).tolist() == pytest.approx([4 / 6, 0, 1])
    assert intersection_over_union(predicted, mask).tolist() == pytest.approx([2 / 4, 0, 1])
    with pytest.raises(ValueError, match="boolean"):
        dice(predicted.float(), mask)


def test_the_best_match_is_the_best_of_all_unions():
    generator = torch.Generator().manual_seed(0)
    segments = torch.randint(0, 5, (4, 6, 6), generator=generator)
    masks = torch.rand(4, 6, 6, generator=generator) > 0.6
    found = dice(best_match(segments, masks), masks)
    for index in range(4):
        unions = (
            torch.isin(segments[index : index + 1], torch.tensor(chosen))
            for size in range(1, 6)
            for chosen in itertools.combinations(range(5), size)
        )
        assert float(found[index]) == pytest.approx(max(float(dice(one, masks[index][None])) for one in unions))


def test_scores_have_intervals_and_gains_in_the_same_draws():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(20, 8, 8, generator=generator) > 0.5
    predicted = masks ^ (torch.rand(20, 8, 8, generator=generator) > 0.9)
    scores = score(predicted, masks, {"itself": predicted, "nothing": torch.zeros_like(masks)})
    low, high = scores["dice"]["interval"]
    assert low < scores["dice"]["mean"] < high < 1 and scores["empty"] == 0
    assert scores["dice_gain"]["itself"] == {"mean": 0, "interval": [0, 0]}
    assert scores["dice_gain"]["nothing"] == scores["dice"]


def masked_folder(folder, count=4):
    """A Parquet file with image and mask columns."""
    import datasets

    folder.mkdir()
    rows = {"image": [], "mask": []}
    for seed in range(count):
        image, mask = chest(seed=seed)
        for name, one in (("image", image), ("mask", Image.fromarray((mask * 255).astype(np.uint8)))):
            one.save(folder / f"{name}{seed}.png")
            rows[name].append(str(folder / f"{name}{seed}.png"))
    features = datasets.Features({name: datasets.Image() for name in rows})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "data.parquet"))
    return str(folder / "data.parquet")


def test_evaluation_puts_the_model_beside_the_baselines(tmp_path):
    data = open_masks(masked_folder(tmp_path / "masks"), SIZE)
    assert data.masks.shape == (4, SIZE, SIZE) and 0.1 < float(data.masks.float().mean()) < 0.4
    pipe = tiny_pipeline(("text", "image"))
    settings = Settings(prompt=PROMPT, segments=3, references=2, draws=1)
    report, masks = evaluate_segmentation(pipe, data, settings, "lungs", development=1)
    assert report["settings"]["layer"] == "up_blocks.0"
    everything = report["all"]
    for name in ("model", "pixels", "encoder", "pixels_alone"):
        assert everything[name]["best_match"]["dice"]["mean"] >= everything[name]["rule"]["dice"]["mean"]
        held_out = score(masks[name][1:], data.masks[1:])
        assert report["held_out"][name]["rule"]["dice"] == held_out["dice"] and held_out["images"] == 3
    assert everything["pixels"]["best_match"]["dice"]["mean"] > 0.8  # the picture is told apart by its grey values
    baselines = {"pixels", "pixels_alone", "encoder", "encoder_alone"}
    assert set(everything["model"]["rule"]["dice_gain"]) == baselines and set(everything) == baselines | {"model"}
    json.dumps(report)
    alone = baseline_segments("encoder", tiny_pipeline(), data.images, 3, together=False)
    assert torch.equal(alone[:1], baseline_segments("encoder", tiny_pipeline(), data.images[:1], 3))
    with pytest.raises(ValueError, match="pixels, encoder"):
        baseline_segments("noise", pipe, data.images, 3)
    with pytest.raises(ValueError, match="no column 'shape'"):
        open_masks(str(tmp_path / "masks" / "data.parquet"), SIZE, mask_column="shape")


def test_scan_over_checkpoints_and_timesteps(tmp_path):
    write_images(tmp_path / "images")
    write_base(tmp_path / "base")
    run = Trainer(diffusion_config(tmp_path)).fit()
    checkpoints = sorted(str(folder) for folder in (run / "checkpoints").glob("step_*"))
    assert len(checkpoints) == 2
    data = open_masks(masked_folder(tmp_path / "masks"), SIZE)
    settings = Settings(prompt=PROMPT, segments=3, references=0, draws=1)
    rows = scan(
        [*checkpoints, None], data, settings, "lungs", (50, 500), lambda name: open_model(name or run / "pipeline")
    )
    assert len(rows) == 6 and {row["timestep"] for row in rows} == {50, 500}
    dices = [row["rule"]["dice"]["mean"] for row in rows]
    assert dices == sorted(dices, reverse=True)
    early, late = (open_model(checkpoint).unet.state_dict() for checkpoint in checkpoints)
    assert any(not torch.equal(early[name], late[name]) for name in early)
    (run / "pipeline").rename(run / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no finished pipeline"):
        open_model(checkpoints[0])


# --- segmenter and command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["features", "diffseg"])
@pytest.mark.parametrize("kinds", [("text", "labels"), ()])
def test_a_mask_depends_neither_on_the_batch_nor_on_the_call(method, kinds):
    pipe = tiny_pipeline(kinds)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    settings = Settings(method=method, prompt=PROMPT if kinds else None, segments=3, references=3, draws=2)
    images = pictures(3)
    segmenter = Segmenter(pipe, settings)
    segments = segmenter.segments(images)
    assert segments.shape == (3, SIZE, SIZE)
    assert torch.equal(segments[1:2], Segmenter(pipe, settings).segments(images[1:2]))
    assert torch.equal(segments, segmenter.segments(images))
    assert segmenter.masks(images, "lungs").dtype == torch.bool
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    with pytest.raises(ValueError, match="lungs, polyp"):
        segmenter.masks(images, "liver")


def test_settings_are_checked():
    for wrong, message in (
        ({"method": "magic"}, "features, diffseg"),
        ({"segments": 1}, "segments must be at least 2"),
        ({"references": -1}, "references must be"),
        ({"draws": 0}, "draws must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)
    with pytest.raises(ValueError, match="no text condition"):
        Segmenter(tiny_pipeline(("labels",)), Settings(prompt=PROMPT, references=0)).segments(pictures())


def command(*arguments):
    return CliRunner().invoke(app, ["segment", *map(str, arguments)])


def test_command_writes_masks_of_the_images_size(tmp_path):
    tiny_pipeline(("text", "labels")).save_pretrained(tmp_path / "model")
    paths = []
    for name, size in (("a", (60, 40)), ("b", (32, 32))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"{name}.png")
        paths.append(tmp_path / f"{name}.png")
    options = ["--model", tmp_path / "model", "--references", 2, "--segments", 3]
    done = command(*paths, *options, "--rule", "lungs", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "out" / "segmentation.json").read_text())
    assert facts["rule"] == "lungs" and facts["settings"]["prompt"].startswith("frontal chest X-ray")
    for row, size in zip(facts["images"], ((60, 40), (32, 32)), strict=True):
        for kind in ("segments", "mask", "overlay"):
            assert Image.open(tmp_path / "out" / row[kind]).size == size
        assert set(np.unique(Image.open(tmp_path / "out" / row["mask"]))) <= {0, 255}
    outside = np.array(Image.open(tmp_path / "out" / "a_segments.png"))[:, :10]
    assert (outside == 255).all()
    done = command(paths[0], *options, "--word", "lungs", "--prompt", "clear lungs", "--out", tmp_path / "word")
    assert done.exit_code == 0 and json.loads((tmp_path / "word" / "segmentation.json").read_text())["word"] == "lungs"
    done = command(paths[0], *options, "--method", "diffseg", "--out", tmp_path / "unnamed")
    assert done.exit_code == 0 and not list((tmp_path / "unnamed").glob("*mask*"))


def facts_of(folder):
    return json.loads((folder / "segmentation.json").read_text())


def test_command_records_what_acted_and_warns_of_coarse_attention(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")  # its cross-attention has 2 x 2 places
    Image.effect_noise((32, 32), 80).convert("RGB").save(tmp_path / "a.png")
    given = [tmp_path / "a.png", "--model", tmp_path / "model", "--prompt", "clear lungs"]
    always = {"prompt", "timestep", "draws", "seed"}
    for name, options, own in (
        ("word", ("--word", "lungs"), set()),
        ("diffseg", ("--method", "diffseg"), {"method", "threshold"}),
        ("features", ("--references", 2), {"method", "layer", "segments", "references", "refine"}),
    ):
        done = command(*given, *options, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
        facts = facts_of(tmp_path / name)
        assert set(facts["settings"]) == always | own
        if name == "features":
            assert facts["warnings"] == [] and "attention_grid" not in facts and done.stderr == ""
            assert facts["settings"]["layer"] == "up_blocks.0"
            continue
        assert facts["attention_grid"] == [2, 2]
        (warning,) = facts["warnings"]
        assert "2 x 2 places, below 16 x 16" in warning and "use --rule" in warning
        assert done.stderr == f"warning: {warning}\n"


def test_fine_attention_is_no_reason_to_warn():
    segmenter = Segmenter(tiny_pipeline(), Settings(method="diffseg", references=0))
    segmenter.segments(pictures(1))
    assert segmenter.grid == (2, 2) and len(segmenter.doubts(1)) == 1
    segmenter.grid = (16, 16)
    assert segmenter.doubts(1) == []


def test_command_warns_of_few_images_and_of_empty_masks(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / "grey.png")
    noise = []
    for index in range(10):
        noise.append(tmp_path / f"{index}.png")
        pictures(1, seed=index)[0].save(noise[-1])
    done = command(*noise[:9], "--model", tmp_path / "model", "--rule", "polyp", "--out", tmp_path / "few")
    assert done.exit_code == 0, done.output
    facts = facts_of(tmp_path / "few")
    assert facts["settings"]["references"] == 0
    assert any("given images, 9 where the rule 'polyp' wants 10 or more" in one for one in facts["warnings"])
    assert "warning: segments are fitted on the given images" in done.stderr
    done = command(*noise, "--model", tmp_path / "model", "--rule", "polyp", "--out", tmp_path / "enough")
    assert done.exit_code == 0 and "wants 10 or more" not in done.stderr
    few = Segmenter(tiny_pipeline(), Settings(references=0))
    assert few.doubts(9, "lungs")[0].endswith("or --references 32") and few.doubts(10, "lungs") == few.doubts(9) == []

    segmenter = Segmenter(tiny_pipeline(), Settings(references=2))
    masks = torch.zeros(3, SIZE, SIZE, dtype=torch.bool)
    masks[0, :4], masks[1, 0, :5] = True, True  # 12 %, 0.5 % and nothing
    (doubt,) = segmenter.doubts(3, "lungs", masks)
    assert doubt.startswith("nothing convincing was found in 2 of 3 images") and "less than 1%" in doubt
    assert segmenter.doubts(1, "lungs", masks[:1]) == []
    # of the whole command: on a plain image every segment is large or touches the border
    options = ["--rule", "polyp", "--segments", 2, "--references", 2]
    done = command(tmp_path / "grey.png", "--model", tmp_path / "model", *options, "--out", tmp_path / "empty")
    assert done.exit_code == 0, done.output
    facts = facts_of(tmp_path / "empty")
    assert (facts["images"][0]["share"] < 0.01) == ("nothing convincing was found in 1 of 1 images" in done.stderr)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rule", "liver"], "unknown rule 'liver'; valid: lungs, polyp"),
        (["--method", "magic"], "unknown segmentation method 'magic'"),
        (["--rule", "lungs", "--word", "lungs"], "give one of them"),
        (["--word", "xyzzy"], "no caption of the vocabulary has the word"),
        (["--timestep", "5000"], "timestep must be in 0..999"),
        (["--layer", "up_blocks.7"], "its layers are: "),
    ],
)
def test_command_says_what_is_wrong_in_one_line(tmp_path, arguments, message):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    done = command(tmp_path / "image.png", "--model", tmp_path / "model", *arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    missing = command(tmp_path / "none.png", "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert missing.exit_code == 2 and "no image file" in missing.stderr
