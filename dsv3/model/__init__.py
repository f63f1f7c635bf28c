"""The report's section 2: latent attention, routing, experts, multi-token prediction, on one device."""
