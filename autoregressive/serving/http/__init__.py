"""Images over HTTP: an API in OpenAI's shape, two engines behind it, and a page."""
