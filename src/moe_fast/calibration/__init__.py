"""What a model makes of texts: tokens, activations, routers, logits."""
