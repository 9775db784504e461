"""The kernels of microVMs: where they come from, and the initramfs that makes a guest of them."""
