"""The bundled demo model: its folder, its training tasks and their checker."""
