"""Methods that train some of the tensors, or entries, that the backbone has."""
