"""Many checks: a file of jobs, the workers that do them, and their sum."""
