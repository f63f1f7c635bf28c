"""Many ranks: who holds which experts, and how tokens and gradients reach them."""
