"""The demo behind `dist-agc demo`: what it trains, how it is spread over processes, what it shows."""
