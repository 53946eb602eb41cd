"""Run many checks: the file of jobs, the workers, and the totals."""
