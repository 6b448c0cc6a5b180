"""What things cost, measured side by side: `metatt-scale benchmark RECIPE --table NAME`."""
