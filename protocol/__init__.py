"""What is said on the wire, and who says it: messages, frames, errors, identity. Tensors are bytes here."""
