"""Name the weights of a Gemma 2 (`parameters`), read them from disk (`checkpoint`) and write them (`save`)."""

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
