"""Parts of a training configuration that are sections of their own: conditions, LoRA, prior preservation, tasks.

- See `medisyn.config`, which holds the whole and reads it.

    TextConditionConfig(encoder="openai/clip-vit-large-patch14", dropout=0.1)
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid")
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


def check_interval(interval: tuple[float, float]) -> None:
    """Raise ValueError for one that ends before it begins."""
    if interval[0] > interval[1]:
        raise ValueError(f"task.guidance_interval must be (low, high) with low <= high, not {tuple(interval)}")


@dataclass(frozen=True)
class TextConditionConfig:
    """Text prompts as cross-attention tokens."""

    __pydantic_config__ = STRICT
    type: Literal["text"] = "text"
    # a transformers or `open_clip:` name, or a folder; None: that of `base`, else a small one built from the captions
    encoder: str | None = None
    train_encoder: bool = False  # train the text encoder along with the UNet
    hidden_size: Positive = 192  # of the encoder that is built when none is named
    num_layers: Positive = 2
    max_length: Positive | None = None  # tokens; None: the encoder's own window, 24 for one built from the captions
    # words that an adapter teaches the text encoder; "auto": those of the captions that its tokenizer breaks to pieces
    new_words: Literal["auto"] | tuple[str, ...] = ()
    # share of the captions that are said in other words at each step (`medisyn.paraphrases`); needs train_encoder
    paraphrase: Fraction = 0.0
    dropout: Fraction = 0.1  # probability of replacing the condition by its null


@dataclass(frozen=True)
class ImageConditionConfig:
    """Image embeddings (DINO and other vision transformers) as cross-attention tokens."""

    __pydantic_config__ = STRICT
    type: Literal["image"] = "image"
    encoder: str | None = None  # transformers name or folder, such as facebook/dinov2-base; None: that of `base`
    tokens: Literal["global", "patch"] = "global"  # patch tokens let a model copy its input
    # most noise on the embeddings in training, as a share of a noise schedule; the UNet is told how much (unCLIP)
    noise: Fraction = 0.0
    dropout: Fraction = 0.1


@dataclass(frozen=True)
class LabelsConditionConfig:
    """Structured labels as a vector added to the time embedding."""

    __pydantic_config__ = STRICT
    type: Literal["labels"] = "labels"
    schema: str | None = None  # name of a shipped schema or path of a JSON file; None: that of `base`
    dropout: Fraction = 0.1


ConditionConfig = Annotated[
    TextConditionConfig | ImageConditionConfig | LabelsConditionConfig, Field(discriminator="type")
]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights (Hu et al. 2022), by peft."""

    __pydantic_config__ = STRICT
    rank: Positive = 16
    alpha: PositiveFloat | None = None  # the adapter is scaled by alpha / rank; None: the rank, a scale of 1
    # endings of module names, or one regular expression that whole names match; by default the UNet's attention
    target_modules: str | tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    use_rslora: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski 2023)
    use_dora: bool = False  # direction and magnitude apart (Liu et al. 2024)
    dropout: Fraction = 0.0
    text_encoder: bool = False  # adapt the text encoder as well
    text_encoder_target_modules: str | tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    # run or adapter whose decoder LoRA becomes part of this adapter (task: autoencoder with lora)
    decoder: str | None = None


@dataclass(frozen=True)
class DecoderLoraConfig:
    """Low-rank adapters on every layer of an autoencoder's decoder, by peft."""

    __pydantic_config__ = STRICT
    rank: Positive = 16
    alpha: PositiveFloat | None = None  # the adapter is scaled by alpha / rank; None: the rank, a scale of 1
    use_rslora: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski 2023)
    dropout: Fraction = 0.0


@dataclass(frozen=True)
class PriorConfig:
    """Images of what the base can already draw, mixed in so that it does not forget (Ruiz et al. 2023)."""

    __pydantic_config__ = STRICT
    fraction: Fraction = 0.25  # their share of the drawn rows
    source: str | tuple[str, ...] | None = None  # real ones, as in data.source; None: drawn by the base itself
    caption_column: str | None = "caption"  # of `source`
    num_images: Positive = 256  # how many the base draws
    prompts: tuple[str, ...] = ()  # what it draws; empty: a sentence for each modality and finding of the vocabulary


