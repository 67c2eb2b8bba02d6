"""Methods that write a weight's change as a product of small matrices."""
