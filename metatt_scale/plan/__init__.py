"""What a recipe trains and what that takes: memory, bytes on the wire, time. Without weights and without a GPU."""