@dataclass(frozen=True)
class AutoencoderTaskConfig:
    """Train an autoencoder: L1 + perceptual + KL, adversarial on request."""

    __pydantic_config__ = STRICT
    type: Literal["autoencoder"] = "autoencoder"
    preset: str | None = "mini"  # autoencoder of this preset, from scratch
    base: str | None = None  # or continue from a folder, Hub name or "default" (a pipeline or an autoencoder)
    train_encoder: bool = True  # False: the decoder alone; latents, and every model trained on them, stay valid
    lora: DecoderLoraConfig | None = None  # an adapter of the decoder of `base`, a pipeline; all else is frozen
    # most noise on the latents that the decoder sees, on the diffusion model's scale: what it draws is never exact
    latent_noise: NonNegative = 0.0
    pca_images: Count = 0  # start a deterministic autoencoder at the best linear code of this many images; 0: random
    l1_weight: NonNegative = 1.0
    l2_weight: NonNegative = 0.0
    colour_weight: NonNegative = 0.0  # of the error of Cb and Cr: a tint of a level shows on a greyscale image
    structure_weight: NonNegative = 0.0  # of SSIM's structure term: faint noise shows where there is none
    perceptual: Literal["none", "st-lpips", "lpips"] = "none"
    perceptual_weights: str | None = None  # file of the perceptual network; None: torchmetrics' own download for lpips
    perceptual_weight: NonNegative = 0.25
    kl_weight: NonNegative = 1e-6  # AutoencoderKL only
    adversarial_weight: NonNegative = 0.0  # 0: no discriminator
    adversarial_start: Count = 0  # first step of the adversarial phase
    discriminator_channels: Positive = 32
    # class consistency: the decoder is tuned on a labelled set with the loss of an image classifier as well
    class_weight: NonNegative = 0.0  # 0: no classifier
    class_column: str = "finding"  # column with the class; "extra.x": key x of JSON extra
    label_fraction: Fraction = 1.0  # share of each class's images, in whole groups, that the set has
    label_seed: int = 0  # chooses them
    scale_images: Positive = 1024  # images from which the latent scale is fitted at the end


