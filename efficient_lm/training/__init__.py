"""What trains a model: learner, losses, optimizers, the one train step."""
