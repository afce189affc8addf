"""The networks: two-stage gated generator, SN-PatchGAN discriminator, their losses."""
