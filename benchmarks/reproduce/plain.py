"""`PlainForImageClassification`: a chain of layers without shortcuts, for studies of depth.

In a ResNet the gradient has a way around each binarized layer: the shortcuts, which stay in full precision. Here there
is none. The classes are registered with the Auto classes of transformers, so that `--model_type plain` is a model like
any other for the recipes.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

ACTIVATIONS = {"relu": nn.ReLU, "hardtanh": nn.Hardtanh}


class PlainConfig(PreTrainedConfig):
    """Depth, width and activation of a [`PlainForImageClassification`], and the images that it takes."""

    model_type = "plain"

    def __init__(
        self,
        depth: int = 8,
        hidden_size: int = 64,
        hidden_act: str = "relu",
        image_size: int = 8,
        num_channels: int = 3,
        **kwargs: Any,
    ) -> None:
        self.depth, self.hidden_size, self.hidden_act = depth, hidden_size, hidden_act
        self.image_size, self.num_channels = image_size, num_channels
        super().__init__(**kwargs)


class PlainPreTrainedModel(PreTrainedModel):
    """What the two share."""

    config_class = PlainConfig
    base_model_prefix = "plain"
    main_input_name = "pixel_values"


class Block(nn.Module):
    """A linear layer, a batch norm, and the activation that comes before the next layer."""

    def __init__(self, inputs: int, config: PlainConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, config.hidden_size, bias=False)
        self.norm = nn.BatchNorm1d(config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.norm(self.linear(hidden)))


class PlainModel(PlainPreTrainedModel):
    """A stem, which takes pixels and stays in full precision, and `depth` layers that are binarized."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.stem = Block(config.num_channels * config.image_size**2, config)
        self.layers = nn.ModuleList(Block(config.hidden_size, config) for _ in range(config.depth))
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        hidden = self.stem(pixel_values.flatten(1))
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutput(last_hidden_state=hidden)


class PlainForImageClassification(PlainPreTrainedModel):
    """A [`PlainModel`] and a linear head."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.plain = PlainModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        logits = self.classifier(self.plain(pixel_values).last_hidden_state)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register("plain", PlainConfig, exist_ok=True)
AutoModelForImageClassification.register(PlainConfig, PlainForImageClassification, exist_ok=True)
