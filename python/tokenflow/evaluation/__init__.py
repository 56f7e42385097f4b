"""What the tokenizer's tokens are worth: reconstruction, codebook use, a linear probe and caption retrieval."""
