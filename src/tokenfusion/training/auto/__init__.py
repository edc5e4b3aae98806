"""What is measured before training begins: what a step takes, the batch size, the learning rate."""
