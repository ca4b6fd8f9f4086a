"""What AITER's attention, cache writers and latent attention compute, mutate, return and silently get wrong."""
