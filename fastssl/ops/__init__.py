"""The differentiable primitives, and which backend runs them."""