@dataclass(frozen=True)
class DiffusionTaskConfig:
    """Train the UNet (and a small text encoder along with it) on cached latents."""

    __pydantic_config__ = STRICT
    type: Literal["diffusion"] = "diffusion"
    # all weights, a LoRA, or scale and shift of the normalisation layers alone; None: lora where `lora:` is given
    method: Literal["full", "lora", "norm"] | None = None
    lora: LoraConfig | None = None  # options of method: lora
    prior: PriorConfig | None = None  # mix in images of the base's own kind
    preset: str | None = "mini"  # UNet of this preset, from scratch
    base: str | None = None  # or continue from this pipeline (folder or Hub name)
    vae: str | None = None  # autoencoder of a new model: folder, Hub name or run folder
    # exactly these: others of `base` are taken out of it, or stay at their null beside an adapter;
    # empty: none, or those of `base` with frozen encoders
    conditions: tuple[ConditionConfig, ...] = ()
    joint_dropout: Fraction = 0.0  # probability of dropping all conditions together, beside each one's own
    # schedule of a new model; a model that starts from `base` keeps that of the base
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    beta_schedule: Literal["squaredcos_cap_v2", "scaled_linear", "linear"] = "squaredcos_cap_v2"
    zero_terminal_snr: bool = False  # rescale the betas (Lin et al. 2024); needs v_prediction or sample
    # Hang et al. 2023; 0: no weighting, since content is decided at noise levels which min-SNR hardly weighs
    min_snr_gamma: NonNegative = 0.0
    noise_offset: NonNegative = 0.0
    cache_dir: str | None = None  # latents; None: inside the run folder
    cache_batch_size: Positive = 32
    compile: bool = False  # torch.compile the UNet
    gradient_checkpointing: bool = False

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained beside a frozen base."""
        return self.method in ("lora", "norm")

    def __post_init__(self) -> None:
        if self.method is None:
            object.__setattr__(self, "method", "full" if self.lora is None else "lora")
        if self.method == "lora" and self.lora is None:
            object.__setattr__(self, "lora", LoraConfig())
        if self.lora is not None and self.method != "lora":
            raise ValueError(f"task.lora belongs to method: lora, not {self.method}")


@dataclass(frozen=True)
class GuidanceDistillationTaskConfig(DiffusionTaskConfig):
    """Build classifier-free guidance into a LoRA, so that one pass a step draws what two or more did."""

    __pydantic_config__ = STRICT
    type: Literal["guidance_distillation"] = "guidance_distillation"  # type: ignore[assignment]
    guidance_scale: PositiveFloat = 4.0  # of the base, the teacher
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 0.95)  # where it acts, in fractions of the timesteps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "lora" or self.lora is None or self.lora.text_encoder:
            raise ValueError("guidance is built into a LoRA of the UNet: set task.lora, without text_encoder")
        check_interval(self.guidance_interval)
        for condition in self.conditions:
            if getattr(condition, "new_words", ()) or getattr(condition, "schema", None) is not None:
                raise ValueError(f"the teacher knows the base's own conditions alone: {condition.type} has new ones")


@dataclass(frozen=True)
class PseudoLabelsConfig:
    """Let a CNN on pixels, trained on the few labels and all images, label the others (FixMatch, Sohn et al. 2020)."""

    __pydantic_config__ = STRICT
    steps: Positive = 750  # of the CNN's training
    # least probability of a class for it to count as a label, in the CNN's training and for what it hands on
    threshold: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.9
    resolution: Positive = 64  # side of the CNN's images in pixels


@dataclass(frozen=True)
class LatentClassifierTaskConfig:
    """Train a classifier of noised latents, on a small labelled set, for guidance."""

    __pydantic_config__ = STRICT
    type: Literal["latent_classifier"] = "latent_classifier"
    base: str = "default"  # the model to guide: folder, run folder, Hub name or "default"
    class_column: str = "finding"  # column with the class; "extra.x": key x of JSON extra
    classes: tuple[str, ...] = ()  # in order; empty: all that the labelled images have, in alphabetical order
    label_fraction: Fraction = 1.0  # share of each class's images, in whole groups, whose label is used
    label_seed: int = 0  # chooses them
    # share of the labelled images, in whole groups of every class, that the temperatures are fitted on and nothing
    # else (Guo et al. 2017): they scale the guidance, and validation images are for measuring. With fewer than three
    # of a class, or 0, all images train the classifier and the temperatures stay 1
    calibration_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.2
    # labels for the other images of data.source too, which are then all taken to be of one of the classes; None: the
    # labelled images alone
    pseudo_labels: PseudoLabelsConfig | None = None
    # start from the encoder half of the base's UNet, which has its shape then; or at random, in the shape below
    initialize: Literal["base", "random"] = "base"
    block_out_channels: tuple[Positive, ...] = (64, 128, 128)  # of a random start: channels at each resolution
    layers_per_block: Positive = 1  # of a random start
    dropout: Fraction = 0.1
    label_smoothing: Fraction = 0.0
    balance_classes: bool = True  # draw every class equally often
    backbone_learning_rate: PositiveFloat | None = None  # of what comes from the base; None: optim.learning_rate
    cache_dir: str | None = None  # latents; None: inside the run folder
    cache_batch_size: Positive = 32


@dataclass(frozen=True)
class GuidedTaskConfig:
    """Distil a teacher with classifier guidance into a class-conditional student."""

    __pydantic_config__ = STRICT
    base: str  # the teacher, without labels: folder, run folder or Hub name
    type: Literal["guided"] = "guided"
    classifier: str = ""  # folder or run of a latent classifier; "": the one that `base` carries
    method: Literal["full", "lora"] = "lora"  # what of the student's UNet is trained beside the label embedding
    lora: LoraConfig | None = None  # options of method: lora
    class_column: str = "finding"  # column with the class of the labelled images
    label_fraction: Fraction = 1.0  # share of each class's images, in whole groups, whose label is used
    label_seed: int = 0  # chooses them; the same as the classifier's
    # count images of data.source as labelled whose class the run of `classifier` was sure of (its task.pseudo_labels)
    pseudo_labels: bool = False
    unlabelled: str | tuple[str, ...] | None = None  # more images for the distillation, as in data.source
    # of the classifier's gradient in the target; at 3 the student does not learn its classes (model_cards/LOG.md)
    guidance_scale: NonNegative = 12.0
    # where it acts, and data_guidance, in fractions of the timesteps
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    guidance_clip: PositiveFloat | None = 1.0  # most that it moves a clean latent (root mean square); null: any
    distillation_weight: NonNegative = 1.0  # of items with a class; without one the teacher's weight is always 1
    data_weight: NonNegative = 1.0  # of the labelled images' own denoising loss
    # classifier-free guidance away from the teacher that this loss builds in, in place of the classifier's
    # (distillation_weight: 0); the student is then sampled with guidance 1. 1: none
    data_guidance: Annotated[float, Field(ge=1.0)] = 1.0
    class_dropout: Fraction = 0.1  # probability of no class, where the target is the teacher as it is
    labelled_share: Fraction = 0.25  # of the drawn images that have a label, each class as often; 1 if all have one
    # share of the images without a label whose class is drawn uniformly; of the others by the classifier's posterior
    uniform_classes: Fraction = 0.25
    # Hang et al. 2023; 0: no weighting, since a class is decided at noise levels which min-SNR hardly weighs
    min_snr_gamma: NonNegative = 0.0
    cache_dir: str | None = None  # latents; None: inside the run folder
    cache_batch_size: Positive = 32
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.method == "lora" and self.lora is None:
            object.__setattr__(self, "lora", LoraConfig())
        if self.lora is not None and self.method != "lora":
            raise ValueError(f"task.lora belongs to method: lora, not {self.method}")
        check_interval(self.guidance_interval)
        if self.data_guidance > 1 and self.distillation_weight:
            raise ValueError("task.data_guidance replaces the classifier's: set task.distillation_weight to 0")


@dataclass(frozen=True)
class DinoTaskConfig:
    """Train a vision transformer on images alone, by self-distillation (DINO, Caron et al. 2021)."""

    __pydantic_config__ = STRICT
    type: Literal["dino"] = "dino"
    base: str | None = None  # continue from this DINOv2 or DINOv3 (folder or Hub name); None: a new Dinov2Model
    hidden_size: Positive = 128  # of a new encoder, as the next four
    num_hidden_layers: Positive = 6
    num_attention_heads: Positive = 4
    mlp_ratio: Positive = 4
    patch_size: Positive = 8  # pixels
    # pixels; None: data.resolution, which the finished encoder sees. Smaller crops train faster, and a test at a
    # larger size makes up for crops being magnified (Touvron et al. 2019)
    global_crop_size: Positive | None = None
    global_crop_scale: tuple[Fraction, Fraction] = (0.4, 1.0)  # share of the image's area
    local_crop_scale: tuple[Fraction, Fraction] = (0.05, 0.4)
    local_crop_size: Positive = 32  # pixels
    local_crops: Count = 6  # beside the two global ones
    vertical_flip: Fraction = 0.0  # probability; data.horizontal_flip mirrors half of the crops
    rotation: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0  # degrees, to either side; 0: crops stay upright
    # weak by default: colour carries stain and skin. Brightness and contrast change by 0.8, saturation by 0.4 and hue
    # by 0.2 of it at most, on 80 % of the crops
    color_jitter: NonNegative = 0.25
    grayscale: Fraction = 0.0  # probability
    blur: Fraction = 0.1  # probability, standard deviation 0.1-1 pixel
    head_hidden_size: Positive = 512
    bottleneck_size: Positive = 128
    prototypes: Positive = 2048  # outputs of the head
    last_layer_frozen_steps: Count = 0  # first steps in which the prototypes stay as they are
    teacher_momentum: Fraction = 0.99  # at the start; rises to 1 over the run, by a cosine
    teacher_temperature: PositiveFloat = 0.04
    warmup_teacher_temperature: PositiveFloat = 0.04  # of the first step; linear to teacher_temperature
    temperature_warmup_steps: Count = 0
    student_temperature: PositiveFloat = 0.1
    # how the teacher is kept from one answer for all: subtract the mean of its outputs, or share the prototypes out
    # evenly among the images of a batch (Sinkhorn-Knopp, as in DINOv2), which a few obvious kinds of image need
    centering: Literal["mean", "sinkhorn"] = "mean"
    center_momentum: Fraction = 0.9  # of centering: mean
    koleo_weight: NonNegative = 0.0  # spreads the global tokens of a batch (Sablayrolles et al. 2019, as in DINOv2)
    class_column: str | None = "finding"  # of validation and training rows, for the k-NN accuracy only
    neighbours: Positive = 20
    bank_images: Positive = 5000  # labelled training images among which neighbours are sought, at most

    def __post_init__(self) -> None:
        if self.base is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"task.hidden_size={self.hidden_size} does not divide into "
                f"task.num_attention_heads={self.num_attention_heads}"
            )
        for name in ("global_crop_scale", "local_crop_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"task.{name}={low:g}, {high:g} is not smallest and largest share of the area")
