"""The DMA API of the reference kernel: direct mapping, bounce buffers, pools."""
