"""From a question to an answer: token ids, text, settings, the terminal."""
