"""`calibrate`: activation scales and shifts from real inputs."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from hf_stompp.layers import BinaryConv2d, BinaryLayer, LatentInput
from hf_stompp.patching import binary_layers
from hf_stompp.sharding import is_sharded, local, shard_as
from hf_stompp.tracing import norms_after


def calibrate(model: nn.Module, batch: Mapping[str, Any], units: Collection[int] | None = None) -> None:
    r"""Sets the activation scales (and shifts) of a binarized model from one batch of its real input.

    Each layer is set just before it runs, so it sees what its upstream layers really give under the present masks.
    Signed: \\(β_k = \operatorname{mean}(x_k)\\) if the shift is learned, and \\(γ = \operatorname{mean}|x - β|\\), the
    least-squares scale. What the shift takes from the layer's output, \\(β \hat w^\top\\), goes into the bias, or out
    of the running mean of the batch norm that follows; a layer with neither keeps its shift, as what
    attention multiplies does. Around an image, padding stands for the mean from then on.
    Unsigned: \\(γ = \operatorname{mean}(x \mid x \ge γ/2)\\), by fixed-point iteration, the least-squares level.

    Padding, by the batch's `attention_mask`, does not count. Batch norms take the statistics of the batch, as they do
    in training, and keep their own. A layer that is executed several times, as ALBERT's are,
    keeps what it saw last. [`StomppCallback`] calls it at the start of the training of a model that has not been
    calibrated, and for each unit when its window begins: what the unit is given then comes out of binary layers, and
    is no longer what it was. Call it yourself in a training loop of your own, or for a training set that is a stream.

    Args:
        model (`Module`): A binarized `PreTrainedModel`, or a `SentenceTransformer` of one.
        batch (`Mapping`): Keyword arguments of its `forward`, on its device: of a `SentenceTransformer`
            `{"input": model.preprocess(texts)}`.
        units (`Collection[int]`, *optional*): Set the layers of these units alone; by default of all.

    Raises:
        ValueError: The model is not binarized; or it has batch norms, and the batch is a single image that they see
            one pixel of, or FSDP has sharded it.
    """
    Calibration(model)(batch, units)


class Calibration:
    """[`calibrate`], any number of times on one model, which is traced once: that takes longer than a step.

    Args:
        model (`Module`): A binarized model, or one around it, whose structure stays as it is.

    Raises:
        ValueError: As of [`calibrate`].
    """

    def __init__(self, model: nn.Module) -> None:
        if not binary_layers(model):
            raise ValueError(
                f"calibrate takes a binarized model, but this {type(model).__name__} is not; binarize it first."
            )
        has_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
        if has_norms and any(_sharded(layer) for layer in binary_layers(model).values()):
            raise ValueError(
                "calibrate has to know which batch norm follows each layer, and does not find it in a model that FSDP "
                "has sharded: use DDP, which such models are small enough for."
            )
        self._model = model
        self._norms = norms_after(model) if has_norms and isinstance(model, PreTrainedModel) else {}

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], units: Collection[int] | None = None) -> None:
        """As [`calibrate`]."""
        inputs = batch.get("input")  # a SentenceTransformer takes all in one
        mask = (inputs if isinstance(inputs, Mapping) else batch).get("attention_mask")
        model = self._model

        def hook(name: str, layer: LatentInput, args: tuple[Tensor, ...]) -> None:
            x = layer.features_last(args[0].detach().float())
            if mask is not None and x.dim() > mask.dim() and x.shape[: mask.dim()] == mask.shape:
                x = x[mask.bool()]
            norm: Any = model.get_submodule(self._norms[name]) if name in self._norms else None
            with _kept(layer, sharded.get(name, {})):
                _calibrate_layer(layer, x.reshape(-1, layer.input_features), norm)

        layers = {
            name: layer
            for name, layer in binary_layers(model).items()
            if isinstance(layer, LatentInput)
            and layer.activation_scale is not None
            and (units is None or layer.unit in units)
        }
        if not layers:  # a unit of tables
            return
        sharded = {name: _sharded(layer) for name, layer in layers.items()}
        handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in layers.items()]
        try:
            with _calibrating(model):
                model(**batch)
        finally:
            for handle in handles:
                handle.remove()


def _sharded(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters of which FSDP gives the layer a whole copy in forward, and takes no changes of it back."""
    return {name: each for name, each in layer.named_parameters(recurse=False) if is_sharded(each)}


@contextmanager
def _kept(layer: LatentInput, sharded: Mapping[str, Tensor]) -> Iterator[None]:
    """What is added to copies of sharded parameters within is added to the shards."""
    changing = [name for name in sharded if name != "weight"]
    before = {name: layer.get_parameter(name).detach().clone() for name in changing}
    yield
    for name, value in before.items():
        change = layer.get_parameter(name).detach().float() - value.float()
        local(sharded[name]).add_(shard_as(change, sharded[name]))


@contextmanager
def _calibrating(model: nn.Module) -> Iterator[None]:
    """Nothing is random, and batch norms take the statistics of their batch and leave their running ones alone, but
    for those that are held in evaluation mode while the model is trained. What they say of a batch that has no
    statistics is said of the batch."""
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in modes if isinstance(module, _BatchNorm) and module.track_running_stats]
    norms = [norm for norm in norms if norm.training or not model.training]
    try:
        model.eval()
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"calibrate takes the statistics of the batch, and batch norms cannot of this one ({error}): give it "
            "more images, or larger ones."
        ) from error
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for module, mode in modes.items():
            module.training = mode


def _calibrate_layer(layer: LatentInput, x: Tensor, norm: _BatchNorm | None) -> None:
    """From its inputs `[tokens or pixels, features]`; `norm` is the batch norm that follows the layer."""
    scale = layer.activation_scale
    assert scale is not None
    if layer.unsigned:
        level = 2 * x.clamp(min=0).mean()
        for _ in range(20):
            above = x[x >= level / 2]
            if above.numel() == 0:
                break
            level = above.mean()
    else:
        if layer.activation_shift is not None:
            if isinstance(layer, BinaryLayer) and (layer.bias is not None or norm is not None):
                _move_shift(layer, x.mean(dim=0), norm)
            x = x - layer.activation_shift
        level = x.abs().mean()
    scale.fill_(level.item() or 1.0)
    layer.calibrated.fill_(True)


def _move_shift(layer: BinaryLayer, shift: Tensor, norm: _BatchNorm | None) -> None:
    """Sets the shift, and gives what it takes from the outputs back to them."""
    assert layer.activation_shift is not None
    moved, weight = shift - layer.activation_shift, layer.effective_weight().float()
    if isinstance(layer, BinaryConv2d):  # all pixels of the window alike; the channels of the group of each output
        weight = weight.sum(dim=(2, 3))
        moved = moved.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1).flatten(0, 1)
    taken = (weight * moved).sum(dim=1)
    if layer.bias is not None:
        layer.bias.add_(taken)
    elif norm is not None and norm.running_mean is not None:
        norm.running_mean.sub_(taken)
    layer.activation_shift.copy_(shift)
