"""The parts of the inference engine: requests, sampling, rows of the cache, scores, model folders.

`simple_inference_engine` puts them together; nothing here knows of it.
"""
