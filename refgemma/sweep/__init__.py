"""Run many checks: read the file of jobs, run the workers, and add up the results."""
