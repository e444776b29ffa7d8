"""Drop-in optimizers: gradients come from an ordinary `loss.backward()`, only the weight update is replaced."""
