"""Files of requests, in the format of OpenAI's Batch API, to files of answers."""
