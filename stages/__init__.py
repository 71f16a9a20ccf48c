"""What a step is: ordinary functions and classes over Arrow tables and tensors. Knows neither Ray nor the pipeline."""
