"""Define the verdicts of tensors and of runs, with the exit codes.

``verify``, ``check``, ``diff``, ``sweep`` and the laws use these words; docs/reference/verdicts.md explains them.

A *tensor* is

========  ==============================================================================================================
verdict   when
========  ==============================================================================================================
EXACT     every element is the correctly rounded result, or the result of PyTorch's eager kernels
PASS      inside every limit
NOISY     inside the error bound, but `RMS_LIMIT` times as noisy as the declared arithmetic, as from an undeclared
          precision; or a product with quantised weights
SKEWED    inside the error bound, but with a common factor or offset
FAIL      an element is outside the error bound
BLIND     nothing can be compared: the reference is not finite, or has no meaningful element
MISSING   not recorded
INVALID   NaN or infinite although the reference is finite, or of another shape
========  ==============================================================================================================

A *run*, which is a case of ``verify`` or a job of ``sweep``, is

============  ====  ====================================================================================================
verdict       code  when
============  ====  ====================================================================================================
conforms      0     rounding explains every difference
differs       1     rounding does not explain some difference
unreadable    2     a file cannot be read
noisy         3     the same model, with more rounding than its declared arithmetic
inconclusive  4     too little was recorded for a verdict
failed        5     the implementation's own command failed
lost          5     the worker of a sweep died
============  ====  ====================================================================================================
"""

EXACT, PASS, NOISY, SKEWED, FAIL = "EXACT", "PASS", "NOISY", "SKEWED", "FAIL"
BLIND, MISSING, INVALID = "BLIND", "MISSING", "INVALID"
GOOD = (EXACT, PASS)
BAD = (SKEWED, FAIL, INVALID)
UNKNOWN = "UNKNOWN"  # shown if no known bug explains a difference

CONFORMS, DIFFERS, NOISY_ONLY, INCONCLUSIVE = "conforms", "differs", "noisy", "inconclusive"
UNREADABLE, FAILED, LOST = "unreadable", "failed", "lost"
# The most serious verdict is first; of several verdicts, the first in this order counts.
EXIT = {DIFFERS: 1, FAILED: 5, LOST: 5, UNREADABLE: 2, INCONCLUSIVE: 4, NOISY_ONLY: 3, CONFORMS: 0}
