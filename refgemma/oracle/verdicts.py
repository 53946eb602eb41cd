"""The words of all verdicts, and the exit codes that go with them: of a tensor, and of a run.

``verify``, ``check``, ``diff``, ``sweep`` and the laws use these words; docs/reference/verdicts.md explains them.

A *tensor* is

========  ==============================================================================================================
verdict   when
========  ==============================================================================================================
EXACT     every element is the correctly rounded result, or what PyTorch's eager kernels make of the inputs
PASS      inside every limit
NOISY     inside the error bound, but `RMS_LIMIT` times as noisy as the declared arithmetic: some undeclared precision;
          or a product with weights that are quantised
SKEWED    inside the error bound, but all elements lean one way, as a wrong factor or offset makes them
FAIL      an element is outside the error bound
BLIND     nothing can be compared: the reference is not finite, or no element of it means anything
MISSING   not recorded
INVALID   not a number or infinite where the reference is finite, or of another shape
========  ==============================================================================================================

and a *run*, a case of ``verify`` or a job of ``sweep``

============  ====  ====================================================================================================
verdict       code  when
============  ====  ====================================================================================================
conforms      0     rounding explains every difference
differs       1     it does not
unreadable    2     a file cannot be read
noisy         3     the same model, with more rounding than its declared arithmetic
inconclusive  4     too little was recorded to say
failed        5     the command of the implementation failed
lost          5     the worker of a sweep died
============  ====  ====================================================================================================
"""

EXACT, PASS, NOISY, SKEWED, FAIL = "EXACT", "PASS", "NOISY", "SKEWED", "FAIL"
BLIND, MISSING, INVALID = "BLIND", "MISSING", "INVALID"
GOOD = (EXACT, PASS)
BAD = (SKEWED, FAIL, INVALID)
UNKNOWN = "UNKNOWN"  # in place of the name of a known bug, where none explains a difference

CONFORMS, DIFFERS, NOISY_ONLY, INCONCLUSIVE = "conforms", "differs", "noisy", "inconclusive"
UNREADABLE, FAILED, LOST = "unreadable", "failed", "lost"
# The most serious first: of many verdicts the first counts.
EXIT = {DIFFERS: 1, FAILED: 5, LOST: 5, UNREADABLE: 2, INCONCLUSIVE: 4, NOISY_ONLY: 3, CONFORMS: 0}
