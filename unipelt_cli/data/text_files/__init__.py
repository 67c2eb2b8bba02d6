"""Text files and pipes: from bytes to lines, what they are, and the records that they hold."""
