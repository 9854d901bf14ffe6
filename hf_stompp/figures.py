"""`Figures`: what the text of a model card states of the model, to be compared with the model itself."""

import dataclasses
import json
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Figures:
    """The figures in the text of a card; None, or nothing, where it does not state them.

    Attributes:
        weights, float_weights (`int`, *optional*): Bytes of the files, and in float32.
        bits (`str`, *optional*): Such as `W1A1`.
        parts (`str`, *optional*): The table of bits and bytes.
        config (`dict`, *optional*): The `BinarizationConfig`, but for its modules.
        checksums (`dict`): File → SHA-256.
    """

    weights: int | None
    float_weights: int | None
    bits: str | None
    parts: str | None
    config: Any
    checksums: dict[str, str]

    @classmethod
    def read(cls, text: str) -> "Figures":
        """Reads what a card of [`model_card`] states.

        Example:

            >>> Figures.read("- **Weights:** 1,024 bytes; in float32 they are 4,096, 4.0 times as many").weights
            1024
        """
        text = text.replace("\r\n", "\n")

        def find(pattern: str) -> str | None:
            match = re.search(pattern, text, re.MULTILINE)
            return match and match[1]

        weights, floats = find(r"^- \*\*Weights:\*\* ([\d,]+) bytes"), find(r"bytes; in float32 they are (\d[\d,]*\d)")
        config = find(r"^The `BinarizationConfig`:\n\n```json\n((?:.*\n)*?)```$")
        return cls(
            weights=None if weights is None else int(weights.replace(",", "")),
            float_weights=None if floats is None else int(floats.replace(",", "")),
            bits=find(r"^(?:A \*\*1-bit\*\*|The \*\*latent\*\* checkpoint of) .*?\((W\d+A\d+)[,)]"),
            parts=find(r"^## Bits per part\n\n((?:\|.*\n)*)"),
            config=None if config is None else json.loads(config),
            checksums={name: sha for sha, name in re.findall(r"^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)},
        )
