"""A model computed in fp32, layer after layer, with weights that are read as they are needed."""
