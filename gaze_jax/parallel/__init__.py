"""Device meshes, and how every array is sharded over them."""
