"""Another implementation's trace judged: which tensor is wrong first, and which known bug explains it."""
