"""From text to libraries in a cache, and to folders that Python imports; knows no convolution."""
