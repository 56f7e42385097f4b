"""Training by the clock: the stage that both trainings share, and the tokenizer's training."""
