"""The residual networks for 32 × 32 images of He et al., of any widths: a model of transformers in one file.

This file travels with every such model. Beside it, `AutoModelForImageClassification.from_pretrained(FOLDER,
trust_remote_code=True)` loads the model with torch and transformers alone; where rmtkd is installed, `import rmtkd`
does instead of the flag.

Where a stage is wider than the one before, the published network fills channels up with zeros. That is a 1 × 1
convolution of zeros and ones, and is one here, so that both sides of it may be narrowed.

Reference:
    He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385, §4.2 (option A).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from .modeling_rmtkd import low_rank_pairs, set_low_rank_pairs

BatchNorm = nn.BatchNorm2d


class CifarResNetConfig(PretrainedConfig):
    """Widths of a network.

    Args:
        hidden_sizes: channels of the residual stream, by stage; the first stage has the stem's.
        inner_sizes: channels within each block, by stage; one list a stage, of as many entries as it has blocks.
        num_channels: of an image.
        low_rank: rank and side of every convolution that is two, by its path, see `LowRankPair`.
    """

    model_type = "cifar_resnet"

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (16, 32, 64),
        inner_sizes: Sequence[Sequence[int]] = ((16,) * 3, (32,) * 3, (64,) * 3),
        num_channels: int = 3,
        low_rank: Mapping[str, Sequence[Any]] | None = None,
        **options: Any,
    ):
        self.hidden_sizes = list(hidden_sizes)
        self.inner_sizes = [list(sizes) for sizes in inner_sizes]
        self.num_channels = num_channels
        self.low_rank = {path: list(pair) for path, pair in (low_rank or {}).items()}
        super().__init__(**options)


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, inner: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, inner, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm(inner)
        self.conv2 = nn.Conv2d(inner, after, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From `rows × channels × height × width` to the same, or half as high and wide."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class CifarResNetForImageClassification(PreTrainedModel):
    """A stem, stages of blocks, the mean over positions, and a linear head."""

    config_class = CifarResNetConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        sizes = config.hidden_sizes
        self.conv1 = nn.Conv2d(config.num_channels, sizes[0], 3, 1, 1, bias=False)
        self.bn1 = BatchNorm(sizes[0])
        for stage, (inner_sizes, after) in enumerate(zip(config.inner_sizes, sizes, strict=True)):
            blocks = []
            for i, inner in enumerate(inner_sizes):
                begins = stage > 0 and i == 0
                blocks.append(Block(sizes[stage - 1] if begins else after, inner, after, 2 if begins else 1))
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(sizes[-1], int(config.num_labels or 0))
        set_low_rank_pairs(self, config.low_rank)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        own = list(module.parameters(recurse=False))
        if own and all(getattr(parameter, "_is_hf_initialized", False) for parameter in own):
            return  # they were loaded: some versions of transformers ask nevertheless
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride != (1, 1):
            fill_up(module)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, BatchNorm):
            module.reset_parameters()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutputWithNoAttention:
        """Class scores of images, normalised as `preprocessor_config.json` says, of shape `rows × 3 × 32 × 32`."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        for stage in range(len(self.config.hidden_sizes)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits = self.linear(x.mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)  # type: ignore[arg-type]


def fill_up(shortcut: nn.Conv2d) -> None:
    """Give a shortcut the published values, in place: as many zeros before the channels as after them."""
    after, before = shortcut.weight.shape[:2]
    channels = torch.arange(min(before, after))
    with torch.no_grad():
        shortcut.weight.zero_()
        shortcut.weight[channels + (after - len(channels)) // 2, channels] = 1


def config_of(model: CifarResNetForImageClassification) -> CifarResNetConfig:
    """The configuration that says the model's widths."""
    stages: Any = [model.get_submodule(f"layer{i + 1}") for i in range(len(model.config.hidden_sizes))]
    values = model.config.to_dict()
    values["hidden_sizes"] = [stage[0].bn2.num_features for stage in stages]
    values["inner_sizes"] = [[block.bn1.num_features for block in stage] for stage in stages]
    values["low_rank"] = low_rank_pairs(model)
    return CifarResNetConfig.from_dict(values)


CifarResNetConfig.register_for_auto_class()
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
