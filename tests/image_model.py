"""What the small image models that tests write themselves have in common."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


class ImageModel(PreTrainedModel):
    """Has no config to speak of: its own `add_layers` makes the layers, and its own `forward` takes the pixels."""

    config_class = PreTrainedConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(PreTrainedConfig())
        self.add_layers(**arguments)
        self.post_init()

    def add_layers(self, **arguments: Any) -> None:
        raise NotImplementedError

    def get_input_embeddings(self) -> None:
        return None
