"""Families of image classifiers. Their widths are found by following channels (`sites.tracing`): no names needed."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ImageFamily:
    """A class of image classifiers that can be saved and loaded at any widths."""

    name: str
    """What transformers calls the model type."""
    model_class: str
    module: str
    """Where the class is."""
    encoder: str | None
    """Module whose parameters count as the encoder's; None if it is no part of its own."""
    side: int
    """Height and width, in pixels, of an image that all stages can be seen by."""

    @property
    def config_class(self) -> str:
        """The class of its configuration."""
        return self.model_class.replace("ForImageClassification", "Config")

    def image_shape(self, config: Any) -> tuple[int, int, int]:
        """Channels, height and width of such an image."""
        return config.num_channels, self.side, self.side


RESNET = ImageFamily(
    name="resnet",
    model_class="ResNetForImageClassification",
    module="transformers",
    encoder="resnet.encoder",
    side=64,
)
CIFAR_RESNET = ImageFamily(
    name="cifar_resnet",
    model_class="CifarResNetForImageClassification",
    module="rmtkd.modeling_cifar_resnet",
    encoder=None,
    side=32,
)
IMAGE_FAMILIES = (RESNET, CIFAR_RESNET)
