"""The adapter, its exact algebra, stacked layers that train many adapters at once, and PEFT in and out."""
