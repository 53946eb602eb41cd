"""The weights of a Gemma 2: their names and shapes (`parameters`), and reading them from disk (`checkpoint`)."""

from refgemma.weights.checkpoint import Checkpoint, CheckpointError, Stored, StoredRows, open_checkpoint
from refgemma.weights.parameters import LayerWeights, Rows, Weights, layer_tensors, tensor_shapes

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LayerWeights",
    "Rows",
    "Stored",
    "StoredRows",
    "Weights",
    "layer_tensors",
    "open_checkpoint",
    "tensor_shapes",
]
