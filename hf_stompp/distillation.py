"""`DistillationTrainer`: a student learns from the logits and hidden states of a full-precision teacher."""

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, mse_loss, softmax
from transformers import AutoModelForSequenceClassification, Trainer

CACHED = "teacher_logits"
"""The column of a training set that has what the teacher says of its rows: see [`with_teacher_logits`]."""


class DistillationTrainer(Trainer):
    r"""A `Trainer` whose loss is how far the model is from a teacher.

    $$L = w_z\,T^2\,\operatorname{KL}\big(\operatorname{softmax}(z_t / T) \,\|\, \operatorname{softmax}(z_s / T)\big)
    + w_h\,\operatorname{mean}_l \operatorname{MSE}(h^l_s, h^l_t) + w_y\,L_{task}$$

    over the logits z, and the hidden states h of all layers and of the embeddings, of tokens that are not padding. Of
    a regression (one logit) the first term is the mean squared error. All else is the Trainer's: evaluation reports
    the loss of the task, and [`StomppCallback`] works as ever. The teacher is no part of the model: it is not saved,
    not wrapped, and always in evaluation mode.

    A training set with the column `teacher_logits` spares the teacher's forward, if no hidden states are asked for.

    Args:
        *args, **kwargs: Those of `Trainer`.
        teacher (`PreTrainedModel`, `PeftModel` or `str`): Fine-tuned for the task, or its folder or Hub id; of the
            student's vocabulary, labels and `id2label`, and, for hidden states, of its width.
        temperature (`float`, *optional*, defaults to 1.0): T.
        logits_weight (`float`, *optional*, defaults to 1.0): \\(w_z\\).
        hidden_weight (`float`, *optional*, defaults to 0.0): \\(w_h\\). With another number of layers, the states that
            are as far through the teacher are compared.
        labels_weight (`float`, *optional*, defaults to 0.0): \\(w_y\\); with 0 the labels are not looked at.

    Raises:
        ValueError: A weight is negative, or all are 0; the temperature is not positive; the teacher has other labels,
            another vocabulary, or, with `hidden_weight`, another width.

    Example:

        >>> callbacks = [StomppCallback()]  # doctest: +SKIP
        >>> trainer = DistillationTrainer(model, args, callbacks=callbacks, teacher="bert-sst2")  # doctest: +SKIP

    Source: Hinton et al., 2015 (logits); Jiao et al., TinyBERT, 2020 (hidden states).
    """

    not_for_the_model = (CACHED,)
    """Columns that `compute_loss` takes out of a batch."""

    def __init__(
        self,
        *args: Any,
        teacher: Any,
        temperature: float = 1.0,
        logits_weight: float = 1.0,
        hidden_weight: float = 0.0,
        labels_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        weights = {"logits_weight": logits_weight, "hidden_weight": hidden_weight, "labels_weight": labels_weight}
        for name, value in weights.items():
            if value < 0 or not any(weights.values()):
                raise ValueError(
                    f"{name}: received {value}; allowed: 0 or more, and one of {', '.join(weights)} above 0."
                )
        if temperature <= 0:
            raise ValueError(f"temperature: received {temperature}; allowed: above 0.")
        teacher = loaded_teacher(teacher)
        if teacher is self.model:
            raise ValueError("teacher: received the model itself, which would learn nothing. Load the teacher apart.")
        _check_teacher(teacher, self.model, hidden_weight > 0)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.temperature, self.weights = temperature, weights
        # A mean over the batch, as that of classification heads: see `recipe_utils.scale_losses`.
        self.model_accepts_loss_kwargs = False

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if CACHED not in self._signature_columns:
            self._signature_columns.append(CACHED)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """As of `Trainer`; in training, the loss above."""
        inputs = dict(inputs)
        cached = inputs.pop(CACHED, None)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        hidden = self.weights["hidden_weight"] > 0
        student = model(**inputs, output_hidden_states=hidden)
        loss = self.weights["labels_weight"] * student.loss if self.weights["labels_weight"] else 0.0
        needed = hidden or cached is None
        taught = self._ask(inputs, hidden) if needed else None
        if self.weights["logits_weight"]:
            logits = cached if taught is None else taught.logits
            loss = loss + self.weights["logits_weight"] * logits_loss(student.logits, logits, self.temperature)
        if hidden and taught is not None:
            mask = inputs.get("attention_mask")
            states = hidden_loss(student.hidden_states, taught.hidden_states, mask)
            loss = loss + self.weights["hidden_weight"] * states
        return (loss, student) if return_outputs else loss

    @torch.no_grad()
    def _ask(self, inputs: Mapping[str, Any], hidden: bool) -> Any:
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        return self.teacher(**asked, output_hidden_states=hidden)


def loaded_teacher(teacher: Any, **options: Any) -> Any:
    """The model, or what its folder or Hub id stands for; `options` are those of `from_pretrained`.

    Raises:
        TypeError: It is neither.
        OSError: There is none.
    """
    if isinstance(teacher, nn.Module):
        return teacher
    if not isinstance(teacher, (str, os.PathLike)):
        raise TypeError(f"teacher: received {type(teacher).__name__}; allowed: a model, its folder or its Hub id.")
    try:
        return AutoModelForSequenceClassification.from_pretrained(teacher, **options)
    except OSError as error:
        missing = "" if os.path.exists(teacher) else "there is no such folder, and "
        raise OSError(f"teacher: received {str(teacher)!r}; {missing}it could not be loaded: {error}") from error


def with_teacher_logits(
    dataset: Any, teacher: Any, collate: Callable[[list[Any]], Mapping[str, Tensor]], batch_size: int = 64
) -> Any:
    """The data with a column of what a teacher says of them, for [`DistillationTrainer`]; kept on disk by `datasets`,
    and found there again for the same data and the same teacher.

    Args:
        dataset (`datasets.Dataset`): Tokenized.
        teacher (`PreTrainedModel` or `str`): On the device to compute on; or its folder or Hub id.
        collate (`Callable`): Makes a batch of rows, as `DataCollatorWithPadding(tokenizer)`.
        batch_size (`int`, *optional*, defaults to 64): Rows at a time.

    Example:

        >>> dataset = with_teacher_logits(dataset, teacher, DataCollatorWithPadding(tokenizer))  # doctest: +SKIP
    """
    if not hasattr(dataset, "_fingerprint"):
        raise TypeError(f"dataset: received a {type(dataset).__name__}; allowed: a datasets.Dataset.")
    teacher = loaded_teacher(teacher)
    known = ("input_ids", "attention_mask", "token_type_ids")
    digest = hashlib.sha256(str(dataset._fingerprint).encode())
    for tensor in teacher.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

    @torch.no_grad()
    def ask(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        columns = {name: rows[name] for name in known if name in rows}
        batch = collate([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
        logits = teacher.eval()(**{name: tensor.to(teacher.device) for name, tensor in batch.items()}).logits
        return {CACHED: logits.float().cpu().tolist()}

    fingerprint = digest.hexdigest()[:32]
    return dataset.map(
        ask, batched=True, batch_size=batch_size, new_fingerprint=fingerprint, desc="Asking the teacher"
    )


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""\\(T^2 \operatorname{KL}(\operatorname{softmax}(z_t / T) \,\|\, \operatorname{softmax}(z_s / T))\\), the mean
    over a batch of logits `[B, C]`; of one logit, which is a regression's, the mean squared error."""
    teacher = teacher.to(student.dtype).view_as(student)
    if student.shape[-1] == 1:
        return mse_loss(student, teacher)
    said, meant = log_softmax(student / temperature, -1), softmax(teacher / temperature, -1)
    return temperature**2 * kl_div(said, meant, reduction="batchmean")


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """The mean, over the hidden states `[B, S, d]` of a student, of the squared distance to those of a teacher that
    are as far through it; of the tokens that `mask`, `[B, S]`, has."""
    last, deeper = len(student) - 1, len(teacher) - 1
    losses = []
    for place, state in enumerate(student):
        target = teacher[round(place * deeper / last)].to(state.dtype)
        if mask is not None and mask.shape == state.shape[:-1]:
            state, target = state[mask.bool()], target[mask.bool()]
        losses.append(mse_loss(state, target))
    return torch.stack(losses).mean()


def _check_teacher(teacher: Any, student: Any, hidden: bool) -> None:
    ours, theirs = student.config, teacher.config
    names = ["num_labels", "vocab_size", *(["hidden_size"] if hidden else [])]
    for name in names:
        here, there = getattr(ours, name, None), getattr(theirs, name, None)
        if here != there:
            raise ValueError(
                f"teacher: its {name} is {there}, and the model's is {here}. Fine-tune a teacher from a model of the "
                "same kind, on the same task" + (", or set hidden_weight=0." if name == "hidden_size" else ".")
            )
    if theirs.id2label != ours.id2label:
        raise ValueError(
            f"teacher: its labels are {theirs.id2label}, and the model's are {ours.id2label}: it would teach others. "
            "Give both the same id2label."
        )
