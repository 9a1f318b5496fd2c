"""MediSynPipeline: latent diffusion steered by text, image embeddings, structured labels, several of them, or none.

- Every component is a stock diffusers or transformers class and this file needs nothing else. A saved model carries
  this very file, so it loads with medisyn installed (no remote code) and without it (`trust_remote_code=True`).
- diffusers' methods for LoRA leave adapters that medisyn loaded to `medisyn.lora`, which keeps account of them.
- Tokens (text, image embeddings) enter the UNet as `encoder_hidden_states`, the label vector as `class_labels`. Two
  kinds of tokens, or tokens of another width than `cross_attention_dim`, pass the UNet's own
  `encoder_hid_dim_type="text_proj"` in blocks: a text token is [t, 0], an image token [0, x], so that one stock linear
  layer holds a projection for each kind.
- Every kind has a null (the empty prompt, zeros, zeros). Guidance leads away from it, with one weight or one per kind.
- Training uses the same `encode_*`, `unet_conditions`, `encode_latents` and `scale_latents` as sampling.
- A latent classifier, where there is one, guides by the gradient of log p(class | noised latent); its file is
  `classifier/medisyn_latent_classifier.py`.

    pipe = MediSynPipeline.from_pretrained("folder-or-hub-name")
    pipe("a chest X-ray, pneumonia", generator=torch.Generator().manual_seed(0)).images[0].save("image.png")
"""

import copy
import difflib
import importlib
import inspect
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers import DDPMScheduler, KarrasDiffusionSchedulers
from diffusers.utils import get_adapter_name, get_peft_kwargs, logging, recurse_remove_peft_layers
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

_SOURCE = Path(__file__).read_text(encoding="utf-8")  # now: diffusers' cache of remote code may hold other code later
_IS_REMOTE_CODE = __name__.startswith("diffusers_modules.")

if _IS_REMOTE_CODE:
    # diffusers runs equally named files of different repositories in one shared module, so that a second model
    # replaces the functions under the first. Moving this module to a name of its own makes the next one start afresh.
    _module = sys.modules.pop(__name__)
    __name__ = f"{__name__}_{sha256(_SOURCE.encode()).hexdigest()[:12]}"
    sys.modules[__name__] = _module

logger = logging.get_logger(__name__)

EMBEDS_NAMES = {"text": "prompt_embeds", "image": "image_embeds", "labels": "label_embeds"}
KINDS = tuple(EMBEDS_NAMES)
NOISE_CHANNELS = 16  # of the noise level, behind the features of an image token
WORD = r"[^\W\d_]{2,}"
# Not warned of though no caption has them. Negations are not among them: they change what is asked for.
FUNCTION_WORDS = frozenset(
    "an and are as at be been being both but by each for from had has have having her his if in into is it its of "
    "on or our some such than that the their them then there these they this those through to was were when where "
    "which while who whose will with within you your".split()
)
NEUTRAL_WORDS = frozenset("no without negative finding findings".split())  # of a finding, which alone name none
PLAIN_ENDINGS = (
    (r"(?<=\w\w)ies$", "y"),
    (r"(?<=[ao]s)es$", "is"),  # keratoses
    (r"(?<=ch|sh|ss)es$", ""),
    (r"(?<=\w\w)ae$", "a"),
    (r"(?<=\w{3})i$", "us"),  # nevi
    (r"(?<=\w\w)(?<![ius])s$", ""),
    (r"(?<=\w{3})our", "or"),
    (r"ae|oe", "e"),
)
Images = PIL.Image.Image | Sequence[PIL.Image.Image] | np.ndarray | Tensor


def words_of(texts: Iterable[str | None]) -> list[str]:
    """The different words of texts in small letters; numbers and single letters are none."""
    return list(dict.fromkeys(word for text in texts if text for word in re.findall(WORD, text.lower())))


@lru_cache(maxsize=2**16)
def plain_spelling(word: str) -> str:
    """One form for all of a word in small letters: singular and plural, American and British."""
    for ending, other in PLAIN_ENDINGS:
        word = re.sub(ending, other, word)
    return word


def nearest_words(word: str, known: Iterable[str]) -> list[str]:
    """Up to three known words of nearly the same spelling; for one of up to three letters, with the same letters."""
    if len(word) > 3:
        return difflib.get_close_matches(word, sorted(known), cutoff=0.8)
    return [one for one in sorted(known) if sorted(one) == sorted(word)][:3]


def stated(phrases: Iterable[str], text: str) -> set[str]:
    """Those of the phrases that a text has as whole words in any case, in small letters."""
    return {one.lower() for one in phrases if re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text, re.IGNORECASE)}


def known_findings(modalities: Iterable[Mapping]) -> str:
    """`"it knows Brain MRI: no tumor, glioma; Colonoscopy: polyp"`."""
    return "it knows " + "; ".join(
        f"{one['name']}: {', '.join(names[0] for names in one['findings'])}" for one in modalities
    )


def combination_warning(text: str, modalities: Sequence[Mapping], alone: bool = True) -> str | None:
    """One line on words that no caption has together, or on a prompt that leaves the modality open; or None.

    Args:
        text: a prompt.
        modalities: `{"name": ..., "terms": [what names it], "anatomy": [...], "details": [...], "findings":
            [[finding, other wordings, ...], ...]}` each; together the words of its captions.
        alone: whether only the prompt can say which modality is meant; otherwise it may leave that open.
    """
    wordings = [[wording for names in one["findings"] for wording in names] for one in modalities]
    telling = [set(words_of([*one["anatomy"], *wordings[i]])) - NEUTRAL_WORDS for i, one in enumerate(modalities)]
    own = [telling[i].union(words_of([*one["terms"], *one["details"]])) for i, one in enumerate(modalities)]
    content = set().union(*telling, words_of(detail for one in modalities for detail in one["details"]))
    asked = [word for word in words_of([text]) if word in content]
    terms = [sorted(stated(one["terms"], text)) for one in modalities]
    named = [i for i, found in enumerate(terms) if found]
    if len(named) == 1:
        missing = " or ".join(repr(word) for word in asked if word not in own[named[0]])
        known = known_findings([modalities[named[0]]])
        return f"this model was not trained on {missing} of this modality; {known}" if missing else None
    fits = [sum(word in words for word in asked) for words in own]
    best = [modalities[i] for i, fit in enumerate(fits) if (i in named if named else fit == max(fits))]
    if named or max(fits) < len(asked):
        together = [term for found in terms for term in found] or asked
        return f"this model was not trained on {' with '.join(map(repr, together))}; {known_findings(best)}"
    found = [wording for said in wordings for wording in stated(said, text)]
    unique = any(found.count(wording) == 1 for wording in found)  # of one modality only
    if not alone or unique or (len(best) == 1 and not telling[modalities.index(best[0])].isdisjoint(asked)):
        return None
    said = " and ".join(map(repr, asked)) or "the prompt"
    verb, names = "do" if len(asked) > 1 else "does", ", ".join(one["name"] for one in best)
    return f"{said} {verb} not say which modality is meant, so the model will choose; to choose yourself, add: {names}"


# ---- labels as vectors ----


def parse_labels(text: str) -> dict[str, str]:
    """Read `"glaucoma=1, dr_grade=3"` as `{"glaucoma": "1", "dr_grade": "3"}`.

    Raises:
        ValueError: an item is not of the form `field=value`, or a field comes twice.
    """
    labels: dict[str, str] = {}
    for item in text.replace(";", ",").split(","):
        field, separator, value = (part.strip() for part in item.partition("="))
        if not (field and separator and value):
            raise ValueError(f"label {item.strip()!r} is not of the form field=value, as in 'glaucoma=1, dr_grade=3'")
        if field in labels:
            raise ValueError(f"label field {field!r} is given twice in {text!r}")
        labels[field] = value
    return labels


