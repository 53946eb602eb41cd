"""Name the axes and the common shapes of arrays; every axis is a word. Checked by beartype under pytest.

======================  ==================================================================================
axis                    length
======================  ==================================================================================
``batch``               sequences computed together
``seq``                 tokens of this call (the queries)
``past``                tokens of earlier calls that a layer keeps
``total``               all tokens so far, including padding
``keys``                tokens that a query may see: those of the cache, then those of this call
``hidden``              ``config.hidden_size``, the residual stream
``heads``               ``config.num_attention_heads``
``kv_heads``            ``config.num_key_value_heads``; each serves ``heads // kv_heads`` query heads
``head_dim``            ``config.head_dim``; ``heads * head_dim`` need not be ``hidden``
``intermediate``        ``config.intermediate_size``, inside the feed-forward layer
``vocab``               ``config.vocab_size``
======================  ==================================================================================

``Float[np.ndarray, "batch seq hidden"]`` means an array of floating-point numbers with these three axes. An axis has
the same length everywhere in a call. ``"*batch hidden"`` has any number of axes before the last. The space in ``"
hidden"`` only marks an array with one axis. `jaxtyping` defines these annotations.

The *residual stream* is one vector of ``hidden`` numbers per token; each layer reads it and adds to it. *Logits* are
the scores of all tokens of the vocabulary for the next token; their softmax gives the probabilities.

Weights are stored as ``(out, in)``, as in the checkpoint: `linear` computes ``x @ weight.T``.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

TokenIds = Int[np.ndarray, "batch seq"]
Positions = Int[np.ndarray, "batch seq"]
Hidden = Float[np.ndarray, "batch seq hidden"]
Heads = Float[np.ndarray, "batch heads seq head_dim"]
KVHeads = Float[np.ndarray, "batch kv_heads seq head_dim"]
Past = Float[np.ndarray, "batch kv_heads past head_dim"]
RotaryTable = Float[np.ndarray, "batch 1 seq head_dim"]
Scores = Float[np.ndarray, "batch heads seq keys"]
Mask = Bool[np.ndarray, "batch #heads seq keys"]
Bias = Float[np.ndarray, "batch #heads seq keys"]
Merged = Float[np.ndarray, "batch seq heads*head_dim"]
Intermediate = Float[np.ndarray, "batch seq intermediate"]
Logits = Float[np.ndarray, "batch seq vocab"]
