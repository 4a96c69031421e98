"""The silicon: memory, cipher, caches, page walks, cores, the security processor."""