def field_values(field: Mapping) -> list[str]:
    """The slots of a schema field's one-hot group, in order; those of a binary field are "0" (no) and "1" (yes)."""
    return ["0", "1"] if field["type"] == "binary" else [str(value) for value in field["values"]]


def label_slots(schema: Mapping) -> list[tuple[str, str]]:
    """What each number of a schema's label vector stands for: (field, value)."""
    return [(code, value) for code, field in schema["fields"].items() for value in field_values(field)]


def label_width(schema: Mapping) -> int:
    """The length of the label vector of a schema."""
    return len(label_slots(schema))


def label_field(schema: Mapping, name: str) -> str:
    """The code of a field given by code or display name, in any case. Raises ValueError listing the fields."""

    def plain(text: str) -> str:
        return text.strip().lower().replace(" ", "_").replace("-", "_")

    displays = {code: field.get("display") or code for code, field in schema["fields"].items()}
    for code, display in displays.items():
        if plain(str(name)) in (plain(code), plain(display)):
            return code
    valid = ", ".join(code if plain(code) == plain(shown) else f"{code} ({shown})" for code, shown in displays.items())
    raise ValueError(f"label field {name!r} is not in the schema {schema.get('name', '')!r}; its fields are: {valid}")


def label_value(schema: Mapping, code: str, value: Any) -> str | None:
    """The slot of a field's value; None for unknown (None, NaN, "", "unknown"). Raises ValueError listing them."""
    field = schema["fields"][code]
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower()
    if field["type"] == "binary":
        text = {"no": "0", "false": "0", "yes": "1", "true": "1"}.get(text, text)
    for slot in field_values(field):
        if text == slot.lower():
            return slot
    if text in ("", "unknown", "nan", "none"):
        return None
    raise ValueError(f"label {code}={value!r} is not valid; valid are: {', '.join(field_values(field))}, unknown")


def label_vector(schema: Mapping, labels: Mapping[str, Any] | str | None) -> list[float]:
    """One-hot groups in field order, all zeros in the group of an unknown field; so None is the zero vector.

    Args:
        schema: `{"name": ..., "fields": {code: {"type": "binary" | "ordinal" | "categorical", "values": [...],
            "display": ...}}}`.
        labels: values by field code or display name, or a string for `parse_labels`.

    Raises:
        ValueError: a field or a value outside the schema; the message lists the valid ones.
    """
    labels = parse_labels(labels) if isinstance(labels, str) else labels or {}
    chosen: dict[str, str | None] = {}
    for name, value in labels.items():
        code = label_field(schema, name)
        if code in chosen:
            raise ValueError(f"label field {code!r} is given twice, the second time as {name!r}")
        chosen[code] = label_value(schema, code, value)
    return [float(chosen.get(code) == slot) for code, slot in label_slots(schema)]


# ---- greyscale images ----


def neutral_greys(images: Tensor) -> Tensor:
    """The images, of which those without colour to the eye become exactly grey (their luma, ITU-R BT.601).

    An autoencoder leaves a tint of a level or so on an X-ray or a CT slice, which real ones do not have.

    Args:
        images: (B, 3, H, W) in [-1, 1]. An image has no colour where its channels are on average less than 2 of 255
            levels from their mean, and less than 16 within every 8 x 8 pixels (a spot of Doppler is colour). With
            another number of channels they are returned as they are.
    """
    if images.shape[1] != 3:
        return images
    luma = (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)
    tint = (images - images.mean(dim=1, keepdim=True)).abs().mean(dim=1, keepdim=True)
    spots = torch.nn.functional.avg_pool2d(tint, min(8, *tint.shape[2:]), ceil_mode=True)
    is_grey = (tint.mean(dim=(2, 3)) < 2 / 127.5) & (spots.amax(dim=(2, 3)) < 16 / 127.5)
    return torch.where(is_grey[:, :, None, None], luma, images)


# ---- the pipeline ----


class MediSynPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Latent diffusion with text, image-embedding and label conditions.

    Args:
        vae: `AutoencoderKL`, or the deterministic `AutoencoderDC`.
        unet: wired for the conditions as the module's docstring says.
        scheduler: any diffusers scheduler for epsilon, v or sample prediction.
        text_encoder: any transformers text encoder that returns `last_hidden_state`.
        tokenizer: its tokenizer; `model_max_length` is the window that prompts are padded to.
        image_encoder: a vision transformer of transformers (DINOv2, with registers, DINOv3, CLIP vision).
        feature_extractor: its image processor.
        label_schema: see `label_vector`.
        image_tokens: "global" (one token) or "patch" (all patch tokens).
        image_noise: see `noise_image_embeds`; the highest "level" in training, "mean" and "std" of the channels.
        conditions: the kinds that the UNet was built for, such as "text+labels"; by default those of the components. A
            model saved without its encoders keeps it and takes `prompt_embeds` and `image_embeds`.
        classifier: `MediSynLatentClassifier` of the noised latents, for `class_label`.
        known_words: see `unknown_words`.
        prompt_labels: see `labels_of_prompt`.
        prompt_vocabulary: `{"spellings": ..., "modalities": ...}`, see `known_spelling` and `combination_warning`.

    Raises:
        ValueError: an unknown kind in `image_tokens` or `conditions`.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "image_encoder", "feature_extractor", "classifier"]
    _exclude_from_cpu_offload = ["classifier"]  # it works beside the UNet in every step
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_encoder: PreTrainedModel | None = None,
        feature_extractor: BaseImageProcessor | None = None,
        label_schema: dict | None = None,
        image_tokens: str = "global",
        conditions: str | None = None,
        classifier: torch.nn.Module | None = None,
        image_noise: dict | None = None,
        known_words: list[str] | None = None,
        prompt_labels: list[dict] | None = None,
        prompt_vocabulary: dict | None = None,
    ) -> None:
        """Register the components; see the class."""
        super().__init__()
        if image_tokens not in ("global", "patch"):
            raise ValueError(f"image_tokens {image_tokens!r} is not one of: global, patch")
        if conditions is None:
            present = zip(KINDS, (text_encoder, image_encoder, label_schema), strict=True)
            conditions = "+".join(kind for kind, component in present if component is not None) or None
        elif not set(conditions.split("+")) <= set(KINDS):
            raise ValueError(f"conditions {conditions!r} are not some of: {', '.join(KINDS)}, joined by '+'")
        if _IS_REMOTE_CODE and unet is not None and unet.dtype == torch.float32:
            # without a dtype diffusers loads models as float32 and transformers as saved; `from_pretrained` below
            # settles that, but DiffusionPipeline.from_pretrained with remote code does not pass through it
            for encoder in (text_encoder, image_encoder):
                if encoder is not None:
                    encoder.to(torch.float32)
        for module in (vae, unet, text_encoder, image_encoder, classifier):
            if module is not None:
                _align_weights(module)
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_modules(image_encoder=image_encoder, feature_extractor=feature_extractor, classifier=classifier)
        self.register_to_config(label_schema=label_schema, image_tokens=image_tokens, conditions=conditions)
        optional = {"image_noise": image_noise, "known_words": known_words, "prompt_labels": prompt_labels}
        optional |= {"prompt_vocabulary": prompt_vocabulary}
        for name, value in optional.items():
            if value is not None:  # not written for models without it
                self.register_to_config(**{name: value})
        self._warned_of: set[str] = set()
        self.vae_scale_factor = 8
        if vae is not None:
            channels = vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]
            self.vae_scale_factor = 2 ** (len(channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_convert_rgb=True)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of condition of this model, some of ("text", "image", "labels"), in that order."""
        recorded = (self.config.conditions or "").split("+")
        return tuple(kind for kind in KINDS if kind in recorded)

    @property
    def label_schema(self) -> dict | None:
        """The label schema as plain data, or None."""
        return self.config.label_schema

    @property
    def guidance_scale(self) -> float | Mapping[str, float]:
        """The guidance of the running or last call; a callback may change `_guidance_scale` between steps."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps of the running or last call."""
        return self._num_timesteps

    # ---- conditions ----

    @property
    def text_window(self) -> int:
        """How many tokens of a prompt the text encoder sees, special tokens included."""
        return min(self.tokenizer.model_max_length, getattr(self.text_encoder.config, "max_position_embeddings", 512))

    def encode_prompt(self, prompt: str | Sequence[str | None]) -> Tensor:
        """Text tokens (B, T, text_width) of B prompts, padded to the window; differentiable. None is the empty prompt.

        Prompts longer than the window are counted in a warning.
        """
        prompts = [prompt] if isinstance(prompt, str) else [text or "" for text in prompt]
        window = self.text_window
        lengths = [len(ids) for ids in self.tokenizer(prompts, verbose=False).input_ids]
        long = [text for text, length in zip(prompts, lengths, strict=True) if length > window]
        if long:
            logger.warning(
                f"{len(long)} of {len(prompts)} prompts are longer than the text encoder's window of {window} tokens "
                f"(up to {max(lengths)}); what is past it has no effect. The first one begins: {long[0][:60]!r}"
            )
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=window, truncation=True, return_tensors="pt"
        ).to(self.text_encoder.device)
        # CLIP was trained without a padding mask (its attention is causal), other encoders with one
        mask = None if self.text_encoder.config.model_type == "clip_text_model" else tokens.attention_mask
        prompt_embeds = self.text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state
        return prompt_embeds

    def labels_of_prompt(self, prompt: str | Sequence[str | None]) -> list[dict[str, str]] | None:
        """Labels that prompts state in words, one dictionary each; None where no prompt states any.

        A rule of `prompt_labels`, `{"all": [[phrase, ...], ...], "labels": {field: value}}`, holds where each of its
        lists has a phrase in the prompt: whole words in any case, not after "no" or "without". Later rules win.
        """
        rules = self.config.get("prompt_labels")
        if not rules or not {"text", "labels"} <= set(self.kinds) or self.label_schema is None:
            return None
        fields = self.label_schema["fields"]
        found = []
        for text in self.known_spelling(prompt):
            labels: dict[str, str] = {}
            for rule in rules:
                patterns = ("|".join(map(re.escape, phrases)) for phrases in rule["all"])
                whole = r"(?<!\w)(?<!\bno )(?<!\bwithout )(?:{})(?!\w)"
                if all(re.search(whole.format(pattern), text, re.IGNORECASE) for pattern in patterns):
                    labels |= {field: value for field, value in rule["labels"].items() if field in fields}
            found.append(labels)
        return found if any(found) else None

    def _adapter_words(self) -> list[set[str]]:
        """The words of the captions of each adapter that is in use."""
        lora = self._medisyn_lora()
        adapters = [] if lora is None else lora.loaded_adapters(self).values()
        return [set(words_of(one.manifest["captions"])) for one in adapters if one.manifest and one.weight]

    def _known_words(self) -> set[str] | None:
        """What the model and its adapters were taught; None where `known_words` does not say it."""
        if self.config.get("known_words") is None or self.tokenizer is None:
            return None
        return set(self.config.known_words).union(words_of(self.tokenizer.get_added_vocab()), *self._adapter_words())

    def known_spelling(self, prompt: str | Sequence[str | None]) -> list[str]:
        """Prompts with unknown words as the model knows them, "tumours" as "tumor"; what it knows is never changed.

        By the rules `[pattern, replacement]` of `prompt_vocabulary`, for whole words in any case; then plurals and
        British spellings of exactly one known word. None is "". Without `known_words`, prompts stay as they are.
        """
        texts = [prompt] if isinstance(prompt, str) else [text or "" for text in prompt]
        known = self._known_words()
        if known is None:
            return texts

        def by_rule(match: re.Match, replacement: str) -> str:
            before, after = match.group(), match.expand(replacement)
            return before if known.intersection(words_of([before])).difference(words_of([after])) else after

        def by_form(match: re.Match) -> str:
            word = match.group().lower()
            form = plain_spelling(word)
            same = [] if word in known else [one for one in known if plain_spelling(one) == form]
            return same[0] if len(same) == 1 else match.group()

        for pattern, replacement in (self.config.get("prompt_vocabulary") or {}).get("spellings", ()):
            whole, change = rf"(?<!\w)(?:{pattern})(?!\w)", partial(by_rule, replacement=replacement)
            texts = [re.sub(whole, change, text, flags=re.IGNORECASE) for text in texts]
        return [re.sub(WORD, by_form, text) for text in texts]

    def unknown_words(self, prompt: str | Sequence[str | None]) -> dict[str, list[str]]:
        """Words that no training caption had, in any spelling that is understood, each with the nearest known ones.

        Empty where the model does not record what its text encoder, made for its captions, was taught (`known_words`,
        small letters). Words of adapters count as known. `FUNCTION_WORDS`, numbers and single letters are left out.
        """
        known = self._known_words()
        words = [] if known is None else words_of(self.known_spelling(prompt))
        return {word: nearest_words(word, known) for word in words if word not in known | FUNCTION_WORDS}

    def prompt_warnings(
        self, prompt: str | Sequence[str | None], alone: bool = True, again: bool = False
    ) -> list[str]:
        """Lines on the `unknown_words` and by `combination_warning` of prompts, each once, with what is known instead.

        Args:
            prompt: what has words of an adapter only, or a word that an adapter added, is not looked at for more.
            alone: see `combination_warning`.
            again: whether to repeat what was returned before.
        """
        if again:
            self._warned_of.clear()
        known = self._known_words()
        if known is None:
            return []
        vocabulary = (self.config.get("prompt_vocabulary") or {}).get("modalities", [])
        added = known.difference(self.config.known_words)
        unknown: dict[tuple[str, str], dict[str, list[str]]] = {}  # what to say before and after the words
        lines = []
        for text in dict.fromkeys(text for text in self.known_spelling(prompt) if text.strip()):
            words = [word for word in words_of([text]) if word not in FUNCTION_WORDS]
            of_adapter = added.intersection(words) or any(taught.issuperset(words) for taught in self._adapter_words())
            modalities = [] if of_adapter else vocabulary
            named = [one for one in modalities if stated(one["terms"], text)]
            before, after = "no caption that this model was trained on has the words: ", ""
            if named:
                after = f"; {known_findings(named)}"
            elif modalities:
                names = ", ".join(one["name"] for one in modalities)
                before = f"the prompt names none of the modalities that this model was trained on ({names}), and "
                before += "no caption has the words: "
            new = [word for word in words if word not in known and word not in self._warned_of]
            self._warned_of.update(new)
            unknown.setdefault((before, after), {}).update({word: nearest_words(word, known) for word in new})
            if modalities:
                lines.append(combination_warning(text, modalities, alone and known.issuperset(words)))
        lines = [self._unknown_line(*around, near) for around, near in unknown.items() if near] + lines
        lines = [line for line in dict.fromkeys(lines) if line is not None and line not in self._warned_of]
        self._warned_of.update(lines)
        return lines

    def _unknown_line(self, before: str, after: str, words: Mapping[str, Sequence[str]]) -> str:
        said = [f"{word!r}" + (f" (near: {', '.join(near)})" if near else "") for word, near in words.items()]
        said = said[:10] + ([f"and {len(said) - 10} more"] if len(said) > 10 else [])
        if before.startswith("no caption") and not after and not all(words.values()):
            longest = sorted(self.config.known_words, key=len, reverse=True)[:12]  # terms rather than small words
            after = f"; it knows, among others: {', '.join(longest)}"
        return f"{before}{', '.join(said)}{after}"

    def encode_image(self, image: Images) -> Tensor:
        """Image tokens (B, 1, image_width), or (B, patches, image_width) for `image_tokens="patch"`.

        Args:
            image: PIL images, or arrays ([B,] H, W, 3) or tensors ([B,] 3, H, W) in [0, 1].
        """
        parts = image if isinstance(image, (list, tuple)) else [image]
        images = [one for part in parts for one in (part if getattr(part, "ndim", 3) == 4 else [part])]
        if images and all(isinstance(one, PIL.Image.Image) for one in images):
            inputs = self.feature_extractor([one.convert("RGB") for one in images], return_tensors="pt")
        elif images and all(isinstance(one, (np.ndarray, Tensor)) and one.ndim == 3 for one in images):
            inputs = self.feature_extractor(images, do_rescale=False, return_tensors="pt")
        else:
            raise ValueError(f"image must be PIL images, arrays (H, W, 3) or tensors (3, H, W), not {image!r:.60}")
        encoder = self.image_encoder
        output = encoder(inputs.pixel_values.to(encoder.device, encoder.dtype))
        if self.config.image_tokens == "patch":  # the global token and the registers come first
            return output.last_hidden_state[:, 1 + getattr(encoder.config, "num_register_tokens", 0) :]
        pooled = output.get("pooler_output")
        return (output.last_hidden_state[:, 0] if pooled is None else pooled)[:, None]

    def noise_image_embeds(self, image_embeds: Tensor, level: float | Tensor = 0.0, noise=None) -> Tensor:
        """Image tokens (B, T, width) with `noise` of a level in [0, 1], one or (B,), and the level's sinusoids behind.

        The recipe of stable unCLIP: normalise, add noise by the cosine schedule, scale back, append the level. Nulls
        stay zeros; tokens that have their level, and those of a model without `image_noise`, are returned as they are.
        """
        settings = self.config.get("image_noise")
        if settings is None or image_embeds.shape[-1] == self.embeds_width("image"):
            return image_embeds
        present = (image_embeds != 0).any(dim=-1, keepdim=True)
        steps = (torch.as_tensor(level, device=image_embeds.device) * 999).round().long().expand(len(image_embeds))
        if noise is not None:
            mean, std = (torch.tensor(settings[name]).to(image_embeds) for name in ("mean", "std"))
            schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
            noised = schedule.add_noise((image_embeds - mean) / std, noise, steps) * std + mean
            image_embeds = torch.where(present & (steps > 0)[:, None, None], noised, image_embeds)
        channels = get_timestep_embedding(steps, NOISE_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([image_embeds, channels[:, None].to(image_embeds) * present], dim=-1)

    def encode_labels(self, labels: Mapping | str | None | Sequence[Mapping | str | None] | Tensor) -> Tensor:
        """Label vectors (B, K) float, see `label_vector`; a tensor (B, K) is passed through."""
        if isinstance(labels, Tensor):
            return labels
        rows: Sequence[Any] = labels if isinstance(labels, (list, tuple)) else [labels]
        if not all(row is None or isinstance(row, (str, Mapping)) for row in rows):
            raise ValueError(f"labels must be a dict, a string 'field=value, ...' or a list of them, not {labels!r}")
        return torch.tensor([label_vector(self.label_schema, row) for row in rows], device=self._execution_device)

    def null_embeds(self, kind: str, batch_size: int = 1) -> Tensor:
        """What stands for "no condition" of a kind: the empty prompt, zero image tokens, the zero label vector.

        Raises:
            ValueError: an unknown kind, or text without a text encoder.
        """
        if kind not in KINDS:
            raise ValueError(f"condition kind {kind!r} is not one of: {', '.join(KINDS)}")
        if kind == "text":
            if self.text_encoder is None:
                raise ValueError("this pipeline has no text encoder for the empty prompt: pass negative_prompt_embeds")
            return self.encode_prompt([""]).expand(batch_size, -1, -1)
        shape: tuple[int, ...] = (batch_size, self.embeds_width(kind))
        if kind == "image":
            shape = (batch_size, self._num_image_tokens(), shape[1])
        return torch.zeros(shape, dtype=self.unet.dtype, device=self._execution_device)

    def embeds_width(self, kind: str) -> int | None:
        """The width of a kind's embeddings; None where neither an encoder nor the UNet's wiring tells."""
        if kind == "labels":
            return self.unet.config.projection_class_embeddings_input_dim
        encoders = {"text": self.text_encoder, "image": self.image_encoder}
        if encoders[kind] is not None:
            config = encoders[kind].config
            width = config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size
            return width + (NOISE_CHANNELS if kind == "image" and self.config.get("image_noise") else 0)
        entrance = self.unet.config.encoder_hid_dim or self.unet.config.cross_attention_dim
        others = [other for other in self.kinds if other in encoders and other != kind]
        if kind not in self.kinds or any(encoders[other] is None for other in others):
            return None
        return entrance - sum(self.embeds_width(other) for other in others)

    def _num_image_tokens(self) -> int:
        if self.config.image_tokens == "global" or self.image_encoder is None:
            return 1
        size = getattr(self.feature_extractor, "crop_size", None) or self.feature_extractor.size
        patch = self.image_encoder.config.patch_size
        return (size["height"] // patch) * (size["width"] // patch)

    def unet_conditions(
        self,
        prompt_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        label_embeds: Tensor | None = None,
        batch_size: int = 1,
    ) -> dict[str, Tensor]:
        """The UNet's keyword arguments: `encoder_hidden_states` (B, T, D), for labels `class_labels` (B, K).

        A kind that the model has and the caller leaves out is its null. Beside text, a null image token (all zeros) is
        masked by `encoder_attention_mask` (B, T), so that it draws no attention from the text.

        Args:
            prompt_embeds: (B, T, text_width).
            image_embeds: (B, T, image_width).
            label_embeds: (B, K).
            batch_size: counts only if no embeddings are given.

        Raises:
            ValueError: embeddings of a kind that the model does not have, or of different batch sizes.
        """
        given = dict(zip(KINDS, (prompt_embeds, image_embeds, label_embeds), strict=True))
        given = {kind: embeds for kind, embeds in given.items() if embeds is not None}
        kinds = self.kinds or tuple(given)  # a pipeline made without encoders takes embeddings at their word
        foreign = [kind for kind in given if kind not in kinds]
        sizes = {len(embeds) for embeds in given.values()} or {batch_size}
        if foreign:
            raise ValueError(f"this model has no {' or '.join(foreign)} condition; it has: {', '.join(kinds)}")
        if len(sizes) > 1:
            raise ValueError(f"embeddings of different batch sizes: {sorted(sizes)}")
        (batch_size,) = sizes
        if "image" in kinds and "image" not in given and self.embeds_width("image") is None and "text" in given:
            # both encoders are absent: the width of images is what the text leaves of the projection
            width = self.unet.config.encoder_hid_dim - given["text"].shape[-1]
            given["image"] = given["text"].new_zeros(batch_size, 1, width)
        embeds = {kind: given[kind] if kind in given else self.null_embeds(kind, batch_size) for kind in kinds}
        if "image" in embeds:
            embeds["image"] = self.noise_image_embeds(embeds["image"])
        embeds = {kind: value.to(self.unet.device, self.unet.dtype) for kind, value in embeds.items()}

        conditions = {}
        tokens = [embeds[kind] for kind in ("text", "image") if kind in embeds]
        if len(tokens) == 2:
            text, image = tokens
            seen = [torch.ones_like(text[..., 0], dtype=torch.bool), (image != 0).any(dim=-1)]
            conditions["encoder_attention_mask"] = torch.cat(seen, dim=1)
            pad = torch.nn.functional.pad
            tokens = [torch.cat([pad(text, (0, image.shape[-1])), pad(image, (text.shape[-1], 0))], dim=1)]
        elif not tokens:
            width = self.unet.config.encoder_hid_dim or self.unet.config.cross_attention_dim
            tokens = [torch.zeros(batch_size, 1, width, dtype=self.unet.dtype, device=self.unet.device)]
        conditions["encoder_hidden_states"] = tokens[0]
        if "labels" in embeds:
            conditions["class_labels"] = embeds["labels"]
        return conditions

    # ---- latents ----

    def encode_latents(self, images: Tensor) -> dict[str, Tensor]:
        """The moments of images (B, 3, H, W) in [-1, 1], unscaled: "mean" and, for `AutoencoderKL`, "logvar"."""
        output = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        if "latent_dist" in output:
            return {"mean": output.latent_dist.mean, "logvar": output.latent_dist.logvar}
        return {"mean": output.latent}

    def scale_latents(self, latents: Tensor) -> Tensor:
        """From the autoencoder's scale to the UNet's: (z - shift) * scale."""
        return (latents - (self.vae.config.get("shift_factor") or 0.0)) * self.vae.config.scaling_factor

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """From the UNet's scale to the autoencoder's: z / scale + shift."""
        return latents / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0.0)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of latents on the UNet's scale; `neutral_greys` of them."""
        latents = self.unscale_latents(latents).to(self.vae.device, self.vae.dtype)
        return neutral_greys(self.vae.decode(latents, return_dict=False)[0].clamp(-1, 1))

    # ---- sampling ----

    def check_conditions(self, given: Mapping[str, Any]) -> None:
        """Raise a ValueError for condition arguments that this model cannot use; the message names the valid ones."""
        valid = ", ".join(self.kinds) or "none"
        kind_of = {"prompt": "text", "negative_prompt": "text", "negative_prompt_embeds": "text", "image": "image"}
        kind_of |= {"labels": "labels"} | {name: kind for kind, name in EMBEDS_NAMES.items()}
        needed = {"prompt": "text_encoder", "negative_prompt": "text_encoder", "image": "image_encoder"}
        needed |= {"labels": "label_schema"}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            kind, component = kind_of[name], needed.get(name)
            if kind not in self.kinds and (self.kinds or component):
                raise ValueError(f"{name}: this model has no {kind} condition; its conditions are: {valid}")
            if component and getattr(self, component) is None:
                raise ValueError(f"{name}: this pipeline has no {component}; pass embeddings instead")
            shape = "(batch, width)" if name == "label_embeds" else "(batch, tokens, width)"
            if not component and not (isinstance(value, Tensor) and value.ndim == shape.count(",") + 1):
                raise ValueError(f"{name} must be a tensor {shape}, not {getattr(value, 'shape', value)}")
            if name in ("prompt", "negative_prompt"):
                texts = [value] if isinstance(value, str) else value
                if not isinstance(texts, (list, tuple)) or not all(
                    isinstance(one, (str, type(None))) for one in texts
                ):
                    raise ValueError(f"{name} must be a string or a list of strings, not {value!r}")
                if name == "prompt" and not all(one is None or one.strip() for one in texts or [""]):
                    raise ValueError("prompt is empty: describe the image, or pass None for no text condition")
        for name, twin in (
            ("prompt", "prompt_embeds"),
            ("image", "image_embeds"),
            ("labels", "label_embeds"),
            ("negative_prompt", "negative_prompt_embeds"),
        ):
            if name in given and twin in given:
                raise ValueError(f"both {name} and {twin} are given; pass one of them")

    def check_classifier(self, label, scale, interval, clip, classifier: Any) -> Tensor:
        """The index of each `class_label`, (B,), -1 for none. Raises a ValueError that names what is valid."""
        if classifier is None:
            raise ValueError(
                "class_label needs a classifier, which this model does not carry; train one (task latent_classifier) "
                "and attach it, or pass `classifier`"
            )
        indices = classifier.class_indices(label)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"classifier_guidance_scale must be a finite number, not {scale!r}")
        if len(interval) != 2 or not 0.0 <= interval[0] <= interval[1] <= 1.0:
            raise ValueError(
                f"classifier_guidance_interval must be (low, high) with 0 <= low <= high <= 1, not {interval!r}"
            )
        if clip is not None and (not isinstance(clip, (int, float)) or not clip > 0):
            raise ValueError(f"classifier_guidance_clip must be above 0, or None, not {clip!r}")
        classifier.check_latents(self)
        return indices

    def check_inputs(
        self, steps, scale, interval, num_images, height, width, generator, init_image, strength, output_type, tensors
    ) -> None:
        """Raise a ValueError that names the argument, its value and what is valid."""
        kinds, factor = self.kinds or KINDS, self.vae_scale_factor
        for name, value, unit in (
            ("num_inference_steps", steps, 1),
            ("num_images_per_prompt", num_images, 1),
            ("height", height, factor),
            ("width", width, factor),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % unit:
                valid = "a positive whole number" if unit == 1 else f"a positive multiple of {unit}"
                raise ValueError(f"{name} must be {valid}, not {value!r}")
        for kind, weight in (scale if isinstance(scale, Mapping) else {kinds[0]: scale}).items():
            if kind not in kinds:
                raise ValueError(f"guidance_scale has {kind!r}; this model's conditions are: {', '.join(kinds)}")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ValueError(f"guidance_scale must be a finite number, or one for each kind, not {scale!r}")
        if len(interval) != 2 or not 0.0 <= interval[0] <= interval[1] <= 1.0:
            raise ValueError(f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, not {interval!r}")
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        if not all(one is None or isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"generator must be a torch.Generator or a list of them, not {generator!r}")
        if init_image is not None and not 0.0 < strength <= 1.0:
            raise ValueError(f"strength must be above 0 and at most 1, not {strength!r}")
        if init_image is not None and not hasattr(self.scheduler, "add_noise"):
            raise ValueError(
                f"init_image needs a scheduler with add_noise, which {type(self.scheduler).__name__} lacks"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is not one of: pil, np, pt, latent")
        if not set(tensors) <= set(self._callback_tensor_inputs):
            valid = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs {list(tensors)} are not some of: {valid}")

    def _encode(self, given: Mapping[str, Any], alone: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The embeddings of the kinds that a call uses, and the nulls of the same kinds; (1 or B, ...) each.

        Args:
            given: the arguments of the call.
            alone: whether nothing but the prompt says what to make.
        """
        negative = given["negative_prompt_embeds"]
        if given["negative_prompt"] is not None:
            negative = self.encode_prompt(self.known_spelling(given["negative_prompt"]))
        encoders: dict[str, Any] = {
            "text": lambda prompt: self.encode_prompt(self.known_spelling(prompt)),
            "image": self.encode_image,
            "labels": self.encode_labels,
        }
        embeds: dict[str, Tensor] = {}
        for kind, name in zip(KINDS, ("prompt", "image", "labels"), strict=True):
            if given[name] is not None:
                if name == "prompt":
                    for line in self.prompt_warnings(given[name], alone):
                        logger.warning(line)
                embeds[kind] = encoders[kind](given[name])
            elif given[EMBEDS_NAMES[kind]] is not None:
                embeds[kind] = given[EMBEDS_NAMES[kind]]
                width = self.embeds_width(kind) or embeds[kind].shape[-1]
                if kind == "image" and self.config.get("image_noise"):
                    width -= NOISE_CHANNELS  # the level follows
                if embeds[kind].shape[-1] != width:
                    wrong = embeds[kind].shape[-1]
                    raise ValueError(f"{EMBEDS_NAMES[kind]} have the width {wrong}; this model's is {width}")
            elif kind == "text" and negative is not None:
                embeds[kind] = self.null_embeds(kind)
        nulls = {kind: torch.zeros_like(value[:1]) for kind, value in embeds.items()}
        if "text" in embeds:
            scale = self._guidance_scale
            guided = any(weight != 1.0 for weight in (scale.values() if isinstance(scale, Mapping) else [scale]))
            if negative is not None:
                nulls["text"] = negative
            elif self.text_encoder is not None or guided:  # without guidance no null is looked at
                nulls["text"] = self.null_embeds("text")
            null, text = tuple(nulls["text"].shape[1:]), tuple(embeds["text"].shape[1:])
            if null != text:
                raise ValueError(f"null and text embeddings differ in (tokens, width): {null} and {text}")
        return embeds, nulls

    def _guidance_stages(
        self, kinds: Sequence[str], t: Tensor, interval: tuple[float, float]
    ) -> list[tuple[int, float]]:
        """Which predictions guidance combines at timestep t: (number of kinds switched on, weight of the step to it).

        The chain is e_0 + w_1 (e_1 - e_0) + w_2 (e_2 - e_1) + ..., where e_i has the first i kinds on and the others
        at their nulls (Brooks et al. 2023, eq. 3, for two kinds). Steps of equal weight telescope, so one number for
        all kinds is classifier-free guidance (Ho & Salimans 2022, eq. 6) with two predictions, and weights of 1 need
        only e_n. Outside `interval` all weights are 1 (Kynkäänniemi et al. 2024, section 3.1).
        """
        scale = self._guidance_scale if self._is_within(t, interval) else 1.0
        weights = [1.0] + [scale.get(kind, 1.0) if isinstance(scale, Mapping) else scale for kind in kinds]
        return [(i, w) for i, w in enumerate(weights) if i == len(kinds) or w != weights[i + 1]]

    def _is_within(self, t: Tensor, interval: tuple[float, float]) -> bool:
        """Whether timestep t lies in an interval of fractions of the training timesteps."""
        low, high = interval
        time = float(t) / self.scheduler.config.num_train_timesteps
        return (low == 0.0 or low <= time) and (high == 1.0 or time <= high)  # some schedulers leave the range 0..1

    def _stage_conditions(self, stages, embeds: Mapping[str, Tensor], nulls, count: int) -> dict[str, Tensor]:
        """`unet_conditions` of the stages of guidance, one after the other along the batch."""
        parts = []
        for switched_on in stages:
            chosen = {kind: embeds[kind] if i < switched_on else nulls[kind] for i, kind in enumerate(embeds)}
            chosen = {EMBEDS_NAMES[kind]: value for kind, value in chosen.items()}
            parts.append(self.unet_conditions(**chosen, batch_size=count))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _predict(
        self, sample: Tensor, t: Tensor, weights: Sequence[float], conditions: Mapping, cross_attention_kwargs
    ) -> Tensor:
        """What the UNet says about noised latents, its stages of guidance combined; differentiable."""
        attention_kwargs = dict(cross_attention_kwargs or {})
        with _scaled_lora(self.unet, attention_kwargs.pop("scale", 1.0)):
            predictions = self.unet(
                torch.cat([sample] * len(weights)).to(self.unet.dtype),
                t,
                **conditions,
                cross_attention_kwargs=attention_kwargs or None,
                return_dict=False,
            )[0].chunk(len(weights))
        prediction = predictions[0]
        for weight, before, after in zip(weights[1:], predictions[:-1], predictions[1:], strict=True):
            prediction = prediction + weight * (after - before)
        if self._guidance_rescale and len(weights) > 1:
            prediction = rescale_noise_cfg(prediction, predictions[-1], self._guidance_rescale)
        return prediction

    def prepare_timesteps(self, num_inference_steps: int, strength: float) -> tuple[Tensor, int]:
        """The timesteps to run through, the last part of the schedule by `strength`, and how many steps they make."""
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        steps = max(int(num_inference_steps * strength), 1)
        skipped = (num_inference_steps - steps) * self.scheduler.order
        if skipped and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(skipped)
        return self.scheduler.timesteps[skipped:], steps

    def prepare_latents(self, shape: tuple[int, ...], generator, latents, init_latents, timestep: Tensor) -> Tensor:
        """Where sampling starts: noise on the scheduler's scale, or `init_latents` with the noise of `timestep`."""
        device = self._execution_device
        if latents is None:
            # float32 whatever the model's precision, so that a seed means the same image in all of them
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; these images need {shape}")
        latents = latents.to(device, self.unet.dtype)
        if init_latents is None:
            return latents * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(init_latents.to(latents), latents, timestep.expand(shape[0]))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str | None] | None = None,
        image: Images | None = None,
        labels: Mapping | str | Sequence[Mapping | str | None] | None = None,
        prompt_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        label_embeds: Tensor | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | Mapping[str, float] = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 0.95),
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        init_image: Images | None = None,
        strength: float = 0.8,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        negative_prompt_embeds: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_label: str | Sequence[str | None] | None = None,
        classifier_guidance_scale: float = 3.0,
        classifier_guidance_interval: tuple[float, float] = (0.0, 1.0),
        classifier_guidance_clip: float | None = 1.0,
        classifier: Any | None = None,
        image_noise_level: float = 0.0,
        guidance_rescale: float = 0.0,
    ) -> ImagePipelineOutput | tuple:
        """Generate images. A kind of condition that is left out is at its null; one value serves a whole batch.

        Args:
            prompt: text; None in a list is an image without a text condition.
            image: images whose embeddings condition the result (`init_image` is the one to start from).
            labels: a dict, a string "field=value, ..." or a list of them; unknown fields may be left out. Without
                any, those that the prompt states count (`labels_of_prompt`); `{}` is none.
            prompt_embeds: (B, T, text_width) in place of `prompt`.
            image_embeds: (B, T, image_width) in place of `image`.
            label_embeds: (B, K) in place of `labels`.
            negative_prompt: takes the place of the empty prompt in guidance.
            num_inference_steps: sampling steps.
            guidance_scale: one weight, or one per kind, `{"text": 4.0, "labels": 1.5}`; kinds left out have 1.
            guidance_interval: where guidance is on, in fractions of the training timesteps. At the highest noise it
                makes images alike and too bright (Kynkäänniemi et al. 2024), so it is off there by default.
            num_images_per_prompt: images for each element of the batch.
            height: in pixels; by default the size that the UNet was trained on.
            width: in pixels.
            generator: one, or one for each image; with one each, an image does not depend on the batch around it.
            latents: (N, C, h, w) standard normal noise in place of drawn noise.
            init_image: start from these images with noise added: PIL, or arrays or tensors in [0, 1].
            strength: how far to go back in the noise schedule with `init_image`, in (0, 1].
            output_type: "pil", "np" (N, H, W, 3) or "pt" (N, 3, H, W) in [0, 1], or "latent" on the UNet's scale.
            return_dict: whether to return an `ImagePipelineOutput` or a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors)`, which may return changed tensors.
            callback_on_step_end_tensor_inputs: what the callback gets, some of `_callback_tensor_inputs`.
            negative_prompt_embeds: (1 or B, T, text_width) in place of `negative_prompt`.
            cross_attention_kwargs: for the UNet's attention; `{"scale": 0.5}` weights LoRA layers in this call, the
                text encoder's included.
            class_label: class of the classifier to lead to; one, or one for each element of the batch (None: none).
            classifier_guidance_scale: weight of the gradient of log p(class | noised latent), which is added to the
                result of the other guidance: samples follow p(image) p(class | image) ** scale.
            classifier_guidance_interval: where that is on, in fractions of the training timesteps.
            classifier_guidance_clip: the root mean square by which it may move a predicted clean latent; None: any.
            classifier: in place of the model's own, such as a `medisyn.guidance.CleanClassifier`.
            image_noise_level: noise on the image embeddings, up to what the model was trained with: more variety.
            guidance_rescale: how far to bring the standard deviation of a guided prediction back to that of the
                conditional one, in [0, 1] (Lin et al. 2024, section 3.4): less contrast at high `guidance_scale`.

        Raises:
            ValueError: an argument that this model cannot use; the message names the valid ones.
        """
        # 1. check
        size = self.unet.config.sample_size or 64
        rows, columns = (size, size) if isinstance(size, int) else size
        height = rows * self.vae_scale_factor if height is None else height
        width = columns * self.vae_scale_factor if width is None else width
        guides = (image, image_embeds, labels, label_embeds, init_image, class_label)
        alone = all(guide is None or (isinstance(guide, Mapping) and not guide) for guide in guides)
        given = {"prompt": prompt, "image": image, "labels": labels, "negative_prompt": negative_prompt}
        given |= {"prompt_embeds": prompt_embeds, "image_embeds": image_embeds, "label_embeds": label_embeds}
        given |= {"negative_prompt_embeds": negative_prompt_embeds}
        counts = (num_images_per_prompt, height, width)
        others = (generator, init_image, strength, output_type, callback_on_step_end_tensor_inputs)
        self.check_conditions(given)
        if labels is None and label_embeds is None and prompt is not None:
            given["labels"] = self.labels_of_prompt(prompt)
        self.check_inputs(num_inference_steps, guidance_scale, guidance_interval, *counts, *others)
        if not 0.0 <= guidance_rescale <= 1.0:
            raise ValueError(f"guidance_rescale must be in 0..1, not {guidance_rescale!r}")
        most = (self.config.get("image_noise") or {"level": 0.0})["level"]
        if not 0.0 <= image_noise_level <= most:
            raise ValueError(f"image_noise_level must be in 0..{most} for this model, not {image_noise_level!r}")
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        classifier = self.classifier if classifier is None else classifier
        guidance = (classifier_guidance_scale, classifier_guidance_interval, classifier_guidance_clip)
        classes = None if class_label is None else self.check_classifier(class_label, *guidance, classifier)

        # 2. encode: embeddings and nulls of the kinds in use, and the image to start from
        with _scaled_lora(self.text_encoder, (cross_attention_kwargs or {}).get("scale", 1.0)):
            embeds, nulls = self._encode(given, alone)
        inputs = embeds | {f"negative {kind}": null for kind, null in nulls.items()}
        if init_image is not None:
            pixels = self.image_processor.preprocess(init_image, height=height, width=width)
            inputs["init_image"] = self.scale_latents(self.encode_latents(pixels)["mean"])
        inputs |= {} if classes is None else {"class_label": classes}
        lengths = {name: len(value) for name, value in inputs.items()}
        batch_size = max(lengths.values(), default=1)
        if not set(lengths.values()) <= {1, batch_size}:
            raise ValueError(f"inputs of different lengths: {', '.join(f'{name} {n}' for name, n in lengths.items())}")
        count = batch_size * num_images_per_prompt
        generator = list(generator) if isinstance(generator, (list, tuple)) else generator
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images; pass one, or one for each image")

        def per_image(values: Tensor) -> Tensor:  # (1 or B, ...) -> (N, ...)
            return values.expand(batch_size, *values.shape[1:]).repeat_interleave(num_images_per_prompt, dim=0)

        embeds, nulls = ({kind: per_image(value) for kind, value in part.items()} for part in (embeds, nulls))
        init_latents = per_image(inputs["init_image"]) if init_image is not None else None
        classes = None if classes is None else per_image(classes)

        # 3. timesteps
        timesteps, steps = self.prepare_timesteps(num_inference_steps, 1.0 if init_image is None else strength)
        self._num_timesteps = len(timesteps)

        # 4. latents
        shape = (count, self.unet.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        latents = self.prepare_latents(shape, generator, latents, init_latents, timesteps[:1])
        if image_noise_level and "image" in embeds:
            noise = randn_tensor(embeds["image"].shape, generator=generator, device=self._execution_device)
            embeds["image"] = self.noise_image_embeds(embeds["image"], image_noise_level, noise.to(embeds["image"]))

        # 5. denoise
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}
        conditions: dict[tuple[int, ...], dict[str, Tensor]] = {}  # by the stages of guidance in use
        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(timesteps):
                stages = self._guidance_stages(tuple(embeds), t, guidance_interval)
                numbers = tuple(number for number, _ in stages)
                if numbers not in conditions:
                    conditions[numbers] = self._stage_conditions(numbers, embeds, nulls, count)
                model_input = self.scheduler.scale_model_input(latents, t)
                predict = partial(
                    self._predict,
                    t=t,
                    weights=[weight for _, weight in stages],
                    conditions=conditions[numbers],
                    cross_attention_kwargs=cross_attention_kwargs,
                )
                if classes is not None and self._is_within(t, classifier_guidance_interval):
                    options = {"scale": classifier_guidance_scale, "clip": classifier_guidance_clip}
                    prediction = classifier.guided_prediction(
                        predict, model_input, t, self.scheduler, classes, **options
                    )
                else:
                    prediction = predict(model_input)
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                progress_bar.update(steps * (i + 1) // len(timesteps) - steps * i // len(timesteps))

        # 6. decode
        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ---- saving and loading ----

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "MediSynPipeline":
        """As `DiffusionPipeline.from_pretrained`, with float32 for all components unless a `dtype` is given."""
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32  # transformers' own default is the precision of the file
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        # a published index names its code file, ["medisyn_pipeline", "MediSynPipeline"]; this class is that code
        index = super()._dict_from_json_file(json_file)
        if isinstance(index.get("_class_name"), list) and index["_class_name"][-1] == cls.__name__:
            index["_class_name"] = cls.__name__
        if not _IS_REMOTE_CODE and (index.get("classifier") or [None])[0] == "medisyn_latent_classifier":
            index["classifier"][0] = __name__.replace("medisyn_pipeline", "medisyn_latent_classifier")
            importlib.import_module(index["classifier"][0])  # diffusers does not import what an index names
        return index

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """As in diffusers; what is saved has adapters fused into its weights, as they are weighted now.

        Their label fields and words as well: it draws what this pipeline draws, which keeps its adapters.
        """
        with self._fused():
            super().save_pretrained(save_directory, *args, **kwargs)

    @contextmanager
    def _fused(self) -> Iterator[None]:
        """Copies with adapters fused in the place of the models that have any, within the block."""
        names = [name for name in ("vae", "unet", "text_encoder") if getattr(self, name) is not None]
        adapted = {name: getattr(self, name) for name in names}
        try:
            for name, module in adapted.items():
                setattr(self, name, _merged(module))
            if any(_is_extended(module) for module in adapted.values()):
                # schema and tokenizer are those of the extended model already
                importlib.import_module("medisyn.extension").fuse_extensions(self)
            yield
        finally:
            for name, module in adapted.items():
                setattr(self, name, module)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Write `model_index.json` and, beside it, this file; `save_pretrained` calls it last.

        No local path stays in any configuration. The hashes of the training images (`training_images.json`) go along
        from the folder that the pipeline was loaded from.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        (folder / "medisyn_pipeline.py").write_text(_SOURCE, encoding="utf-8")
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["_class_name"] = ["medisyn_pipeline", "MediSynPipeline"]
        if self.classifier is not None:
            index["classifier"] = ["medisyn_latent_classifier", "MediSynLatentClassifier"]
        else:
            index.pop("classifier", None)  # so that models without one are written as ever
        index["label_schema"] = self.label_schema  # diffusers sorts keys; the order of fields is that of the vector
        index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _remove_paths(folder)
        hashes = Path(self.config.get("_name_or_path") or folder) / "training_images.json"
        if hashes.is_file() and not (folder / hashes.name).exists():
            shutil.copyfile(hashes, folder / hashes.name)

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, hotswap: bool = False, **kwargs
    ) -> None:
        """As in diffusers; says so when an adapter holds more than LoRA weights. Adapters that medisyn loaded stay on.

        Raises:
            ValueError: with medisyn installed, an `adapter.json` beside the weights names another base than this one.
        """
        source = pretrained_model_name_or_path_or_dict
        manifest = _adapter_manifest(source, **kwargs)
        if "base_hash" in manifest:
            try:
                from medisyn.lora import require_base
            except ImportError:  # only medisyn can tell
                pass
            else:
                require_base(self, manifest, str(source))
        super().load_lora_weights(source, adapter_name=adapter_name, hotswap=hotswap, **kwargs)
        if (lora := self._medisyn_lora()) is not None:
            lora.record_loras(self, adapter_name if hotswap else None)
        if manifest.get("label_schema") or manifest.get("tokens"):
            logger.warning(
                f"{source} also brings label fields or words, which are not LoRA weights and were not loaded: use "
                "medisyn.load_pipeline(adapter=...)"
            )

    def _medisyn_lora(self) -> Any:
        """The module that keeps account of the adapters on this pipeline; None where medisyn loaded none."""
        return importlib.import_module("medisyn.lora") if hasattr(self, "_medisyn_adapters") else None

    def unload_lora_weights(self) -> None:
        """As in diffusers; adapters that medisyn loaded go as a whole. After `fuse_lora` all of them is fused."""
        if (lora := self._medisyn_lora()) is None:
            return super().unload_lora_weights()
        parts = [part for part in (self.unet, self.text_encoder) if part is not None]
        layers = [layer for part in parts for layer in part.modules() if hasattr(layer, "scale_layer")]
        return lora.fuse_adapters(self) if any(layer.merged for layer in layers) else lora.unload_adapters(self)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As in diffusers; adapters that medisyn loaded go as a whole."""
        lora = self._medisyn_lora()
        return super().delete_adapters(adapter_names) if lora is None else lora.delete_adapters(self, adapter_names)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """As in diffusers; of adapters that medisyn loaded all parts, and the record, get the weight.

        Raises:
            ValueError: weights by part of the model for such adapters.
        """
        if (lora := self._medisyn_lora()) is None:
            return super().set_adapters(adapter_names, adapter_weights)
        return lora.set_adapters(self, adapter_names, adapter_weights)

    def disable_lora(self) -> None:
        """As in diffusers; adapters that medisyn loaded are at weight 0 until `enable_lora`."""
        lora = self._medisyn_lora()
        return super().disable_lora() if lora is None else lora.disable_adapters(self)

    def enable_lora(self) -> None:
        """As in diffusers; see `disable_lora`."""
        lora = self._medisyn_lora()
        return super().enable_lora() if lora is None else lora.enable_adapters(self)

    @classmethod
    def load_lora_into_text_encoder(cls, state_dict, network_alphas, text_encoder, **kwargs) -> None:
        """As in diffusers; a pipeline without a text encoder takes adapters that have UNet weights only."""
        prefix = f"{cls.text_encoder_name}."
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if text_encoder is None:
            if own:
                raise ValueError("this adapter has text encoder weights, but the pipeline has no text encoder")
        elif kwargs.get("hotswap") or any("_proj." in key for key in own) or not any(".lora_A." in key for key in own):
            super().load_lora_into_text_encoder(state_dict, network_alphas, text_encoder, **kwargs)
        else:  # diffusers knows the layers of CLIP alone; this adapter is of BERT or T5, in peft's own format
            from peft import LoraConfig

            metadata = {key: value for key, value in (kwargs.get("metadata") or {}).items() if key.startswith(prefix)}
            options = {key.removeprefix(prefix): value for key, value in metadata.items()}
            ranks = {key: value.shape[1] for key, value in own.items() if key.endswith(".lora_B.weight")}
            text_encoder.load_adapter(
                adapter_state_dict=own,
                peft_config=LoraConfig(**options or get_peft_kwargs(ranks, None, own)),
                adapter_name=kwargs.get("adapter_name") or get_adapter_name(text_encoder),
                low_cpu_mem_usage=kwargs.get("low_cpu_mem_usage", False),
            )
            text_encoder.to(device=text_encoder.device, dtype=text_encoder.dtype)

    def export_stable_diffusion(self, folder: str | Path) -> None:
        """Save as a plain `StableDiffusionPipeline` that gives the same images for the same latents.

        Raises:
            ValueError: the model is not text-only with a CLIP text encoder and an AutoencoderKL, or that pipeline
                would treat its latents, prompts or schedule in another way.
        """
        scheduler, vae, text = self.scheduler.config, self.vae, self.text_encoder
        is_text_only = self.kinds == ("text",) and isinstance(text, CLIPTextModel)
        obstacles = {
            f"its conditions are {', '.join(self.kinds) or 'none'}, not text alone": self.kinds != ("text",),
            "its text encoder is not a CLIPTextModel": not isinstance(text, CLIPTextModel),
            "its autoencoder is not an AutoencoderKL": not isinstance(vae, AutoencoderKL),
            "its latents have a shift": bool(vae.config.get("shift_factor")),
            "its window is not the tokenizer's": is_text_only and self.text_window != self.tokenizer.model_max_length,
            "its scheduler clips samples": scheduler.get("clip_sample", False),
            "its scheduler has a steps_offset other than 1": scheduler.get("timestep_spacing") == "leading"
            and scheduler.get("steps_offset", 1) != 1,
        }
        if any(obstacles.values()):
            reasons = "; ".join(reason for reason, is_true in obstacles.items() if is_true)
            raise ValueError(f"this model cannot be saved as a StableDiffusionPipeline: {reasons}")
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        with self._fused():
            components = {name: getattr(self, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
            components["scheduler"] = type(self.scheduler).from_config(scheduler)  # that pipeline changes its own
            StableDiffusionPipeline(**components, **absent).save_pretrained(folder)
        _remove_paths(Path(folder))


def _align_weights(module: torch.nn.Module) -> None:
    """Move weights that lie at odd addresses, as those of a mapped file do, to where PyTorch would have put them.

    CPU kernels choose their code by alignment, so the last bits of an image would tell whether its model was loaded.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


@contextmanager
def _scaled_lora(module: torch.nn.Module | None, scale: float) -> Iterator[None]:
    """LoRA layers at `scale` times their weights; diffusers' own way would leave them at 1 after a scale of 0."""
    layers: list[Any] = [] if module is None or scale == 1.0 else list(module.modules())
    scaled = [layer for layer in layers if hasattr(layer, "scale_layer")]
    weights = [dict(layer.scaling) for layer in scaled]
    try:
        for layer in scaled:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, before in zip(scaled, weights, strict=True):
            layer.scaling.update(before)


def _merged(module: Any) -> Any:
    """A module itself; of one with LoRA layers or medisyn's extensions a copy, LoRA layers merged into its weights.

    Saved as they are, such a UNet could not be loaded, and of a text encoder transformers would save the LoRA alone.
    """
    if not (_is_extended(module) or any(hasattr(layer, "scale_layer") for layer in module.modules())):
        return module
    module = copy.deepcopy(module)
    for layer in module.modules():
        if hasattr(layer, "scale_layer") and not (layer.merged or layer.disable_adapters):
            layer.merge()
    recurse_remove_peft_layers(module)
    module.__dict__.pop("peft_config", None)
    module._hf_peft_config_loaded = False
    return module


def _is_extended(module: torch.nn.Module) -> bool:
    """Whether label fields or words of an adapter lie in a model, in layers of medisyn's own."""
    return any(type(layer).__module__ == "medisyn.extension_layers" for layer in module.modules())


def _adapter_manifest(source: Any, **options) -> dict[str, Any]:
    """`adapter.json` beside the LoRA weights of a file, folder or Hub name; empty where there is none.

    Args:
        source: of the weights, as for `load_lora_weights`; weights in memory have no manifest.
        options: those of the download: "subfolder", "revision", "token" and the like.

    Raises:
        ValueError: the file is not JSON.
    """
    if isinstance(source, Mapping):
        return {}
    place = Path(source)
    if place.exists():
        folder = place.parent if place.is_file() else place / (options.get("subfolder") or "")
        file = folder / "adapter.json"
    else:
        names = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
        chosen = {name: options[name] for name in names if options.get(name) is not None}
        try:
            file = Path(hf_hub_download(str(source), "adapter.json", **chosen))
        except (OSError, ValueError):  # no such file; or nothing of that name, of which diffusers says why
            return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return manifest if isinstance(manifest, dict) else {}


def _remove_paths(folder: Path) -> None:
    """Take the place that components were loaded from out of the configuration files of a saved pipeline."""
    for file in [folder / "model_index.json", *folder.glob("*/*config.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}
        if kept != config:
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
