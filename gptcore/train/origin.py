"""A model that is there already: what a training begins with, or learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore import artifact, weights
from gptcore.artifact import Artifact
from gptcore.catalogue import Catalogue
from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.spec import ModelSpec
from gptcore.weights import Checkpoint

if TYPE_CHECKING:
    from gptcore.model import GPT


@dataclass(frozen=True, slots=True)
class Origin:
    """Weights in floating point, of a checkpoint or of a finished variant."""

    name: str
    spec: ModelSpec
    id: str
    """Of the weights; another one is another training."""
    directory: Path
    """Has the tokenizer's files."""
    source: Artifact | Checkpoint

    def model(self, device: str) -> GPT:
        """Return the model on ``device``, in fp32, with memory of its own.

        Raises:
            InvalidWeights: the files are not what they were, or damaged.
        """
        from torch import nn

        placement = Placement(device=device, precision="fp32")
        if isinstance(self.source, Artifact):
            model = artifact.load(self.source, weights.silent).float().to(device)
        else:
            model = weights.build(self.source, placement)
        for module in model.modules():
            for name, one in list(module.named_parameters(recurse=False)):
                # Loaded weights are mapped from their file, which must not be written.
                fresh = nn.Parameter(one.detach().clone(), requires_grad=False)
                setattr(module, name, fresh)
        if self.spec.tied_head:
            model.head.weight = model.embedding.weight
        return model


def origin(catalogue: Catalogue, name: str) -> Origin:
    """Return the model of a name or path.

    Raises:
        UnknownModel, InvalidWeights, InvalidSpec: it cannot be used.
        InvalidInput: its weights are packed numbers.
    """
    made = catalogue.artifact(name)
    if made is None:
        found = catalogue.checkpoint(name)
        return Origin(name, found.spec, found.weights_id, found.directory, found)
    if packed := _packed(made):
        raise InvalidInput(
            f"{name} has packed numbers in {len(packed)} layers ({min(packed)} is one), and those "
            f"cannot be trained: take {made.variant.model}, or a variant of other passes."
        )
    return Origin(name, made.spec, made.weights_sha256, made.directory, made)


def _packed(made: Artifact) -> Mapping[str, object]:
    config = weights.huggingface.read_config(made.directory)
    packed: Mapping[str, object] = config.get("quantization_config", {}).get("modules", {})
    return packed
