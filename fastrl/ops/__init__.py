"""The vocabulary operations: dispatch and autograd."""
